"""Sequential executor: all ranks train one client at a time; clients of one level share one sub-model and
engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from scalefl.config.derived import checkpoints
from scalefl.contracts import ClientTask, ClientUpdate, State
from scalefl.engine.session import Session
from scalefl.federation.client import ClientTrainer
from scalefl.models.store import Store


class Sequential:
    def __init__(self, trainer: ClientTrainer, store: Store) -> None:
        self._trainer, self._store = trainer, store

    def order(self, tasks: Sequence[ClientTask]) -> list[ClientTask]:
        """Tasks grouped by level, so that a sub-model is built once per level and round."""
        return sorted(tasks, key=lambda task: (task.level, task.client))

    def train(self, tasks: Sequence[ClientTask], global_state: State, lr: float) -> Iterator[ClientUpdate]:
        """Train every task and yield its update as soon as it is there; on ranks other than 0 deltas are
        empty.
        """
        ordered = self.order(tasks)
        for level in dict.fromkeys(task.level for task in ordered):
            yield from self._level([t for t in ordered if t.level == level], level, global_state, lr)

    def _level(
        self, tasks: Sequence[ClientTask], level: int, global_state: State, lr: float
    ) -> Iterator[ClientUpdate]:
        """One level's clients; its model and engine are gone before the next level's are made."""
        sent = self._store.models.level_state(level, global_state)
        session = self._trainer.engine.session(self._model(level, global_state), self._trainer.run)
        try:
            for task in tasks:
                yield self._train(session, task, sent, lr)
        finally:
            session.close()

    def _model(self, level: int, global_state: State) -> Any:
        place = self._trainer.engine.place
        model: Any = self._store.submodel(level, global_state, own=True, place=place)
        if checkpoints(self._trainer.run, level):
            model.activation_checkpointing_enable()
        return model

    def _train(self, session: Session, task: ClientTask, sent: State, lr: float) -> ClientUpdate:
        try:
            return self._trainer.train(session, task, sent, lr)
        except Exception as error:
            error.add_note(f"while training client {task.client} (level {task.level}) in round {task.round}")
            raise
