"""Laws of saved models: a level is a Hugging Face model folder, loads as it was, and can be started from."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import ANSWERS, QUESTIONS, RUN, build_global, build_store, exit_logits, model_file, processor
from transformers import AutoModelForImageTextToText, AutoProcessor

from scalefl.models.minigptv2 import FAMILY, MiniGPTv2Config, MiniGPTv2ForConditionalGeneration


@pytest.mark.parametrize("width_axes", ["inner", "all"])
@pytest.mark.parametrize("level", [1, 2])
def test_a_submodel_saved_and_loaded_through_auto_classes_answers_the_same(
    tmp_path: Path, width_axes: str, level: int
) -> None:
    """Level 2 keeps 3 heads of 8, which do not divide the hidden size of 32 under inner. Scales go along."""
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


def test_a_level_that_was_saved_with_its_scales_can_be_started_from(tmp_path: Path) -> None:
    """`--init_from` an exported level: the whole model of the new run answers as the level did."""
    built = build_store(width_axes="all", width_scaler=True)
    built.store.submodel(1, built.state, own=True).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    expected = exit_logits(loaded)
    run = replace(RUN, ee_locs=(), vertical_scale_ratios=(1.0,), horizontal_scale_ratios=(1,))
    store, state = build_global(
        run, FAMILY, loaded.config, dict(loaded.named_parameters()), device=torch.device("cpu")
    )
    for mine, other in zip(exit_logits(store.submodel(0, state, own=False).eval()), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_a_config_with_exits_and_scales_survives_json() -> None:
    config = MiniGPTv2Config(exit_layers=[2, 32], input_scales={"projector": 2.0})
    again = MiniGPTv2Config.from_dict(json.loads(config.to_json_string()))
    assert (again.exit_layers, again.input_scales) == ([2, 32], {"projector": 2.0})


def test_the_tokenizer_does_not_depend_on_the_process() -> None:
    script = "from builders import processor; print(processor().tokenizer.backend_tokenizer.to_str())"
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "12345"}  # this process has another
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout == processor().tokenizer.backend_tokenizer.to_str() + "\n"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [((1, 2), (2,), (0.2,)), ((2,), (1, 2), (0.3, 0.2)), ((1, 2), (1, 2), (0.1, 0.2))],
)
def test_exits_of_a_loaded_model_stay_and_new_ones_start_from_the_final_norm(
    before: tuple[int, ...], after: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    """The norm after layer n holds n / 10; there are 3 layers."""
    config = FAMILY.config(model_file(), processor())
    config.exit_layers = [*before, 3]
    model = FAMILY.new_model(config)
    for i, layer in enumerate((*before, 3), start=1):
        model.exit_norm(i).weight.data.fill_(layer / 10)
    run = replace(RUN, ee_locs=after, horizontal_scale_ratios=(1, 1, 1))
    store, state = build_global(
        run, FAMILY, config, dict(model.named_parameters()), device=torch.device("cpu")
    )
    assert store.models.config.exit_layers == [*after, 3]
    for i, value in enumerate(expected):
        assert bool((state[f"exit_norms.{i}.weight"] == torch.tensor(value)).all())
