"""Cut a sub-model's tensors out of the global ones, and add them back: pure tensor functions over a plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scalefl.contracts import State
from scalefl.slicing.plan import Index, Plan


def cut(global_state: Mapping[str, Tensor], plan: Plan) -> State:
    """The sub-model's tensors: views of the global ones where the cut is a prefix, copies elsewhere."""
    return {name: select(global_state[entry.global_name], entry.index) for name, entry in plan.items()}


def add_into(
    total: Mapping[str, Tensor], local_state: Mapping[str, Tensor], plan: Plan, weight: float
) -> None:
    """`total[global coordinates] += weight * local_state`, in place."""
    for name, tensor in local_state.items():
        entry = plan[name]
        _add(total[entry.global_name], entry.index, tensor, weight)


def add_coverage(total: Mapping[str, Tensor], plan: Plan, weight: float) -> None:
    """`total[global coordinates] += weight`, in place: who holds what, and how much that counts."""
    for entry in plan.values():
        target = total[entry.global_name]
        shape = [part.stop if isinstance(part, slice) else len(part) for part in entry.index]
        _add(target, entry.index, torch.ones((), dtype=target.dtype).expand(shape), weight)


def select(tensor: Tensor, index: tuple[Index, ...]) -> Tensor:
    """One tensor, cut: a view where the cut is a prefix in every dimension."""
    for dim, part in enumerate(index):
        if isinstance(part, slice):
            tensor = tensor.narrow(dim, 0, part.stop)
        else:
            tensor = tensor.index_select(dim, part.to(tensor.device))
    return tensor


def _add(target: Tensor, index: tuple[Index, ...], source: Tensor, weight: float) -> None:
    gathered = []
    for dim, part in enumerate(index):
        if isinstance(part, slice):
            target = target.narrow(dim, 0, part.stop)
        else:
            gathered.append(dim)
    if not gathered:
        target.add_(source, alpha=weight)
    elif len(gathered) == 1:
        dim = gathered[0]
        target.index_add_(dim, index[dim], source, alpha=weight)  # type: ignore[arg-type]  # a Tensor: see above
    else:
        raise ValueError("a parameter with two strided dimensions: no family has one.")
