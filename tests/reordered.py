"""A model folder of random weights, and its copy by `scalefl reorder`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
from builders import model_file, processor, randomise
from runs import forget_launch
from safetensors.torch import load_file
from torch import Tensor

from scalefl.cli import main
from scalefl.contracts import State
from scalefl.models.adapters import LoraSpec, add_lora, is_adapter, write_adapters
from scalefl.models.files import TensorFiles
from scalefl.models.minigptv2 import FAMILY

TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
SYNTHETIC = ["--data", "synthetic", "--num_patients", "24"]


def saved(folder: Path, *, kv_heads: int = 2, hidden: int = 32, ffn: int = 40, adapters: bool = True) -> Path:
    """A model folder with an exit after each of 3 layers, all weights random, adapters beside them or not."""
    file = model_file(kv_heads=kv_heads)
    text = {**file.text, "hidden_size": hidden, "intermediate_size": ffn}
    config = FAMILY.config(dataclasses.replace(file, text=text), processor())
    config.exit_layers = [1, 2, 3]
    model = FAMILY.new_model(config)
    randomise(dict(model.named_parameters()))
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    if adapters:
        spec = LoraSpec(rank=4, alpha=8.0, dropout=0.0, targets=TARGETS)
        add_lora(model, spec)
        found = {name: tensor for name, tensor in model.named_parameters() if is_adapter(name)}
        randomise(found, seed=1)
        write_adapters(folder, spec, found)
    return folder


def reorder(model: Path, out: Path, *typed: str) -> Path:
    command = ["reorder", "--model", str(model), "--out", str(out), *SYNTHETIC, "--examples", "4", *typed]
    assert main(command) == 0
    return out


def tensors(folder: Path) -> State:
    """Weights and adapters."""
    files = TensorFiles(folder)
    adapters = folder / "adapter_model.safetensors"
    return {**{name: files[name] for name in files}, **(load_file(adapters) if adapters.is_file() else {})}


def same_order(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def refused(capsys: pytest.CaptureFixture, *typed: object) -> str:
    """The one line that a command gets."""
    forget_launch()
    capsys.readouterr()
    assert main([str(word) for word in typed]) == 2
    (line,) = [said for said in capsys.readouterr().err.splitlines() if said.startswith("scalefl: ")]
    return line.removeprefix("scalefl: ")
