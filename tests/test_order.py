"""Orders of units are permutations that are undone, composed and cut like any other slice."""

import math

import torch
from builders import model_file, processor
from hypothesis import given
from hypothesis import strategies as st

from scalefl.contracts import Axis
from scalefl.models.minigptv2 import FAMILY, LAYOUTS
from scalefl.slicing.layout import match_layouts, parse_layout
from scalefl.slicing.order import composed, most_first, permute, restoring, unit_places

LAYOUT_TEXTS = {
    "a.0.q.weight": "(heads head_dim) embed",
    "a.0.k.weight": "(kv_heads head_dim) embed",
    "a.0.o.weight": "embed (heads head_dim)",
    "a.0.qkv.weight": "(3 kv_heads head_dim) embed",
    "a.0.up.bias": "ffn",
    "a.0.down.weight": "embed ffn",
    "a.0.norm.weight": "embed",
    "a.norm.weight": "embed",
}
TABLE = {name: parse_layout(text) for name, text in LAYOUT_TEXTS.items()}


@st.composite
def models(draw):
    """Axes of a layer, its tensors, and two orders."""
    kv, group, head_dim, ffn, embed = (draw(st.integers(1, most)) for most in (4, 3, 3, 6, 3))
    axes = {
        "kv_heads": Axis(size=kv, cut_by="inner"),
        "heads": Axis(size=kv * group, cut_by="inner", follows="kv_heads"),
        "head_dim": Axis(size=head_dim),
        "ffn": Axis(size=ffn, cut_by="inner"),
        "embed": Axis(size=embed, cut_by="all"),
    }
    sizes = {name: axis.size for name, axis in axes.items()} | {"3": 3}
    shapes = {n: [math.prod(sizes[a] for a in inner) for inner in layout] for n, layout in TABLE.items()}
    orders = [
        {
            f"a.0/{axis}": torch.tensor(draw(st.permutations(range(sizes[axis]))))
            for axis in ("kv_heads", "ffn")
        }
        for _ in range(2)
    ]
    return axes, {name: torch.rand(shape) for name, shape in shapes.items()}, orders


@given(models())
def test_orders_are_undone_and_composed(model):
    axes, tensors, (first, then) = model
    places = unit_places(TABLE, axes)
    for name, tensor in tensors.items():
        once = permute(tensor, places[name], first)
        assert torch.equal(permute(once, places[name], restoring(first, axes)), tensor)
        assert torch.equal(
            permute(once, places[name], then), permute(tensor, places[name], composed(first, then))
        )


@given(models(), st.data())
def test_a_prefix_is_sorted_as_it_once_was(model, data):
    """Restored, the first units of an order are those of the original, in its sequence."""
    axes, tensors, (order, _) = model
    kept = data.draw(st.integers(1, axes["ffn"].size))
    cut_axes = axes | {"ffn": Axis(size=kept, cut_by="inner")}
    place = unit_places(TABLE, axes)["a.0.down.weight"]
    cut = permute(tensors["a.0.down.weight"], place, order)[:, :kept]
    restored = permute(cut, unit_places(TABLE, cut_axes)["a.0.down.weight"], restoring(order, cut_axes))
    chosen = sorted(order["a.0/ffn"][:kept].tolist())
    assert torch.equal(restored, tensors["a.0.down.weight"][:, chosen])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.data())
def test_every_prefix_holds_what_matters_most(scores, data):
    kept = data.draw(st.integers(1, len(scores)))
    order = most_first({"a.0/ffn": torch.tensor(scores, dtype=torch.float64)})["a.0/ffn"].tolist()
    assert sorted((scores[i] for i in order[:kept]), reverse=True) == sorted(scores, reverse=True)[:kept]


def test_heads_of_a_group_move_together():
    axes = {
        "kv_heads": Axis(size=2, cut_by="inner"),
        "heads": Axis(size=4, cut_by="inner", follows="kv_heads"),
        "head_dim": Axis(size=1),
        "ffn": Axis(size=1, cut_by="inner"),
        "embed": Axis(size=1, cut_by="all"),
    }
    places, order = unit_places(TABLE, axes), {"a.0/kv_heads": torch.tensor([1, 0])}
    assert permute(torch.arange(4.0)[:, None], places["a.0.q.weight"], order).flatten().tolist() == [
        2,
        3,
        0,
        1,
    ]
    assert permute(torch.arange(2.0)[:, None], places["a.0.k.weight"], order).flatten().tolist() == [1, 0]
    assert places["a.0.norm.weight"] == places["a.norm.weight"] == []


def test_what_moves_in_minigptv2():
    """Heads and channels of both towers; never the residual stream, head_dim (rotary), or the vocabulary."""
    config = FAMILY.config(model_file(kv_heads=2), processor())
    names = [n for n, _ in FAMILY.new_model(config).named_parameters()]
    places = unit_places(match_layouts(names, LAYOUTS), FAMILY.axes(config, cut_vision=True))
    found = {place.key.rpartition("/")[2] for of_name in places.values() for place in of_name}
    assert found == {"kv_heads", "ffn", "vision_heads", "vision_ffn"}
