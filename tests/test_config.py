"""Options and model files: layers, laws of the round trip, and the line that each kind of bad input gets."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalefl.config.modelfile import EVA_VIT_G, LLAMA_2_7B, ModelFile, parse_model_file, read_model_file
from scalefl.config.options import GROUPS, RunConfig
from scalefl.config.recipes import RECIPES
from scalefl.config.resolve import resolve
from scalefl.config.saved import changed_on_resume, from_dict, load_config, save_config, to_dict
from scalefl.contracts import InputError

# Upstream's own files, shortened: the model's, a training and an evaluation one.
UPSTREAM_MODEL = """
model:
  arch: minigpt_v2
  image_size: 448
  drop_path_rate: 0
  use_grad_checkpoint: False
  vit_precision: "fp16"
  freeze_vit: True
  prompt: ""
  llama_model: "/llama"
  lora_r: 64
  lora_alpha: 16
preprocess:
    vis_processor:
        train: {name: "blip2_image_train", image_size: 448}
        eval: {name: "blip2_image_eval", image_size: 448}
    text_processor:
        train: {name: "blip_caption"}
"""
UPSTREAM_TRAINING = """
model:
  arch: minigpt_v2
  model_type: pretrain
  max_txt_len: 1024
  end_sym: "</s>"
  llama_model: "/llama"
  ckpt: "/ckpt"
  use_grad_checkpoint: True
  chat_template: True
datasets:
  coco_caption: {batch_size: 6, sample_ratio: 10}
run:
  task: image_text_pretrain
  init_lr: 1e-5
"""
UPSTREAM_EVALUATION = """
model:
  arch: minigpt_v2
  low_resource: True
  prompt_template: '[INST] {} [/INST]'
  ckpt: ""
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """A function that writes a YAML file and returns its path."""

    def write_text(text: str) -> str:
        path = tmp_path / "given.yaml"
        path.write_text(text)
        return str(path)

    return write_text


def problems(flags: dict[str, Any], *config_files: str) -> list[str]:
    with pytest.raises(InputError) as refusal:
        resolve(flags, *config_files)
    return str(refusal.value).splitlines()


def test_every_option_has_a_default_and_belongs_to_one_group():
    names = [f.name for group in GROUPS for f in dataclasses.fields(group)]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(RunConfig))
    assert len(set(names)) == len(names)
    RunConfig()


# Layers


