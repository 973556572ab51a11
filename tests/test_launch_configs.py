"""Launch configs are what accelerate and DeepSpeed take, and leave to the run what the run decides."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
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


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_a_launch_script_is_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    "typed", [[], ["{folder}"], ["{folder}", "--augment"], ["{folder}/none", "{folder}"]]
)
def test_the_low_memory_recipe_wants_a_model_and_data(tmp_path: Path, typed: list[str]) -> None:
    typed = [word.format(folder=tmp_path) for word in typed]
    command = ["bash", str(ROOT / "launch" / "low_memory.sh"), *typed]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=20)
    model, data = (*typed, "", "")[:2]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"launch/low_memory.sh: got model folder '{model}' and data folder '{data}'; expected two folders "
        "that exist: bash launch/low_memory.sh MODEL_FOLDER DATA_FOLDER [OPTION ...]"
    ]


def test_the_low_memory_recipe_is_a_run_and_further_options_win(tmp_path: Path) -> None:
    """The script itself, in a folder that counts as installed, with a python that notes its arguments."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    hashed = hashlib.sha256()
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
        hashed.update((tmp_path / name).read_bytes())
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / ".venv" / "installed-project").write_text(f"{tmp_path} {hashed.hexdigest()}  -\n")
    (programs / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (programs / "python").chmod(0o755)

    def noted(*further: str) -> tuple[list[str], RunConfig]:
        command = ["bash", str(tmp_path / "launch" / "low_memory.sh"), str(tmp_path), str(tmp_path), *further]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, "")
        words = done.stdout.splitlines()
        start = words.index("scalefl") + 1
        return words[:start], resolve(parse(words[start:]).flags)[0]

    launcher, run = noted()
    assert launcher == ["-m", "scalefl"]
    assert (run.quantization, run.double_quant, run.precision) == ("nf4", True, "bf16")
    assert (run.optimizer, run.feature_cache, run.gradient_checkpointing) == (
        "paged_adamw_8bit",
        "file",
        True,
    )
    assert (run.micro_batch_size, run.batch_size, run.tuning, run.lora_r) == (1, 8, "lora", 64)
    assert (run.init_from, run.data_root) == (str(tmp_path), str(tmp_path))
    _, changed = noted("--use_gpu", "0", "--optimizer", "adamw_8bit", "--batch_size", "4")
    assert (changed.use_gpu, changed.optimizer, changed.batch_size) == (False, "adamw_8bit", 4)
    assert changed.quantization == "nf4"
