"""Launch configs are what accelerate and DeepSpeed take, and leave to the run what the run decides."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import DeepSpeedPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from runs import environment

from scalefl.config.flags import parse
from scalefl.config.options import RunConfig
from scalefl.config.resolve import resolve
from scalefl.engine import zero as engine_zero

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = sorted(path.name for path in (ROOT / "accelerate_configs").iterdir())
DEEPSPEED = sorted(path.name for path in (ROOT / "ds_configs").iterdir())

OF_THE_RUN = ("lr", "optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "gradient_clipping")
"""Decided by options of the run; so is every *batch_size*."""


def launch(name: str) -> ClusterConfig:
    config = load_config_from_file(str(ROOT / "accelerate_configs" / name))
    assert isinstance(config, ClusterConfig)
    return config


def zero(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "ds_configs" / name).read_text())


def keys(value: Any) -> set[str]:
    """Those of a JSON object and of all objects in it."""
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(keys, value.values()))


def test_there_is_one_for_every_launch() -> None:
    stages = {"zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}
    others = {"cpu", "ddp_cpu", "single_gpu", "ddp", "multi_node"}
    assert {Path(name).stem for name in DEEPSPEED} == stages
    assert {Path(name).stem for name in ACCELERATE} == stages | others


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_it_and_it_names_its_command(name: str) -> None:
    config = launch(name)
    assert launch_command_parser().parse_args(["--config_file", name, "-m", "scalefl"]).config_file == name
    assert (config.num_processes > 1) == (config.distributed_type != DistributedType.NO)
    assert config.num_processes % config.num_machines == 0
    head = [line for line in (ROOT / "accelerate_configs" / name).read_text().splitlines() if line[0] == "#"]
    assert any(f"accelerate launch --config_file accelerate_configs/{name} " in line for line in head)
    is_deepspeed = config.distributed_type == DistributedType.DEEPSPEED
    # Beside a DeepSpeed file, mixed_precision is an error of accelerate's.
    assert config.mixed_precision == (None if is_deepspeed else "no")
    assert is_deepspeed == name.startswith("zero")


@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_deepspeed_config_is_named_by_its_launch(name: str) -> None:
    config = launch(f"{Path(name).stem}.yaml")
    assert config.deepspeed_config == {
        "deepspeed_config_file": f"ds_configs/{name}",
        "zero3_init_flag": False,
    }
    assert zero(name)["zero_optimization"]["stage"] == int(name[len("zero")])


@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_deepspeed_config_leaves_what_the_run_decides(name: str) -> None:
    config = zero(name)
    assert not keys(config) & set(OF_THE_RUN)
    assert not [key for key in keys(config) if "batch_size" in key]
    assert "auto" not in json.dumps(config)
    assert config["gradient_accumulation_steps"] == 1  # steps are divided by the session
    assert config["zero_force_ds_cpu_optimizer"] is False  # its kernels are compiled for a minute
    assert config["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("name", DEEPSPEED)
def test_offload_is_what_the_name_says(name: str) -> None:
    section = zero(name)["zero_optimization"]
    offloaded = {part for part in ("optimizer", "param") if f"offload_{part}" in section}
    expected = {"zero2_offload.json": {"optimizer"}, "zero3_offload.json": {"optimizer", "param"}}
    assert offloaded == expected.get(name, set())
    assert all(section[f"offload_{part}"]["device"] == "cpu" for part in offloaded)


@pytest.mark.parametrize("name", DEEPSPEED)
def test_accelerate_and_deepspeed_take_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launcher passes it on: a file, and the fields of accelerate's own config beside it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    fields = launch(f"{Path(name).stem}.yaml").deepspeed_config
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", ",".join(fields))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", str(fields["zero3_init_flag"]).lower())
    plugin = DeepSpeedPlugin(hf_ds_config=str(ROOT / "ds_configs" / name))
    section = zero(name)["zero_optimization"]
    assert plugin.zero_stage == section["stage"] and plugin.zero3_init_flag is False
    assert plugin.offload_optimizer_device == section.get("offload_optimizer", {}).get("device", "none")
    config = DeepSpeedConfig({**zero(name), "train_micro_batch_size_per_gpu": 1})
    assert config.zero_optimization_stage == section["stage"]
    read = config.zero_config.model_dump(by_alias=True)
    for key, value in section.items():
        if key.startswith("offload"):
            assert (read[key]["device"], read[key]["pin_memory"]) == ("cpu", True)
        else:
            assert read[key] == value, key


def in_words(config: dict[str, Any]) -> str:
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    return engine_zero.in_words(SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_launch_says_what_it_offloads(name: str) -> None:
    """A section that leaves a part where it is offloads nothing."""
    words = {
        "zero2_offload.json": "ZeRO-2 with optimizer offloaded",
        "zero3_offload.json": "ZeRO-3 with weights and optimizer offloaded",
    }
    stage = zero(name)["zero_optimization"]["stage"]
    assert in_words(zero(name)) == words.get(name, f"ZeRO-{stage}")
    stays = {f"offload_{part}": {"device": "none"} for part in ("optimizer", "param")}
    assert in_words({"zero_optimization": {"stage": stage, **stays}}) == f"ZeRO-{stage}"


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_a_launch_script_is_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


LOW_MEMORY = "launch/low_memory.sh"


def program(folder: Path, name: str, script: str) -> None:
    """A program in place of a real one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def bash(script: Path, *typed: str, gpu: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """A launch script on a machine with two GPUs, or without any."""
    shown = "echo 'GPU 0: one'; echo 'GPU 1: another'" if gpu else "exit 1"
    program(fakes := script.parents[1] / "fakes", "nvidia-smi", shown)
    settings = ("SCALEFL_PYTHON", "CUDA_VISIBLE_DEVICES", "PROCESSES", "CPU")
    kept = {name: value for name, value in environment().items() if name not in settings}
    return subprocess.run(
        ["bash", str(script), *typed],
        env=kept | {"PATH": f"{fakes}:{os.environ['PATH']}"} | variables,
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """Folder of launch scripts, whose repository has no `.venv`."""
    shutil.copytree(ROOT / "launch", tmp_path / "repository" / "launch")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / "repository" / name)
    return tmp_path / "repository" / "launch"


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    "typed", [[], ["{folder}"], ["{folder}", "--augment"], ["{folder}/none", "{folder}"]]
)
def test_the_low_memory_recipe_wants_a_model_and_data(
    scripts: Path, tmp_path: Path, typed: list[str]
) -> None:
    typed = [word.format(folder=tmp_path) for word in typed]
    done = bash(scripts / "low_memory.sh", *typed)
    model, data = (*typed, "", "")[:2]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{LOW_MEMORY}: got model folder '{model}' and data folder '{data}'; expected two folders "
        f"that exist: bash {LOW_MEMORY} MODEL_FOLDER DATA_FOLDER [OPTION ...]"
    ]


