"""Whole runs of a very small model on synthetic knees.

The model: 2 text layers, hidden 16, 2 heads, 16 patches, 4 image tokens; 2 levels, an exit after each layer.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from scalefl import checkpoint
from scalefl.checkpoint import Progress
from scalefl.cli import main
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.resolve import resolve
from scalefl.contracts import State
from scalefl.federation.setup import Federation, build

gc.freeze()  # accelerate collects garbage at every teardown: 0.2 s over all that the libraries hold
torch.set_num_threads(1)  # the model is too small for more, and the machine may be busy

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
MODEL = {
    "model": {
        "arch": "minigpt_v2",
        "image_size": 28,
        "vit_precision": "fp32",
        "end_sym": "</s>",
        "lora_r": 4,
    },
    "vision": {**SIZES, "num_hidden_layers": 1, "patch_size": 7, "initializer_range": 0.2},
    "text": {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.2},
    "tokenizer": {"kind": "trained", "vocab_size": 280},
    "train": {
        "tuning": "full",
        "ee_locs": [1],
        "vertical_scale_ratios": [0.5, 1.0],
        "horizontal_scale_ratios": [1, 2],
        "client_split_ratios": [0.5, 0.5],
        "data": "synthetic",
        "num_patients": 24,
        "use_valid": True,
        "num_clients": 4,
        "num_rounds": 2,
        "batch_size": 4,
        "optimizer": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "print_freq": 1000,
        "use_gpu": False,
    },
}
"""Large initial weights, so that every unit of so small a model shows in its logits."""


def model_file(folder: Path, model: Mapping[str, Any] | None = None, **train: Any) -> Path:
    """The model as a YAML file; `model` changes whole sections, `train` single options."""
    content = MODEL | {"train": MODEL["train"] | train} | dict(model or {})
    path = folder / f"model{len(list(folder.glob('model*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def arguments(folder: Path, *typed: str, model: Mapping[str, Any] | None = None, **train: Any) -> list[str]:
    """A command line that trains the model into `folder`/run."""
    cfg_path = model_file(folder, model, **train)
    return ["train", "--cfg-path", str(cfg_path), "--save_path", str(folder / "run"), *typed]


def budgets_file(folder: Path, budgets: Any) -> str:
    """Clients' machines as a YAML file, for `scalefl plan`; a text is written as it is."""
    path = folder / "budgets.yaml"
    path.write_text(budgets if isinstance(budgets, str) else yaml.safe_dump(budgets))
    return str(path)


def start(folder: Path, *typed: str, **train: Any) -> Path:
    """Train to the end, through the command line; the run's folder."""
    forget_launch()
    assert main(arguments(folder, *typed, **train)) == 0
    return folder / "run"


def federation(folder: Path, model: Mapping[str, Any] | None = None, **options: Any) -> Federation:
    """What a run is built of; its save path is `folder`/run."""
    forget_launch()
    run, file = resolved(folder, model, **options)
    return build(run, file)


def resolved(
    folder: Path, model: Mapping[str, Any] | None = None, **options: Any
) -> tuple[RunConfig, ModelFile]:
    flags = {"cfg_path": str(model_file(folder, model)), "save_path": str(folder / "run")}
    return resolve(flags | options)


def forget_launch() -> None:
    """Accelerate keeps precision and devices for the life of a process; a new run may want others."""
    AcceleratorState._reset_state(reset_partial_state=True)


def records(run_folder: Path, *, timings: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, which must be JSON as every reader knows it."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    rounds = [json.loads(line, parse_constant=refuse) for line in lines]
    if not timings:
        for record in rounds:
            del record["peak_memory_bytes"], record["training_seconds"]
            for part in (record, *record["clients"]):
                part.pop("seconds", None)  # of a client that failed there is none
    return rounds


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def state(run_folder: Path, round: int) -> State:
    return load_file(run_folder / "checkpoints" / f"round-{round:04d}" / "model.safetensors")


def load_latest(checkpoints: Path) -> Progress | None:
    path = checkpoint.latest(checkpoints)
    return None if path is None else checkpoint.load(path)


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n].view(torch.int32), other[n].view(torch.int32)) for n in one
    )


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max()) for n in one)


def nearly(value: Any, **tolerance: float) -> Any:
    """Equals the same record with floats that differ by rounding; what was counted or predicted may not."""
    if isinstance(value, dict):
        return {key: nearly(part, **tolerance) for key, part in value.items()}
    if isinstance(value, list):
        return [nearly(part, **tolerance) for part in value]
    return pytest.approx(value, **tolerance) if isinstance(value, float) else value


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: time of its last change, and its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.exists() else []
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def environment(**changes: str) -> dict[str, str]:
    """For processes of their own: one thread, and nothing of a launch that started the tests."""
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "COLUMNS")
    kept = {k: v for k, v in os.environ.items() if k not in launch and not k.startswith("ACCELERATE_")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | changes


PEAK_KILOBYTES = "int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])"
"""In Python: the most memory of a process so far. `ru_maxrss` begins with that of whoever forked it."""


class Job:
    """A command as a process of its own, its output in a file; leaving the block ends what is left of it."""

    def __init__(
        self, folder: Path, command: Sequence[str], python: str = sys.executable, **variables: str
    ) -> None:
        self.folder, self._output = folder, folder / "output.txt"
        with open(self._output, "w") as output:
            self.process = subprocess.Popen(
                [python, *command],
                env=environment(**variables),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for number in self.running():
            os.kill(number, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def last_lines(self) -> str:
        """What a failing test shows: enough to find the cause, short enough to be read."""
        return "\n".join(self.output.splitlines()[-40:])

    def running(self) -> list[int]:
        """Processes with the folder on their command line: a launcher's workers have their own session."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if str(self.folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # gone, or no process
        return found

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Until the output holds this text."""
        self.wait_until(lambda: text in self.output, seconds)

    def wait_until(self, happened: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None and time.monotonic() < end, self.last_lines
            time.sleep(0.02)

    def end(self, seconds: float = 120.0) -> int:
        return self.process.wait(timeout=seconds)


def resume(run_folder: Path, *typed: str) -> int:
    """Go on with a run in this process; its exit code."""
    forget_launch()
    return main(["train", "--resume", str(run_folder), *typed])


def launched(folder: Path, launch: str, command: Sequence[str], processes: int = 2, **variables: str) -> Job:
    """`python COMMAND`, or several such processes under "ddp" or one of ds_configs/."""
    root = Path(__file__).resolve().parents[1]
    variables = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"} | variables
    if launch == "single":
        return Job(folder, command, **variables)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--main_process_port", port]
    if launch == "ddp":
        ddp = ["--config_file", str(root / "accelerate_configs" / "ddp_cpu.yaml")]
        return Job(folder, [*launcher, *ddp, *command], **variables)
    config = json.loads((root / "ds_configs" / f"{launch}.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else so small a model stays whole
    (folder / "ds.json").write_text(json.dumps(config))
    zero = ["--use_deepspeed", "--deepspeed_config_file", str(folder / "ds.json")]
    return Job(folder, [*launcher, *zero, *command], **variables)
