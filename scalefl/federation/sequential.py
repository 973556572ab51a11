"""Sequential executor: all ranks train one client at a time; clients of one level share one sub-model and
engine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from scalefl.config.derived import checkpoints
from scalefl.contracts import ClientTask, Outcome, State
from scalefl.engine.session import Session
from scalefl.federation.attempts import Bench
from scalefl.federation.client import ClientTrainer
from scalefl.models.store import Store


class Sequential:
    splits = False

    def __init__(self, trainer: ClientTrainer, store: Store) -> None:
        self._trainer, self._store = trainer, store

    def order(self, tasks: Sequence[ClientTask]) -> list[ClientTask]:
        """Tasks grouped by level, so that a sub-model is built once per level and round."""
        return sorted(tasks, key=lambda task: (task.level, task.client))

    def train(self, tasks: Sequence[ClientTask], global_state: State, lr: float) -> Iterator[Outcome]:
        """Every task's outcome as soon as it is there; on ranks other than 0 deltas are empty."""
        ordered = self.order(tasks)
        for level in dict.fromkeys(task.level for task in ordered):
            yield from self._level([t for t in ordered if t.level == level], level, global_state, lr)

    def _level(
        self, tasks: Sequence[ClientTask], level: int, global_state: State, lr: float
    ) -> Iterator[Outcome]:
        """One level's clients; its model and engine are gone before the next level's are made."""
        models = self._store.models
        sent, shapes = models.level_state(level, global_state), models.slices[level].trainable_shapes
        make_session = functools.partial(self._session, level, global_state)
        with Bench(self._trainer, make_session, sent, shapes) as bench:
            for task in tasks:
                yield bench.train(task, lr)

    def _session(self, level: int, global_state: State) -> Session:
        engine, run = self._trainer.engine, self._trainer.run
        model: Any = self._store.submodel(level, global_state, own=True, place=engine.place)
        if checkpoints(run, level):
            model.activation_checkpointing_enable()
        return engine.session(model, run)
