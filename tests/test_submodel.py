"""Laws of sub-models: equal to the global model with the rest zeroed, views of one base, real Hugging Face models.

Weights are float64, but Llama's RMSNorm computes in fp32 inside: logits agree to a few fp32 roundings (1e-6), far
below what one column too many or too few would do at these weights (1e-2 and more).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ANSWERS, QUESTIONS, RUN, batcher, build_store, in_float64, processor, whole_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from scalefl.models.minigptv2 import MiniGPTv2Config, MiniGPTv2ForConditionalGeneration

LOGITS = {"rtol": 1e-6, "atol": 1e-6}


def exit_logits(model: nn.Module) -> tuple[Tensor, ...]:
    """Of three prompts of different length, at every exit and answer token."""
    inputs = dict(batcher().training([0, 1, 2]).inputs)
    inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    with torch.no_grad():
        return model(**inputs).exit_logits


def zero_complement(model: nn.Module, kept: dict[str, int]) -> None:
    """Zero what a level of `kept` heads and channels does not add to the residual streams, in the whole model."""
    with torch.no_grad():
        for layer in model.language_model.model.layers:
            layer.self_attn.o_proj.weight[:, kept["heads"] * 8 :] = 0.0  # head_dim 32 / 4
            layer.mlp.down_proj.weight[:, kept["ffn"] :] = 0.0
        for layer in model.vision_model.encoder.layers:
            layer.mlp.fc2.weight[:, kept.get("vision_ffn", 48) :] = 0.0


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"freeze_vit": True}, {"tuning": "lora"}], ids=str)
def test_under_inner_a_submodel_is_the_global_model_with_the_rest_zeroed(options: dict[str, Any]) -> None:
    built = in_float64(build_store(**options))
    for level in built.store.levels:
        spec = built.store.slices[level].spec
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
    assert built.store.slices[3].config.input_scales in (None, {})
    for own in (False, True):  # torch picks other kernels where weights require gradients: a few fp32 roundings
        ours = exit_logits(built.store.submodel(3, built.state, own=own).eval())
        for mine, other in zip(ours, exit_logits(whole_model(built)), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4 if own else 0)


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
    for level, part in built.store.slices.items():
        parameters = dict(built.store.submodel(level, built.state, own=own).named_parameters())
        assert part.base_plan
        for name, entry in part.base_plan.items():
            assert storage(parameters[name]) == storage(built.store.base[entry.global_name]), name
            assert parameters[name].data_ptr() == built.store.base[entry.global_name].data_ptr()
            assert not parameters[name].requires_grad


def test_evaluation_reads_the_state_in_place_and_training_owns_its_copies() -> None:
    built = build_store()
    part = built.store.slices[1]
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
    for level, part in built.store.slices.items():
        model = built.store.submodel(level, built.state, own=True)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(part.trainable_plan)
        state = built.store.level_state(level, built.state)
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
    built = in_float64(build_store(tuning=tuning, width_axes=width_axes, width_scaler=True, lora_targets=targets))
    whole = {name: module.in_features for name, module in linears(whole_model(built)).items()}
    model = built.store.submodel(1, built.state, own=False).eval()
    scaled = 0
    for name, module in linears(model).items():
        weight, bias = getattr(module, "base_layer", module).weight, getattr(module, "bias", None)
        if "lora_A" in dict(module.named_children()):  # alpha / r = 8 / 4
            weight = weight + 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
        factor = whole[name] / module.in_features
        scaled += factor != 1
        x = torch.randn(3, module.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        expected = factor * x @ weight.T + (0.0 if bias is None else bias)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected)
    # Inner: o_proj and down_proj of the one layer, fc2 of two where the tower is cut. All: every linear layer,
    # 7 and the head, and in the vision tower 4 in each of 2 layers and the projector.
    expected_count = {("inner", "full"): 4, ("inner", "lora"): 2, ("all", "full"): 17, ("all", "lora"): 8}
    assert scaled == expected_count[width_axes, tuning]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tails_start_without_effect(kv_heads: int) -> None:
    """At init from scratch each level answers as the whole model does at the level's exits."""
    built = in_float64(build_store(kv_heads=kv_heads, from_scratch=True, random_weights=False))
    whole = exit_logits(whole_model(built))
    for level in built.store.levels:
        ours = exit_logits(built.store.submodel(level, built.state, own=False).eval())
        for mine, other in zip(ours, whole, strict=False):
            torch.testing.assert_close(mine, other, **LOGITS)
    plain = build_store(kv_heads=kv_heads, from_scratch=True, random_weights=False, zero_tails=False)
    ours = exit_logits(plain.store.submodel(1, plain.state, own=False).eval())
    assert (ours[0] - exit_logits(whole_model(plain))[0]).abs().max() > 1e-4  # weights of 0.02: small, not nothing


def test_pretrained_weights_keep_their_tails() -> None:
    built = build_store(from_scratch=False, random_weights=False)
    assert bool((built.state["language_model.model.layers.0.mlp.down_proj.weight"] != 0).all())


def test_gradients_reach_zeroed_tails() -> None:
    built = build_store(from_scratch=True, random_weights=False)
    model = built.store.submodel(3, built.state, own=True)
    batch = batcher().training([0, 1, 2])
    torch.nn.functional.cross_entropy(model(**batch.inputs).exit_logits[-1], batch.targets).backward()
    column = model.language_model.model.layers[0].mlp.down_proj.weight
    assert bool((column[:, 20:] == 0).all()) and bool((column.grad[:, 20:] != 0).any())


@pytest.mark.parametrize("width_axes", ["inner", "all"])
@pytest.mark.parametrize("level", [1, 2])
def test_a_submodel_saved_and_loaded_through_auto_classes_answers_the_same(
    tmp_path: Path, width_axes: str, level: int
) -> None:
    """Level 2 keeps 3 heads of 8, which under inner do not divide the hidden size of 32. The scaler goes along."""
    built = build_store(width_axes=width_axes, width_scaler=True)
    model = built.store.submodel(level, built.state, own=True).eval()
    assert model.config.input_scales
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is MiniGPTv2ForConditionalGeneration
    assert loaded.config.input_scales == model.config.input_scales
    for mine, other in zip(exit_logits(loaded), exit_logits(model), strict=True):
        assert torch.equal(mine, other)
    again = AutoProcessor.from_pretrained(tmp_path)
    for question in QUESTIONS:
        assert again.encode_question(question) == processor().encode_question(question)
    assert [again.decode_answer(again.encode_answer(answer)) for answer in ANSWERS] == list(ANSWERS)


def test_a_config_with_exits_and_scales_survives_json() -> None:
    config = MiniGPTv2Config(exit_layers=[2, 4], input_scales={"projector": 2.0}, text_config={"num_hidden_layers": 4})
    again = MiniGPTv2Config.from_dict(json.loads(config.to_json_string()))
    assert (again.exit_layers, again.input_scales) == ([2, 4], {"projector": 2.0})


def test_the_tokenizer_does_not_depend_on_the_process() -> None:
    script = "from builders import processor; print(processor().tokenizer.backend_tokenizer.to_str())"
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "12345"}  # this process has another
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == processor().tokenizer.backend_tokenizer.to_str() + "\n"


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_seed_alone_decides_the_initial_weights(tuning: str) -> None:
    first, second = (build_store(tuning=tuning, random_weights=False) for _ in range(2))
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
    other = build_store(tuning=tuning, random_weights=False, seed=RUN.seed + 1)
    assert not torch.equal(first.state["projector.weight"], other.state["projector.weight"])
