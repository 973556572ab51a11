"""`scalefl calibrate`: how sure an exit must be, chosen on validation images, stored beside the model."""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
from torch import Tensor

from scalefl.batches import Batcher
from scalefl.config.calibrateoptions import CalibrateOptions
from scalefl.config.options import RunConfig
from scalefl.console import Display
from scalefl.contracts import InputError
from scalefl.data.images import decode_all
from scalefl.inference import macs_to_exits, scores_at_exits
from scalefl.prediction.calibration import (
    CALIBRATION_FILE,
    Calibration,
    Point,
    best_temperature,
    calibration_error,
    candidate_thresholds,
    choose,
    curve,
    write_calibration,
)
from scalefl.prediction.loaded import Answering, check_is_model, device_of, task_of
from scalefl.registry import resolve

log = logging.getLogger("scalefl")

DEFAULT_DROP = 0.02


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What every exit says of one split."""

    scores_mba: Tensor
    labels_b: Tensor

    def probabilities(self, temperatures: Sequence[float]) -> Tensor:
        return (self.scores_mba / torch.tensor(temperatures)[:, None, None]).softmax(-1)


def calibrate(run: RunConfig, options: CalibrateOptions) -> None:
    """Fit temperatures, choose a threshold, store both, and tell what they come to on both splits."""
    assert options.model is not None
    folder = Path(options.model)
    model = _model(folder, device_of(run.use_gpu))
    measured, costs = _measure(run, model, options.batch)
    val = measured["val"]
    temperatures = tuple(best_temperature(part, val.labels_b) for part in val.scores_mba)
    thresholds = candidate_thresholds(val.probabilities(temperatures), options.measure)
    points = {
        split: curve(part.probabilities(temperatures), part.labels_b, costs, options.measure, thresholds)
        for split, part in measured.items()
    }
    drop = DEFAULT_DROP if options.accuracy_drop is None else options.accuracy_drop
    chosen = choose(points["val"], drop, options.mean_cost)
    if options.mean_cost is not None and chosen.mean_cost > options.mean_cost:
        log.warning("--mean_cost %g: the cheapest is %.3f and taken", options.mean_cost, chosen.mean_cost)
    found = Calibration(
        measure=options.measure,
        thresholds=(chosen.threshold,) * (model.num_exits - 1),
        temperatures=temperatures,
    )
    write_calibration(folder, found)
    _write_curve(folder, points)
    plot(folder / "calibration.png", points, chosen)
    display = Display(speaks=True, print_freq=1)
    for split, part in measured.items():
        rows = _by_exit(part, temperatures, costs)
        display.table(f"{split}, {len(part.labels_b)} examples", COLUMNS, rows)
    for split, of_split in points.items():
        display.line(_told(split, of_split, chosen))
    display.line(f"calibration  {folder / CALIBRATION_FILE}")


def _model(folder: Path, device: torch.device) -> Answering:
    check_is_model(folder)
    task = task_of(folder)
    if task.answers is None:
        raise InputError(f"--model {folder}: its answers are open; expected a model with candidate answers.")
    model = Answering(folder, device, None, task.answers)
    if model.num_exits < 2:
        raise InputError(f"--model {folder}: has one exit; there is nothing to choose.")
    return model


def _measure(run: RunConfig, model: Answering, batch: int) -> tuple[dict[str, Measured], list[int]]:
    """By split; and multiply-accumulates of an image up to each exit."""
    assert model.answers is not None and model.candidates is not None
    asked = dataclasses.replace(run, question=model.question, answers=model.answers)
    data = resolve("data", run.data)(asked)
    if not data.splits.get("val"):
        raise InputError(f"--data {run.data}: has no validation examples; expected some to calibrate on.")
    measured: dict[str, Measured] = {}
    costs: list[int] = []
    for split in ("val", "test"):
        if examples := data.splits.get(split):
            pixels = decode_all(examples, data.read_image, model.prepare, run.workers)
            batcher = Batcher(model.processor, examples, pixels, model.device)
            labels = torch.tensor([-1 if example.label is None else example.label for example in examples])
            measured[split] = Measured(scores_mba=_scores(model, batcher, batch), labels_b=labels)
            costs = costs or macs_to_exits(model.model, batcher.scoring([0], model.candidates))
    return measured, costs


@torch.no_grad()
def _scores(model: Answering, batcher: Batcher, batch: int) -> Tensor:
    """(M, B, A) of a whole split."""
    assert model.candidates is not None
    ids = range(len(batcher.examples))
    parts = [
        scores_at_exits(model.model, batcher, ids[at : at + batch], model.candidates)
        for at in range(0, len(ids), batch)
    ]
    return torch.cat(parts, dim=1)


def _write_curve(folder: Path, points: dict[str, list[Point]]) -> None:
    with open(folder / "calibration.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "threshold", "accuracy", "mean_cost"])
        for split, of_split in points.items():
            writer.writerows([split, p.threshold, p.accuracy, p.mean_cost] for p in of_split)


def plot(path: Path, points: dict[str, list[Point]], chosen: Point) -> None:
    """Accuracy over mean cost, a line for each split and a mark at what was chosen."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for split, of_split in points.items():
        ordered = sorted(of_split, key=lambda p: p.mean_cost)
        axes.plot([p.mean_cost for p in ordered], [p.accuracy for p in ordered], label=split)
    axes.plot([chosen.mean_cost], [chosen.accuracy], "ko", label="chosen, on val")
    axes.set_xlabel("mean multiply-accumulates, share of the deepest exit's")
    axes.set_ylabel("accuracy")
    axes.legend()
    figure.savefig(path, dpi=150)


COLUMNS = ("exit", "cost", "accuracy", "temperature", "calibration error before", "after")


def _by_exit(part: Measured, temperatures: Sequence[float], costs: Sequence[int]) -> list[list[str]]:
    before = part.scores_mba.softmax(-1)
    rows = []
    for exit, after_ba in enumerate(part.probabilities(temperatures)):
        right = float((after_ba.argmax(-1) == part.labels_b).double().mean())
        rows.append([str(exit + 1), f"{costs[exit] / costs[-1]:.3f}", f"{right:.3f}"])
        rows[-1].append(f"{temperatures[exit]:.2f}")
        rows[-1] += [f"{calibration_error(p, part.labels_b):.3f}" for p in (before[exit], after_ba)]
    return rows


def _told(split: str, points: Sequence[Point], chosen: Point) -> str:
    """What the chosen threshold comes to on a split."""
    found = next(point for point in points if point.threshold == chosen.threshold)
    return (
        f"{split}: leaving at {found.threshold:.4f}: accuracy {found.accuracy:.3f} (deepest exit "
        f"{points[-1].accuracy:.3f}) at {found.mean_cost:.3f} of the multiply-accumulates, "
        f"{1 / found.mean_cost:.2f} times as few"
    )
