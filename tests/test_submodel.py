"""Laws of sub-models: equal to the global model with the rest zeroed, views of one base, scaled.

Weights are float64, but Llama's RMSNorm computes in fp32 inside: logits agree to a few fp32 roundings (1e-6),
far below what one column too many or too few would do at these weights (1e-2 and more).
"""

from typing import Any

import pytest
import torch
from builders import RUN, batcher, build_store, exit_logits, in_float64, whole_model
from torch import Tensor, nn

LOGITS = {"rtol": 1e-6, "atol": 1e-6}


def zero_complement(model: nn.Module, kept: dict[str, int]) -> None:
    """In the whole model, zero what a level of `kept` units does not add to the residual streams."""
    with torch.no_grad():
        for layer in model.language_model.model.layers:
            layer.self_attn.o_proj.weight[:, kept["heads"] * 8 :] = 0.0  # head_dim 32 / 4
            layer.mlp.down_proj.weight[:, kept["ffn"] :] = 0.0
            for module, size in (
                (layer.self_attn.o_proj, kept["heads"] * 8),
                (layer.mlp.down_proj, kept["ffn"]),
            ):
                if hasattr(module, "lora_A"):
                    module.lora_A["default"].weight[:, size:] = 0.0
        for layer in model.vision_model.encoder.layers:
            layer.mlp.fc2.weight[:, kept.get("vision_ffn", 48) :] = 0.0


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"kv_heads": 2},
    {"freeze_vit": True},
    {"tuning": "lora"},
    {"tuning": "lora", "lora_targets": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_under_inner_a_submodel_is_the_global_model_with_the_rest_zeroed(options: dict[str, Any]) -> None:
    built = in_float64(build_store(**options))
    for level in built.store.models.levels:
        spec = built.store.models.slices[level].spec
        whole = whole_model(built, own=True)
        for parameter in whole.parameters():
            parameter.data = parameter.data.clone()
        zero_complement(whole, dict(spec.kept))
        ours = exit_logits(built.store.submodel(level, built.state, own=False).eval())
        expected = exit_logits(whole)[: spec.depth]
        for mine, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, other, **LOGITS)
        if level == 1:  # the law has teeth: the untouched global model answers otherwise
            assert (ours[0] - exit_logits(whole_model(built))[0]).abs().max() > 1e-2


@pytest.mark.parametrize("width_axes", ["inner", "all"])
def test_a_whole_level_is_the_global_model(width_axes: str) -> None:
    built = build_store(width_axes=width_axes, width_scaler=True)
    assert built.store.models.slices[3].config.input_scales in (None, {})
    for own in (
        False,
        True,
    ):  # torch picks other kernels where weights require gradients
        ours = exit_logits(built.store.submodel(3, built.state, own=own).eval())
        for mine, other in zip(ours, exit_logits(whole_model(built)), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4 if own else 0)  # fp32, logits of 10


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_layers_beyond_the_last_exit_do_not_exist(tuning: str) -> None:
    built = build_store(tuning=tuning)
    for level, depth in ((1, 1), (2, 2), (3, 3)):
        model = built.store.submodel(level, built.state, own=True)
        assert len(model.language_model.model.layers) == depth and len(model.exit_norms) == depth - 1
        assert not any(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())


def test_the_last_exit_of_a_level_is_an_earlier_exit_of_the_global_model() -> None:
    built = build_store()
    norm = built.store.submodel(2, built.state, own=False).language_model.model.norm.weight
    assert torch.equal(norm, built.state["exit_norms.1.weight"])


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("width_axes", ["inner", "all"])
@pytest.mark.parametrize("own", [True, False])
def test_frozen_parameters_are_views_of_the_base(width_axes: str, own: bool) -> None:
    built = build_store(tuning="lora", width_axes=width_axes)
    for level, part in built.store.models.slices.items():
        parameters = dict(built.store.submodel(level, built.state, own=own).named_parameters())
        assert part.base_plan
        for name, entry in part.base_plan.items():
            assert storage(parameters[name]) == storage(built.store.base[entry.global_name]), name
            assert parameters[name].data_ptr() == built.store.base[entry.global_name].data_ptr()
            assert not parameters[name].requires_grad


