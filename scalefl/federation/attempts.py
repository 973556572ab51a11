"""What makes an update unusable, and how a client is tried again in the same process."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scalefl.config.derived import checkpoints, micro_batch_size
from scalefl.config.options import RunConfig
from scalefl.contracts import (
    ClientFailure,
    ClientTask,
    ClientUpdate,
    InputError,
    Interrupted,
    Outcome,
    State,
    Unfinished,
)
from scalefl.engine.session import Session
from scalefl.federation.client import ClientTrainer
from scalefl.models.store import Store

log = logging.getLogger("scalefl")

OUT_OF_MEMORY = (
    *("memoryerror:", "out of memory", "out_of_memory", "outofmemoryerror"),
    *("can't allocate memory", "cannot allocate memory"),
)
"""What Python says, CUDA's allocator, PyTorch's on the CPU, bitsandbytes, and SLURM."""

Shapes = Mapping[str, tuple[int, ...]]


def name_of(task: ClientTask) -> str:
    return f"client {task.client} (level {task.level})"


def tell_failure(task: ClientTask, attempt: int, attempts: int, cause: str) -> None:
    log.warning(
        "%s, round %d, attempt %d of %d: %s; %s",
        *(name_of(task), task.round, attempt, attempts, cause),
        "it is tried again" if attempt < attempts else "it is left out of the round",
    )


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no text"
    return f"{type(error).__name__}: {text[:300]}"


def lacks_memory(cause: str) -> bool:
    """Whether a failure, in its own words, a job's last ones or SLURM's, was a lack of memory."""
    return any(words in cause.lower() for words in OUT_OF_MEMORY)


def unusable(delta: Mapping[str, Tensor], shapes: Shapes) -> str | None:
    """Why an update cannot be merged: other shapes than its level's, or values that are not finite."""
    for name in sorted(delta.keys() | shapes.keys()):
        got, expected = tuple(delta[name].shape) if name in delta else "nothing", shapes.get(name, "nothing")
        if got != expected:
            return f"update is of another level: {name} has shape {got}; expected {expected}"
    for name, tensor in delta.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"update is not finite in {name}"
    return None


def halved(run: RunConfig, num_processes: int) -> int:
    """Half of the examples of a pass, or as few as there can be: the step stays one of as many examples."""
    size = micro_batch_size(run, num_processes)
    fitting = [half for half in range(size // 2, 0, -1) if run.batch_size % (half * num_processes) == 0]
    return fitting[0] if fitting else size


def _in_passes_of(trainer: ClientTrainer, size: int) -> ClientTrainer:
    return dataclasses.replace(trainer, run=dataclasses.replace(trainer.run, micro_batch_size=size))


class Bench:
    """The session on which one level's clients train in turn; a failure makes it anew.

    A context manager: at its end the session is gone.
    """

    def __init__(self, trainer: ClientTrainer, store: Store, level: int, sent: State) -> None:
        """`sent` is the level's slice of the global trainable state."""
        self._trainer, self._store, self._level, self._sent = trainer, store, level, sent
        self._shapes = store.models.slices[level].trainable_shapes
        self._session: Session | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: Any) -> None:
        self._drop_session()

    def train(self, task: ClientTask, lr: float, *, micro_batch_size: int | None = None) -> Outcome:
        """A client's update, or its failure after `--client_retries` further attempts.

        `micro_batch_size` takes the place of the run's. Of several processes all fail when one does; raises
        Unfinished where they cannot agree on it.
        """
        trainer = self._trainer
        if micro_batch_size is not None:
            trainer = _in_passes_of(trainer, micro_batch_size)
        for attempt in range(1, trainer.run.client_retries + 2):
            update, problem = self._attempt(trainer, task, lr)
            problem = trainer.engine.agree(problem)
            if problem is None and update is not None:
                return update
            cause = problem or "no update"
            tell_failure(task, attempt, trainer.run.client_retries + 1, cause)
            trainer.on_failure(task, cause)
            self._drop_session()
            if lacks_memory(cause):
                trainer = _in_passes_of(trainer, halved(trainer.run, trainer.engine.num_processes))
        return ClientFailure(client=task.client, level=task.level, num_examples=len(task.example_ids))

    def _attempt(
        self, trainer: ClientTrainer, task: ClientTask, lr: float
    ) -> tuple[ClientUpdate | None, str | None]:
        """An update, or what went wrong."""
        try:
            with trainer.engine.watchdog.client(f"{name_of(task)}, round {task.round}"):
                if self._session is None:
                    self._session = self._new_session()
                update = trainer.train(self._session, task, self._sent, lr)
        except (Interrupted, InputError, Unfinished):
            raise
        except Exception as error:
            log.debug("%s", name_of(task), exc_info=True)
            return None, in_one_line(error)
        return update, unusable(update.delta, self._shapes) if trainer.engine.is_main else None

    def _new_session(self) -> Session:
        engine, run = self._trainer.engine, self._trainer.run
        model: Any = self._store.submodel(self._level, self._sent, own=True, place=engine.place, is_cut=True)
        if checkpoints(run, self._level):
            model.activation_checkpointing_enable()
        return engine.session(model, run)

    def _drop_session(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
