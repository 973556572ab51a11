"""`scalefl client`: train the tasks in files, for the jobs executor or on a site's own data, and answer in
files.

Of the frozen base a client holds its level's slice alone, read from disk; its data never enter an answer.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scalefl.batches import Batcher
from scalefl.config.clientoptions import ClientOptions
from scalefl.config.derived import adjusts_logits, caches_features
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.saved import from_dict
from scalefl.contracts import (
    ClientFailure,
    ClientTask,
    ClientUpdate,
    DataSplits,
    Example,
    InputError,
    Outcome,
    State,
    Unfinished,
)
from scalefl.data.images import decode_all
from scalefl.engine.launch import Engine, telling_others
from scalefl.features import INDEX, FeatureFiles, image_features
from scalefl.federation import exchange
from scalefl.federation.attempts import Bench, name_of
from scalefl.federation.client import ClientTrainer
from scalefl.federation.exchange import BadFileError, Note
from scalefl.federation.job import JOB_ENDS
from scalefl.federation.setup import check_launch, read_data
from scalefl.federation.start import client_store
from scalefl.federation.stop import StopSignal
from scalefl.models.store import Store
from scalefl.registry import resolve

log = logging.getLogger("scalefl")


@telling_others()
def work(options: ClientOptions) -> None:
    """Train every task, and answer each as soon as it is done; a client that fails is answered too.

    Raises InputError for files that are no tasks, or that do not belong together.
    """
    begun = time.time()
    tasks = [_read_task(Path(path)) for path in options.task]
    _check_together(tasks)
    sent, model_folder = _carried(tasks[0])
    if options.out is not None and not Path(options.out).absolute().parent.is_dir():
        raise InputError(f"--out {options.out}: its folder is not there; expected one to write into.")
    run, model_file = _run_of(tasks[0], options)
    engine = Engine(run, next_step=JOB_ENDS)
    check_launch(run, engine)
    family = resolve("arch", run.arch)
    processor = family.load_processor(str(model_folder))
    store = client_store(run, model_file, family, model_folder, tasks[0].content, engine)
    data = read_data(run)
    train, places = _examples(data, tasks, own=options.data_root is not None)
    batcher = _batcher(run, engine, store, processor, data, train, model_folder)
    closed = data.answers is not None
    answers = tuple(tuple(processor.encode_answer(answer)) for answer in data.answers or ())
    with StopSignal(engine) as stop:
        trainer = ClientTrainer(
            run=run,
            engine=engine,
            batcher=batcher,
            answer_ids=answers if adjusts_logits(run, closed_answers=closed) else None,
            vocab_size=store.models.vocab_size,
            check_stop=stop.check,
        )
        failed = _train(trainer, store, tasks, sent, places, options, begun)
    engine.finish()
    if failed and _by_hand(options):
        raise Unfinished("; ".join(failed))


def _by_hand(options: ClientOptions) -> bool:
    """Whether a person started it, who wants to know; a run reads the answers themselves."""
    return options.out is not None or options.data_root is not None


def _train(
    trainer: ClientTrainer,
    store: Store,
    tasks: Sequence[Note],
    sent: State,
    places: Sequence[tuple[int, ...]],
    options: ClientOptions,
    begun: float,
) -> list[str]:
    """Answer every task; what became of those that failed."""
    failed: list[str] = []
    causes: list[str] = []
    trainer = dataclasses.replace(trainer, on_failure=lambda task, cause: causes.append(cause))
    out = None if options.out is None else Path(options.out)
    level, times = tasks[0].content["level"], {"begun": begun, "ready": time.time()}
    with Bench(trainer, store, level, sent) as bench:
        for note, ids in zip(tasks, places, strict=True):
            if out is None and _is_answered(note):  # by an earlier start of this job, which was requeued
                continue
            task = ClientTask(
                client=note.content["client"], level=level, round=note.content["round"], example_ids=ids
            )
            micro = note.content["micro_batch_size"]
            outcome = bench.train(task, note.content["lr"], micro_batch_size=micro)
            if trainer.engine.is_main:
                times["trained"] = time.time()
                path = _answer(note, outcome, causes, out, times)
                if _by_hand(options):
                    with_it = " and .safetensors" if isinstance(outcome, ClientUpdate) else ""
                    log.info("%s: the answer to carry back is %s%s", name_of(task), path, with_it)
            if isinstance(outcome, ClientFailure):
                failed.append(f"{name_of(task)} failed: {causes[-1]}")
    return failed


def _is_answered(note: Note) -> bool:
    try:
        path = exchange.answer_path(note.path, "update")
        exchange.read_note(path, "update", answers=note.content["task"]).tensors()
    except (BadFileError, OSError):
        return False
    return True


def _answer(
    note: Note, outcome: Outcome, causes: Sequence[str], out: Path | None, times: Mapping[str, float]
) -> Path:
    """Write it, and say where; `times` are seconds since the epoch, for whoever looks at where time goes."""
    answered = {
        "task": note.content["task"],
        "client": note.content["client"],
        "round": note.content["round"],
    }
    if isinstance(outcome, ClientUpdate):
        path = out or exchange.answer_path(note.path, "update")
        tensors = exchange.write_tensors(path.with_suffix(".safetensors"), outcome.delta)
        content = {
            "num_examples": outcome.num_examples,
            "metrics": dict(outcome.metrics),
            "batches": outcome.batches,
            "times": dict(times),
            "tensors": tensors,
        }
        exchange.write_note(path, "update", {**answered, **content})
        exchange.answer_path(path, "failure").unlink(missing_ok=True)  # of an earlier try
    else:
        beside = note.path if out is None else out
        path = exchange.answer_path(beside, "failure")
        exchange.write_note(path, "failure", {**answered, "cause": causes[-1]})
    return path


def _read_task(path: Path) -> Note:
    try:
        return exchange.read_note(path, "task")
    except (BadFileError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"--task {path}: {reason}; expected a task that a run with --executor jobs wrote, as it wrote it."
        ) from error


def _carried(task: Note) -> tuple[State, Path]:
    """What a task names beside itself: the level's trainable slice, and the model's folder."""
    try:
        sent = task.tensors()
    except BadFileError as error:
        raise InputError(
            f"--task {task.path}: {error}; expected the file of the run beside it, carried whole."
        ) from error
    folder = task.path.parent / task.content["model"]
    if not (folder / "config.json").is_file():
        raise InputError(
            f"--task {task.path}: needs {folder}, which is not there; carry the run's jobs/model/."
        )
    return sent, folder


def _check_together(tasks: Sequence[Note]) -> None:
    first = tasks[0].content
    for task in tasks[1:]:
        if any(task.content[name] != first[name] for name in ("run", "round", "level", "tensors")):
            raise InputError(f"--task {task.path}: of another run, round or level than {tasks[0].path}.")


def _run_of(task: Note, options: ClientOptions) -> tuple[RunConfig, ModelFile]:
    """The run's options, but for what this machine has of its own."""
    content = task.content
    run = from_dict(RunConfig, content["run"])
    its_own = Path(run.save_path).resolve() / "jobs"  # else a site's folder of that name is another run's
    is_here = task.path.resolve().is_relative_to(its_own)
    beside_model = task.path.parent / content["model"] / ".."  # a base that is made serves every round
    here = options.save_path or (run.save_path if is_here else str(beside_model.resolve()))
    run = dataclasses.replace(run, save_path=here, client_retries=0, executor="sequential", report_to=())
    if options.use_gpu is not None:
        run = dataclasses.replace(run, use_gpu=options.use_gpu)
    if options.init_from is not None:
        content["origin"]["folder"] = options.init_from
    if options.data_root is None and run.data_here == "held_out":
        raise InputError(
            "--data_root: nothing given, and the run itself has no training images (--data_here held_out); "
            "expected the folder of this client's own."
        )
    if options.data_root is not None:
        run = dataclasses.replace(
            run, data_root=options.data_root, data_here="train", use_valid=True, feature_folder=None
        )
    return run, from_dict(ModelFile, content["model_file"])


