"""A plan says, for one level, where each parameter of the sub-model lies in the global model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scalefl.slicing.layout import Layout, units

Index = slice | Tensor
"""A prefix (a `slice`, so that cutting is a view), or the positions of a strided selection (int64)."""


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    global_name: str
    index: tuple[Index, ...]
    """One per dimension."""


Plan = Mapping[str, PlanEntry]
"""Sub-model parameter name -> its place in the global model."""


def make_plan(
    local_shapes: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, Layout],
    sizes: Mapping[str, int],
    kept: Mapping[str, int],
    global_name: Callable[[str], str] = lambda name: name,
) -> Plan:
    """The plan of the sub-model whose parameters have `local_shapes`.

    `layouts` are the global parameters' layouts, `sizes` the whole axes, `kept` the kept units of cut axes,
    `global_name` maps a sub-model's name to the global one. Raises ValueError if an index does not give the
    sub-model's shape: then the layout table and the sub-model's config disagree.
    """
    plan = {}
    for name, shape in local_shapes.items():
        target = global_name(name)
        index = tuple(_dimension_index(axes, sizes, kept) for axes in layouts[target])
        indexed = tuple(part.stop if isinstance(part, slice) else len(part) for part in index)
        if indexed != tuple(shape):
            raise ValueError(f"{name}: the sub-model has shape {tuple(shape)}, its layout gives {indexed}.")
        plan[name] = PlanEntry(global_name=target, index=index)
    return plan


def _dimension_index(axes: tuple[str, ...], sizes: Mapping[str, int], kept: Mapping[str, int]) -> Index:
    """Positions of a dimension at which every one of its axes lies within its kept prefix."""
    whole = [units(axis, sizes) for axis in axes]
    part = [kept.get(axis, full) for axis, full in zip(axes, whole, strict=True)]
    count = math.prod(part)
    if part[1:] == whole[1:]:  # only the outermost axis is cut: a prefix
        return slice(0, count)
    grid = torch.arange(math.prod(whole)).view(whole)
    return grid[tuple(slice(0, p) for p in part)].reshape(-1)


def lost_share(layout: Layout, sizes: Mapping[str, int], kept: Mapping[str, int]) -> float:
    """Whole over kept size of a weight's input dimension (its second), the factor of `--width_scaler`."""
    if len(layout) < 2:
        return 1.0
    ratio = 1.0
    for axis in layout[1]:
        if axis in kept:
            ratio *= sizes[axis] / kept[axis]
    return ratio


def zero_tail(weight: Tensor, layout: Layout, sizes: Mapping[str, int], kept: Mapping[str, int]) -> None:
    """Zero, in place, the input columns beyond the `kept` prefix of a linear layer's (out, in) weight.

    Gradients still reach them, as they reach LoRA's B.
    """
    if any(axis in kept for axis in layout[1]):
        index = _dimension_index(layout[1], sizes, kept)
        columns = torch.arange(index.stop) if isinstance(index, slice) else index
        tail = torch.ones(weight.shape[1], dtype=torch.bool)
        tail[columns] = False
        with torch.no_grad():
            weight[:, tail] = 0.0
