"""Local optimizers by name: PyTorch's, and those of bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from scalefl.config.options import RunConfig


def make_optimizer(parameters: Iterable[nn.Parameter], run: RunConfig) -> torch.optim.Optimizer:
    """A new optimizer; norms and biases decay like the rest, as in the original."""
    if run.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay, fused=True
        )
    return torch.optim.AdamW(parameters, lr=run.lr, weight_decay=run.weight_decay, fused=True)
