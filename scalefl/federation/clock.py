"""The virtual clock: which clients of a cohort would deliver, and when, on the machines that they have.

A client's round takes its slice's bytes each way over its bandwidth, and 6 operations for every
multiply-accumulate (2 each of the forward pass, of the gradients of activations and of those of weights) over
its FLOP/s. Nothing is slowed down: clients that would not deliver are not trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scalefl.config.options import RunConfig
from scalefl.contracts import ClientTask
from scalefl.federation import workload
from scalefl.models.cost import LevelCost
from scalefl.seeding import numpy_rng

OPERATIONS_PER_MAC = 6

DROPPED_OUT, LATE = "dropped out", "late"


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """One round, as the virtual clock has it."""

    seconds: Mapping[int, float]
    """Client -> its simulated seconds; empty without a clock."""
    missing: Mapping[int, str]
    """Client -> why it does not deliver."""
    round_seconds: float | None
    """Until the last one delivers, or the deadline; None without a clock."""


def simulate(run: RunConfig, tasks: Sequence[ClientTask], costs: Mapping[int, LevelCost]) -> Simulation:
    """A round of these tasks; `costs` is by level. `--min_clients` deliver at least, the fastest first."""
    seconds = {
        task.client: client_seconds(run, task, costs[task.level]) for task in tasks if run.client_flops
    }
    missing: dict[int, str] = {}
    for task in tasks:
        draw = numpy_rng(run.seed, "client dropout", round=task.round, client=task.client).random()
        if draw < run.dropout_rate:
            missing[task.client] = DROPPED_OUT
        elif run.round_deadline is not None and seconds[task.client] > run.round_deadline:
            missing[task.client] = LATE
    fastest = sorted((seconds.get(task.client, 0.0), task.client) for task in tasks)
    for _, client in fastest:
        if len(tasks) - len(missing) >= max(run.min_clients, 1):
            break
        missing.pop(client, None)
    delivered = [seconds[client] for client in seconds if client not in missing]
    deadline = run.round_deadline if run.round_deadline is not None else math.inf
    waits = any(why == LATE for why in missing.values()) or bool(run.dropout_rate and missing)
    longest = max(delivered, default=0.0)
    round_seconds = max(longest, deadline) if waits and math.isfinite(deadline) else longest
    return Simulation(seconds=seconds, missing=missing, round_seconds=round_seconds if seconds else None)


def client_seconds(run: RunConfig, task: ClientTask, cost: LevelCost) -> float:
    """Simulated seconds of a client's round: its slice down, its training, its change up."""
    speed = run.level_speeds[task.level - 1] if run.level_speeds else 1.0
    macs = workload.macs(run, task, {task.level: cost.macs})
    training = OPERATIONS_PER_MAC * macs / (_of_client(run.client_flops, task.client) * speed)
    if not run.client_bandwidth:
        return training
    return training + 2 * cost.bytes_each_way / _of_client(run.client_bandwidth, task.client)


def _of_client(values: Sequence[float], client: int) -> float:
    return values[client] if len(values) > 1 else values[0]