def test_later_layers_win(write):
    assert RunConfig().lr_schedule == "none"
    assert resolve({})[0].lr_schedule == "cosine"  # the tiny preset
    config_file = write("lr-schedule: none\nseed: 3\n")
    assert resolve({}, config_file)[0].lr_schedule == "none"
    run, _ = resolve({"lr_schedule": "exponential"}, config_file)
    assert (run.lr_schedule, run.seed) == ("exponential", 3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_its_values_and_flags_override_them(name):
    run, _ = resolve({"recipe": name})
    assert {option: getattr(run, option) for option in RECIPES[name]} == RECIPES[name]
    assert resolve({"recipe": name, "logit_adjustment": "on"})[0].logit_adjustment == "on"


def test_recipes_set_the_same_options():
    assert len({frozenset(values) for values in RECIPES.values()}) == 1


def test_yaml_chooses_the_preset(write):
    assert resolve({}, write("cfg_path: minigpt_v2"))[1].name == "minigpt_v2"


def test_yaml_reads_floats_and_off_as_meant(write):
    run, _ = resolve(
        {}, write("lr: 3e-5\nlogit_adjustment: off\nreport_to: [tensorboard]\nmax_grad_norm: null")
    )
    assert (run.lr, run.logit_adjustment, run.report_to) == (3e-5, "off", ("tensorboard",))
    assert run.max_grad_norm is None


@pytest.mark.parametrize(("tuning", "frozen"), [("lora", True), ("full", False)])
def test_the_tower_is_frozen_under_lora_and_trained_under_full(tuning, frozen):
    assert resolve({"tuning": tuning})[0].freeze_vit is frozen


def test_momentum_alone_means_sgd(write):
    assert resolve({"momentum": "0.9"})[0].optimizer == "sgd"
    assert resolve({}, write("momentum: 0.9"))[0].optimizer == "sgd"


def test_momentum_with_an_explicit_adamw_is_refused(write):
    expected = ["--momentum: adamw has no momentum; leave it out, or choose --optimizer sgd."]
    assert problems({"momentum": "0.9", "optimizer": "adamw"}) == expected
    assert problems({"momentum": "0.9"}, write("optimizer: adamw")) == expected


# Saved configs


def test_a_saved_config_reads_back_equal(tmp_path):
    for flags in ({}, {"cfg_path": "minigpt_v2", "answers": ["a", "b"], "eval_limit": "7"}):
        run, model_file = resolve(flags)
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
        assert from_dict(ModelFile, json.loads(json.dumps(to_dict(model_file)))) == model_file
        save_config(tmp_path, run, model_file)
        assert load_config(tmp_path) == (run, model_file)


@given(lr=st.floats(0, 1e3), seed=st.integers(0, 2**62), answers=st.sets(st.text(min_size=1), min_size=1))
def test_any_config_survives_json(lr, seed, answers):
    run = RunConfig(lr=lr, seed=seed, answers=tuple(answers))
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run


def test_a_resume_starts_from_the_saved_config_in_the_folder_it_is_in(tmp_path):
    run, model_file = resolve({"recipe": "paper", "width_scaler": "0", "num_rounds": "2"})
    save_config(tmp_path, run, model_file)
    resumed, resumed_file = resolve({"resume": str(tmp_path), "num_rounds": "4"})
    assert resumed_file == model_file
    assert resumed == dataclasses.replace(run, num_rounds=4, resume=str(tmp_path), save_path=str(tmp_path))


def test_a_resume_may_change_rounds_paths_and_logging_alone(tmp_path):
    run, model_file = resolve({"lr": "1e-3"})
    save_config(tmp_path, run, model_file)
    flags = {"resume": str(tmp_path), "data_root": "elsewhere", "print_freq": "3", "lr": "2e-3"}
    assert problems(flags) == [
        f"--lr: got 0.002, {tmp_path} has 0.001; a saved run keeps it: drop the option, or start a new run."
    ]
    assert changed_on_resume(run, dataclasses.replace(run, seed=1, num_rounds=9)) == ["seed"]


def test_an_evaluation_may_change_the_data_but_not_the_model(tmp_path):
    save_config(tmp_path, *resolve({}))
    run, _ = resolve({"evaluate_from": str(tmp_path), "data": "synthetic", "evalmode": "local"})
    assert (run.data, run.evalmode, run.ee_locs) == ("synthetic", "local", (1, 2, 3))
    assert problems({"evaluate_from": str(tmp_path), "ee_locs": ["1", "2", "4"]}) == [
        f"--ee_locs: got (1, 2, 4), {tmp_path} has (1, 2, 3); "
        "a saved run keeps it: drop the option, or start a new run."
    ]


def test_resuming_what_is_no_run_is_refused(tmp_path):
    assert problems({"resume": str(tmp_path)}) == [
        f"{tmp_path}/run.json: No such file or directory; "
        "expected a run folder or checkpoint that `scalefl train` wrote."
    ]
    (tmp_path / "run.json").write_text("{")
    assert problems({"resume": str(tmp_path)})[0].startswith(f"{tmp_path}/run.json: damaged (")


# Model files


def test_upstreams_files_are_read_as_they_are(write):
    model = read_model_file(write(UPSTREAM_MODEL))
    assert (model.arch, model.image_size, model.llama_model) == ("MiniGPTv2", 448, "/llama")
    assert (dict(model.vision), dict(model.text)) == (dict(EVA_VIT_G), dict(LLAMA_2_7B))
    assert model.train == {
        "gradient_checkpointing": False,
        "freeze_vit": True,
        "lora_r": 64,
        "lora_alpha": 16.0,
    }
    training = read_model_file(write(UPSTREAM_TRAINING))
    assert (training.max_txt_len, training.ckpt, training.chat_template) == (1024, "/ckpt", True)
    assert training.train == {"gradient_checkpointing": True}
    evaluation = read_model_file(write(UPSTREAM_EVALUATION))
    assert (evaluation.low_resource, evaluation.ckpt) == (True, None)


def test_the_full_size_preset_is_upstreams(write):
    preset, upstream = read_model_file("minigpt_v2"), read_model_file(write(UPSTREAM_MODEL))
    same = (
        "arch",
        "image_size",
        "vit_precision",
        "prompt_template",
        "image_mean",
        "vision",
        "text",
        "tokenizer",
    )
    assert {n: getattr(preset, n) for n in same} == {n: getattr(upstream, n) for n in same}
    assert upstream.train.items() - {("gradient_checkpointing", False)} <= preset.train.items()


def test_the_tiny_preset_is_the_default():
    assert resolve({})[1] == read_model_file("tiny")


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({}, "m: no section model; expected `model:` with at least `arch: minigpt_v2`."),
        ({"model": 3}, "m: model: got 3; expected a section of `key: value` lines."),
        ({"model": {}, "tex": {}}, "m: tex: unknown key; did you mean 'text'? known: "),
        ({"model": {"imagesize": 4}}, "m: model.imagesize: unknown key; did you mean 'image_size'? known: "),
        ({"model": {"image_size": "big"}}, "m: model.image_size: got 'big'; expected a whole number."),
        ({"model": {"image_size": 0}}, "m: model.image_size: got 0; expected a number above 0."),
        (
            {"model": {"vit_precision": "fp61"}},
            "m: model.vit_precision: got 'fp61'; did you mean 'fp16'? expected one of fp16, bf16, fp32.",
        ),
        (
            {"model": {"prompt_template": "[INST]"}},
            "m: model.prompt_template: got '[INST]'; expected one {}, for the question.",
        ),
        (
            {"model": {"lora_r": 8}, "train": {"lora_r": 8}},
            "m: train.lora_r: given in section model as well; keep one.",
        ),
        (
            {"model": {}, "train": {"width_axes": "all"}},
            "m: train.width_axes: the recipe decides it; set train.recipe instead.",
        ),
        ({"model": {}, "train": {"lrr": 1}}, "m: train.lrr: unknown option; did you mean m: train.lr? "),
        (
            {"model": {}, "tokenizer": {"kind": "trained"}},
            "m: tokenizer: expected vocab_size with kind trained, and",
        ),
        (
            {"model": {"image_size": 448}, "preprocess": {"vis_processor": {"eval": {"image_size": 224}}}},
            "m: preprocess.vis_processor.eval.image_size: got 224, elsewhere 448; keep one.",
        ),
        (
            {
                "model": {},
                "vision": {
                    "hidden_size": 20,
                    "intermediate_size": 8,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 3,
                },
            },
            "m: vision.hidden_size: got 20, no multiple of num_attention_heads 3; expected one.",
        ),
    ],
)
def test_bad_model_files_get_one_line(raw, line):
    with pytest.raises(InputError) as refusal:
        parse_model_file(raw, "m")
    (got,) = str(refusal.value).splitlines()
    assert got.startswith(line)


