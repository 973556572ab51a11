"""A federation as plainly as it can be written, to hold runs against: no sessions, streams or engine."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from runs import federation, forget_launch

from scalefl.batches import Batcher, step_order
from scalefl.config.options import RunConfig
from scalefl.contracts import ClientTask, State
from scalefl.federation.client import ClientTrainer
from scalefl.models.store import Store
from scalefl.objective import UNSEEN
from scalefl.seeding import numpy_rng

LEVEL = 2
"""The level of `OneClient`: the whole model."""

Answers = Sequence[Sequence[int]]
"""The closed answer set as token ids."""


def plain_loss(
    exit_logits: Sequence[torch.Tensor],
    targets: torch.Tensor,
    gamma: float,
    temperature: float,
    bias: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Mean over answer tokens of the exit-weighted loss; `bias` is added where labels are learned."""
    num_exits, teacher = len(exit_logits), exit_logits[-1].detach() / temperature
    total = torch.zeros(())
    for i, logits in enumerate(exit_logits, start=1):
        total = total + i * F.cross_entropy(logits + bias, targets)
        if i < num_exits:
            p, q = teacher.softmax(-1), (logits / temperature).softmax(-1)
            total = total + i * gamma * temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    return total / (num_exits * (num_exits + 1) / 2)


def plain_bias(batcher: Batcher, ids: Any, task: ClientTask, answers: Answers, vocab: int) -> torch.Tensor:
    """Per answer token and vocabulary entry: log of how much likelier it is to follow at this client.

    The client draws answer a in proportion to its examples of a, plus `UNSEEN`; elsewhere all are as likely.
    """
    held = [batcher.examples[i].label for i in task.example_ids]
    weights = [UNSEEN + held.count(a) for a in range(len(answers))]
    rows = []
    for i in ids:
        label = batcher.examples[i].label
        assert label is not None
        own = list(answers[label])
        for step in range(len(own)):
            row = torch.zeros(vocab)
            possible = [a for a, other in enumerate(answers) if list(other[:step]) == own[:step]]
            for token in {answers[a][step] for a in possible if len(answers[a]) > step}:
                following = [a for a in possible if list(answers[a][: step + 1]) == [*own[:step], token]]
                here = sum(weights[a] for a in following) / sum(weights[a] for a in possible)
                row[token] = np.log(here) - np.log(len(following) / len(possible))
            rows.append(row)
    return torch.stack(rows)


def plain_client(
    model: torch.nn.Module,
    run: RunConfig,
    batcher: Batcher,
    task: ClientTask,
    answers: Answers | None = None,
) -> State:
    """The trained parameters of one client; with `answers` its logits are adjusted."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if run.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=run.weight_decay)
    gamma = run.KD_gamma if task.round > run.KD_start * run.num_rounds else 0.0
    for number, ids in enumerate(batches(run, batcher, task), start=1):
        if run.warmup_steps:
            optimizer.param_groups[0]["lr"] = run.lr * min(1, number / run.warmup_steps)
        batch = batcher.training(ids)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.precision == "bf16"):
            logits = [exit_nv.float() for exit_nv in model(**batch.inputs).exit_logits]
        vocab = logits[0].shape[-1]
        bias = 0.0 if answers is None else plain_bias(batcher, ids, task, answers, vocab)
        plain_loss(logits, batch.targets, gamma, run.KD_T, bias).backward()
        if run.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def batches(run: RunConfig, batcher: Batcher, task: ClientTask) -> list[np.ndarray]:
    return step_order(
        task.example_ids,
        [batcher.examples[i].label for i in task.example_ids],
        batch_size=run.batch_size,
        num_epoch=run.num_epoch,
        local_steps=run.local_steps,
        balanced=run.balanced_sampling,
        rng=numpy_rng(run.seed, "batches", round=task.round, client=task.client),
    )


def plain_round(store: Store, before: State, run: RunConfig, batcher: Batcher, tasks: Any) -> State:
    """Deep copies of the sub-model for all clients, then the weighted mean of values at every coordinate."""
    total = {name: np.zeros(tensor.shape) for name, tensor in before.items()}
    weight = {name: np.zeros(tensor.shape) for name, tensor in before.items()}
    models = {t.client: copy.deepcopy(store.submodel(t.level, before, own=True)) for t in tasks}
    for task in tasks:
        counts = len(task.example_ids) if run.weighting == "examples" else 1
        trained = plain_client(models[task.client], run, batcher, task)
        for name, tensor in trained.items():
            where = place(name, tensor.shape, before, store.models.slices[task.level].spec.depth)
            target = global_name(name, before, store.models.slices[task.level].spec.depth)
            total[target][where] += counts * tensor.double().numpy()
            weight[target][where] += counts
    merged = {}
    for name, tensor in before.items():
        held = weight[name] > 0
        value = np.where(held, total[name] / np.where(held, weight[name], 1), tensor.double().numpy())
        merged[name] = torch.from_numpy(value).float()
    return merged


def global_name(name: str, before: State, depth: int) -> str:
    earlier = f"exit_norms.{depth - 1}.weight"
    return earlier if name == "language_model.model.norm.weight" and earlier in before else name


def place(name: str, shape: Sequence[int], before: State, depth: int) -> Any:
    """Where a sub-model's parameter lies in the whole: prefixes, also within q, k, v and any patch."""
    whole = before[global_name(name, before, depth)].shape
    groups = {("qkv", 0): 3, ("projector.weight", 1): 4}
    parts = []
    for dim, (size, kept) in enumerate(zip(whole, shape, strict=True)):
        count = next((g for (part, at), g in groups.items() if part in name and at == dim), 1)
        parts.append(np.arange(size).reshape(count, -1)[:, : kept // count].reshape(-1))
    return np.ix_(*parts)


class OneClient:
    """A client's training as the round loop sets it up, in the first and only round."""

    def __init__(
        self, folder: Path, sections: Any = None, forget: Any = forget_launch, **options: Any
    ) -> None:
        forget()
        options = {"logit_adjustment": "off", "num_rounds": 1, "KD_start": 0.0} | options
        self.fed = federation(folder, sections, **options)
        self.run, self.engine, self.state = self.fed.run, self.fed.engine, self.fed.initial_state
        self.batcher = self.fed.batchers["train"]
        self.answers = self.fed.answer_ids if self.fed.adjusts_logits else None
        self.trainer = ClientTrainer(
            run=self.run,
            engine=self.engine,
            batcher=self.batcher,
            answer_ids=self.answers,
            vocab_size=self.fed.store.models.vocab_size,
        )

    def task(self, count: int = 10, client: int = 0) -> ClientTask:
        ids = tuple(range(client, client + count))
        return ClientTask(client=client, level=LEVEL, round=1, example_ids=ids)

    def session(self) -> Any:
        model: Any = self.fed.store.submodel(LEVEL, self.state, own=True, place=self.engine.place)
        if self.run.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return self.engine.session(model, self.run)

    def train(self, *tasks: ClientTask, lr: float | None = None) -> State:
        """The last task's change, after the others on the same session."""
        session, sent = self.session(), self.fed.store.models.level_state(LEVEL, self.state)
        rate = self.run.lr if lr is None else lr
        updates = [self.trainer.train(session, task, sent, rate) for task in tasks]
        session.close()
        return updates[-1].delta

    def plain(self, task: ClientTask) -> State:
        model = self.fed.store.submodel(LEVEL, self.state, own=True)
        sent = self.fed.store.models.level_state(LEVEL, self.state)
        trained = plain_client(model, self.run, self.batcher, task, self.answers)
        return {name: tensor - sent[name] for name, tensor in trained.items()}
