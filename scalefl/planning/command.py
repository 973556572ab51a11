"""`scalefl plan`: tables of what levels cost and need, and which client gets which."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalefl.config.derived import checkpoints
from scalefl.config.flags import Command
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.planoptions import PlanOptions
from scalefl.config.resolve import read_layers
from scalefl.console import Display
from scalefl.contracts import InputError
from scalefl.planning.assign import Assignment, best_fit, search, shown
from scalefl.planning.budgets import Budget, read_budgets
from scalefl.planning.estimate import MemoryEstimate
from scalefl.planning.outfile import check_out, write
from scalefl.planning.predict import MARGIN, RUNTIME, LevelPlan, Predictor
from scalefl.planning.subject import subject_of
from scalefl.registry import resolve
from scalefl.report import client_title, levels_and_costs

GLIBC = (
    "on the CPU, glibc keeps some of what a process frees, up to as much again as it uses; with "
    "MALLOC_MMAP_THRESHOLD_=65536 in its environment it gives it back, and steps take about a sixth longer"
)
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "total", "host")


def plan(run: RunConfig, model_file: ModelFile, command: Command) -> None:
    """Predict, print, and with budgets assign levels to clients. Nothing is loaded or trained."""
    options = command.own
    assert isinstance(options, PlanOptions)
    budgets = _budgets(run, command, options)
    if options.out is not None:
        assert options.client_budgets is not None
        read = {"config": command.config_files, "client_budgets": [options.client_budgets]}
        check_out(Path(options.out), read)
    subject = subject_of(run, model_file, resolve("arch", run.arch), options)
    predictor = Predictor(run, subject, options)
    levels, assignment = _assigned(run, predictor, budgets, options)
    if assignment is not None and options.out is not None:
        write(Path(options.out), assignment, [*subject.notes, _step(run, predictor)])
    display = Display(speaks=True, print_freq=run.print_freq)
    notes = [*subject.notes, *_notes(run, predictor, levels)]
    if options.json:
        record = _record(levels, predictor)
        if assignment is not None:
            record |= _assignment_record(assignment, budgets, run, options)
        display.line(json.dumps(record | {"notes": notes}))
        return
    _print_levels(display, levels, predictor)
    if assignment is not None:
        _print_clients(display, assignment, budgets, run, options)
    for note in notes:
        display.line(note)
    if assignment is not None and options.out is not None:
        display.line(f"assignment   {options.out} (scalefl train --config {options.out} ...)")


def _budgets(run: RunConfig, command: Command, options: PlanOptions) -> tuple[Budget, ...]:
    path = options.client_budgets
    if path is None:
        return ()
    budgets = read_budgets(path, numbered=not _by_site(run))
    asked = read_layers(command.flags, *command.config_files).given.get("num_clients")
    if asked is not None and asked.value != len(budgets):
        raise InputError(
            f"{asked.where}: got {asked.value}, but --client_budgets {path} names {len(budgets)} clients; "
            "expected the same number; drop it, or mend the file."
        )
    return budgets


def _by_site(run: RunConfig) -> bool:
    """Whether clients are sites, which their names then are."""
    return run.partitioner == "natural"


def _assigned(
    run: RunConfig, predictor: Predictor, budgets: Sequence[Budget], options: PlanOptions
) -> tuple[Sequence[LevelPlan], Assignment | None]:
    """The levels, and with budgets each client's."""
    if options.search and run.checkpointing_levels:
        raise InputError(
            "--search: makes levels of its own, but --checkpointing_levels names some; leave that out."
        )
    levels = [] if options.search else predictor.levels()
    if not budgets:
        return levels, None
    helps = remedies(run, predictor)
    found = search(budgets, predictor, helps) if options.search else best_fit(budgets, levels, helps)
    return found.levels, dataclasses.replace(found, by_site=_by_site(run))


def seconds_per_round(budget: Budget, level: LevelPlan, run: RunConfig, options: PlanOptions) -> float | None:
    """Of computing and of sending both ways; None without the budget's flops and bandwidth.

    A backward pass takes twice the forward pass where all weights are trained, once where most are frozen,
    and once more where activations are computed again.
    """
    if budget.flops is None or budget.bandwidth is None:
        return None
    passes = (3 if run.tuning == "full" else 2) + checkpoints(run, level.spec.level)
    examples = run.num_epoch * options.client_examples
    if run.local_steps is not None:
        examples = run.local_steps * run.batch_size
    computing = 2 * level.cost.macs * passes * examples / budget.flops / options.world_size
    return computing + 2 * level.cost.bytes_each_way / budget.bandwidth


def remedies(run: RunConfig, predictor: Predictor) -> str:
    """What this run has not done yet to need less."""
    possible = {
        "a smaller --micro_batch_size": predictor.micro_batch_size > 1,
        "--gradient_checkpointing": not run.gradient_checkpointing,
        "--precision bf16": run.precision == "fp32",
        "--tuning lora": run.tuning == "full",
        "--quantization nf4": run.tuning == "lora"
        and run.quantization != "nf4"
        and run.width_axes == "inner",
        "--optimizer adamw_8bit": run.optimizer == "adamw",
        "smaller --vertical_scale_ratios": True,
    }
    return ", ".join(what for what, helps in possible.items() if helps)


