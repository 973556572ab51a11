"""Laws of batches: what a client sees, in which order, where targets stand, what augmentation may change."""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import QUESTIONS, batcher, build_store, examples, processor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from plain import OneClient

from scalefl.batches import MAX_SHIFT, Batcher, Candidates, _shifted, draw_shifts, step_order
from scalefl.models.prompts import IMAGE_SLOT
from scalefl.objective import exit_losses
from scalefl.seeding import derive, numpy_rng

IDS = st.lists(st.integers(0, 10_000), min_size=1, max_size=40, unique=True)


def order(ids: list[int], seed: int = 0, labels: list[int] | None = None, **changes: Any) -> list[np.ndarray]:
    options = {"batch_size": 4, "num_epoch": 1, "local_steps": None, "balanced": False, **changes}
    labels = [0] * len(ids) if labels is None else labels
    return step_order(ids, labels, rng=np.random.default_rng(seed), **options)


@given(IDS, st.integers(1, 9), st.integers(1, 3), st.integers(0, 5))
def test_epochs_neither_repeat_nor_drop(ids: list[int], batch_size: int, epochs: int, seed: int) -> None:
    steps = order(ids, seed, batch_size=batch_size, num_epoch=epochs)
    per_epoch = math.ceil(len(ids) / batch_size)
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        own = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(own).tolist()) == sorted(ids)
        assert all(len(step) == batch_size for step in own[:-1])
        assert len(own[-1]) == len(ids) - batch_size * (per_epoch - 1)


@given(IDS, st.integers(1, 9), st.integers(1, 25))
def test_local_steps_override_epochs(ids: list[int], batch_size: int, local_steps: int) -> None:
    """Exactly as many steps; epochs go round as often as needed, the last one as far as needed."""
    steps = order(ids, batch_size=batch_size, local_steps=local_steps, num_epoch=99)
    assert len(steps) == local_steps
    times = Counter(np.concatenate(steps).tolist())
    assert max(times.values()) - min(times[i] for i in ids) <= 1


class ImpatientGenerator(np.random.Generator):
    """Turns an endless loop into a failure."""

    draws = 0

    def permutation(self, *args: Any, **kwargs: Any) -> Any:
        self.draws += 1
        assert self.draws < 100, "step_order never ends"
        return super().permutation(*args, **kwargs)


@pytest.mark.parametrize("local_steps", [None, 3])
def test_a_client_without_examples_has_no_steps(local_steps: int | None) -> None:
    draws = ImpatientGenerator(np.random.PCG64(0))
    options: dict[str, Any] = {"batch_size": 4, "num_epoch": 1, "balanced": False}
    assert step_order([], [], local_steps=local_steps, rng=draws, **options) == []


