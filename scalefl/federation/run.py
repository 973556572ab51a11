"""A whole run: build, print what was built, do the rounds, report. And the evaluation of a checkpoint."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from scalefl import checkpoint
from scalefl.checkpoint import Progress
from scalefl.config.derived import checkpoints, features_in_files
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.saved import FOR_MEMORY, FREE_ON_RESUME, save_config, to_dict
from scalefl.console import Display
from scalefl.contracts import InputError, State
from scalefl.data.partition import describe
from scalefl.engine.launch import Engine, telling_others
from scalefl.federation.jobs import Jobs
from scalefl.federation.lock import locked
from scalefl.federation.records import RunFolder
from scalefl.federation.rounds import RoundLoop, clock_costs, evaluate_levels, next_tasks, trainer_of
from scalefl.federation.setup import Federation, build
from scalefl.federation.start import check_same_parameters
from scalefl.federation.stop import StopSignal
from scalefl.models.cost import level_cost
from scalefl.models.store import ResidentStore
from scalefl.report import client_title, levels_and_costs, levels_by_exits

MAY_DIFFER = FREE_ON_RESUME - FOR_MEMORY | {"cfg_path"}
"""Options that processes of one run need not have in common."""


@telling_others()
def train(run: RunConfig, model_file: ModelFile) -> None:
    """Start or resume a run; a finished run is reported again and left as it is."""
    if run.evaluate_from is not None:
        return evaluate(run, model_file)
    with locked(Path(run.save_path), takes=os.environ.get("RANK", "0") == "0"):
        _train(run, model_file)


def _train(run: RunConfig, model_file: ModelFile) -> None:
    earlier = _earlier_checkpoint(run)
    progress = None
    if earlier is not None:
        progress = checkpoint.with_rank_parts(earlier.parent, checkpoint.load(earlier))
    federation = build(run, model_file, earlier)
    engine = federation.engine
    _check_agreement(run, progress, engine)
    display = Display(speaks=engine.is_main, print_freq=run.print_freq)
    folder = RunFolder(run.save_path, writes=engine.is_main)
    if progress is None:
        progress = Progress(state=federation.initial_state)
    else:
        check_same_parameters(progress.state, federation.initial_state, run.resume or "")
        display.line(f"resuming after round {progress.round} of {run.num_rounds}")
    federation = dataclasses.replace(federation, initial_state={})  # else it outlives the first round
    results = folder.read_results()
    if results is not None and results["rounds"] == progress.round >= run.num_rounds:
        display.line(f"{folder.path}: all {run.num_rounds} rounds are done already")
    else:
        _print_setup(display, federation)
        if run.dry_run:
            return _preview(display, federation, progress)
        results = _rounds(federation, folder, display, progress)
    _print_results(display, folder, results)
    engine.finish()


def _rounds(
    federation: Federation, folder: RunFolder, display: Display, progress: Progress
) -> dict[str, Any]:
    """All rounds that are left, and the results, which are written."""
    run, engine = federation.run, federation.engine
    _settle_rank_parts(federation, folder, progress)
    if progress.partial is not None and not engine.is_main:
        progress = dataclasses.replace(progress, partial=dataclasses.replace(progress.partial, sums={}))
    gc.collect()
    gc.freeze()  # what lives as long as the run need not be searched each time an engine is torn down
    try:
        with StopSignal(engine) as stop:
            loop = RoundLoop(federation, folder, display, stop)  # which may refuse: nothing is written yet
            folder.write_config(lambda path: save_config(path, run, federation.model_file, federation.base))
            folder.drop_rounds_of_jobs(before=progress.round + 1 if run.executor == "jobs" else None)
            engine.start_trackers(to_dict(run))
            while progress.round < run.num_rounds:
                progress = loop.round(progress)
            results = _final_results(federation, folder, progress, stop)
    finally:
        gc.unfreeze()
    folder.write_results(results)
    return results


def evaluate(run: RunConfig, model_file: ModelFile) -> None:
    """Evaluate `run.evaluate_from` on the validation and test splits; what the run wrote stays as it is.

    A frozen base in files of other options than the run's lies beside it for as long as this takes.
    """
    assert run.evaluate_from is not None
    progress = checkpoint.load(Path(run.evaluate_from))
    spare_base = Path(run.save_path) / f"base-of-evaluation-{uuid.uuid4().hex}"
    try:
        federation = build(run, model_file, Path(run.evaluate_from), spare_base)
        check_same_parameters(progress.state, federation.initial_state, run.evaluate_from)
        _print_evaluation(federation, progress.state)
        federation.engine.finish()
    finally:
        shutil.rmtree(spare_base, ignore_errors=True)


def _print_evaluation(federation: Federation, state: State) -> None:
    run = federation.run
    display = Display(speaks=federation.engine.is_main, print_freq=run.print_freq)
    for split in ("val", "test"):
        evaluation = evaluate_levels(federation, split, state, lambda: None)
        if evaluation:
            display.table(
                f"{federation.data.name} {split}, {run.evaluate_from}, {run.evalmode}, by {run.scoring}",
                *levels_by_exits(evaluation),
            )


def _earlier_checkpoint(run: RunConfig) -> Path | None:
    """The checkpoint to go on from. A folder that holds a run is not written over."""
    folder = Path(run.resume or run.save_path)
    if folder.resolve() != Path(run.save_path).resolve():
        raise InputError(
            f"--save_path: got {run.save_path}, but --resume goes on in {run.resume}; drop --save_path, "
            "or start a new run from its weights with --init_from."
        )
    path = checkpoint.latest(folder / "checkpoints")
    if path is not None and run.resume is None:
        raise InputError(
            f"--save_path {run.save_path}: holds a run already ({path.name}); "
            "expected --resume to go on with it, or another --save_path."
        )
    return path


def _settle_rank_parts(federation: Federation, folder: RunFolder, progress: Progress) -> None:
    """What ranks of the run before had of a round becomes one checkpoint: there may be other ranks now."""
    if federation.engine.is_main:
        if progress.partial is not None and checkpoint.rank_parts(folder.checkpoints, progress):
            keep = federation.run.keep_last
            checkpoint.save(folder.checkpoints, progress, keep, federation.write_config)
        checkpoint.drop_rank_parts(folder.checkpoints)
    federation.engine.barrier()


def _check_agreement(run: RunConfig, progress: Progress | None, engine: Engine) -> None:
    """Every process must go on with the same run: another machine may see other files."""
    options = {k: v for k, v in to_dict(run).items() if k not in MAY_DIFFER}
    at = None if progress is None else [progress.round, [c["client"] for c in _finished_clients(progress)]]
    found = engine.gather([json.dumps([options, at], sort_keys=True)])
    if len(set(found)) > 1:
        rounds = [json.loads(text)[1] for text in found]
        raise InputError(
            f"launch: processes go on from different runs (round and finished clients by rank: {rounds}); "
            f"expected a --save_path that every machine sees, got {run.save_path}."
        )


def _finished_clients(progress: Progress) -> list[dict[str, Any]]:
    return progress.partial.clients if progress.partial is not None else []


def _final_results(
    federation: Federation, folder: RunFolder, progress: Progress, stop: StopSignal
) -> dict[str, Any]:
    """Test results of the best checkpoint by validation, or of the last round without validation."""
    selected, state = progress.round, progress.state
    if progress.best is not None and progress.best["round"] != progress.round:
        selected = progress.best["round"]
        if federation.engine.is_main:
            state = checkpoint.load(folder.checkpoints / f"round-{selected:04d}").state
        state = federation.engine.broadcast_state(state)
    return {
        "rounds": progress.round,
        "selected_round": selected,
        "selected_by": "validation" if progress.best is not None else "last round",
        "split": "test",
        "evalmode": federation.run.evalmode,
        "data": federation.data.name,
        "levels": evaluate_levels(federation, "test", state, stop.check),
    }


def _print_setup(display: Display, federation: Federation) -> None:
    run, store, data = federation.run, federation.store, federation.data
    sizes = ", ".join(f"{name} {len(examples)}" for name, examples in data.splits.items())
    display.line(
        f"{data.name}: {sizes} examples; {run.num_clients} clients; {run.arch}, --tuning {run.tuning}, "
        f"--recipe {run.recipe}"
    )
    display.line(_how_it_trains(federation))
    example = federation.example_row
    models = store.models
    columns, rows = levels_and_costs(
        (models.slices[level].spec, level_cost(models, level, example)) for level in models.levels
    )
    counts = (str(federation.client_levels.count(level)) for level in models.levels)
    rows = [[*row, count] for row, count in zip(rows, counts, strict=True)]
    display.table("levels", [*columns, "clients"], rows)
    names = run.client_names or [str(client) for client in range(run.num_clients)]
    held = describe(data.splits["train"], federation.clients, data.answers)
    display.table(
        "clients",
        ["client", "level", "patients", "examples", *(data.answers or ())],
        [
            [
                client_title(c.client, names[c.client]),
                federation.client_levels[c.client],
                c.patients,
                c.examples,
                *c.by_label,
            ]
            for c in held
        ],
    )


def _how_it_trains(federation: Federation) -> str:
    """What decides the memory of a process."""
    run, store, engine = federation.run, federation.store, federation.engine
    base = "in memory" if isinstance(store, ResidentStore) else "read from files"
    scales = ", double" if run.quantization == "nf4" and run.double_quant else ""
    base += f" in {run.quantization}{scales}" if run.quantization != "none" else ""
    at = [str(level) for level in store.models.levels if checkpoints(run, level)]
    cached = "on disk" if features_in_files(run) else "in memory"
    parts = {
        f"{engine.num_processes} process(es) on {engine.device}, {engine.launch}": True,
        f"--precision {run.precision}": True,
        f"frozen base {base}": bool(store.models.base_shapes),
        f"image features {cached}": not store.models.has_vision,
        f"checkpointing at level {' '.join(at)}": bool(at),
        f"--optimizer {run.optimizer}": True,
    }
    return "; ".join(part for part, applies in parts.items() if applies)


def _preview(display: Display, federation: Federation, progress: Progress) -> None:
    """What the next round would launch, without launching it; base and features are made as for a run."""
    jobs = Jobs(trainer_of(federation), federation)
    if progress.round >= federation.run.num_rounds:
        return display.line("no round is left: nothing would be launched")
    _, todo, _ = next_tasks(federation, progress, clock_costs(federation))
    for line in jobs.preview(todo) if todo else ["no client of the round is left: nothing would be launched"]:
        display.line(line)


def _print_results(display: Display, folder: RunFolder, results: dict[str, Any]) -> None:
    title = (
        f"{results['data']} {results['split']}, round {results['selected_round']} ({results['selected_by']})"
    )
    display.table(title, *levels_by_exits(results["levels"]))
    display.line(f"results      {folder.results}")
    display.line(f"rounds       {folder.metrics}")
    display.line(f"config       {folder.path / 'run.json'}")
    display.line(f"checkpoint   {folder.checkpoints / 'round-{:04d}'.format(results['selected_round'])}")