def test_evaluation_reads_the_state_in_place_and_training_owns_its_copies() -> None:
    built = build_store()
    part = built.store.models.slices[1]
    views = dict(built.store.submodel(1, built.state, own=False).named_parameters())
    copies = dict(built.store.submodel(1, built.state, own=True).named_parameters())
    everything = {storage(tensor) for tensor in built.state.values()}
    for name, entry in part.trainable_plan.items():
        assert storage(views[name]) == storage(built.state[entry.global_name]), name
        assert storage(copies[name]) not in everything and copies[name].is_contiguous(), name
    assert not any(p.requires_grad for p in views.values())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_gradients_are_asked_for_exactly_where_the_server_merges(tuning: str) -> None:
    built = build_store(tuning=tuning)
    for level, part in built.store.models.slices.items():
        model = built.store.submodel(level, built.state, own=True)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(part.trainable_plan)
        state = built.store.models.level_state(level, built.state)
        assert {n: tuple(t.shape) for n, t in state.items()} == dict(part.trainable_shapes)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", module), nn.Linear) and "lora_" not in name
        if not name.endswith("base_layer")
    }


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("width_axes", ["inner", "all"])
def test_the_scaler_multiplies_every_contraction_that_lost_terms(tuning: str, width_axes: str) -> None:
    """full / kept times the product with the input, adapters' path included; the bias stays as it is."""
    targets = ("q_proj", "v_proj", "o_proj")
    built = in_float64(
        build_store(tuning=tuning, width_axes=width_axes, width_scaler=True, lora_targets=targets)
    )
    whole = {name: module.in_features for name, module in linears(whole_model(built)).items()}
    model = built.store.submodel(1, built.state, own=False).eval()
    scaled = 0
    for name, module in linears(model).items():
        weight, bias = getattr(module, "base_layer", module).weight, getattr(module, "bias", None)
        if "lora_A" in dict(module.named_children()):  # alpha / r = 8 / 4
            weight = weight + 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
        factor = whole[name] / module.in_features
        scaled += factor != 1
        x = torch.randn(
            3, module.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        expected = factor * x @ weight.T + (0.0 if bias is None else bias)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected)
    # Inner: o_proj and down_proj of the one layer, and fc2 of two where the tower is cut. All: 7 of the layer
    # and the head, and where the tower is cut 4 in each of its 2 layers and the projector.
    expected_count = {("inner", "full"): 4, ("inner", "lora"): 2, ("all", "full"): 17, ("all", "lora"): 8}
    assert scaled == expected_count[width_axes, tuning]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tails_start_without_effect(kv_heads: int) -> None:
    """At init from scratch every exit of every level answers as the whole model's first exit."""
    built = in_float64(build_store(kv_heads=kv_heads, from_scratch=True, random_weights=False))
    whole = exit_logits(whole_model(built))
    for level in built.store.models.levels:
        ours = exit_logits(built.store.submodel(level, built.state, own=False).eval())
        for mine in ours:
            torch.testing.assert_close(mine, whole[0], **LOGITS)
    plain = build_store(kv_heads=kv_heads, from_scratch=True, random_weights=False, zero_tails=False)
    ours = exit_logits(plain.store.submodel(1, plain.state, own=False).eval())
    assert (ours[0] - exit_logits(whole_model(plain))[0]).abs().max() > 1e-4  # small: weights of 0.02


@pytest.mark.parametrize(("tuning", "from_scratch"), [("full", False), ("lora", False), ("lora", True)])
def test_tails_that_are_pretrained_or_frozen_stay(tuning: str, from_scratch: bool) -> None:
    """A frozen column of zeros would keep a head or channel without effect for good."""
    built = build_store(tuning=tuning, from_scratch=from_scratch, random_weights=False)
    for name, tensor in {**built.store.base, **built.state}.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight")):
            assert bool((tensor != 0).any(dim=0).all()), name


def test_gradients_reach_zeroed_tails() -> None:
    built = build_store(from_scratch=True, random_weights=False)
    model = built.store.submodel(3, built.state, own=True)
    batch = batcher().training([0, 1, 2])
    torch.nn.functional.cross_entropy(model(**batch.inputs).exit_logits[-1], batch.targets).backward()
    column = model.language_model.model.layers[0].mlp.down_proj.weight
    assert bool((column[:, 20:] == 0).all()) and bool((column.grad[:, 20:] != 0).any())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_seed_alone_decides_the_initial_weights(tuning: str) -> None:
    first, second = (build_store(tuning=tuning, random_weights=False) for _ in range(2))
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
    other = build_store(tuning=tuning, random_weights=False, seed=RUN.seed + 1)
    assert not torch.equal(first.state["projector.weight"], other.state["projector.weight"])
