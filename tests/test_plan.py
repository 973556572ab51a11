"""Laws of plans: an index holds exactly the coordinates whose every axis lies within its kept prefix."""

import itertools
import math

import numpy as np
import pytest
import torch
from builders import build_store
from hypothesis import given
from hypothesis import strategies as st

from scalefl.slicing.layout import Layout, parse_layout
from scalefl.slicing.ops import cut
from scalefl.slicing.plan import PlanEntry, lost_share, make_plan, zero_tail

AXES = ("a", "b", "c", "d")


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Layout, dict[str, int], dict[str, int]]:
    """A layout of up to 3 dimensions with up to 3 axes each, their sizes, and the kept units of some."""
    sizes = {axis: draw(st.integers(1, 4)) for axis in AXES}
    kept = {axis: draw(st.integers(1, sizes[axis])) for axis in draw(st.sets(st.sampled_from(AXES)))}
    axis = st.sampled_from([*AXES, "2", "3"])
    layout = draw(st.lists(st.lists(axis, min_size=1, max_size=3), min_size=1, max_size=3))
    return tuple(map(tuple, layout)), sizes, kept


def brute_force(layout: Layout, sizes: dict[str, int], kept: dict[str, int]) -> list[list[int]]:
    """Per dimension: name each position by its axes' indices, keep those with every index below its bound."""
    positions = []
    for axes in layout:
        full = [int(axis) if axis.isdecimal() else sizes[axis] for axis in axes]
        named = list(itertools.product(*(range(size) for size in full)))
        bound = [kept.get(axis, size) for axis, size in zip(axes, full, strict=True)]
        positions.append(
            [at for at, name in enumerate(named) if all(i < b for i, b in zip(name, bound, strict=True))]
        )
    return positions


def plan_of(layout: Layout, sizes: dict[str, int], kept: dict[str, int]) -> PlanEntry:
    shape = tuple(len(positions) for positions in brute_force(layout, sizes, kept))
    return make_plan({"p": shape}, {"p": layout}, sizes, kept)["p"]


@given(cuts())
def test_a_cut_takes_the_coordinates_of_the_definition(
    case: tuple[Layout, dict[str, int], dict[str, int]],
) -> None:
    layout, sizes, kept = case
    shape = [math.prod(int(axis) if axis.isdecimal() else sizes[axis] for axis in axes) for axes in layout]
    whole = torch.arange(math.prod(shape)).view(shape)
    local = cut({"p": whole}, {"p": plan_of(*case)})["p"]
    expected = whole.numpy()[np.ix_(*brute_force(layout, sizes, kept))]
    assert np.array_equal(local.numpy(), expected)


@given(cuts())
def test_prefixes_are_slices_and_slices_are_prefixes(
    case: tuple[Layout, dict[str, int], dict[str, int]],
) -> None:
    """Whatever could be a view is one: an index tensor stands only where positions are not 0, 1, 2, ..."""
    layout, sizes, kept = case
    for part, positions in zip(plan_of(*case).index, brute_force(layout, sizes, kept), strict=True):
        if isinstance(part, slice):
            assert (part.start, part.step) == (0, None) and list(range(part.stop)) == positions
        else:
            assert part.tolist() == positions


@pytest.mark.parametrize(
    ("text", "is_view"),
    [("(heads head_dim) embed", True), ("embed (heads head_dim)", True), ("(3 heads head_dim) embed", False)],
)
def test_prefix_cuts_are_views_and_strided_ones_are_not(text: str, is_view: bool) -> None:
    sizes, kept = {"heads": 4, "head_dim": 2, "embed": 8}, {"heads": 2, "embed": 6}
    layout = parse_layout(text)
    shape = [math.prod(int(a) if a.isdecimal() else sizes[a] for a in axes) for axes in layout]
    whole = torch.zeros(shape)
    local = cut({"p": whole}, {"p": plan_of(layout, sizes, kept)})["p"]
    assert (local.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == is_view


def test_strided_heads_keep_query_key_and_value_apart() -> None:
    """3 x 2 heads x 2: head 0 of each of q, k, v is rows 0 1, 4 5 and 8 9."""
    layout = parse_layout("(3 heads head_dim) embed")
    index = plan_of(layout, {"heads": 2, "head_dim": 2, "embed": 3}, {"heads": 1}).index
    assert not isinstance(index[0], slice) and index[0].tolist() == [0, 1, 4, 5, 8, 9]


def test_a_shape_that_its_layout_does_not_give_is_named() -> None:
    with pytest.raises(ValueError, match=r"p: the sub-model has shape \(3,\), its layout gives \(2,\)"):
        make_plan({"p": (3,)}, {"p": (("a",),)}, {"a": 4}, {"a": 2})


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("width_axes", ["inner", "all"])
def test_only_the_vision_heads_and_the_projector_are_strided(tuning: str, width_axes: str) -> None:
    """Everything else is a prefix, so a sub-model costs views: under lora, and under inner, all of it."""
    store = build_store(tuning=tuning, width_axes=width_axes).store
    part = store.models.slices[1]
    strided = {
        name.rpartition("layers.")[2].lstrip("01.")
        for name, entry in {**part.base_plan, **part.trainable_plan}.items()
        if not all(isinstance(index, slice) for index in entry.index)
    }
    whole = tuning == "lora" or width_axes == "inner"
    assert strided == (set() if whole else {"self_attn.qkv.weight", "self_attn.qkv.bias", "projector.weight"})


def test_the_share_lost_is_whole_over_kept_of_the_input() -> None:
    sizes, kept = {"heads": 4, "head_dim": 2, "embed": 8, "ffn": 10}, {"heads": 3, "embed": 6}
    assert lost_share(parse_layout("embed (heads head_dim)"), sizes, kept) == pytest.approx(4 / 3)
    assert lost_share(parse_layout("ffn embed"), sizes, kept) == pytest.approx(8 / 6)
    assert lost_share(parse_layout("embed ffn"), sizes, kept) == 1.0
    assert lost_share(parse_layout("embed"), sizes, kept) == 1.0


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_a_zeroed_tail_is_the_columns_a_cut_leaves_behind(p: int, a: int, b: int) -> None:
    """Where nothing of an axis is kept, all of them."""
    sizes, kept = {"p": 3, "a": 3, "b": 3, "out": 2}, {"p": p, "a": a, "b": b}
    layout = parse_layout("out (p a b)")
    weight = torch.ones(2, 27)
    zero_tail(weight, layout, sizes, kept)
    columns = brute_force(layout, sizes, kept)[1]
    assert weight.sum() == 2 * len(columns) and bool(weight[:, columns].all())


def test_a_weight_that_reads_no_cut_axis_has_no_tail() -> None:
    """Its output is cut, its input is not: whoever holds a row holds the whole row."""
    weight = torch.ones(4, 3)
    zero_tail(weight, parse_layout("ffn embed"), {"ffn": 4, "embed": 3}, {"ffn": 2})
    assert bool(weight.all())
