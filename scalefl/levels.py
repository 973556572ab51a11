"""Capacity levels: ratios -> what each level keeps, and which client is of which level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scalefl.contracts import Axis, InputError, LevelSpec
from scalefl.seeding import numpy_rng

WIDTH_AXES = ("inner", "all")
"""Choices of `--width_axes`, each cutting what the ones before it cut, and more."""


def level_specs(
    axes: Mapping[str, Axis],
    width_ratios: Sequence[float],
    depths: Sequence[int],
    width_axes: str,
    num_exits: int,
) -> tuple[LevelSpec, ...]:
    """One spec per level, weakest first.

    Raises InputError for a ratio that keeps no unit of an axis, naming a parameter and a ratio that fits,
    and for a depth beyond the last exit.
    """
    cut_by = WIDTH_AXES[: WIDTH_AXES.index(width_axes) + 1]
    cut_axes = [name for name, axis in axes.items() if axis.cut_by in cut_by]
    narrowest_first = sorted(cut_axes, key=lambda name: axes[name].size)  # its smallest ratio fits them all
    specs = []
    for level, (ratio, depth) in enumerate(zip(width_ratios, depths, strict=True), start=1):
        if not 1 <= depth <= num_exits:
            raise InputError(
                f"level {level}: --horizontal_scale_ratios asks for {depth} exits, the model has "
                f"{num_exits}; expected 1 to {num_exits} (change it, or give more --ee_locs)."
            )
        kept = {name: _kept_units(axes, name, ratio, level) for name in narrowest_first}
        specs.append(LevelSpec(level=level, width_ratio=ratio, depth=depth, kept=kept))
    return tuple(specs)


def _kept_units(axes: Mapping[str, Axis], name: str, ratio: float, level: int) -> int:
    axis = axes[name]
    if axis.follows is not None:
        leader = axes[axis.follows]
        return _kept_units(axes, axis.follows, ratio, level) * (axis.size // leader.size)
    kept = math.floor(ratio * axis.size + 1e-9)  # 0.55 * 20 is 11, not 10.999...
    if kept < 1:
        smallest = math.ceil(1e4 / axis.size) / 1e4
        raise InputError(
            f"level {level}: width ratio {ratio:g} keeps 0 of {axis.size} {name} in {axis.seen_in}; "
            f"the smallest ratio that keeps one is {smallest:g}."
        )
    return kept


def exit_layers(ee_locs: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Layers after which an exit sits; the last layer is always one.

    Raises InputError unless `ee_locs` rise strictly and end before the last layer.
    """
    locations = tuple(ee_locs)
    rising = all(a < b for a, b in zip(locations, locations[1:], strict=False))
    if not rising or any(not 1 <= layer < num_layers for layer in locations):
        raise InputError(
            f"--ee_locs {' '.join(map(str, locations))}: expected rising layer numbers from 1 to "
            f"{num_layers - 1} (the model has {num_layers} layers; the last is an exit without being listed)."
        )
    return (*locations, num_layers)


def assign_levels(num_clients: int, shares: Sequence[float], seed: int) -> tuple[int, ...]:
    """Each client's level: counts by largest remainder, then a seeded shuffle blind to the data."""
    total = math.fsum(shares)
    quotas = [num_clients * share / total for share in shares]
    counts = [math.floor(quota + 1e-9) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: num_clients - sum(counts)]:
        counts[i] += 1
    levels = [level for level, count in enumerate(counts, start=1) for _ in range(count)]
    order = numpy_rng(seed, "levels").permutation(num_clients)
    return tuple(levels[i] for i in order)
