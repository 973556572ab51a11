"""`scalefl plan`: tables of what levels cost and need, and which client gets which."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.planoptions import PlanOptions
from scalefl.console import Display
from scalefl.contracts import InputError
from scalefl.planning.assign import MARGIN, Assignment, best_fit, need, search
from scalefl.planning.budgets import Budget, read_budgets
from scalefl.planning.estimate import MemoryEstimate
from scalefl.planning.predict import LevelPlan, Predictor
from scalefl.planning.subject import subject_of
from scalefl.registry import resolve

GLIBC = (
    "on the CPU, glibc keeps some of what a process frees, up to as much again as it uses; with "
    "MALLOC_MMAP_THRESHOLD_=65536 in its environment it gives it back, and steps take about a sixth longer"
)
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "total", "host")


def plan(run: RunConfig, model_file: ModelFile, options: PlanOptions) -> None:
    """Predict, print, and with budgets assign levels to clients. Nothing is loaded or trained."""
    budgets = read_budgets(options.client_budgets) if options.client_budgets is not None else ()
    if options.search and run.checkpointing_levels:
        raise InputError(
            "--search: makes levels of its own, but --checkpointing_levels names some; leave that out."
        )
    subject = subject_of(run, model_file, resolve("arch", run.arch), options)
    predictor = Predictor(run, subject, options)
    assignment = None
    if options.search:
        assignment = search(budgets, predictor)
        levels: Sequence[LevelPlan] = assignment.levels
    else:
        levels = predictor.levels()
        assignment = best_fit(budgets, levels) if budgets else None
    if assignment is not None and options.out is not None:
        _write(options.out, assignment, budgets)
    notes = [*subject.notes, *_notes(run, predictor)]
    display = Display(speaks=True, print_freq=run.print_freq)
    if options.json:
        display.line(json.dumps(_record(levels, assignment, budgets, run, options, notes)))
        return
    _print_levels(display, levels, predictor)
    if assignment is not None:
        _print_clients(display, assignment, budgets, run, options)
    for note in notes:
        display.line(note)
    if assignment is not None and options.out is not None:
        display.line(f"assignment   {options.out} (scalefl train --config {options.out} ...)")


def seconds_per_round(budget: Budget, level: LevelPlan, run: RunConfig, options: PlanOptions) -> float | None:
    """Of computing and of sending both ways; None without the budget's flops and bandwidth.

    A backward pass takes twice the forward pass where all weights are trained, once where most are frozen,
    and once more where activations are computed again.
    """
    if budget.flops is None or budget.bandwidth is None:
        return None
    passes = (3 if run.tuning == "full" else 2) + (1 if run.gradient_checkpointing else 0)
    examples = run.num_epoch * options.client_examples
    if run.local_steps is not None:
        examples = run.local_steps * run.batch_size
    computing = 2 * level.cost.macs * passes * examples / budget.flops / options.world_size
    return computing + 2 * level.cost.bytes_each_way / budget.bandwidth


def _notes(run: RunConfig, predictor: Predictor) -> list[str]:
    launch, rows = predictor.launch, predictor.micro_batch_size
    engine = f"ZeRO-{launch.zero_stage}, offload {launch.offload}" if launch.zero_stage else "no ZeRO"
    tower = "images as cached features" if predictor.caches_features else "images through the vision tower"
    step = f"{rows} rows a process and forward pass, {tower}, --precision {run.precision}, "
    step += f"--quantization {run.quantization}, --optimizer {run.optimizer}, {engine}, "
    step += f"{launch.world_size} process(es) on {launch.device}"
    held = "the base of all levels" if predictor.rounds_hold_all else "one level's slice, read from files"
    return [
        step,
        f"in a round: a process that trains clients of every level and holds {held}; "
        "own process: a client's, which holds its level's slice alone",
        "split as it is at the moment of the peak: before the backward pass there are no gradients",
        "host: offloaded and paged parts, and trainable states on their way, in the first process",
        "not counted: Python with its libraries, a GPU's context, images and features held, evaluation",
        *([GLIBC] if launch.device == "cpu" else []),
    ]


def _print_levels(display: Display, levels: Sequence[LevelPlan], predictor: Predictor) -> None:
    rows: list[list[Any]] = []
    for number, level in enumerate(levels, start=1):
        spec, cost = level.spec, level.cost
        sent = f"{cost.bytes_each_way / 1e6:.2f} MB"
        rows.append([f"level {number}", f"{spec.width_ratio:g}", spec.depth])
        rows[-1] += [f"{cost.parameters:,}", f"{cost.trainable:,}", f"{cost.macs / 1e6:,.1f} M", sent, sent]
        rows[-1].append(" ".join(f"{axis}={units}" for axis, units in spec.kept.items()))
    columns = ["level", "width", "exits", "parameters", "trainable", "MACs/example", "up", "down", "keeps"]
    display.table("levels, a client and round", columns, rows)
    unit, name = _unit([level.round for level in levels])
    rows = []
    for number, level in enumerate(levels, start=1):
        for where, memory in (("in a round", level.round), ("own process", level.own)):
            shown = [f"{getattr(memory, part) / unit:,.2f}" for part in PARTS]
            rows.append([f"level {number}", where, *shown])
    display.table(
        f"predicted peak of one process on {predictor.launch.device}, {name}", ["level", "", *PARTS], rows
    )


def _unit(memories: Sequence[MemoryEstimate]) -> tuple[float, str]:
    return (1e9, "GB") if max(memory.total for memory in memories) >= 1e9 else (1e6, "MB")


def _print_clients(
    display: Display, assignment: Assignment, budgets: Sequence[Budget], run: RunConfig, options: PlanOptions
) -> None:
    unit, name = _unit([level.own for level in assignment.levels])
    rows: list[list[Any]] = []
    for number, (budget, at) in enumerate(zip(budgets, assignment.client_levels, strict=True)):
        level = assignment.levels[at - 1]
        seconds = seconds_per_round(budget, level, run, options)
        called = f"client {number}" if budget.client == str(number) else f"client {number} ({budget.client})"
        rows.append([called, at, f"{level.spec.width_ratio:g}", level.spec.depth])
        rows[-1] += [f"{budget.memory / unit:,.2f}", f"{need(level) / unit:,.2f}"]
        rows[-1].append(None if seconds is None else f"{seconds:,.1f}")
    columns = ["client", "level", "width", "exits", f"has, {name}", f"needs, {name}", "s/round"]
    display.table(f"clients, {MARGIN:.0%} to spare", columns, rows)
    if any(budget.flops and budget.bandwidth for budget in budgets) and run.local_steps is None:
        display.line(
            f"seconds for {options.client_examples} examples a client (--client_examples), --num_epoch "
            f"{run.num_epoch}"
        )


def _record(
    levels: Sequence[LevelPlan],
    assignment: Assignment | None,
    budgets: Sequence[Budget],
    run: RunConfig,
    options: PlanOptions,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What the tables say, in bytes."""
    record: dict[str, Any] = {
        "levels": [
            {
                "level": number,
                "width_ratio": level.spec.width_ratio,
                "depth": level.spec.depth,
                "kept": dict(level.spec.kept),
                **dataclasses.asdict(level.cost),
                "round": _bytes(level.round),
                "own": _bytes(level.own),
            }
            for number, level in enumerate(levels, start=1)
        ],
        "notes": list(notes),
    }
    if assignment is not None:
        record["assignment"] = assignment.options()
        record["clients"] = [
            {
                "client": budget.client,
                "level": at,
                "memory": budget.memory,
                "needs": need(levels[at - 1]),
                "seconds_per_round": seconds_per_round(budget, levels[at - 1], run, options),
            }
            for budget, at in zip(budgets, assignment.client_levels, strict=True)
        ]
    return record


def _bytes(memory: MemoryEstimate) -> dict[str, int]:
    return {part: getattr(memory, part) for part in PARTS}


def _write(path: str, assignment: Assignment, budgets: Sequence[Budget]) -> None:
    names = ", ".join(f"{number} = {budget.client}" for number, budget in enumerate(budgets))
    options = yaml.safe_dump(assignment.options(), sort_keys=False, default_flow_style=None)
    try:
        Path(path).write_text(f"# Written by `scalefl plan`. Clients: {names}.\n{options}", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--out {path}: {error.strerror}; expected a file in a folder that is there and can be written."
        ) from error
