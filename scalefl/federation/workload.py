"""How much work a client's round is, in advance: for balance between ranks, and for the virtual clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scalefl.config.options import RunConfig
from scalefl.contracts import ClientTask


def examples_trained(run: RunConfig, num_examples: int) -> int:
    """Examples that pass through the model in a client's round."""
    if run.local_steps is not None:
        return run.local_steps * min(run.batch_size, num_examples)
    return run.num_epoch * num_examples


def macs(run: RunConfig, task: ClientTask, macs_per_example: Mapping[int, int]) -> int:
    """Multiply-accumulates of the forward passes of a client's round; `macs_per_example` is by level."""
    return examples_trained(run, len(task.example_ids)) * macs_per_example[task.level]


def deal(tasks: Sequence[ClientTask], costs: Mapping[int, float], num_ranks: int) -> list[list[ClientTask]]:
    """Per rank, the tasks it trains: longest first, each to the rank with the least to do so far.

    `costs` is by client. Of ranks with as little to do, one that has the level already gets it.
    """
    ranks: list[list[ClientTask]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for task in sorted(tasks, key=lambda t: (-costs[t.client], t.level, t.client)):
        lacks_level = [all(t.level != task.level for t in mine) for mine in ranks]
        rank = min(range(num_ranks), key=lambda r: (loads[r], lacks_level[r], r))
        ranks[rank].append(task)
        loads[rank] += costs[task.client]
    return ranks
