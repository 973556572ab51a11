"""Peak memory of a federated round with 4, 16 and 64 clients, against plain training of the largest one.

    python benchmarks/round_memory.py [--bases resident nf4] [--clients 4 16 64] [--precision fp32] [--small]

Every case is a process of its own. Counted is what it puts into memory (anonymous pages) beyond what it has
after its imports, which are the same in every case, at the peak of two rounds, or of as many steps of plain
transformers + peft; building the model, and quantising it, come before. The rounds are those of
`scalefl train`: server sums, updates, evaluation of every level and checkpoints are in.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, STEADY_MALLOC, Row, TimedSequential, forget_peak, memory_now, peak_memory, show
from midsize import resolved
from plain_peft import PlainTraining, batcher_of

from scalefl.config.options import RunConfig
from scalefl.federation.run import train

LIMIT = 1.10
ROUNDS = 2
"""The second one still holds what the first one left."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", choices=("resident", "nf4"), default=["resident", "nf4"])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a model of no weight, to try this script out")
    parser.add_argument("--case", nargs=2, metavar=("BASE", "CLIENTS"), help="one alone, 0 clients: plain")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case is not None:
        print(json.dumps(measured(arguments.case[0], int(arguments.case[1]), arguments)))
        return 0
    rows = []
    for base in arguments.bases:
        plain = in_own_process(base, 0)
        rows.append(row(base, "plain", plain))
        for count in arguments.clients:
            rows.append(row(base, f"{count} clients", in_own_process(base, count), plain, arguments.small))
    columns = ["base", "trained", "peak MiB", "after imports", "difference", "resident peak", "raw ratio"]
    return show(f"Peak memory of a round, {arguments.precision}", columns, rows)


def row(base: str, name: str, found: Any, plain: Any = None, small: bool = False) -> Row:
    """Of a model of no weight ratios are not judged."""
    own = found["peak"] - found["before"]
    ratio = None if plain is None else own / (plain["peak"] - plain["before"])
    raw = "-" if plain is None else f"{found['resident'] / plain['resident']:.3f}"
    numbers = (found["peak"], found["before"], own, found["resident"])
    cells = (base, name, *(f"{value / MIB:.0f}" for value in numbers), raw)
    return Row(cells=cells, ratio=ratio, limit=None if plain is None or small else LIMIT)


def in_own_process(base: str, clients: int) -> Any:
    print(f"{base}, {clients} clients ...", file=sys.stderr)
    command = [sys.executable, *sys.argv, "--case", base, str(clients)]
    done = subprocess.run(command, env=os.environ | STEADY_MALLOC, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(base: str, clients: int, arguments: Any) -> dict[str, int]:
    """Anonymous memory before and at the peak, and resident memory at the peak, in bytes."""
    import bitsandbytes  # noqa: F401  # imported late by either kind of training, or by one
    import flwr_datasets.partitioner  # noqa: F401

    before = memory_now()
    with tempfile.TemporaryDirectory() as folder:
        run, model_file = resolved(
            Path(folder),
            small=arguments.small,
            precision=arguments.precision,
            quantization="nf4" if base == "nf4" else "none",
            num_clients=max(clients, 4),
            num_rounds=ROUNDS,
            executor="measuring:TimedSequential",
        )
        if clients:
            TimedSequential.at_start = forget_peak
            train(run, model_file)
        else:
            train_plain(run, model_file)
    peak = peak_memory()
    return {"before": before.anonymous, "peak": peak.anonymous, "resident": peak.resident}


def train_plain(run: RunConfig, model_file: Any) -> None:
    batcher, config = batcher_of(run, model_file)
    training = PlainTraining(config, run)
    forget_peak()
    for number in range(ROUNDS * (run.local_steps or 1)):
        training.step(batcher, range(run.batch_size * number, run.batch_size * (number + 1)))


if __name__ == "__main__":
    sys.exit(main())
