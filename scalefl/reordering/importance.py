"""How much every head and channel contributes to the loss, to first order.

Shapes: B rows, L positions, D inputs of a layer, U units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scalefl.batches import Batcher, Ids
from scalefl.objective import exit_losses
from scalefl.slicing.order import Place


def readers_of(places: Mapping[str, Sequence[Place]]) -> dict[str, Place]:
    """Linear layer -> the units that its weight, (out, in), reads."""
    return {
        name.removesuffix(".weight"): place
        for name, of_name in places.items()
        for place in of_name
        if name.endswith(".weight") and place.dim == 1
    }


def importance(
    model: nn.Module, batcher: Batcher, ids: Ids, readers: Mapping[str, Place], batch_size: int
) -> dict[str, Tensor]:
    """`layer/axis` -> (U) mean over examples of |d loss / d gate|, in fp32 on the CPU.

    A gate of 1 multiplies what a unit gives to the layers that read it, at every position of an example: its
    gradient is the sum of activation times gradient, the loss's change to first order if the unit went. The
    loss is that of training without distillation and adjustment: cross-entropy summed over an example's
    answer tokens, exit i weighing i. Sources: for heads Michel, Levy, Neubig, "Are Sixteen Heads Really
    Better than One?" (NeurIPS 2019); for channels Molchanov et al., "Pruning Convolutional Neural Networks
    for Resource Efficient Inference" (ICLR 2017). Unlike theirs, heads that share a kv head have one gate,
    the loss is that of every exit, and layers are not normalised, since units are ranked within one.
    """
    counts = {place.key: place.shape[1] for place in readers.values()}
    totals = {key: torch.zeros(count) for key, count in counts.items()}
    gates: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    with _gated(model, readers, gates):
        for at in range(0, len(ids), batch_size):
            shown = ids[at : at + batch_size]
            batch = batcher.training(shown)
            for key, count in counts.items():
                gates[key] = torch.ones(len(shown), count, device=device, requires_grad=True)
            logits = model(**batch.inputs).exit_logits
            loss, _ = exit_losses(logits, batch.targets, distill_weight=0.0, temperature=1.0)
            found = torch.autograd.grad(loss, list(gates.values()))
            for key, gradient in zip(gates, found, strict=True):
                totals[key] += gradient.abs().sum(0).cpu()
    return {key: total / len(ids) for key, total in totals.items()}


@contextlib.contextmanager
def _gated(model: nn.Module, readers: Mapping[str, Place], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the inputs of the readers are multiplied by what `gates` hold at the time."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(_through_gate, place=place, gates=gates))
        for name, place in readers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _through_gate(_: nn.Module, inputs: Any, place: Place, gates: Mapping[str, Tensor]) -> Any:
    repeats, count, each = place.shape
    (x_bld,) = inputs
    # Spread in fp32, so that the gradients of a unit's coordinates are summed in it.
    gate_bu = gates[place.key]
    gate_bd = gate_bu[:, None, :, None].expand(-1, repeats, count, each).flatten(1)
    return (x_bld * gate_bd[:, None].to(x_bld.dtype),)
