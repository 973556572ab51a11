"""Whole runs of a very small model on synthetic knees, and a plain federation to hold them against.

The model: 2 text layers, hidden 16, 2 heads, 16 patches, 4 image tokens; 2 levels, an exit after each layer.
"""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from scalefl.batches import Batcher, step_order
from scalefl.cli import main
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.resolve import resolve
from scalefl.contracts import ClientTask, State
from scalefl.federation.setup import Federation, build
from scalefl.models.store import ResidentStore
from scalefl.seeding import numpy_rng

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
            for part in (record, *record["clients"]):
                del part["seconds"]
    return rounds


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def state(run_folder: Path, round: int) -> State:
    return load_file(run_folder / "checkpoints" / f"round-{round:04d}" / "model.safetensors")


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


class Job:
    """A command as a process of its own, its output in a file; leaving the block ends what is left of it."""

    def __init__(self, folder: Path, command: Sequence[str], **variables: str) -> None:
        self.folder, self._output = folder, folder / "output.txt"
        with open(self._output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
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
        end = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < end, self.output
            time.sleep(0.02)

    def end(self, seconds: float = 120.0) -> int:
        return self.process.wait(timeout=seconds)


# A federation as plainly as it can be written: no sessions, no streaming, no engine.


def plain_loss(
    exit_logits: Sequence[torch.Tensor], targets: torch.Tensor, gamma: float, temperature: float
) -> torch.Tensor:
    """Mean over answer tokens of the exit-weighted loss."""
    num_exits, teacher = len(exit_logits), exit_logits[-1].detach() / temperature
    total = torch.zeros(())
    for i, logits in enumerate(exit_logits, start=1):
        total = total + i * F.cross_entropy(logits, targets)
        if i < num_exits:
            p, q = teacher.softmax(-1), (logits / temperature).softmax(-1)
            total = total + i * gamma * temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    return total / (num_exits * (num_exits + 1) / 2)


def plain_client(model: torch.nn.Module, run: RunConfig, batcher: Batcher, task: ClientTask) -> State:
    """The trained parameters of one client."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if run.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=run.weight_decay)
    gamma = run.KD_gamma if task.round > run.KD_start * run.num_rounds else 0.0
    for ids in batches(run, task):
        batch = batcher.training(ids)
        optimizer.zero_grad()
        plain_loss(model(**batch.inputs).exit_logits, batch.targets, gamma, run.KD_T).backward()
        if run.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def batches(run: RunConfig, task: ClientTask) -> list[np.ndarray]:
    rng = numpy_rng(run.seed, "batches", round=task.round, client=task.client)
    size, epochs = run.batch_size, run.num_epoch
    return step_order(
        task.example_ids, [], batch_size=size, num_epoch=epochs, local_steps=None, balanced=False, rng=rng
    )


def plain_round(store: ResidentStore, before: State, run: RunConfig, batcher: Batcher, tasks: Any) -> State:
    """Deep copies of the sub-model for all clients, then the weighted mean of values at every coordinate."""
    total = {name: np.zeros(tensor.shape) for name, tensor in before.items()}
    weight = {name: np.zeros(tensor.shape) for name, tensor in before.items()}
    models = {t.client: copy.deepcopy(store.submodel(t.level, before, own=True)) for t in tasks}
    for task in tasks:
        trained = plain_client(models[task.client], run, batcher, task)
        for name, tensor in trained.items():
            where = place(name, tensor.shape, before, store.slices[task.level].spec.depth)
            target = global_name(name, before, store.slices[task.level].spec.depth)
            total[target][where] += len(task.example_ids) * tensor.double().numpy()
            weight[target][where] += len(task.example_ids)
    merged = {}
    for name, tensor in before.items():
        held = weight[name] > 0
        value = np.where(held, total[name] / np.where(held, weight[name], 1), tensor.double().numpy())
        merged[name] = torch.from_numpy(value).float()
    return merged


def global_name(name: str, before: State, depth: int) -> str:
    earlier = f"exit_norms.{depth - 1}.weight"
    return earlier if name == "language_model.model.norm.weight" and earlier in before else name


def place(name: str, shape: Sequence[int], before: State, depth: int) -> Any:
    """Where a sub-model's parameter lies in the whole: prefixes, also within q, k, v and any patch."""
    whole = before[global_name(name, before, depth)].shape
    groups = {("qkv", 0): 3, ("projector.weight", 1): 4}
    parts = []
    for dim, (size, kept) in enumerate(zip(whole, shape, strict=True)):
        count = next((g for (part, at), g in groups.items() if part in name and at == dim), 1)
        parts.append(np.arange(size).reshape(count, -1)[:, : kept // count].reshape(-1))
    return np.ix_(*parts)