def test_epochs_are_shuffled_and_seeded() -> None:
    ids = list(range(50))
    first, again, other = (np.concatenate(order(ids, seed, num_epoch=2)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first[:50], first[50:]) and not np.array_equal(first[:50], ids)


def test_balanced_sampling_draws_labels_equally_often() -> None:
    """90, 9 and 1 examples, 12 000 draws: 4000 a label; five sigma are 5 * sqrt(12000 * 2/9) = 258."""
    labels = [0] * 90 + [1] * 9 + [2]
    steps = order(list(range(100)), labels=labels, balanced=True, num_epoch=120, batch_size=32)
    drawn = np.concatenate(steps)
    assert len(drawn) == 12_000
    for label, count in Counter(labels[i] for i in drawn).items():
        assert abs(count - 4000) < 258, label


@pytest.mark.parametrize("balanced", [False, True])
def test_without_lengths_an_epoch_is_one_draw_cut_into_batches(balanced: bool) -> None:
    ids, labels, draws = list(range(3, 13)), [0] * 7 + [1] * 3, np.random.default_rng(7)
    weights = np.array([1 / 14] * 7 + [1 / 6] * 3)
    expected = []
    for _ in range(2):
        epoch = draws.choice(ids, size=10, p=weights) if balanced else draws.permutation(ids)
        expected += [epoch[:4], epoch[4:8], epoch[8:]]
    steps = order(ids, 7, labels, balanced=balanced, num_epoch=2, lengths=None)
    assert [step.tolist() for step in steps] == [step.tolist() for step in expected]


def padding(steps: list[np.ndarray], length_of: Mapping[int, int]) -> int:
    """Tokens that fill the rows of each step up to its longest."""
    rows = [[length_of[i] for i in step] for step in steps]
    return sum(max(row) * len(row) - sum(row) for row in rows)


@given(IDS, st.integers(1, 9), st.integers(0, 5), st.booleans(), st.randoms(use_true_random=False))
def test_batches_by_length_hold_the_same_examples_with_no_more_padding(
    ids: list[int], batch_size: int, seed: int, balanced: bool, random: Any
) -> None:
    """The first epoch: later ones have drawn otherwise."""
    lengths = [random.randint(1, 50) for _ in ids]
    options: dict[str, Any] = {"batch_size": batch_size, "balanced": balanced}
    plain, bucketed = order(ids, seed, **options), order(ids, seed, **options, lengths=lengths)
    assert sorted(np.concatenate(plain).tolist()) == sorted(np.concatenate(bucketed).tolist())
    assert [len(step) for step in plain] == [len(step) for step in bucketed]
    length_of = dict(zip(ids, lengths, strict=True))
    assert padding(bucketed, length_of) <= padding(plain, length_of)


@given(IDS, st.integers(1, 9), st.integers(1, 25))
def test_batches_by_length_neither_repeat_nor_drop(ids: list[int], batch_size: int, local_steps: int) -> None:
    lengths = [i % 7 for i in ids]
    steps = order(ids, batch_size=batch_size, num_epoch=3, lengths=lengths)
    per_epoch = math.ceil(len(ids) / batch_size)
    for epoch in range(3):
        own = np.concatenate(steps[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(own.tolist()) == sorted(ids)
    assert len(order(ids, batch_size=batch_size, local_steps=local_steps, lengths=lengths)) == local_steps


@pytest.mark.parametrize("count", [32, 1000])
def test_batches_by_length_have_much_less_padding(count: int) -> None:
    """Lengths 1 to 100 at even odds in batches of 4. Without: 80, the mean of the largest of 4, less 50.

    In 4 batches sorted together, 16 neighbours lie 100 / 17 apart: (0 + 1 + 2 + 3) / 4 x 5.9 = 9 of those 30.
    """
    lengths = np.random.default_rng(0).integers(1, 101, count).tolist()
    length_of, ids = dict(enumerate(lengths)), list(range(count))
    totals = [
        sum(padding(order(ids, seed, num_epoch=3, lengths=chosen), length_of) for seed in range(10))
        for chosen in (None, lengths)
    ]
    assert totals[1] < 0.4 * totals[0]


def test_batches_by_length_vary_and_come_in_any_order() -> None:
    """All lengths differ, and batches divide the epoch: the hardest case for variety."""
    ids = list(range(64))
    steps = order(ids, num_epoch=20, lengths=ids)
    again = order(ids, num_epoch=20, lengths=ids)
    assert [step.tolist() for step in steps] == [step.tolist() for step in again]
    groups = [frozenset(step.tolist()) for step in steps]
    assert len(set(groups)) > 160  # whole epochs sorted would give 16 again and again
    means = np.array([step.mean() for step in steps]).reshape(20, 16)
    # Of a random order the mean place of the longest batch is 7.5, give or take 4.6 / sqrt(20) = 1.
    assert abs(means.argmax(axis=1).mean() - 7.5) < 4 and abs(means.argmin(axis=1).mean() - 7.5) < 4


def test_lengths_are_those_of_rows() -> None:
    data, pad = batcher(), processor().tokenizer.pad_token_id
    rows = data.training(range(6)).inputs["input_ids"]
    assert data.lengths(range(6)) == (rows != pad).sum(dim=1).tolist()
    assert len(set(data.lengths(range(6)))) > 2
    assert data.lengths([]) == []


@pytest.mark.parametrize("length_bucketing", [False, True])
def test_a_client_trains_on_batches_by_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length_bucketing: bool
) -> None:
    client, seen = OneClient(tmp_path, length_bucketing=length_bucketing), []
    by_answer = client.batcher.lengths(range(10))
    assert len(set(by_answer)) > 1
    training = Batcher.training

    def note(self: Batcher, ids: Any, *rest: Any) -> Any:
        seen.append(ids.tolist())
        return training(self, ids, *rest)

    monkeypatch.setattr(Batcher, "training", note)
    task = client.task()
    client.train(task)
    expected = step_order(
        task.example_ids,
        [client.batcher.examples[i].label for i in task.example_ids],
        batch_size=client.run.batch_size,
        num_epoch=client.run.num_epoch,
        local_steps=None,
        balanced=False,
        rng=numpy_rng(client.run.seed, "batches", round=1, client=0),
        lengths=by_answer if length_bucketing else None,
    )
    assert seen == [step.tolist() for step in expected]


@pytest.mark.parametrize("ids", [[0], [0, 1, 2], [5, 0]])
def test_targets_are_the_answers_with_their_end_symbol_where_they_are_predicted(ids: list[int]) -> None:
    data, end = batcher(), processor().tokenizer.eos_token_id
    batch = data.training(ids)
    rows, at = batch.inputs["input_ids"], batch.inputs["predict_at"]
    lengths = {len(values) for values in (at, batch.targets, batch.labels, batch.steps)}
    assert lengths == {data.num_answer_tokens(ids)}
    assert torch.equal(rows.flatten()[at + 1], batch.targets)  # a position predicts the token after it
    place = 0
    for b, i in enumerate(ids):
        example = data.examples[i]
        prompt = processor().encode_question(example.question)
        answer = processor().encode_answer(example.answer)
        assert answer[-1] == end and processor().decode_answer(answer) == example.answer
        assert rows[b].tolist()[: len(prompt) + len(answer)] == [*prompt, *answer]
        assert set(rows[b].tolist()[len(prompt) + len(answer) :]) <= {processor().tokenizer.pad_token_id}
        part = slice(place, place + len(answer))
        assert (at[part] - b * rows.shape[1]).tolist() == list(
            range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        )
        assert batch.labels[part].tolist() == [example.label] * len(answer)
        assert batch.steps[part].tolist() == list(range(len(answer)))
        place += len(answer)


def test_the_image_stands_once_in_every_prompt() -> None:
    """28 / 7 = 4 patches a side, 4 to a token: 4 tokens in a row."""
    for question in QUESTIONS:
        ids = processor().encode_question(question)
        first = ids.index(processor().image_token_id)
        assert ids.count(processor().image_token_id) == 4
        assert ids[first : first + 4] == [processor().image_token_id] * 4
        assert ids[0] == processor().tokenizer.bos_token_id


def test_the_processor_makes_of_an_image_and_a_prompt_what_the_batcher_does() -> None:
    """A user's call of the processor and the run's own batches are one preprocessing."""
    grey = Image.fromarray(np.arange(40 * 40, dtype=np.uint8).reshape(40, 40))
    shown = examples(2)
    texts = [processor().prompt_template.format(IMAGE_SLOT + example.question) for example in shown]
    features = processor()(images=[grey, grey.convert("RGB")], text=texts)
    pixels = {example.image_key: processor().resize(grey) for example in shown}
    expected = Batcher(processor(), shown, pixels, torch.device("cpu")).prompts([0, 1])
    assert set(features) == set(expected)
    assert all(torch.equal(features[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ids", [[], np.array([], dtype=np.int64)], ids=["list", "array"])
def test_a_process_without_a_share_adds_nothing(ids: list[int]) -> None:
    """It runs the model, so that all processes run alike, and gets a zero loss and zero gradients."""
    built, batch = build_store(), batcher().training(ids)
    assert len(batch.targets) == 0
    model = built.store.submodel(2, built.state, own=True)
    adjustment = torch.zeros(5, 9, 280)[batch.labels, batch.steps]
    loss, exits = exit_losses(
        model(**batch.inputs).exit_logits,
        batch.targets,
        distill_weight=1.0,
        temperature=3.0,
        adjustment_nv=adjustment,
    )
    loss.backward()
    assert float(loss.detach()) == 0.0 and not exits.any()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_batch_is_the_mean_of_its_parts() -> None:
    """Summed losses of micro-batches, divided by the tokens of the step, do not depend on the division."""
    built, data = build_store(), batcher()
    model = built.store.submodel(2, built.state, own=False).eval()
    loss_of = functools.partial(exit_losses, distill_weight=1.0, temperature=3.0)
    with torch.no_grad():
        parts = [data.training(ids) for ids in ([0, 1], [2], [])]
        apart = sum(loss_of(model(**p.inputs).exit_logits, p.targets)[0] for p in parts)
        whole = data.training([0, 1, 2])
        together = loss_of(model(**whole.inputs).exit_logits, whole.targets)[0]
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=0)  # fp32 sums of some hundred terms


IMAGES = (torch.arange(28 * 28) % 251).to(torch.uint8).view(1, 28, 28)


def test_no_shift_is_the_identity() -> None:
    assert torch.equal(_shifted(IMAGES, 0.0, 0.0, 0.0), IMAGES)


@given(st.integers(0, 99))
def test_augmentation_keeps_shape_and_type_and_values(seed: int) -> None:
    for row in draw_shifts(3, np.random.default_rng(seed)):
        moved = _shifted(IMAGES, *row)
        assert moved.shape == IMAGES.shape and moved.dtype == IMAGES.dtype
        assert 0 <= row[0] < 1 and bool((np.abs(row[1:]) <= MAX_SHIFT).all())
        assert set(moved.unique().tolist()) <= set(IMAGES.unique().tolist())


def test_shifts_move_down_and_right_and_repeat_the_edge() -> None:
    """0.08 of 28 is 2 pixels."""
    down, right = _shifted(IMAGES, 0.0, 0.08, 0.0), _shifted(IMAGES, 0.0, 0.0, 0.08)
    assert torch.equal(down[:, 2:], IMAGES[:, :-2]) and torch.equal(down[:, 0], IMAGES[:, 0])
    assert torch.equal(right[:, :, 2:], IMAGES[:, :, :-2]) and torch.equal(right[:, :, 1], IMAGES[:, :, 0])
    assert torch.equal(_shifted(IMAGES, 0.9, 0.0, 0.0), IMAGES.flip(-1))


def test_augmentation_reaches_the_pixels_and_nothing_else() -> None:
    data, shifts = batcher(), np.array([[0.9, 0.0, 0.0], [0.0, 0.0, 0.0]])
    plain, changed = data.training([0, 1]), data.training([0, 1], shifts)
    pixels = changed.inputs["pixel_values"]
    assert torch.equal(pixels[0], plain.inputs["pixel_values"][0].flip(-1))
    assert torch.equal(pixels[1], plain.inputs["pixel_values"][1])
    assert torch.equal(changed.inputs["input_ids"], plain.inputs["input_ids"])


def test_seeds_differ_by_everything_they_are_drawn_for() -> None:
    seeds = {
        derive(seed, purpose, round=round, client=client)
        for seed in (0, 1)
        for purpose in ("batches", "dropout")
        for round in (0, 1, 11)
        for client in (0, 1, 11)
    }
    assert len(seeds) == 2 * 2 * 3 * 3 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, "a", round=1, client=2) == derive(0, "a", client=2, round=1)
    draws = [numpy_rng(0, "batches", round=3, client=1).permutation(9).tolist() for _ in range(2)]
    assert draws[0] == draws[1]


def test_grey_and_colour_images_mix() -> None:
    """A grey image beside colour ones is what it is alone."""
    data = batcher(of=examples(2))
    data._pixels = {"i0": IMAGES, "i1": IMAGES.expand(3, -1, -1)}  # type: ignore[assignment]
    together = data.training([0, 1]).inputs["pixel_values"]
    assert torch.equal(together[0], together[1]) and torch.equal(
        together[:1], data.training([0]).inputs["pixel_values"]
    )


def test_features_take_the_place_of_pixels_and_of_nothing_else() -> None:
    """In training, scoring and generation, of examples in any order; pixels need not be there."""
    table = {f"i{i}": torch.full((4, 8), float(i)) for i in range(6)}
    plain, data = batcher(), Batcher(processor(), examples(6), {}, torch.device("cpu"), table)
    candidates = Candidates(ids=((7, 2), (8,)))
    for ids in ([3, 0, 5], [1]):
        rows = torch.stack([table[f"i{i}"] for i in ids])
        for mine, other in (
            (data.training(ids).inputs, plain.training(ids).inputs),
            (data.scoring(ids, candidates), plain.scoring(ids, candidates)),
            (data.prompts(ids), plain.prompts(ids)),
        ):
            assert torch.equal(mine["image_features"], rows)
            assert mine.keys() - {"image_features"} == other.keys() - {"pixel_values"}
            assert all(torch.equal(mine[name], other[name]) for name in mine.keys() & other.keys())
    assert torch.equal(data.training([]).inputs["image_features"], table["i0"].unsqueeze(0))
    table["i0"] = table["i0"].half()
    with torch.autocast("cpu", torch.bfloat16):  # around evaluation in bf16, of a tower in fp16
        assert data.training([0]).inputs["image_features"].dtype == torch.float16
    with pytest.raises(ValueError, match="augmentation moves pixels"):
        data.training([0], np.zeros((1, 3)))
