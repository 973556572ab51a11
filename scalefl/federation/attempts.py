"""What makes an update unusable, and how a client is tried again in the same process."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from scalefl.config.derived import micro_batch_size
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

log = logging.getLogger("scalefl")

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""What errors say that are no MemoryError: of CUDA's allocator, PyTorch's on the CPU, bitsandbytes."""

Shapes = Mapping[str, tuple[int, ...]]


def name_of(task: ClientTask) -> str:
    return f"client {task.client} (level {task.level})"


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no text"
    return f"{type(error).__name__}: {text[:300]}"


def is_memory_error(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)
    )


def unusable(delta: Mapping[str, Tensor], shapes: Shapes) -> str | None:
    """Why an update cannot be merged: it is of another level's shapes, or holds values that are not finite."""
    for name in sorted(delta.keys() | shapes.keys()):
        got, expected = tuple(delta[name].shape) if name in delta else "nothing", shapes.get(name, "nothing")
        if got != expected:
            return f"update is of another level: {name} has shape {got}; expected {expected}"
    for name, tensor in delta.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"update is not finite in {name}"
    return None


def with_less_memory(run: RunConfig, num_processes: int) -> RunConfig:
    """The same steps in passes of half as many examples, or as few as there can be."""
    half = micro_batch_size(run, num_processes) // 2
    fitting = [size for size in range(half, 0, -1) if run.batch_size % (size * num_processes) == 0]
    return dataclasses.replace(run, micro_batch_size=fitting[0]) if fitting else run


class Bench:
    """The session on which one level's clients train in turn; a failure makes it anew.

    A context manager: at its end the session is gone.
    """

    def __init__(
        self, trainer: ClientTrainer, make_session: Callable[[], Session], sent: State, shapes: Shapes
    ) -> None:
        self._trainer, self._make, self._sent, self._shapes = trainer, make_session, sent, shapes
        self._session: Session | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: Any) -> None:
        self._drop_session()

    def train(self, task: ClientTask, lr: float) -> Outcome:
        """A client's update, or its failure after `--client_retries` further attempts.

        Of several processes all fail when one does; Unfinished where they cannot agree on it.
        """
        failures: list[str] = []
        trainer = self._trainer
        for attempt in range(1, trainer.run.client_retries + 2):
            update, problem, lacks_memory = self._attempt(trainer, task, lr)
            problem = trainer.engine.agree(problem)
            if problem is None and update is not None:
                return dataclasses.replace(update, failures=tuple(failures))
            failures.append(problem or "no update")
            log.warning(
                "%s, round %d, attempt %d of %d: %s",
                *(name_of(task), task.round, attempt, trainer.run.client_retries + 1, failures[-1]),
            )
            self._drop_session()
            if lacks_memory:
                run = with_less_memory(trainer.run, trainer.engine.num_processes)
                trainer = dataclasses.replace(trainer, run=run)
        log.warning("%s is left out of round %d", name_of(task), task.round)
        return ClientFailure(
            client=task.client,
            level=task.level,
            num_examples=len(task.example_ids),
            failures=tuple(failures),
        )

    def _attempt(
        self, trainer: ClientTrainer, task: ClientTask, lr: float
    ) -> tuple[ClientUpdate | None, str | None, bool]:
        """An update or what went wrong, and whether that was a lack of memory."""
        try:
            with trainer.engine.watchdog.client(f"{name_of(task)}, round {task.round}"):
                if self._session is None:
                    self._session = self._make()
                update = trainer.train(self._session, task, self._sent, lr)
        except (Interrupted, InputError, Unfinished):
            raise
        except Exception as error:
            log.debug("%s", name_of(task), exc_info=True)
            return None, in_one_line(error), is_memory_error(error)
        return update, unusable(update.delta, self._shapes) if trainer.engine.is_main else None, False

    def _drop_session(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