def _step(run: RunConfig, predictor: Predictor) -> str:
    """What a level was planned for."""
    launch, rows = predictor.launch, predictor.micro_batch_size
    engine = f"ZeRO-{launch.zero_stage}, offload {launch.offload}" if launch.zero_stage else "no ZeRO"
    tower = "images as cached features" if predictor.caches_features else "images through the vision tower"
    step = f"{rows} rows a process and forward pass, {tower}, --precision {run.precision}, "
    step += f"--quantization {run.quantization}, --optimizer {run.optimizer}, {engine}, "
    return step + f"{launch.world_size} process(es) on {launch.device}"


def _notes(run: RunConfig, predictor: Predictor, levels: Sequence[LevelPlan]) -> list[str]:
    device = predictor.launch.device
    held = "the base of all levels" if predictor.rounds_hold_all else "one level's slice, read from files"
    beside = "Python and libraries" if device == "cpu" else "the GPU's context and libraries"
    notes = [
        _step(run, predictor),
        f"in a round: a process that trains clients of every level and holds {held}; "
        "own process: a client's, which holds its level's slice alone",
        "split as it is at the moment of the peak: before the backward pass there are no gradients",
        "host: offloaded and paged parts, and trainable states on their way, in the first process"
        + ("; the same memory on the CPU" if device == "cpu" else ""),
        f"evaluation: {run.eval_batch_size} rows a process and pass (--eval_batch_size), candidates packed"
        + (", then generated with a cache of keys and values" if run.scoring == "generate" else ""),
        f"not counted: {shown(RUNTIME[device])} of {beside}, but in what clients need",
        f"not counted: {shown(predictor.bytes_of_image)} of host memory for every image that is held",
        *([GLIBC] if device == "cpu" else []),
    ]
    if (whole := predictor.evaluation_of_whole(levels)) is not None:
        notes.append(f"the whole model, which no level is, is evaluated too: {shown(whole.on(device))}")
    return notes


def _print_levels(display: Display, levels: Sequence[LevelPlan], predictor: Predictor) -> None:
    display.table(
        "levels, a client and round", *levels_and_costs((level.spec, level.cost) for level in levels)
    )
    unit, name = _unit([level.round for level in levels])
    rows = []
    if predictor.features is not None:
        rows.append(["all", "image features", *_cells(predictor.features, unit)])
    for number, level in enumerate(levels, start=1):
        for when, memory in (
            ("training in a round", level.round),
            ("training, own process", level.own),
            ("evaluation", level.evaluation),
        ):
            rows.append([f"level {number}", when, *_cells(memory, unit)])
    display.table(
        f"predicted peak of one process on {predictor.launch.device}, {name}", ["level", "", *PARTS], rows
    )


def _cells(memory: MemoryEstimate, unit: float) -> list[str]:
    return [f"{getattr(memory, part) / unit:,.2f}" for part in PARTS]


def _unit(memories: Sequence[MemoryEstimate]) -> tuple[float, str]:
    return (1e9, "GB") if max(memory.total for memory in memories) >= 1e9 else (1e6, "MB")


def _print_clients(
    display: Display, assignment: Assignment, budgets: Sequence[Budget], run: RunConfig, options: PlanOptions
) -> None:
    rows: list[list[Any]] = []
    for number, (budget, at) in enumerate(zip(budgets, assignment.client_levels, strict=True)):
        level, title = assignment.levels[at - 1], client_title(number, budget.client)
        seconds = seconds_per_round(budget, level, run, options)
        rows.append([title, at, f"{level.spec.width_ratio:g}", level.spec.depth])
        rows[-1] += [shown(budget.memory), shown(level.need)]
        rows[-1].append(None if seconds is None else f"{seconds:,.1f}")
    columns = ["client", "level", "width", "exits", "has", "needs", "s/round"]
    display.table(f"clients, {MARGIN:.0%} to spare", columns, rows)
    if any(budget.flops and budget.bandwidth for budget in budgets) and run.local_steps is None:
        display.line(
            f"seconds for {options.client_examples} examples a client (--client_examples), --num_epoch "
            f"{run.num_epoch}"
        )


def _record(levels: Sequence[LevelPlan], predictor: Predictor) -> dict[str, Any]:
    """What the tables say, in bytes."""
    record: dict[str, Any] = {"levels": [_level_record(n, level) for n, level in enumerate(levels, start=1)]}
    if predictor.features is not None:
        record["features"] = _bytes(predictor.features)
    return record


def _level_record(number: int, level: LevelPlan) -> dict[str, Any]:
    return {
        "level": number,
        "width_ratio": level.spec.width_ratio,
        "depth": level.spec.depth,
        "kept": dict(level.spec.kept),
        **dataclasses.asdict(level.cost),
        "round": _bytes(level.round),
        "own": _bytes(level.own),
        "evaluation": _bytes(level.evaluation),
        "needs": level.need,
    }


def _assignment_record(
    assignment: Assignment, budgets: Sequence[Budget], run: RunConfig, options: PlanOptions
) -> dict[str, Any]:
    pairs = zip(budgets, assignment.client_levels, strict=True)
    return {
        "assignment": assignment.options(),
        "clients": [
            {
                "client": budget.client,
                "level": at,
                "memory": budget.memory,
                "needs": assignment.levels[at - 1].need,
                "seconds_per_round": seconds_per_round(budget, assignment.levels[at - 1], run, options),
            }
            for budget, at in pairs
        ],
    }


def _bytes(memory: MemoryEstimate) -> dict[str, int]:
    return {part: getattr(memory, part) for part in PARTS}