def _examples(
    data: DataSplits, tasks: Sequence[Note], *, own: bool
) -> tuple[list[Example], list[tuple[int, ...]]]:
    """The examples of all tasks, and where those of each task are among them."""
    train = data.splits["train"]
    ids_of = [tuple(range(len(train))) if own else tuple(task.content["example_ids"]) for task in tasks]
    needed = sorted({i for ids in ids_of for i in ids})
    if needed and needed[-1] >= len(train):
        raise InputError(
            f"{data.name}: {len(train)} training examples here, the task names number {needed[-1]}; expected "
            "the run's own data, or --data-root for those of this client alone."
        )
    if not all(ids_of):
        raise InputError(f"{data.name}: no training examples for the task; expected one or more.")
    at = {i: place for place, i in enumerate(needed)}
    return [train[i] for i in needed], [tuple(at[i] for i in ids) for ids in ids_of]


def _batcher(
    run: RunConfig,
    engine: Engine,
    store: Store,
    processor: Any,
    data: DataSplits,
    examples: Sequence[Example],
    model_folder: Path,
) -> Batcher:
    decode = functools.partial(
        decode_all, read_image=data.read_image, prepare=processor.resize, workers=run.workers
    )
    features: Mapping[str, Any] | None = None
    if caches_features(run):
        index = model_folder / INDEX
        if index.is_file() and run.data_here != "train":
            features = FeatureFiles.read_index(index)
            store.drop_vision()
        else:
            features = image_features(run, engine, store, processor, examples, decode)
    pixels = decode(examples) if features is None else {}
    return Batcher(processor, examples, pixels, engine.device, features)
