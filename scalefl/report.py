"""What runs and plans print of levels and clients, as columns and rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from scalefl.contracts import LevelSpec
from scalefl.models.cost import LevelCost
from scalefl.models.submodels import WHOLE

Evaluation = Mapping[str, Any]
"""Level (as text) -> metrics of each exit, shallowest first."""


def levels_and_costs(levels: Iterable[tuple[LevelSpec, LevelCost]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what every level keeps, and what it costs a client."""
    rows = []
    for number, (spec, cost) in enumerate(levels, start=1):
        rows.append([f"level {number}", f"{spec.width_ratio:g}", str(spec.depth)])
        rows[-1] += [f"{cost.parameters:,}", f"{cost.trainable:,}", f"{cost.macs / 1e6:,.1f} M"]
        rows[-1] += [f"{cost.bytes_each_way / 1e6:.2f} MB"]
        rows[-1].append(" ".join(f"{axis}={units}" for axis, units in spec.kept.items()))
    return ["level", "width", "exits", "parameters", "trainable", "MACs/example", "up = down", "keeps"], rows


def client_title(number: int, name: str) -> str:
    """A client by its number, and by its name where it has one of its own."""
    return f"client {number}" if name == str(number) else f"client {number} ({name})"


def levels_by_exits(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of results: each level's every exit, its deepest last."""
    closed = any(e["accuracy"] is not None for exits in evaluation.values() for e in exits)
    metrics = ("balanced accuracy", "accuracy", "kappa", "mae", "loss") if closed else ("exact match", "loss")
    rows = []
    for level, exits in evaluation.items():
        for number, values in enumerate(exits, start=1):
            name = "whole model" if int(level) == WHOLE else f"level {level}"
            cells = [_cell(values[metric.replace(" ", "_")]) for metric in metrics]
            rows.append([name, str(number), *cells, str(values["count"])])
    columns = ["level", "exit", *metrics, "examples"]
    unparsable = [values["unparsable"] for exits in evaluation.values() for values in exits]
    if any(unparsable):  # generated text outside the answer set, counted as wrong
        return [*columns, "unparsable"], [
            [*row, str(count)] for row, count in zip(rows, unparsable, strict=True)
        ]
    return columns, rows


def summary(evaluation: Evaluation) -> str:
    """One figure per level: balanced accuracy (exact match in an open answer set) at its deepest exit."""
    return " ".join(_cell(_figure(exits[-1])) for exits in evaluation.values())


def selection_value(evaluation: Evaluation) -> float:
    """What chooses the best checkpoint: the mean over levels of balanced accuracy at the deepest exit."""
    values = [_figure(exits[-1]) for exits in evaluation.values()]
    return sum(values) / len(values)


def _figure(metrics: Mapping[str, Any]) -> float:
    """Balanced accuracy, or the exact match of an open answer set."""
    key = "exact_match" if metrics["balanced_accuracy"] is None else "balanced_accuracy"
    return float(metrics[key])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
