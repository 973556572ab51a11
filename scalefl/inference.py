"""Answers with early exits: each row leaves at the first exit that is sure enough, and costs no more.

Shapes: B rows, A answers, M exits, L positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scalefl.batches import Batcher, Candidates
from scalefl.models.exits import exit_by_exit, hidden_at_exits, logits_at

Measure = Literal["probability", "margin", "entropy"]

FIRST_TOKEN = Candidates(ids=((0,),))
"""Packs nothing behind a prompt, so that its end alone is looked at."""


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """When a row leaves."""

    thresholds: tuple[float, ...]
    """By exit, shallowest first: confidence at which a row leaves; the deepest exit answers who is left."""
    measure: Measure = "probability"
    temperatures: tuple[float, ...] = ()
    """By exit: what logits are divided by. None: 1."""
    max_exit: int | None = None
    """Exit at which every row leaves at the latest."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a row was answered with."""

    exit: int
    """Counted from 1."""
    probabilities: tuple[float, ...]
    """Of the candidate answers at that exit; empty of an open answer set."""


def confidence(probabilities_ba: Tensor, measure: Measure) -> Tensor:
    """(B,), from 0 to 1: largest probability, its lead over the second, or 1 - entropy / log A."""
    if measure == "probability":
        return probabilities_ba.max(-1).values
    if measure == "margin":
        top_b2 = probabilities_ba.topk(2, dim=-1).values
        return top_b2[:, 0] - top_b2[:, 1]
    entropy_b = torch.special.entr(probabilities_ba).sum(-1)
    return 1 - entropy_b / math.log(probabilities_ba.shape[-1])


def scores_at_exits(
    model: Any, batcher: Batcher, ids: Sequence[int], candidates: Candidates | None
) -> Tensor:
    """What `answer` chooses by, at every exit: log-likelihoods of the candidates (M, B, A), or without them
    logits of the first token (M, B, V). In fp32 on the CPU.
    """
    exits = model(**batcher.scoring(ids, candidates or FIRST_TOKEN)).exit_logits
    found = [_scored(logits.unflatten(0, (len(ids), -1)), candidates) for logits in exits]
    return torch.stack(found).cpu()


def macs_to_exits(model: Any, inputs: Mapping[str, Tensor]) -> list[int]:
    """Multiply-accumulates of one row up to each exit, the earlier exits' answers included.

    `inputs` are those of `Batcher.scoring` for one row; nothing is computed.
    """
    with torch.device("meta"):
        empty = type(model)(model.config)
        empty.rebuild_buffers()
    on_meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
    found = []
    for exit in range(1, len(model.config.exit_layers) + 1):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            embeds_bld = empty.input_embeds(
                on_meta["input_ids"], on_meta.get("pixel_values"), on_meta.get("image_features")
            )
            context = {name: on_meta[name] for name in ("attention_mask", "position_ids")}
            layers = model.config.exit_layers[:exit]
            hidden = hidden_at_exits(empty.language_model.model, embeds_bld, layers, **context)
            for number, hidden_bld in enumerate(hidden, start=1):
                norm, head = empty.exit_norm(number), empty.language_model.lm_head
                logits_at(hidden_bld, on_meta["predict_at"], norm, head)
        found.append(counter.get_total_flops() // 2)
    return found


def answer(
    model: Any, batcher: Batcher, ids: Sequence[int], candidates: Candidates | None, rule: ExitRule
) -> list[Choice]:
    """Of each example the exit that answers it, and what it says of the `candidates`.

    An exit is chosen once for a whole answer: by the candidates' probabilities, in an open answer set by
    those of the first token. Layers beyond a row's exit are not computed for it.
    """
    inputs = batcher.scoring(ids, candidates or FIRST_TOKEN)
    predict_at_bk = inputs["predict_at"].view(len(ids), -1)
    length, layers = inputs["input_ids"].shape[1], model.config.exit_layers
    last = min(rule.max_exit or len(layers), len(layers))
    embeds_bld = model.input_embeds(
        inputs["input_ids"], inputs.get("pixel_values"), inputs.get("image_features")
    )
    passes = exit_by_exit(
        model.language_model.model,
        embeds_bld,
        layers[:last],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
    )
    found: dict[int, Choice] = {}
    rows = torch.arange(len(ids), device=embeds_bld.device)
    hidden_bld = next(passes)
    for exit in range(1, last + 1):
        places_bk = predict_at_bk[rows] - rows[:, None] * length
        scores = _scores(model, exit, hidden_bld, places_bk, candidates)
        temperature = rule.temperatures[exit - 1] if rule.temperatures else 1.0
        probabilities = (scores / temperature).softmax(-1)
        leaves = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        if exit < last:
            leaves = confidence(probabilities, rule.measure) >= rule.thresholds[exit - 1]
        for row, values in zip(rows[leaves].tolist(), probabilities[leaves].tolist(), strict=True):
            found[row] = Choice(exit=exit, probabilities=tuple(values) if candidates else ())
        stay = (~leaves).nonzero().squeeze(1)
        if len(stay) == 0:
            break
        rows, hidden_bld = rows[stay], passes.send(stay)
    return [found[row] for row in range(len(ids))]


def _scores(
    model: Any, exit: int, hidden_bld: Tensor, places_bk: Tensor, candidates: Candidates | None
) -> Tensor:
    """Log-likelihoods of the candidates (B, A), or without them logits of the first token (B, V)."""
    batch, length = hidden_bld.shape[:2]
    at_n = (torch.arange(batch, device=places_bk.device)[:, None] * length + places_bk).flatten()
    norm, head = model.exit_norm(exit), model.language_model.lm_head
    logits_bkv = logits_at(hidden_bld, at_n, norm, head).unflatten(0, (batch, -1))
    return _scored(logits_bkv, candidates)


def _scored(logits_bkv: Tensor, candidates: Candidates | None) -> Tensor:
    return logits_bkv[:, 0].float() if candidates is None else candidates.log_likelihoods(logits_bkv)
