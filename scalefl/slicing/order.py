"""Heads and channels in another order within their layer, so that prefixes hold what matters most.

What writes a unit and what reads it move together, so that the model stays the same function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from scalefl.contracts import Axis
from scalefl.slicing.layout import Layout, units

Order = Mapping[str, Tensor]
"""`layer/axis` -> which unit of the model as it was is now in each place (int64)."""

_LAYER = re.compile(r"(.+?\.\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the units of one layer's axis lie in a dimension of a parameter."""

    key: str
    """`layer/axis`."""
    dim: int
    shape: tuple[int, int, int]
    """Of that dimension: repeats of the axis, its units, coordinates of one unit."""


def unit_places(layouts: Mapping[str, Layout], axes: Mapping[str, Axis]) -> dict[str, list[Place]]:
    """Parameter -> its dimensions whose units may move.

    Those are units that a level may drop and that a layer keeps to itself; all share the residual stream. A
    layer is what a name has up to its first number. An axis that follows another moves with it in groups, as
    query heads with their kv head.
    """
    shared = {axis for name in layouts if not _LAYER.match(name) for axis in _named(layouts[name])}
    found: dict[str, list[Place]] = {}
    for name, layout in layouts.items():
        found[name] = []
        for dim, inner in enumerate(layout):
            for place, axis in enumerate(inner):
                if axis in axes and axes[axis].cut_by is not None and axis not in shared:
                    leader = axes[axis].follows or axis
                    found[name].append(_place(name, leader, dim, inner, place, axes))
    return found


def _named(layout: Layout) -> set[str]:
    return {axis for inner in layout for axis in inner}


def _place(
    name: str, leader: str, dim: int, inner: Sequence[str], place: int, axes: Mapping[str, Axis]
) -> Place:
    layer, sizes = _LAYER.match(name), {axis: known.size for axis, known in axes.items()}
    assert layer is not None  # else the axis would be a shared one
    whole = [units(axis, sizes) for axis in inner]
    repeats, count = math.prod(whole[:place]), sizes[leader]
    shape = (repeats, count, math.prod(whole) // (repeats * count))
    return Place(key=f"{layer[1]}/{leader}", dim=dim, shape=shape)


def permute(tensor: Tensor, places: Sequence[Place], order: Order) -> Tensor:
    """The tensor with the units of `order` in their new places; itself where nothing of it moves."""
    for place in places:
        if place.key in order:
            parts = tensor.unflatten(place.dim, place.shape)
            moved = parts.index_select(place.dim + 1, order[place.key].to(tensor.device))
            tensor = moved.flatten(place.dim, place.dim + 2)
    return tensor


def most_first(scores: Mapping[str, Tensor]) -> Order:
    """Units by falling score; equal ones stay in their order."""
    return {key: score.argsort(descending=True, stable=True) for key, score in scores.items()}


def composed(first: Order, then: Order) -> Order:
    """One order for two after each other."""
    return {**first, **{key: first[key][now] if key in first else now for key, now in then.items()}}


def restoring(order: Order, axes: Mapping[str, Axis]) -> Order:
    """What undoes an order; of a prefix of the units, as long as `axes` say, what sorts it as it once was."""
    return {key: now[: axes[key.rpartition("/")[2]].size].argsort() for key, now in order.items()}
