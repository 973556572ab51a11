"""Every precision and quantisation under one launch: `python -m accelerate ... tests/matrix.py FOLDER`.

`test_matrix.py` launches it and reads `FOLDER/cells.json`. Each cell trains two rounds of two levels with
adapters, of which client updates must equal those of `plain.py` on plain linear layers that hold the
quantised values.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from plain import OneClient, plain_round
from runs import MODEL, federation, largest_difference, model_file, same_bits, state

from scalefl.cli import main
from scalefl.contracts import State
from scalefl.federation.rounds import sample_cohort
from scalefl.federation.setup import Federation
from scalefl.models.build import DTYPES, GlobalModel
from scalefl.models.build import new_model as random_model
from scalefl.models.minigptv2 import FAMILY, MiniGPTv2ForConditionalGeneration

PRECISIONS = ("fp32", "bf16")
QUANTISATIONS = ("none", "int8", "nf4")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
"""NF4 packs 64 neighbours; three heads of four, and 72 channels, are no round numbers."""
SECTIONS = {"text": {**MODEL["text"], **SIZES}}
OPTIONS = {
    "tuning": "lora",
    "lora_targets": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "vertical_scale_ratios": [0.75, 1.0],
    "num_patients": 16,
    "batch_size": 4,
    "micro_batch_size": 1,
    "num_rounds": 2,
    "KD_start": 0.0,
    "use_gpu": None,
    "partitioner": "iid",  # no labels to adjust for, which plain_round does not
}


def cell(folder: Path, precision: str, quantization: str) -> dict[str, Any]:
    """What one cell does, in numbers and truths.

    The whole run evaluates between its rounds and the resumed one, in one process, does not: where they end
    with the same bits, neither evaluation nor resuming does harm.
    """
    options = {**OPTIONS, "precision": precision, "quantization": quantization}
    whole = trained(folder / "whole", **options)
    trained(folder / "resumed", **options | {"num_rounds": 1})
    resumed = run_to_end(
        folder / "resumed", ["train", "--resume", str(folder / "resumed" / "run"), "--num_rounds", "2"]
    )
    alive = models_alive()
    before = fed(folder, **options)
    expected = plain_rounds(before)
    change, off = (
        sum(float((one[n] - other[n]).double().square().sum()) for n in one) ** 0.5
        for one, other in ((expected, before.initial_state), (whole, expected))
    )
    return {
        "difference": largest_difference(whole, expected),
        "relative": off / change,
        "resumed": same_bits(whole, resumed),
        "released": alive == 0,
        "fresh": clients_do_not_see_each_other(folder / "clients", **options),
        "still": lr_zero_changes_nothing(folder / "still", **options),
    }


def trained(folder: Path, **options: Any) -> State:
    """The end of a run through the command line."""
    cfg_path = model_file(own(folder), SECTIONS, **options)
    return run_to_end(folder, ["train", "--cfg-path", str(cfg_path), "--save_path", str(folder / "run")])


def run_to_end(folder: Path, command: list[str]) -> State:
    forget_run()
    if code := main(command):
        raise RuntimeError(f"exit code {code}")
    PartialState().wait_for_everyone()
    results = json.loads((folder / "run" / "results.json").read_text())
    return state(folder / "run", results["rounds"])


def own(folder: Path) -> Path:
    """A folder of this rank's."""
    path = folder / f"rank{os.environ.get('RANK', '0')}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def fed(folder: Path, **options: Any) -> Federation:
    forget_run()
    return federation(own(folder), SECTIONS, save_path=str(folder / "run"), **options)


def forget_run() -> None:
    """A run's precision and DeepSpeed config; the process group stays."""
    AcceleratorState._reset_state()


def plain_rounds(before: Federation) -> State:
    """Two rounds on deep copies of sub-models with plain linear layers."""
    run = before.run
    config = FAMILY.config(before.model_file, before.processor)
    weights = dict(random_model(run, FAMILY, config).named_parameters())
    plain = replace(run, quantization="none")
    store = GlobalModel(plain, FAMILY, config, weights, from_scratch=True).resident(torch.device("cpu"))
    store.load()
    for name in store.base:
        if FAMILY.is_block_weight(name):
            store.base[name] = rounded(weights[name.replace(".base_layer", "")].detach(), name, run)
    after = before.initial_state
    for number in (1, 2):
        tasks = sample_cohort(run, number, before.clients, before.client_levels)
        after = plain_round(store, after, run, before.batchers["train"], tasks)
    return after


def rounded(weight: torch.Tensor, name: str, run: Any) -> torch.Tensor:
    """What a weight is after quantisation, by bitsandbytes alone."""
    dtype = DTYPES[run.precision]
    if run.quantization == "int8":
        weight = weight.half().float()  # as bitsandbytes' kernel takes it
        largest = weight.abs().amax(1, keepdim=True)
        return ((weight * (127 / largest)).round() * (largest / 127)).to(dtype)
    if run.quantization == "nf4":
        across = any(part in name for part in ("o_proj", "down_proj"))
        held = (weight.t() if across else weight).contiguous()
        packed, packing = bitsandbytes.functional.quantize_4bit(held, blocksize=64, quant_type="nf4",
                                                                compress_statistics=True)  # fmt: skip
        values = bitsandbytes.functional.dequantize_4bit(packed, packing).to(dtype)
        return values.t().contiguous() if across else values
    return weight.to(dtype)


def models_alive() -> int:
    """Models of engines that are gone, which nothing may hold."""
    gc.unfreeze()
    gc.collect()
    return sum(isinstance(item, MiniGPTv2ForConditionalGeneration) for item in gc.get_objects())


@contextmanager
def one_client(folder: Path, **options: Any) -> Iterator[OneClient]:
    yield OneClient(own(folder), SECTIONS, forget=forget_run, save_path=str(folder / "run"), **options)


def clients_do_not_see_each_other(folder: Path, **options: Any) -> bool:
    """A client after another on one engine, and the same client on a fresh engine."""
    with one_client(folder, **options | {"optimizer": "adamw", "momentum": 0.0, "lr": 1e-3}) as client:
        later = client.task(count=6, client=3)
        after, fresh = client.train(client.task(count=3), later), client.train(later)
        return same_bits(after, fresh) and (not fresh or any(bool(t.any()) for t in fresh.values()))


def lr_zero_changes_nothing(folder: Path, **options: Any) -> bool:
    with one_client(folder, **options | {"weight_decay": 0.1}) as client:
        return not any(bool(tensor.any()) for tensor in client.train(client.task(count=4), lr=0.0).values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it ends the process group, which later cells need
    results = Path(sys.argv[1])
    found = {
        f"{precision} {quantization}": cell(results / f"{precision}-{quantization}", precision, quantization)
        for precision in PRECISIONS
        for quantization in QUANTISATIONS
    }
    if os.environ.get("RANK", "0") == "0":
        (results / "cells.json").write_text(json.dumps(found, indent=1))
