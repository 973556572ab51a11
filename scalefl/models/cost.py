"""What a level costs its clients: parameters, multiply-accumulates, bytes; on the meta device, without
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scalefl.models.submodels import SubModels


@dataclass(frozen=True, kw_only=True)
class LevelCost:
    parameters: int
    trainable: int
    macs: int
    """Multiply-accumulates of one example's forward pass through every exit."""
    bytes_each_way: int
    """Per client and round: its trainable slice in fp32."""


def level_cost(models: SubModels, level: int, example: Mapping[str, Tensor]) -> LevelCost:
    """Cost of a level for an `example` batch of one row (keyword arguments of the model)."""
    model = models.empty(level)
    on_meta = {name: tensor.to("meta") for name, tensor in example.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**on_meta)
    return LevelCost(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=models.slice_bytes(level) // 4,
        macs=counter.get_total_flops() // 2,
        bytes_each_way=models.slice_bytes(level),
    )