def test_the_low_memory_recipe_looks_before_it_installs(
    scripts: Path, tmp_path: Path, model_folder: str
) -> None:
    (empty := tmp_path / "empty").mkdir()
    no_model = bash(scripts / "low_memory.sh", str(empty), str(tmp_path))
    no_gpu = bash(scripts / "low_memory.sh", model_folder, str(tmp_path), gpu=False)
    assert no_model.stderr.splitlines() == [
        f"{LOW_MEMORY}: {empty}: no config.json there; expected a MiniGPT-v2 that save_pretrained wrote."
    ]
    assert no_gpu.stderr.splitlines() == [
        f"{LOW_MEMORY}: no CUDA GPU was found (nvidia-smi -L names none); expected one, or a driver that is "
        "in order."
    ]
    assert no_model.returncode == no_gpu.returncode == 2
    assert not (scripts.parent / ".venv").exists()


def test_an_environment_of_other_making_stays(scripts: Path, model_folder: str, tmp_path: Path) -> None:
    """As `uv venv` makes them: without pip."""
    venv = scripts.parent / ".venv"
    program(venv / "bin", "python", "exit 1")
    done = bash(scripts / "low_memory.sh", model_folder, str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"scalefl: {venv}: is of other making, and has no pip that runs; expected an environment with pip; "
        "install that there, or move the folder away"
    ]
    assert [path.name for path in venv.rglob("*")] == ["bin", "python"]


def test_an_environment_of_ours_that_broke_is_made_anew(
    scripts: Path, model_folder: str, tmp_path: Path
) -> None:
    venv = scripts.parent / ".venv"
    program(venv / "bin", "python", "exit 1")
    (venv / "made-by-scalefl").touch()
    # A python whose `-m venv FOLDER` makes one that is as good as nothing: pip ends in an error.
    program(tmp_path / "found", "python", 'echo "$@" >>"${0%/*}/typed"')
    variables = {"PYTHON": str(tmp_path / "found" / "python")}
    done = bash(scripts / "low_memory.sh", model_folder, str(tmp_path), **variables)
    assert done.returncode != 0
    assert (tmp_path / "found" / "typed").read_text().splitlines()[-1] == f"-m venv {venv}"
    assert [path.name for path in venv.rglob("*")] == ["made-by-scalefl"]


