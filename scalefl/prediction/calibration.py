"""Temperatures and thresholds of exits, from what every exit says of held-out images: pure functions.

Shapes: M exits, B examples, A answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from scalefl.contracts import InputError
from scalefl.inference import ExitRule, Measure, confidence

CALIBRATION_FILE = "calibration.json"
BINS = 15
"""Of the expected calibration error, as in Guo et al. 2017 (arXiv 1706.04599)."""
LOG_TEMPERATURES = torch.linspace(-3.0, 3.0, 241, dtype=torch.float64)
"""Tried: from 0.05 to 20, 2.5 % apart."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is stored beside a model."""

    measure: Measure
    thresholds: tuple[float, ...]
    """By exit but the deepest."""
    temperatures: tuple[float, ...]
    """By exit."""

    def rule(self, max_exit: int | None = None) -> ExitRule:
        return ExitRule(
            thresholds=self.thresholds,
            measure=self.measure,
            temperatures=self.temperatures,
            max_exit=max_exit,
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a threshold, the same at every exit, comes to."""

    threshold: float
    accuracy: float
    mean_cost: float
    """Multiply-accumulates of an image, as a share of those up to the deepest exit."""


def write_calibration(folder: Path, calibration: Calibration) -> None:
    temporary = folder / f".{CALIBRATION_FILE}.tmp"
    temporary.write_text(json.dumps(asdict(calibration), indent=1), encoding="utf-8")
    temporary.replace(folder / CALIBRATION_FILE)


def read_calibration(folder: Path, num_exits: int) -> Calibration | None:
    """The one beside a model, if any. Raises InputError if it is damaged, or that of another model."""
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        found = Calibration(
            measure=content["measure"],
            thresholds=tuple(map(float, content["thresholds"])),
            temperatures=tuple(map(float, content["temperatures"])),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged ({error}); remove it, or run `scalefl calibrate` again."
        ) from error
    if len(found.temperatures) != num_exits or len(found.thresholds) != num_exits - 1:
        raise InputError(
            f"{path}: is of a model with {len(found.temperatures)} exits, this one has {num_exits}."
        )
    return found


def best_temperature(scores_ba: Tensor, labels_b: Tensor) -> float:
    """What scores are to be divided by, so that their softmax is least surprised by the labels."""
    tried = LOG_TEMPERATURES.exp()
    log_probs_tba = (scores_ba.double()[None] / tried[:, None, None]).log_softmax(-1)
    nats_t = -log_probs_tba[:, torch.arange(len(labels_b)), labels_b].mean(-1)
    return float(tried[nats_t.argmin()])


def calibration_error(probabilities_ba: Tensor, labels_b: Tensor) -> float:
    """Expected calibration error: the gap between confidence and accuracy, over bins of equal width."""
    sure_b, chosen_b = probabilities_ba.max(-1)
    right_b = (chosen_b == labels_b).double()
    bin_b = (sure_b * BINS).long().clamp(max=BINS - 1)
    gaps = [
        float((right_b[bin_b == n].mean() - sure_b[bin_b == n].double().mean()).abs() * (bin_b == n).sum())
        for n in bin_b.unique().tolist()
    ]
    return sum(gaps) / len(labels_b)


def curve(
    probabilities_mba: Tensor,
    labels_b: Tensor,
    costs_m: Sequence[float],
    measure: Measure,
    thresholds: Sequence[float],
) -> list[Point]:
    """What each threshold comes to; `costs_m` are multiply-accumulates up to each exit."""
    sure_mb = torch.stack([confidence(part, measure) for part in probabilities_mba])
    right_mb = (probabilities_mba.argmax(-1) == labels_b).double()
    costs = torch.tensor(costs_m, dtype=torch.float64) / costs_m[-1]
    sure_mb[-1] = torch.inf  # the deepest exit answers who is left
    points = []
    for threshold in thresholds:
        exit_b = (sure_mb >= threshold).int().argmax(0)
        accuracy = right_mb.gather(0, exit_b[None]).mean()
        points.append(
            Point(threshold=threshold, accuracy=float(accuracy), mean_cost=float(costs[exit_b].mean()))
        )
    return points


def candidate_thresholds(probabilities_mba: Tensor, measure: Measure) -> list[float]:
    """From one that lets everybody leave to one that lets nobody: halfway between seen confidences."""
    seen = torch.cat([confidence(part, measure) for part in probabilities_mba[:-1]]).unique()
    between = (seen[1:] + seen[:-1]) / 2
    return [0.0, *between.tolist(), 2.0]


def choose(points: Sequence[Point], accuracy_drop: float | None, mean_cost: float | None) -> Point:
    """The cheapest that gives up `accuracy_drop` of the deepest exit's accuracy at most; or the most accurate
    that keeps to `mean_cost`, or costs least if none does.
    """
    if mean_cost is not None:
        within = [p for p in points if p.mean_cost <= mean_cost] or [min(points, key=lambda p: p.mean_cost)]
        return max(within, key=lambda p: (p.accuracy, -p.mean_cost))
    assert accuracy_drop is not None
    least = points[-1].accuracy * (1 - accuracy_drop)
    return min((p for p in points if p.accuracy >= least), key=lambda p: (p.mean_cost, -p.accuracy))
