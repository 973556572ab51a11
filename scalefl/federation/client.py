"""One client's round: its examples, in its order, on a sub-model that is already prepared."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from scalefl.batches import Batch, Batcher, Ids, draw_shifts, step_order
from scalefl.config.derived import micro_batch_size
from scalefl.config.options import RunConfig
from scalefl.contracts import ClientTask, ClientUpdate
from scalefl.engine.launch import Alone, Engine
from scalefl.engine.session import Session
from scalefl.objective import answer_prior_adjustment, exit_losses
from scalefl.seeding import derive, numpy_rng


@dataclass(frozen=True, kw_only=True)
class ClientTrainer:
    """What stays the same for every client of a run."""

    run: RunConfig
    engine: Engine | Alone
    batcher: Batcher
    answer_ids: tuple[tuple[int, ...], ...] | None
    """The closed answer set as token ids; None where answers are open or logits are not adjusted."""
    vocab_size: int
    check_stop: Callable[[Engine | Alone], None] = lambda engine: None
    """Called before every step by all ranks of the engine; raises if the run is to stop."""
    on_step: Callable[[ClientTask, int, int, float], None] = lambda *_: None
    """(task, step, steps, mean loss of the last steps read) after every step."""
    on_failure: Callable[[ClientTask, str], None] = lambda *_: None
    """(task, cause) after every attempt that failed."""

    def train(
        self, session: Session, task: ClientTask, sent: Mapping[str, Tensor], lr: float
    ) -> ClientUpdate:
        """Train one client from the state it was `sent` and return the change."""
        run, started = self.run, time.perf_counter()
        session.load(sent)
        labels = [self.batcher.examples[i].label for i in task.example_ids]
        draws = numpy_rng(run.seed, "batches", round=task.round, client=task.client)
        steps = self._steps(task, labels, draws)
        shifts = draw_shifts(sum(map(len, steps)), draws) if run.augment else None
        objective = self._objective(task, labels)
        seen = 0
        loss = MeanLoss(session, read_every=run.print_freq)
        with torch.random.fork_rng(devices=[self.engine.device] if self.engine.device.type == "cuda" else []):
            torch.manual_seed(derive(run.seed, "dropout", round=task.round, client=task.client))
            for number, ids in enumerate(steps, start=1):
                self.check_stop(self.engine)
                step_shifts = None if shifts is None else shifts[seen : seen + len(ids)]
                step_tokens = self.batcher.num_answer_tokens(ids)
                losses = [objective.bind(batch) for batch in self._micro_batches(ids, step_shifts)]
                session.step(losses, step_tokens, lr * min(1.0, number / max(run.warmup_steps, 1)))
                seen += len(ids)
                self.on_step(task, number, len(steps), loss.after_step(objective.take_loss(), step_tokens))
        return ClientUpdate(
            client=task.client,
            level=task.level,
            delta=session.delta(sent),
            num_examples=len(task.example_ids),
            metrics={
                "loss": loss.of_all_steps(),
                "steps": len(steps),
                "seconds": time.perf_counter() - started,
            },
            batches=self._digest(steps),
        )

    def _steps(
        self, task: ClientTask, labels: Sequence[int | None], draws: np.random.Generator
    ) -> Sequence[Ids]:
        """The examples of every step."""
        run = self.run
        return step_order(
            task.example_ids,
            labels,
            batch_size=run.batch_size,
            num_epoch=run.num_epoch,
            local_steps=run.local_steps,
            balanced=run.balanced_sampling,
            rng=draws,
            lengths=self.batcher.lengths(task.example_ids) if run.length_bucketing else None,
        )

    def _digest(self, steps: Sequence[Ids]) -> str:
        """Of the images and questions of every step, in their order."""
        found = hashlib.blake2b(digest_size=8)
        for ids in steps:
            shown = [(self.batcher.examples[i].image_key, self.batcher.examples[i].question) for i in ids]
            found.update(repr(shown).encode())
        return found.hexdigest()

    def _micro_batches(self, ids: Ids, shifts: np.ndarray | None) -> list[Batch]:
        """This rank's share of a step, as many micro-batches on every rank; surplus ones predict nothing."""
        size, ranks = micro_batch_size(self.run, self.engine.num_processes), self.engine.num_processes
        rounds = -(-len(ids) // (size * ranks))
        batches = []
        for number in range(rounds):
            start = (number * ranks + self.engine.rank) * size
            part = slice(start, start + size)
            batches.append(self.batcher.training(ids[part], None if shifts is None else shifts[part]))
        return batches

    def _objective(self, task: ClientTask, labels: Sequence[int | None]) -> Objective:
        table = None
        if self.answer_ids is not None:
            counts = [sum(label == a for label in labels) for a in range(len(self.answer_ids))]
            table = answer_prior_adjustment(counts, self.answer_ids, self.vocab_size).to(self.engine.device)
        weight = self.run.KD_gamma if distils(self.run, task.round) else 0.0
        return Objective(distill_weight=weight, temperature=self.run.KD_T, table=table)


def distils(run: RunConfig, round: int) -> bool:
    """Whether the deepest exit teaches in this round."""
    return round > run.KD_start * run.num_rounds


class MeanLoss:
    """Loss per answer token; waits for the device, and for other ranks, once in `read_every` steps alone."""

    def __init__(self, session: Session, read_every: int) -> None:
        self._session, self._read_every = session, read_every
        self._unread: list[Tensor] = []
        self._unread_tokens, self._steps = 0, 0
        self._sum, self._tokens, self._shown = 0.0, 0, math.nan

    def after_step(self, loss_sum: Tensor, tokens: int) -> float:
        """Take in this rank's part of a step; the mean of the last steps that were read."""
        self._unread.append(loss_sum)
        self._unread_tokens, self._steps = self._unread_tokens + tokens, self._steps + 1
        if self._steps % self._read_every == 0:
            self._read()
        return self._shown

    def of_all_steps(self) -> float:
        if self._unread:
            self._read()
        return self._sum / max(self._tokens, 1)

    def _read(self) -> None:
        total = float(self._session.sum_over_ranks(torch.stack(self._unread).sum()))
        self._shown = total / self._unread_tokens
        self._sum, self._tokens = self._sum + total, self._tokens + self._unread_tokens
        self._unread, self._unread_tokens = [], 0


class Objective:
    """The loss of one micro-batch as a function of the model; keeps the deepest exit's for reports."""

    def __init__(self, *, distill_weight: float, temperature: float, table: Tensor | None) -> None:
        self._distill_weight, self._temperature, self._table = distill_weight, temperature, table
        self._loss: list[Tensor] = []

    def bind(self, batch: Batch) -> Callable[[nn.Module], Tensor]:
        def loss(model: nn.Module) -> Tensor:
            logits = model(**batch.inputs).exit_logits
            adjustment = None if self._table is None else self._table[batch.labels, batch.steps]
            total, cross_entropies = exit_losses(
                logits,
                batch.targets,
                distill_weight=self._distill_weight,
                temperature=self._temperature,
                adjustment_nv=adjustment,
            )
            self._loss.append(cross_entropies[-1])
            return total

        return loss

    def take_loss(self) -> Tensor:
        """Summed cross-entropy of the deepest exit since the last call."""
        loss, self._loss = torch.stack(self._loss).sum(), []
        return loss
