"""Parallel executor: each rank trains other clients, alone; their sums meet when all are done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from scalefl.contracts import ClientTask, Outcome, State
from scalefl.engine.launch import Engine
from scalefl.federation import workload
from scalefl.federation.client import ClientTrainer
from scalefl.federation.sequential import Sequential
from scalefl.federation.setup import Federation
from scalefl.models.cost import level_cost


class Parallel:
    splits = True

    def __init__(self, trainer: ClientTrainer, federation: Federation) -> None:
        """Raises InputError in a launch whose ranks cannot train apart."""
        launch = trainer.engine
        assert isinstance(launch, Engine)
        self._rank, self._num_ranks = launch.rank, launch.num_processes
        self._trainer = dataclasses.replace(trainer, engine=launch.alone())
        self._fed = federation
        self._mine = Sequential(self._trainer, federation)

    def train(self, tasks: Sequence[ClientTask], global_state: State, lr: float) -> Iterator[Outcome]:
        """The outcomes of this rank's share of the tasks."""
        costs = {t.client: float(workload.macs(self._trainer.run, t, self._macs_per_example)) for t in tasks}
        share = workload.deal(tasks, costs, self._num_ranks)[self._rank]
        return self._mine.train(share, global_state, lr)

    def end_round(self) -> None:
        """A round leaves nothing behind."""

    @functools.cached_property
    def _macs_per_example(self) -> dict[int, int]:
        models, example = self._fed.store.models, self._fed.example_row
        return {level: level_cost(models, level, example).macs for level in models.levels}
