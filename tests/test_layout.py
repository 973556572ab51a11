"""Laws of layouts: the notation means what it says, and each parameter of a family has exactly one."""

import pytest
from builders import build_store, model_file, processor
from hypothesis import given
from hypothesis import strategies as st

from scalefl.contracts import InputError
from scalefl.models.adapters import LoraSpec, adapter_layouts
from scalefl.models.minigptv2 import FAMILY
from scalefl.slicing.layout import match_layouts, parse_layout, units

WORDS = st.text("abcdefghij_0123456789", min_size=1, max_size=6)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=3), max_size=4))
def test_a_layout_written_out_reads_back(layout: list[list[str]]) -> None:
    text = " ".join(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in layout)
    assert parse_layout(text) == tuple(map(tuple, layout))


@pytest.mark.parametrize("text", ["(a b", "a b)", "((a b) c)", "a ()"])
def test_unbalanced_parentheses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected names and groups in parentheses"):
        parse_layout(text)


def test_a_number_stands_for_itself() -> None:
    assert units("3", {}) == 3
    assert units("heads", {"heads": 8}) == 8


@pytest.mark.parametrize("ee_locs", [(), (1, 2)], ids=["one exit", "early exits"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")]
)
def test_every_parameter_has_one_layout_of_its_own_shape(
    ee_locs: tuple[int, ...], tuning: str, targets: tuple[str, ...]
) -> None:
    depths = (1, 1, 1) if not ee_locs else (1, 2, 3)
    built = build_store(
        tuning=tuning, ee_locs=ee_locs, lora_targets=targets, horizontal_scale_ratios=depths, kv_heads=2
    )
    store, spec = built.store, LoraSpec(rank=4, alpha=8.0, dropout=0.0, targets=targets)
    tensors = {**store.base, **built.state}
    table = FAMILY.layouts(store.models.config)
    table = table if tuning == "full" else adapter_layouts(table, spec)
    layouts = match_layouts(tensors, table)
    sizes = {name: axis.size for name, axis in FAMILY.axes(store.models.config, cut_vision=True).items()}
    assert set(layouts) == set(tensors)
    for name, tensor in tensors.items():
        shape = []
        for axes in layouts[name]:
            size = 1
            for axis in axes:
                size *= int(axis) if axis.isdecimal() else sizes[axis]
            shape.append(size)
        assert tuple(shape) == tuple(tensor.shape), name


def test_lora_moves_weights_aside_and_adds_two_factors_each() -> None:
    """3 layers, 2 targets each: 12 factors beside the projector and the 2 early norms."""
    built = build_store(tuning="lora")
    factors = [name for name in built.state if ".lora_" in name]
    assert len(factors) == 12
    assert set(built.state) - set(factors) == {
        "projector.weight",
        "projector.bias",
        "exit_norms.0.weight",
        "exit_norms.1.weight",
    }
    assert "language_model.model.norm.weight" in built.store.base


@pytest.mark.parametrize("targets", [("q_porj",), ("q_proj", "v_porj"), ("fc1",), ("lm_head",)])
def test_a_target_that_is_no_layer_of_the_language_models_is_named(targets: tuple[str, ...]) -> None:
    """One misspelled target beside a good one would go unnoticed, and half the adapters be missing."""
    with pytest.raises(InputError, match=targets[-1]):
        build_store(tuning="lora", lora_targets=targets)


def test_mismatches_are_named() -> None:
    names = ["a.weight", "b.weight", "lonely"]
    table = [("a.*", "x"), ("?.weight", "x"), ("ghost.*", "x")]
    with pytest.raises(InputError) as caught:
        match_layouts(names, table)
    message = str(caught.value)
    assert "pattern 'ghost.*' matches no parameter" in message
    assert "a.weight matches several patterns" in message
    assert "lonely has no layout" in message


def test_a_family_parameter_without_a_layout_is_an_error() -> None:
    config = FAMILY.config(model_file(), processor())
    names = [name for name, _ in FAMILY.new_model(config).named_parameters()]
    with pytest.raises(InputError, match="surprise has no layout"):
        match_layouts([*names, "surprise"], FAMILY.layouts(config))
    with pytest.raises(InputError, match="pattern 'projector.bias' matches no parameter"):
        match_layouts([n for n in names if n != "projector.bias"], FAMILY.layouts(config))