def test_a_section_of_sizes_is_complete():
    with pytest.raises(InputError, match="text.intermediate_size: missing; expected a number"):
        parse_model_file({"model": {}, "text": {"hidden_size": 64}}, "m")


# Bad input


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"lr": "nan"}, "--lr: got nan; expected a finite number at least 0."),
        ({"lr": "fast"}, "--lr: got 'fast'; expected a number."),
        ({"num_rounds": "1.5"}, "--num_rounds: got '1.5'; expected a whole number."),
        ({"num_rounds": "0"}, "--num_rounds: got 0; expected a number at least 1."),
        ({"sample_rate": "1.5"}, "--sample_rate: got 1.5; expected a number above 0 and at most 1."),
        (
            {"vertical_scale_ratios": ["0", ".5", ".5", "1"]},
            "--vertical_scale_ratios: got 0.0; expected a number above 0 and at most 1.",
        ),
        (
            {"ee_locs": ["1", "3", "2"]},
            "--ee_locs: exits out of order: 1 3 2; expected each layer once, rising, such as 1 2 3.",
        ),
        (
            {"vertical_scale_ratios": ["0.5", "1"]},
            "--vertical_scale_ratios: got 2 levels, with 4 in --horizontal_scale_ratios and 4 in "
            "--client_split_ratios; expected one number per level in each, and at least one level.",
        ),
        (
            {"horizontal_scale_ratios": ["1", "2", "3", "5"]},
            "--horizontal_scale_ratios: got 1 2 3 5; expected numbers of exits up to 4, for 3 --ee_locs "
            "and the last layer; lower it or add an exit.",
        ),
        (
            {"client_split_ratios": ["0.5", "0.5", "0.5", "0.5"]},
            "--client_split_ratios: the shares sum to 2; expected 1.",
        ),
        (
            {"partitioner": "dirichlt"},
            "--partitioner: got 'dirichlt'; did you mean 'dirichlet'? "
            "expected one of dirichlet, iid, pathological, natural, size_skewed.",
        ),
        ({"use_valid": "2"}, "--use_valid: got '2'; expected true, false, 1 or 0."),
        ({"save_path": 5}, "--save_path: got 5; expected a text; put it in quotes."),
        ({"data_root": ""}, "--data_root: got an empty text; expected a value, or leave the option out."),
        (
            {"answers": ["yes", "yes"]},
            "--answers: got 'yes', 'yes'; expected texts that differ, without blanks around them.",
        ),
        (
            {"batch_size": "5", "micro_batch_size": "2"},
            "--batch_size: got 5, which --micro_batch_size 2 does not divide; expected a multiple of it.",
        ),
        (
            {"lr_schedule": "multistep"},
            "--lr_milestones: missing; expected the rounds at which multistep lowers the rate.",
        ),
        (
            {"tuning": "lora", "freeze_vit": "0"},
            "--freeze_vit: got false; --tuning lora keeps the tower frozen; choose --tuning full.",
        ),
        (
            {"cfg_path": "minigpt_v2", "tuning": "full", "freeze_vit": False},
            "--tuning: full would train the vision tower, which minigpt_v2 keeps in fp16 (vit_precision); "
            "set that to fp32 or bf16, or give --freeze_vit.",
        ),
        (
            {"tuning": "lora", "double_quant": False},
            "--double_quant: is of --quantization nf4 alone, which is none; leave it out, or choose nf4.",
        ),
        (
            {"client_levels": "1 1 1 4".split(), "client_split_ratios": ".25 .25 .25 .25".split()}
            | {"num_clients": "4"},
            "--client_split_ratios: got 0.25 0.25 0.25 0.25, but --client_levels deals 3 0 0 1 of the 4 "
            "clients; drop one.",
        ),
        (
            {"arch": "MiniGPTv3"},
            "--arch: got MiniGPTv3, but tiny describes MiniGPTv2; drop it, or give another --cfg_path.",
        ),
        (
            {"cfg_path": "tinny"},
            "--cfg_path: no file 'tinny', and no preset of that name; did you mean 'tiny'? "
            "expected a YAML file or one of minigpt_v2, tiny.",
        ),
        (
            {"batchsize": "4"},
            "--batchsize: unknown option; did you mean --batch_size? `scalefl train --help` lists them.",
        ),
    ],
)
def test_bad_options_get_one_line(flags, line):
    assert problems(flags) == [line]


