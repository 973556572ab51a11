"""Sequential executor: all ranks train one client at a time; clients of one level share one sub-model and
engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scalefl.contracts import ClientTask, Outcome, State
from scalefl.federation.attempts import Bench
from scalefl.federation.client import ClientTrainer
from scalefl.federation.setup import Federation


class Sequential:
    splits = False

    def __init__(self, trainer: ClientTrainer, federation: Federation) -> None:
        self._trainer, self._store = trainer, federation.store

    def order(self, tasks: Sequence[ClientTask]) -> list[ClientTask]:
        """Tasks grouped by level, so that a sub-model is built once per level and round."""
        return sorted(tasks, key=lambda task: (task.level, task.client))

    def train(self, tasks: Sequence[ClientTask], global_state: State, lr: float) -> Iterator[Outcome]:
        """Every task's outcome as soon as it is there; on ranks other than 0 deltas are empty."""
        ordered = self.order(tasks)
        for level in dict.fromkeys(task.level for task in ordered):
            yield from self._level([t for t in ordered if t.level == level], level, global_state, lr)

    def end_round(self) -> None:
        """A round leaves nothing behind."""

    def _level(
        self, tasks: Sequence[ClientTask], level: int, global_state: State, lr: float
    ) -> Iterator[Outcome]:
        """One level's clients; its model and engine are gone before the next level's are made."""
        sent = self._store.models.level_state(level, global_state)
        with Bench(self._trainer, self._store, level, sent) as bench:
            for task in tasks:
                yield bench.train(task, lr)
