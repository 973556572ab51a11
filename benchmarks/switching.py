"""What building and switching levels and clients costs in a round, against the training it serves.

    python benchmarks/switching.py [--clients 8] [--local-steps 8] [--precision fp32] [--quantization none]
        [--base-store resident] [--threads 1] [--small]

The rounds are those of `scalefl train` with the sequential executor. Training is the time of optimizer steps;
all else that the executor does counts as building and switching: sub-models, sessions, optimizers, a client's
state in and its change out, teardown. The sums of the server, evaluation and checkpoints are shown beside it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import RoundTimes, Row, TimedSequential, show
from midsize import resolved

from scalefl.federation.run import train

LIMIT = 0.05
ROUNDS = 3
"""The first one warms up and is not counted."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--local-steps", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--base-store", choices=("resident", "file"), default="resident")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a model of no weight, to try this script out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        run, model_file = resolved(
            Path(folder),
            small=arguments.small,
            precision=arguments.precision,
            quantization=arguments.quantization,
            base_store=arguments.base_store,
            num_clients=arguments.clients,
            local_steps=arguments.local_steps,
            num_rounds=2 if arguments.small else ROUNDS,
            executor="measuring:TimedSequential",
        )
        train(run, model_file)
        records = (Path(run.save_path) / "metrics.jsonl").read_text().splitlines()
        wall = [json.loads(record)["seconds"] for record in records]
    found = list(zip(TimedSequential.rounds[1:], wall[1:], strict=True))
    rows = [_row(number, times, seconds, arguments) for number, (times, seconds) in enumerate(found, start=2)]
    columns = ["round", "steps, s", "building and switching, s", "of it between clients, s"]
    columns += ["ms per level", "rest of the round, s"]
    title = f"{arguments.clients} clients of {arguments.local_steps} steps, {arguments.precision}, "
    return show(title + f"quantization {arguments.quantization}, base {arguments.base_store}", columns, rows)


def _row(number: int, times: RoundTimes, wall: float, arguments: Any) -> Row:
    steps = sum(map(sum, times.steps.values()))
    switching, between = times.executor - steps, times.clients - steps
    per_level = (switching - between) / len(times.steps)
    seconds = [f"{value:.2f}" for value in (steps, switching, between)]
    return Row(
        cells=(number, *seconds, f"{1e3 * per_level:.0f}", f"{wall - times.executor:.2f}"),
        ratio=switching / steps,
        limit=None if arguments.small else LIMIT,
    )


if __name__ == "__main__":
    sys.exit(main())