def test_what_has_no_effect_is_refused_only_where_it_was_asked_for(write):
    """Defaults, presets and what a plan wrote may hold it."""
    preset = "model: {arch: minigpt_v2}\ntrain: {tuning: lora, double_quant: false, checkpointing_levels: []}"
    run, _ = resolve({"cfg_path": write(preset)})
    assert (run.quantization, run.double_quant, run.checkpointing_levels) == ("none", False, ())
    shares = {"client_split_ratios": ["0.33", "0", "0", "0.67"]}
    assert resolve({"num_clients": "3", "client_levels": ["1", "4", "4"], **shares})[0].client_levels


def test_a_saved_run_may_change_its_feature_cache(tmp_path):
    """What it keeps of one is without effect then; no flag takes it back. Given beside it, it is refused."""
    kept = {"feature_folder": "features", "feature_dtype": "bf16"}
    save_config(tmp_path, *resolve({"tuning": "lora", "feature_cache": "file", **kept}))
    for then in ("resume", "evaluate_from"):
        for cache in ("off", "memory", "auto"):
            run, _ = resolve({then: str(tmp_path), "feature_cache": cache})
            assert (run.feature_cache, run.feature_folder) == (cache, "features")
    expected = [
        "--feature_folder: got features, but --feature_cache is off; expected file.",
        "--feature_dtype: got bf16, but --feature_cache is off; leave it out.",
    ]
    assert problems({"tuning": "lora", "feature_cache": "off", **kept}) == expected
    assert problems({"resume": str(tmp_path), "feature_cache": "off", **kept}) == expected


