"""The round loop: sample a cohort, train it, merge, evaluate, checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from scalefl import checkpoint
from scalefl.checkpoint import Partial, Progress
from scalefl.config.options import RunConfig
from scalefl.console import Display
from scalefl.contracts import (
    Aggregator,
    ClientTask,
    ClientUpdate,
    Executor,
    Interrupted,
    Outcome,
    State,
    Unfinished,
)
from scalefl.federation.client import ClientTrainer
from scalefl.federation.clock import Simulation, simulate
from scalefl.federation.records import RunFolder
from scalefl.federation.setup import Federation
from scalefl.federation.stop import StopSignal
from scalefl.models.cost import LevelCost, level_cost
from scalefl.registry import resolve
from scalefl.report import selection_value, summary
from scalefl.seeding import numpy_rng

log = logging.getLogger("scalefl")


class RoundLoop:
    def __init__(self, federation: Federation, folder: RunFolder, display: Display, stop: StopSignal) -> None:
        self._fed, self._run, self._engine = federation, federation.run, federation.engine
        self._folder, self._display, self._stop = folder, display, stop
        self._aggregation = resolve("aggregation", self._run.aggregation)
        trainer = trainer_of(
            federation, check_stop=stop.check, on_step=self._on_step, on_failure=self._on_failure
        )
        self._executor: Executor = resolve("executor", self._run.executor)(trainer, federation)
        self._clients_done = 0
        self._failures: dict[str, list[str]] = {}
        """By client (its number as text): why attempts failed, until it is taken in."""
        self._is_gathered = False
        """Whether rank 0 has what every rank had of the round."""

    def round(self, before: Progress) -> Progress:
        """One round: from the progress before it to the progress after it, checkpointed.

        Raises Interrupted when a stop is asked for, after writing a checkpoint to go on from.
        """
        number, started = before.round + 1, time.perf_counter()
        tasks, todo, simulation = next_tasks(self._fed, before, self._costs)
        lr = learning_rate(self._run, number)
        merge, clients = self._begin(before)
        self._display.round_starts(number, self._run.num_rounds, len(tasks))
        try:
            self._train(before, todo, lr, merge, clients)
            records = self._gather(merge, clients)
            self._check_delivered(number, records)
            state = self._merged(merge, before.state)
            training_seconds = time.perf_counter() - started
            evaluation = self._evaluate(number, state)
        except (Interrupted, Unfinished):
            self._save_part(before, merge, clients)
            self._engine.leave()
            raise
        finally:
            self._display.stop()
        best = self._best(before.best, number, evaluation)
        seconds = {"seconds": time.perf_counter() - started, "training_seconds": training_seconds}
        record = self._record(number, lr, records, evaluation, seconds, simulation)
        self._display.line(_round_line(record, self._run.num_rounds))
        metrics_bytes = self._folder.append_metrics(record, at=before.metrics_bytes)
        self._track(record)
        after = dataclasses.replace(
            before, state=state, round=number, best=best, metrics_bytes=metrics_bytes, partial=None
        )
        self._save(after)
        self._executor.end_round()
        return after

    def _begin(self, before: Progress) -> tuple[Aggregator, list[dict[str, Any]]]:
        """The merge, with what a checkpoint in mid-round has of it, and the records of its clients."""
        plans = {level: part.trainable_plan for level, part in self._fed.store.models.slices.items()}
        merge: Aggregator = self._aggregation(before.state, plans, self._run.weighting)
        so_far = before.partial or Partial(sums={}, clients=[])
        if so_far.sums:
            merge.sums = so_far.sums
        self._failures = {client: list(causes) for client, causes in so_far.failures.items()}
        self._is_gathered = False
        self._clients_done = len(so_far.clients)
        return merge, list(so_far.clients) if self._engine.is_main or not self._executor.splits else []

    def _train(
        self,
        before: Progress,
        tasks: Sequence[ClientTask],
        lr: float,
        merge: Aggregator,
        clients: list[dict[str, Any]],
    ) -> None:
        """Take in every outcome as it comes, with a checkpoint every `--save_every_seconds`."""
        saved_at = time.monotonic()
        for outcome in self._outcomes(tasks, before.state, lr):
            clients.append(self._take(merge, outcome))
            self._clients_done += 1
            del outcome  # else it stays in memory while the next client trains
            if time.monotonic() - saved_at > self._run.save_every_seconds:
                self._save_part(before, merge, clients)
                saved_at = time.monotonic()

    def _outcomes(self, tasks: Sequence[ClientTask], state: State, lr: float) -> Iterator[Outcome]:
        """The executor's; ranks with clients of their own stop or go on together once they have trained."""
        signum = 0
        try:
            yield from self._executor.train(tasks, state, lr)
        except Interrupted as stop:
            if not self._executor.splits:
                raise
            signum = stop.signum
        if self._executor.splits and (signum := self._engine.meet(signum, lambda: self._stop.received)):
            raise Interrupted(signum)

    def _take(self, merge: Aggregator, outcome: Outcome) -> dict[str, Any]:
        """Add an update to the sums of the rank that has it; the client's record."""
        record = {
            "client": outcome.client,
            "level": outcome.level,
            "examples": outcome.num_examples,
            "delivered": isinstance(outcome, ClientUpdate),
            "failures": self._failures.pop(str(outcome.client), []),
        }
        if self._executor.splits:
            record["rank"] = self._engine.rank
        if isinstance(outcome, ClientUpdate):
            if outcome.delta:
                merge.add(outcome)
            # JSON has no NaN, which a client that diverged reports as its loss.
            metrics = {n: value if math.isfinite(value) else None for n, value in outcome.metrics.items()}
            record |= {"batches": outcome.batches, **metrics}
        return record

    def _gather(self, merge: Aggregator, clients: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Every rank gets all records. Where ranks trained clients of their own rank 0 gets what they had,
        and they have nothing to save any more.
        """
        if not self._executor.splits:
            return clients
        merge.sums = self._engine.sum_to_main(merge.sums)
        records = sorted(self._engine.gather(clients), key=lambda record: record["client"])
        clients[:] = records if self._engine.is_main else []
        self._failures, self._is_gathered = {}, True
        return clients if self._engine.is_main else records

    def _check_delivered(self, number: int, clients: list[dict[str, Any]]) -> None:
        """Raise Unfinished where too few delivered; those that failed are to be tried once more."""
        delivered = [record for record in clients if record["delivered"]]
        if len(delivered) < self._run.min_clients:
            failures = [text for record in clients for text in record["failures"]]
            if self._engine.is_main:
                self._failures |= {str(c["client"]): c["failures"] for c in clients if not c["delivered"]}
            clients[:] = delivered
            raise Unfinished(
                f"round {number}: {len(delivered)} client(s) delivered, --min_clients is "
                f"{self._run.min_clients}; the last failure: {failures[-1] if failures else 'none'}"
            )

    def _merged(self, merge: Aggregator, before: State) -> State:
        """Rank 0 merges, every rank gets the result."""
        state = (
            merge.finish()
            if self._engine.is_main
            else {name: torch.empty_like(t) for name, t in before.items()}
        )
        return self._engine.broadcast_state(state)

    def _evaluate(self, number: int, state: State) -> dict[str, Any] | None:
        if number % self._run.eval_every and number != self._run.num_rounds:
            return None
        split = "val" if self._run.use_valid else "test"
        return {"split": split, "levels": evaluate_levels(self._fed, split, state, self._stop.check)}

    def _best(self, best: dict[str, Any] | None, number: int, evaluation: dict[str, Any] | None) -> Any:
        """The validation split chooses; the test split never does."""
        if evaluation is None or evaluation["split"] != "val":
            return best
        value = selection_value(evaluation["levels"])
        return {"round": number, "value": value} if best is None or value > best["value"] else best

    @functools.cached_property
    def _costs(self) -> dict[int, LevelCost]:
        return clock_costs(self._fed)

    def _record(
        self,
        number: int,
        lr: float,
        clients: list[dict[str, Any]],
        evaluation: Any,
        seconds: dict[str, float],
        simulation: Simulation,
    ) -> dict[str, Any]:
        kept = [c for c in clients if c["delivered"]]
        if not kept:
            log.warning("round %d: no client delivered; the model stays as it was", number)
        losses = [(c["loss"], c["examples"]) for c in kept if c["loss"] is not None and c["examples"]]
        slice_bytes = {
            level: self._fed.store.models.slice_bytes(level) for level in self._fed.store.models.slices
        }
        return {
            "round": number,
            "lr": lr,
            "train_loss": sum(loss * n for loss, n in losses) / sum(n for _, n in losses) if losses else None,
            "left_out": len(clients) - len(kept),
            "bytes_down": sum(
                slice_bytes[c["level"]] * (len(c["failures"]) + c["delivered"]) for c in clients
            ),
            "bytes_up": sum(slice_bytes[c["level"]] for c in kept),
            "missing": {str(client): why for client, why in simulation.missing.items()},
            **seconds,
            "simulated_seconds": simulation.round_seconds,
            "simulated_client_seconds": {str(client): s for client, s in simulation.seconds.items()},
            "peak_memory_bytes": self._engine.peak_memory(),
            "clients": clients,
            "evaluation": evaluation,
        }

    def _track(self, record: dict[str, Any]) -> None:
        values = {key: record[key] for key in ("lr", "train_loss", "seconds") if record[key] is not None}
        for level, exits in (record["evaluation"] or {}).get("levels", {}).items():
            for exit, metrics in enumerate(exits, start=1):
                values |= {
                    f"{record['evaluation']['split']}/level{level}/exit{exit}/{name}": value
                    for name, value in metrics.items()
                    if value is not None
                }
        self._engine.log(values, step=record["round"])

    def _save_part(self, before: Progress, merge: Aggregator, clients: list[dict[str, Any]]) -> None:
        """The middle of a round: rank 0's part of it, or of ranks with clients of their own each one's."""
        partial = Partial(sums=merge.sums, clients=clients, failures=self._failures)
        if self._engine.is_main:
            self._save(dataclasses.replace(before, partial=partial))
            if self._is_gathered:  # what others left has part in it, or is to be trained again
                checkpoint.drop_rank_parts(self._folder.checkpoints)
        elif self._executor.splits and (merge.sums or clients or self._failures):
            checkpoint.save_rank_part(self._folder.checkpoints, before.round + 1, self._engine.rank, partial)

    def _save(self, progress: Progress) -> None:
        if self._engine.is_main:
            checkpoint.save(self._folder.checkpoints, progress, self._run.keep_last, self._fed.write_config)

    def _on_step(self, task: ClientTask, step: int, steps: int, loss: float) -> None:
        self._display.client_step(task.client, task.level, self._clients_done, step, steps, loss)

    def _on_failure(self, task: ClientTask, cause: str) -> None:
        self._failures.setdefault(str(task.client), []).append(cause)


def trainer_of(federation: Federation, **calls: Callable[..., None]) -> ClientTrainer:
    """What trains the federation's clients in this process, and calls who wants to know."""
    return ClientTrainer(
        run=federation.run,
        engine=federation.engine,
        batcher=federation.batchers["train"],
        answer_ids=federation.answer_ids if federation.adjusts_logits else None,
        vocab_size=federation.store.models.vocab_size,
        **calls,
    )


def clock_costs(federation: Federation) -> dict[int, LevelCost]:
    """By level; counted where the virtual clock asks for them."""
    if not federation.run.client_flops:
        return {}
    models, example = federation.store.models, federation.example_row
    return {level: level_cost(models, level, example) for level in models.levels}


def next_tasks(
    federation: Federation, before: Progress, costs: Mapping[int, LevelCost]
) -> tuple[list[ClientTask], list[ClientTask], Simulation]:
    """The cohort of the round after `before`; those of it that are to train yet; what the clock says."""
    run = federation.run
    tasks = sample_cohort(run, before.round + 1, federation.clients, federation.client_levels)
    simulation = simulate(run, tasks, costs)
    finished = {record["client"] for record in before.partial.clients} if before.partial else set()
    todo = [t for t in tasks if t.client not in finished and t.client not in simulation.missing]
    return tasks, todo, simulation


def evaluate_levels(federation: Federation, split: str, state: State, check_stop: Any) -> dict[str, Any]:
    """Level -> metrics of every exit, for every level that has held-out examples."""
    results = {}
    for level, ids in federation.held_out[split].items():
        if ids:
            results[str(level)] = federation.evaluators[split].level(level, state, ids, check_stop)
    return results


def _counted(record: dict[str, Any]) -> str:
    """Clients of the cohort that are not in the merge, if any."""
    parts = {"left out": record["left_out"], "did not deliver (simulated)": len(record["missing"])}
    return "".join(f"  {count} {what}" for what, count in parts.items() if count)


def sample_cohort(
    run: RunConfig, number: int, clients: Sequence[tuple[int, ...]], client_levels: Sequence[int]
) -> list[ClientTask]:
    """The tasks of one round: `sample_rate` of the clients, at least one, drawn by seed and round."""
    size = max(1, math.floor(run.sample_rate * run.num_clients + 0.5))
    chosen = numpy_rng(run.seed, "cohort", round=number).choice(run.num_clients, size=size, replace=False)
    return [
        ClientTask(client=int(c), level=client_levels[c], round=number, example_ids=clients[c])
        for c in sorted(chosen)
    ]


def learning_rate(run: RunConfig, number: int) -> float:
    """Learning rate of a round, counted from 1."""
    done = number - 1
    if run.lr_schedule == "multistep":
        return run.lr * run.lr_gamma ** sum(done >= milestone for milestone in run.lr_milestones)
    if run.lr_schedule == "exponential":
        return run.lr * run.lr_gamma**done
    if run.lr_schedule == "cosine":
        return run.lr * 0.5 * (1 + math.cos(math.pi * done / run.num_rounds))
    return run.lr


def _round_line(record: dict[str, Any], num_rounds: int) -> str:
    loss = "-" if record["train_loss"] is None else f"{record['train_loss']:.3f}"
    text = f"round {record['round']}/{num_rounds}  {record['seconds']:.1f} s  "
    if record["simulated_seconds"] is not None:
        text += f"simulated {record['simulated_seconds']:.3g} s  "
    text += f"peak {record['peak_memory_bytes'] / 1e9:.1f} GB  loss {loss}"
    if record["evaluation"] is not None:
        text += f"  {record['evaluation']['split']} by level: {summary(record['evaluation']['levels'])}"
    return text + _counted(record)
