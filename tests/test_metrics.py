"""Laws of the metrics, against definitions written out over single examples."""

import pytest
import torch
from builders import ANSWERS
from hypothesis import given
from hypothesis import strategies as st

from scalefl.evaluate import UNPARSABLE, grade_metrics

CLASSES = len(ANSWERS)
GRADES = st.integers(0, CLASSES - 1)
PAIRS = st.lists(st.tuples(GRADES, GRADES), min_size=1, max_size=30)
TOLERANCE = 1e-5
"""The kappa is computed in fp32 from counts below 1000."""


def quadratic_kappa(pairs: list[tuple[int, int]]) -> float | None:
    """1 - (mean squared difference) / (mean squared difference of all predictions with all truths)."""
    observed = sum((p - t) ** 2 for p, t in pairs) / len(pairs)
    by_chance = sum((p - t) ** 2 for p, _ in pairs for _, t in pairs) / len(pairs) ** 2
    return None if by_chance == 0 else 1 - observed / by_chance


def balanced_accuracy(pairs: list[tuple[int, int]]) -> float:
    recalls = []
    for grade in {t for _, t in pairs}:
        answers = [p for p, t in pairs if t == grade]
        recalls.append(answers.count(grade) / len(answers))
    return sum(recalls) / len(recalls)


@given(PAIRS)
def test_metrics_equal_their_definitions(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = torch.tensor(pairs).unbind(1)
    metrics = grade_metrics(predicted, labels, CLASSES, loss=1.5)
    assert metrics.count == len(pairs) and metrics.loss == 1.5 and metrics.unparsable == 0
    assert metrics.accuracy == pytest.approx(sum(p == t for p, t in pairs) / len(pairs))
    assert metrics.balanced_accuracy == pytest.approx(balanced_accuracy(pairs))
    assert metrics.mae == pytest.approx(sum(abs(p - t) for p, t in pairs) / len(pairs))
    kappa = quadratic_kappa(pairs)
    assert metrics.kappa is None if kappa is None else metrics.kappa == pytest.approx(kappa, abs=TOLERANCE)


def test_absent_classes_do_not_count() -> None:
    """Two of three zeros and the one four are right; grades 1 to 3 do not occur: (2/3 + 1) / 2."""
    metrics = grade_metrics(torch.tensor([0, 0, 1, 4]), torch.tensor([0, 0, 0, 4]), CLASSES, loss=0.0)
    assert metrics.balanced_accuracy == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("grade", range(CLASSES))
def test_a_kappa_of_one_grade_alone_is_undefined(grade: int) -> None:
    same = torch.full((6,), grade)
    metrics = grade_metrics(same, same, CLASSES, loss=0.0)
    assert (
        metrics.kappa is None and metrics.accuracy == metrics.balanced_accuracy == 1.0 and metrics.mae == 0.0
    )


def test_a_constant_answer_has_no_skill() -> None:
    """Chance balanced accuracy is 1 / 5 and kappa 0."""
    labels = torch.arange(20) % CLASSES
    metrics = grade_metrics(torch.full((20,), 2), labels, CLASSES, loss=0.0)
    assert metrics.balanced_accuracy == pytest.approx(0.2)
    assert metrics.kappa == pytest.approx(0.0, abs=TOLERANCE)


@given(PAIRS, st.data())
def test_an_unparsable_answer_is_the_farthest_grade(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    lost = data.draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    answers = [UNPARSABLE if gone else p for (p, _), gone in zip(pairs, lost, strict=True)]
    labels = torch.tensor([t for _, t in pairs])
    metrics = grade_metrics(torch.tensor(answers), labels, CLASSES, loss=0.0)
    assert metrics.unparsable == sum(lost)
    errors = [
        max(t, CLASSES - 1 - t) if gone else abs(p - t) for (p, t), gone in zip(pairs, lost, strict=True)
    ]
    assert metrics.mae == pytest.approx(sum(errors) / len(errors))
    assert metrics.accuracy == pytest.approx(errors.count(0) / len(errors))