def test_all_problems_are_reported_at_once():
    flags = {"lrr": "1", "seed": "x", "alpha": "-1", "ee_locs": ["2", "1", "3"], "cfg_path": "tiny"}
    assert [line.split(":")[0] for line in problems(flags)] == ["--lrr", "--seed", "--alpha", "--ee_locs"]


def test_an_option_that_cannot_be_read_hides_what_would_follow_from_it_alone():
    flags = {"vertical_scale_ratios": ["x"], "horizontal_scale_ratios": ["1"], "lr": "-1"}
    assert [line.split(":")[0] for line in problems(flags)] == ["--vertical_scale_ratios", "--lr"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "num_round: 3",
            "{}: num_round: unknown option; did you mean {}: num_rounds? `scalefl train --help` lists them.",
        ),
        ("alpha: [1]", "{}: alpha: got [1]; expected a number."),
        ("ee_locs: 3", "{}: ee_locs: got 3; expected a list, such as [3]."),
        (
            "ee_locs: [3, 2, 1]",
            "{}: ee_locs: exits out of order: 3 2 1; expected each layer once, rising, such as 1 2 3.",
        ),
        ("seed: 1\nseed: 2", "{}, line 2, column 1: not valid YAML (seed given twice); mend that line."),
        (
            "batch-size: 1\nbatch_size: 2",
            "{}: batch_size: given twice, with dashes and with underscores; keep one.",
        ),
        (
            "a: [1",
            "{}, line 1, column 6: not valid YAML (expected ',' or ']', but got '<stream end>'); "
            "mend that line.",
        ),
        ("- seed", "{}: got a list; expected a mapping, such as `num_rounds: 5`."),
        ("", "{}: got an empty file; expected a mapping, such as `num_rounds: 5`."),
    ],
)
def test_bad_yaml_gets_one_line(write, text, line):
    path = write(text)
    assert problems({}, path) == [line.replace("{}", path)]


def test_a_missing_config_file_is_named():
    assert problems({}, "nowhere.yaml") == ["nowhere.yaml: No such file or directory; expected a YAML file."]


def test_a_problem_that_comes_from_the_preset_names_it(write):
    assert (
        problems({"cfg_path": write("model: {}\ntrain: {tuning: full, lr: -1}")})[0].split(": ")[1]
        == "train.lr"
    )


def test_low_resource_means_8_bits(write):
    low = "model: {low_resource: true, vit_precision: fp32}"
    assert resolve({"tuning": "lora", "cfg_path": write(low)})[0].quantization == "int8"
    chosen = {"tuning": "lora", "cfg_path": write(low), "quantization": "nf4"}
    assert resolve(chosen)[0].quantization == "nf4"
    (line,) = problems({"tuning": "full", "cfg_path": write(low)})
    assert "train.quantization: got int8, but --tuning full trains those weights" in line
