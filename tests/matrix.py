"""Every precision and quantisation under one launch: `accelerate launch ... tests/matrix.py FOLDER LAUNCH`.

`test_matrix.py` launches it and reads `FOLDER/found.json`. Each cell trains two rounds of two levels with
adapters, and so does `plain.py` on plain linear layers that hold the quantised values. Checks of the launch
follow.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from plain import LEVEL, OneClient, plain_round
from runs import MODEL, federation, model_file, records, same_bits, state

from scalefl.cli import main
from scalefl.contracts import InputError, State
from scalefl.federation.rounds import sample_cohort
from scalefl.federation.setup import Federation
from scalefl.models.build import ModelSource
from scalefl.models.build import new_model as random_model
from scalefl.models.holding import DTYPES
from scalefl.models.minigptv2 import FAMILY, MiniGPTv2ForConditionalGeneration

PRECISIONS = ("fp32", "bf16")
QUANTISATIONS = ("none", "int8", "nf4")
CELLS = tuple(f"{precision} {quantization}" for precision in PRECISIONS for quantization in QUANTISATIONS)
DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
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
SGD = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "momentum": 0.0, "weight_decay": 1.0}
"""Enough decay that a loop without it ends far off; gradients are clipped, as by default."""
WITH_ADAMW = ("fp32 int8",)
"""The others have SGD: AdamW enlarges the rounding of bf16 until it would hide what a loop leaves out."""
ADAMW_8BIT = ADAMW | {"optimizer": "adamw_8bit", "lora_r": 64, "num_epoch": 2}
"""Each adapter has 4096 elements or more, the least that bitsandbytes holds the state of in 8 bits."""


def options_of(cell_name: str) -> dict[str, Any]:
    """Of "PRECISION QUANTISATION"."""
    precision, quantization = cell_name.split()
    optimizer = ADAMW if cell_name in WITH_ADAMW else SGD
    return {**OPTIONS, **optimizer, "precision": precision, "quantization": quantization}


def cell(folder: Path, **options: Any) -> dict[str, Any]:
    """What one cell does, in numbers and truths.

    The whole run evaluates between its rounds. The plain loop never does, nor does what the resumed run
    builds before it trains the second round.
    """
    whole = trained(folder / "whole", **options)
    trained(folder / "resumed", **options | {"num_rounds": 1})
    resumed = run_to_end(
        folder / "resumed", ["train", "--resume", str(folder / "resumed" / "run"), "--num_rounds", "2"]
    )
    alive = models_alive()
    client = one_client(folder / "clients", **options)
    return {
        "relative": share_of_change(whole, plain_rounds(client.fed), client.state),
        "evaluated": bool(records(folder / "whole" / "run")[0]["evaluation"]),
        "resumed": same_bits(whole, resumed),
        "released": alive == 0,
        "fresh": does_not_see_the_one_before(client),
        "still": lr_zero_changes_nothing(client),
    }


def small_state(folder: Path, **options: Any) -> dict[str, Any]:
    """One client with 8-bit AdamW, beside a plain loop with PyTorch's AdamW."""
    client = one_client(folder, **options)
    task, sent = client.task(count=8), client.fed.store.models.level_state(LEVEL, client.state)
    session = client.session()
    got = client.trainer.train(session, task, sent, client.run.lr).delta
    optimizer = session._optimizer.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()  # ZeRO's optimizer wraps it
    in_bytes = any(one["state1"].dtype == torch.uint8 for one in states)
    session.close()
    return {
        "relative": share_of_change(got, client.plain(task)) if got else 0.0,  # rank 0 alone is given it
        "in_bytes": in_bytes,
        "fresh": does_not_see_the_one_before(client),
        "still": lr_zero_changes_nothing(client),
    }


def both_stores(folder: Path, **options: Any) -> dict[str, Any]:
    """Whether a base on the device and a base in files train alike, or why a launch takes only one."""
    try:
        fed(folder / "refused", **options, base_store="resident")
    except InputError as error:
        return {"refused": str(error)}
    resident, file = (trained(folder / store, **options, base_store=store) for store in ("resident", "file"))
    return {"same_bits": same_bits(resident, file)}


def shipped_threshold(folder: Path, config: Path, **options: Any) -> dict[str, Any]:
    """A cell under a config of ds_configs/, which keeps weights below its threshold whole on every rank."""
    spread = kept_whole(folder / "spread", **options)
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(config)
    whole = kept_whole(folder / "whole", **options)
    return cell(folder, **options) | {"spread": not any(spread), "stay_whole": all(whole)}


def kept_whole(folder: Path, **options: Any) -> list[bool]:
    """Of each parameter under ZeRO-3, whether it is whole on every rank."""
    session = one_client(folder, **options).session()
    found = [parameter.ds_persist for parameter in session._model.parameters()]
    session.close()
    return found


def share_of_change(got: State, expected: State, before: State | None = None) -> float:
    """Distance from what is expected, as a share of its distance from `before`, or from zero."""
    change = {name: tensor - before[name] if before else tensor for name, tensor in expected.items()}
    off = {name: tensor - got[name] for name, tensor in expected.items()}
    return size(off) / size(change)


def size(state: State) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in state.values()) ** 0.5


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
    store = ModelSource(plain, FAMILY, config, weights, from_scratch=True).resident(torch.device("cpu"))
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
    # Not isinstance, which asks objects for their class: some of PyTorch's then say that they will go.
    alive = sum(issubclass(type(item), MiniGPTv2ForConditionalGeneration) for item in gc.get_objects())
    gc.freeze()  # as `runs` does, for speed
    return alive


def one_client(folder: Path, **options: Any) -> OneClient:
    return OneClient(own(folder), SECTIONS, forget=forget_run, save_path=str(folder / "run"), **options)


def does_not_see_the_one_before(client: OneClient) -> bool:
    """A client after another on one session, and the same client on a fresh one."""
    later = client.task(count=6, client=3)
    after, fresh = client.train(client.task(count=3), later), client.train(later)
    return same_bits(after, fresh) and (not fresh or any(bool(t.any()) for t in fresh.values()))


def lr_zero_changes_nothing(client: OneClient) -> bool:
    """Although weights decay, at the rate."""
    assert client.run.weight_decay > 0
    return not any(bool(tensor.any()) for tensor in client.train(client.task(count=4), lr=0.0).values())


def checks(folder: Path, launch: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every cell, and what is checked once a launch, by name."""
    for name in CELLS:
        yield name, cell(folder / name.replace(" ", "-"), **options_of(name))
    yield "adamw_8bit", small_state(folder / "adamw_8bit", **OPTIONS | ADAMW_8BIT)
    yield "both_stores", both_stores(folder / "both_stores", **options_of("fp32 nf4"))
    if launch.startswith("zero3"):
        config = DS_CONFIGS / f"{launch}.json"
        yield "shipped_threshold", shipped_threshold(folder / "shipped", config, **options_of("fp32 nf4"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it ends the process group, which later cells need
    results, launch = Path(sys.argv[1]), sys.argv[2]
    found = dict(checks(results, launch))
    if os.environ.get("RANK", "0") == "0":
        (results / "found.json").write_text(json.dumps(found, indent=1))
