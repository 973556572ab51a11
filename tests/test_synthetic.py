"""Laws of the synthetic set: the seed and the name decide every pixel, and the grade can be read off."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalefl.contracts import SPLITS, DataSplits, Example, InputError
from scalefl.data.synthetic import SCANNERS, load

Run = Callable[..., Any]


def all_examples(data: DataSplits) -> list[Example]:
    return [example for split in SPLITS for example in data.splits[split]]


def pixels(data: DataSplits, example: Example) -> np.ndarray:
    return np.asarray(data.read_image(example))


def test_every_patient_has_two_knees_of_neighbouring_grades_in_one_split(knee_run: Run) -> None:
    run = knee_run(num_patients=101)
    data = load(run)
    knees: dict[str, list[Example]] = {}
    for example in all_examples(data):
        knees.setdefault(example.patient, []).append(example)
    assert len(knees) == 101
    for patient, (left, right) in knees.items():
        assert (left.image_key, right.image_key) == (f"{patient}L", f"{patient}R")
        assert left.site == right.site
        assert left.label is not None and right.label is not None
        assert abs(left.label - right.label) <= 1
        assert left.answer == run.answers[left.label]
    split_patients = [{e.patient for e in data.splits[split]} for split in SPLITS]
    assert [len(own) for own in split_patients] == [71, 15, 15]
    assert len(set.union(*split_patients)) == 101


def test_grades_and_sites_are_balanced(knee_run: Run) -> None:
    examples = all_examples(load(knee_run(num_patients=200)))
    # One knee of each patient is balanced (40 per grade); the other moves by one with probability 0.4.
    assert all(50 <= count <= 110 for count in Counter(e.label for e in examples).values())
    assert Counter(e.site for e in examples) == dict.fromkeys(SCANNERS, 100)


def test_pixels_depend_on_seed_and_name_only(knee_run: Run) -> None:
    data, again = load(knee_run()), load(knee_run())
    examples = all_examples(data)[:6]
    backwards = {e.image_key: pixels(again, e) for e in reversed(examples)}
    for example in examples:
        np.testing.assert_array_equal(pixels(data, example), backwards[example.image_key])
    other_seed = load(knee_run(seed=1))
    assert not np.array_equal(pixels(data, examples[0]), pixels(other_seed, examples[0]))
    assert not np.array_equal(pixels(data, examples[0]), pixels(data, examples[1]))


def test_more_patients_do_not_change_the_knees_of_the_first_ones(knee_run: Run) -> None:
    few, many = load(knee_run(num_patients=20)), load(knee_run(num_patients=40))
    by_key = {example.image_key: example for example in all_examples(many)}
    assert all(by_key[example.image_key] == example for example in all_examples(few))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), index=st.integers(0, 19))
def test_every_image_is_8_bit_grey_with_bone_brighter_than_air(knee_run: Run, seed: int, index: int) -> None:
    data = load(knee_run(num_patients=10, seed=seed))
    image = data.read_image(all_examples(data)[index])
    assert (image.mode, image.size) == ("L", (128, 128))
    shaft, air = np.asarray(image)[10:30, 54:74], np.asarray(image)[:, :2]
    assert shaft.mean() > air.mean() + 20


def test_the_joint_space_darkens_the_middle_less_as_the_grade_rises(knee_run: Run) -> None:
    """The rows about the joint, relative to the whole image, brighten with every grade."""
    data = load(knee_run(num_patients=100))
    contrast: dict[int | None, list[float]] = {}
    for example in all_examples(data):
        image = pixels(data, example).astype(float)
        contrast.setdefault(example.label, []).append(image[56:72, 30:98].mean() / image.mean())
    means = [np.mean(contrast[grade]) for grade in range(5)]
    assert means == sorted(means)


def test_a_linear_probe_reads_the_grade_far_above_chance(knee_run: Run) -> None:
    """Ridge regression on 32 x 32 pixels, trained on 2/3: chance is 0.2."""
    data = load(knee_run(num_patients=200))
    train, test = all_examples(data)[:270], all_examples(data)[270:]

    def features(examples: list[Example]) -> np.ndarray:
        small = np.stack(
            [np.asarray(data.read_image(e).resize((32, 32)), dtype=float).ravel() for e in examples]
        )
        small = (small - small.mean(1, keepdims=True)) / small.std(1, keepdims=True)
        return np.hstack([small, np.ones((len(small), 1))])

    x, labels = features(train), np.array([e.label for e in train])
    weights = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1]), x.T @ np.eye(5)[labels])
    predicted, truth = (features(test) @ weights).argmax(1), np.array([e.label for e in test])
    recalls = [(predicted[truth == grade] == grade).mean() for grade in range(5)]
    assert np.mean(recalls) > 0.55


def test_other_scales_of_grades_are_drawn_too(knee_run: Run) -> None:
    data = load(knee_run(answers=("healthy", "ill")))
    assert {example.label for example in all_examples(data)} == {0, 1}
    data.read_image(all_examples(data)[0])


def test_sets_too_small_to_split_or_grade_are_refused(knee_run: Run) -> None:
    with pytest.raises(InputError, match=r"--num_patients: got 2; expected 3 or more"):
        load(knee_run(num_patients=2))
    with pytest.raises(InputError, match="--answers: got 1"):
        load(knee_run(answers=("healthy",)))
    smallest = load(knee_run(num_patients=3))
    assert [len(smallest.splits[split]) for split in SPLITS] == [2, 2, 2]
