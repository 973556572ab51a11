"""Early exits of a Llama decoder: hidden states after chosen layers, each with its own norm before one head.

Shapes: B batch, L positions, D hidden, N predicted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaModel


def hidden_at_exits(
    decoder: LlamaModel, embeds_bld: Tensor, exit_layers: Sequence[int], **context: Any
) -> list[Tensor]:
    """Hidden states (B, L, D) after each of `exit_layers`; `context` is what `exit_by_exit` takes."""
    return list(exit_by_exit(decoder, embeds_bld, exit_layers, **context))


def exit_by_exit(
    decoder: LlamaModel,
    embeds_bld: Tensor,
    exit_layers: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
) -> Generator[Tensor, Tensor | None, None]:
    """Hidden states after each of `exit_layers` (counted from 1), before any norm, one exit after the other.

    Layers beyond the last one asked for are not computed. What is sent back are the indices of the rows that
    go on (int64), None for all; not with a cache, whose rows stay. `attention_mask` is (B, L) with 1 = real,
    or an already prepared (B, 1, L, L) mask. Follows `LlamaModel.forward` of transformers 5.
    """
    if position_ids is None:
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = (torch.arange(embeds_bld.shape[1], device=embeds_bld.device) + seen).unsqueeze(0)
    mask: Any = create_causal_mask(
        config=decoder.config,
        inputs_embeds=embeds_bld,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=None,  # only used to look for packed sequences: that stalls a GPU, and we have none
    )
    if mask is not None and mask.dtype == torch.bool and decoder.config._attn_implementation != "sdpa":
        mask = torch.zeros_like(mask, dtype=embeds_bld.dtype).masked_fill(~mask, float("-inf"))
    rotary = decoder.rotary_emb(embeds_bld, position_ids=position_ids)
    hidden_bld = embeds_bld
    for number, layer in enumerate(decoder.layers[: exit_layers[-1]], start=1):
        hidden_bld = layer(
            hidden_bld,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        )
        if number in exit_layers:
            rows = yield hidden_bld
            if rows is not None:
                assert past_key_values is None
                hidden_bld, mask, position_ids = (_rows(t, rows) for t in (hidden_bld, mask, position_ids))
                rotary = tuple(_rows(t, rows) for t in rotary)


def _rows(tensor: Any, rows: Tensor) -> Any:
    """Those of a batch; what is the same for all rows has one row, or is None."""
    return tensor if tensor is None or len(tensor) == 1 else tensor.index_select(0, rows)


def logits_at(hidden_bld: Tensor, predict_at_n: Tensor, norm: nn.Module, head: nn.Module) -> Tensor:
    """Logits (N, V) of one exit at flat positions `b * L + l`: the head never sees the other positions."""
    return head(norm(hidden_bld.flatten(0, 1).index_select(0, predict_at_n)))


def new_cache(decoder: LlamaModel) -> Cache:
    return DynamicCache(config=decoder.config)