def test_the_low_memory_recipe_is_a_run_and_further_options_win(
    scripts: Path, model_folder: str, tmp_path: Path
) -> None:
    """The script itself, in a folder that counts as installed, with a python that notes its arguments."""
    root = scripts.parent
    hashed = hashlib.sha256()
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        hashed.update((root / name).read_bytes())
    program(root / ".venv" / "bin", "python", "printf '%s\\n' \"$@\"")
    (root / ".venv" / "installed-project").write_text(f"{root} {hashed.hexdigest()}  -\n")

    def noted(*further: str) -> tuple[list[str], RunConfig]:
        done = bash(scripts / "low_memory.sh", model_folder, str(tmp_path), *further)
        assert (done.returncode, done.stderr) == (0, "")
        words = done.stdout.splitlines()
        start = words.index("scalefl") + 1
        return words[:start], resolve(parse(words[start:]).flags)[0]

    launcher, run = noted()
    assert launcher == ["-m", "scalefl"]
    assert (run.quantization, run.double_quant, run.precision) == ("nf4", True, "bf16")
    assert (run.optimizer, run.gradient_checkpointing, run.use_gpu) == ("paged_adamw_8bit", True, True)
    assert (run.micro_batch_size, run.batch_size, run.eval_batch_size) == (1, 8, 8)
    assert (run.tuning, run.lora_r) == ("lora", 64)
    assert (run.init_from, run.data_root) == (model_folder, str(tmp_path))
    assert (run.feature_cache, run.feature_folder) == ("file", f"{root}/runs/features")
    assert not Path(run.feature_folder).is_relative_to(run.save_path), "runs share it"
    _, changed = noted("--use_gpu", "0", "--optimizer", "adamw_8bit", "--batch_size", "4")
    assert (changed.use_gpu, changed.optimizer, changed.batch_size) == (False, "adamw_8bit", 4)
    assert changed.quantization == "nf4"


MULTI_GPU = "launch/multi_gpu.sh"


@pytest.mark.parametrize(
    ("gpu", "variables", "line"),
    [
        (
            False,
            {},
            "no CUDA GPU was found; expected one, or PROCESSES=2 CPU=1 for two processes on the CPU.",
        ),
        (False, {"PROCESSES": "2"}, "no CUDA GPU was found; expected one, or PROCESSES=2 CPU=1 for two proc"),
        (True, {"CUDA_VISIBLE_DEVICES": ""}, "no CUDA GPU was found; expected one, or PROCESSES=2 CPU=1 for"),
        (False, {"CPU": "1"}, "PROCESSES: got '0' with 0 GPU(s); expected a number from 1 on, and no more "),
        (
            True,
            {"PROCESSES": "3"},
            "PROCESSES: got '3' with 2 GPU(s); expected a number from 1 on, and no more",
        ),
        (
            True,
            {"PROCESSES": "two"},
            "PROCESSES: got 'two' with 2 GPU(s); expected a number from 1 on, and no",
        ),
    ],
    ids=str,
)
def test_several_gpus_are_there_or_asked_for_otherwise(
    scripts: Path, gpu: bool, variables: dict[str, str], line: str
) -> None:
    done = bash(scripts / "multi_gpu.sh", "--save_path", "run", gpu=gpu, **variables)
    (shown,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert shown.startswith(f"{MULTI_GPU}: {line}")
    assert not (scripts.parent / ".venv").exists()


@pytest.mark.parametrize(
    ("variables", "launch", "given"),
    [
        ({}, "--num_processes 2 --multi_gpu", ""),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "", ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1,5"}, "--num_processes 3 --multi_gpu", ""),
        ({"PROCESSES": "4", "CPU": "1"}, "--num_processes 4 --multi_gpu", "--use_gpu 0"),
        ({"ACCELERATE_CONFIG": "zero3.yaml"}, "--num_processes 2 --config_file zero3.yaml", ""),
    ],
    ids=str,
)
def test_several_gpus_are_one_launch(
    scripts: Path, variables: dict[str, str], launch: str, given: str
) -> None:
    program(scripts.parent, "python", "printf '%s\\n' \"$@\"; env | grep ACCELERATE_USE_CPU >&2")
    variables = {"SCALEFL_PYTHON": str(scripts.parent / "python"), **variables}
    done = bash(scripts / "multi_gpu.sh", "--save_path", "a run", **variables)
    words = done.stdout.splitlines()
    at = words.index("scalefl")
    assert words[at:] == ["scalefl", "train", *given.split(), "--save_path", "a run"]
    assert ("accelerate.commands.launch" in words) == bool(launch)
    assert set(launch.split()) <= set(words[:at])
    assert done.stderr.split() == ["ACCELERATE_USE_CPU=true"] * bool(given)
