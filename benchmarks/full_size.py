"""MiniGPT-v2 in full size (ViT-g and a Llama of 7B, random weights) on a GPU: peak memory and time of steps.

    python benchmarks/full_size.py [--pixels 448 224] [--bases bf16 nf4] [--clients 4 32] [--weights DIR]
    python benchmarks/full_size.py --device cpu --small      the same code on a model of no weight

Four levels, batches of one, LoRA of rank 64, a resident base. The weights are made on the device and written
as sharded safetensors (16 GB for each image size, below --weights); every case then is a process of its own
that reads them as `scalefl train --init_from` does, computes the features of every image, and does one round
with evaluation and checkpoint. Peaks are those of the round, on a GPU what tensors take
(max_memory_allocated) and what PyTorch reserves for them; reading and quantising the base and the features
come before, and are shown beside it. On a CPU: anonymous memory beyond the imports, and resident memory.

"level 1 alone" is a client of the weakest level in a process of its own, which reads its slice from files.
Its ratio is that of the larger of both peaks to 2.5 GB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import (
    MIB,
    STEADY_MALLOC,
    Row,
    TimedSequential,
    device_peak,
    forget_peak,
    memory_now,
    peak_memory,
    show,
)
from midsize import resolved
from own_process import peak_of_a_client
from torch import Tensor

from scalefl.config.modelfile import EVA_VIT_G, LLAMA_2_7B, ModelFile
from scalefl.config.options import RunConfig
from scalefl.data.synthetic import load
from scalefl.federation.run import train
from scalefl.federation.setup import build
from scalefl.models.files import write_tensors
from scalefl.models.minigptv2 import FAMILY

LIMIT = 1.10
"""Of the peak with more clients over that with the fewest."""
ALONE = 0
"""In place of a number of clients: one client of level 1, in its own process."""
CLIENT_ALONE = {"num_clients": 1, "client_levels": [1], "base_store": "file"}
ALONE_BYTES = 2.5e9
"""What that process is to stay within under NF4, its look at the images included."""
FULL = {
    "model": {"vit_precision": "fp16"},
    "vision": {name: size for name, size in EVA_VIT_G.items() if name != "ln_vision_eps"},
    "text": {name: size for name, size in LLAMA_2_7B.items() if name != "vocab_size"},
    "train": {"ee_locs": [8, 16, 24]},
}
SMALL_PIXELS = {448: 112, 224: 56}
PROMPT_WORDS = 20
STEPS = 4
"""Of each client; the first one makes the optimizer's state and is not counted."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pixels", type=int, nargs="+", choices=(448, 224), default=[448, 224])
    parser.add_argument("--bases", nargs="+", choices=("bf16", "nf4"), default=["bf16", "nf4"])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--weights", type=Path, help="folder that keeps the weights; unset: a temporary one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a model of no weight, to try this script out")
    parser.add_argument("--case", nargs=3, metavar=("PIXELS", "BASE", "CLIENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("full_size.py: no CUDA GPU was found; expected one, or --device cpu --small.", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and not arguments.small:
        print(
            "full_size.py: --device cpu: takes hours in full size; expected --small as well.", file=sys.stderr
        )
        return 2
    if arguments.case is not None:
        pixels, base, clients = arguments.case
        print(json.dumps(case(int(pixels), base, int(clients), arguments)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        arguments.weights = arguments.weights or Path(folder)
        return every_case(arguments)


def every_case(arguments: Any) -> int:
    """Print the table; the exit code."""
    rows = []
    for pixels in arguments.pixels:
        in_own_process(arguments, pixels, "write", ALONE)
        for base in arguments.bases:
            found = {n: in_own_process(arguments, pixels, base, n) for n in (*arguments.clients, ALONE)}
            rows += [row(base, n, one, found[arguments.clients[0]], arguments) for n, one in found.items()]
    columns = ["pixels", "base", "clients", "peak MiB", "reserved MiB", "peak of building", "s/step by level"]
    return show("MiniGPT-v2, one round at batch 1", columns, rows)


def row(base: str, clients: int, one: Any, fewest: Any, arguments: Any) -> Row:
    """Of a model of no weight ratios are not judged."""
    sizes = [f"{one[kind] / MIB:.0f}" for kind in ("peak", "reserved", "building")]
    seconds = " / ".join(f"{one['seconds'][level]:.3f}" for level in sorted(one["seconds"])) or "-"
    cells = (one["pixels"], base, clients or "level 1 alone", *sizes, seconds)
    if clients == ALONE:
        ratio, limit = max(one["peak"], one["building"]) / ALONE_BYTES, 1.0 if base == "nf4" else None
    else:
        ratio, limit = None if one is fewest else one["peak"] / fewest["peak"], LIMIT
    return Row(cells=cells, ratio=ratio, limit=None if ratio is None or arguments.small else limit)


def in_own_process(arguments: Any, pixels: int, base: str, clients: int) -> Any:
    what = f"{clients} clients" if clients != ALONE else "alone"
    print(f"{pixels} pixels, {base}, {what} ...", file=sys.stderr)
    command = [sys.executable, sys.argv[0], "--device", arguments.device, "--weights", str(arguments.weights)]
    command += ["--small"] * arguments.small + ["--case", str(pixels), base, str(clients)]
    done = subprocess.run(command, env=os.environ | STEADY_MALLOC, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def case(pixels: int, base: str, clients: int, arguments: Any) -> dict[str, Any]:
    """Write the weights, or train on them: a round, or one client alone."""
    small, on_gpu = arguments.small, arguments.device == "cuda"
    size = SMALL_PIXELS[pixels] if small else pixels
    weights = arguments.weights / f"{'small' if small else 'full'}-{pixels}"
    sections = {} if small else dict(FULL)
    sections["model"] = sections.get("model", {}) | {"image_size": size}
    with tempfile.TemporaryDirectory() as folder:
        run, model_file = resolved(
            Path(folder),
            small=small,
            sections=sections,
            question_words=PROMPT_WORDS,
            precision="bf16",
            quantization="nf4" if base == "nf4" else "none",
            init_from=None if base == "write" else str(weights),
            batch_size=1,
            eval_batch_size=1,
            local_steps=STEPS,
            **({"num_clients": max(clients, 4)} if clients != ALONE else CLIENT_ALONE),
            num_rounds=1,
            num_patients=60,
            use_gpu=on_gpu,
            executor="measuring:TimedSequential",
        )
        if base == "write":
            if not (weights / "config.json").is_file():
                write_weights(weights, run, model_file, torch.device(arguments.device))
            return {}
        measure = measured_alone if clients == ALONE else measured
        return {"pixels": size, **measure(run, model_file, on_gpu)}


def measured(run: RunConfig, model_file: ModelFile, on_gpu: bool) -> dict[str, Any]:
    """Peaks in bytes, and the median seconds of a step by level."""
    before, building = memory_now().anonymous, 0

    def starts() -> None:
        nonlocal building
        if on_gpu:
            building = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            building = peak_memory().anonymous - before
            forget_peak()

    TimedSequential.at_start = starts
    train(run, model_file)
    if on_gpu:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        peak, reserved = peak_memory().anonymous - before, peak_memory().resident
    seconds = {
        level: statistics.median(s for number, s in enumerate(found) if number % STEPS)
        for level, found in TimedSequential.rounds[0].steps.items()
    }
    return {"peak": peak, "reserved": reserved, "building": building, "seconds": seconds}


def measured_alone(run: RunConfig, model_file: ModelFile, on_gpu: bool) -> dict[str, Any]:
    """As `measured`, of a client of level 1; building is all before its training, which is not timed."""
    before = memory_now().anonymous
    federation = build(run, model_file)
    building = device_peak(federation.store.device)
    if on_gpu:
        torch.cuda.empty_cache()
    peak = peak_of_a_client(federation, 1)
    reserved = torch.cuda.max_memory_reserved() if on_gpu else peak_memory().resident
    beyond = 0 if on_gpu else before
    return {"peak": peak - beyond, "reserved": reserved, "building": building - beyond, "seconds": {}}


def write_weights(folder: Path, run: RunConfig, model_file: ModelFile, device: torch.device) -> None:
    """A model folder with random weights; config.json comes last, so that a half-written one is no model."""
    data = load(run)
    texts = {text for split in data.splits.values() for e in split for text in (e.question, e.answer)}
    processor = FAMILY.processor(model_file, sorted({*texts, *run.answers}))
    config = FAMILY.config(model_file, processor)
    if "vocab_size" not in model_file.text and config.text_config.hidden_size == LLAMA_2_7B["hidden_size"]:
        config.text_config.vocab_size = LLAMA_2_7B["vocab_size"]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in FAMILY.new_model(config).named_parameters()}
    generator = torch.Generator(device).manual_seed(0)

    def made() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            dtype = torch.float16 if FAMILY.is_vision(name) and device.type == "cuda" else torch.bfloat16
            if "norm" in name:
                yield name, torch.full(shape, float(name.endswith("weight")), dtype=dtype)
            else:
                weight = torch.empty(shape, dtype=dtype, device=device)
                yield name, weight.normal_(std=0.02, generator=generator)

    write_tensors(folder, made())
    processor.save_pretrained(folder)
    config.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
