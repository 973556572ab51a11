"""Peak memory of clients, evaluation and image features, against what `scalefl plan` predicts for them.

    python benchmarks/plan_accuracy.py [--cases lora lora-nf4 ...] [--levels 1 2 3 4] [--device cpu|cuda]
        [--small]

Two kinds of process train, each a fresh one, two optimizer steps a client. "own process": a client of one
level alone, with the base in files, and of the trainable state the slice it was sent; from when its sub-model
is there to its change. "in a round": `scalefl train` with clients of all levels on a resident base; each
level from the making of its sub-model to its last client's merge, and its evaluation. Of two processes the
first is looked at. The cases "tower" are the pass over the images of a larger tower, feature_cache.py's.

Counted is on the CPU what a process has in memory beyond its imports (anonymous pages, and the weights that
are pages of the base's files); planned is `total` and `host`, which is the same memory there. On a GPU it is
what tensors take (max_memory_allocated), against `total`.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from feature_cache import TOWER
from measuring import (
    MIB,
    STEADY_MALLOC,
    PeakSequential,
    Row,
    memory_now,
    show,
    watched_evaluation,
)
from midsize import options_of
from own_process import peak_of_a_client, peak_of_features

from scalefl.config.resolve import resolve
from scalefl.federation.run import train
from scalefl.federation.setup import build

LEAST, MOST = 0.85, 1.15
ROUND, EVALUATION, OWN, FEATURES = "in a round", "evaluation", "own process", "image features"
PARTS = {ROUND: "round", EVALUATION: "evaluation", OWN: "own"}
"""What a process does -> the key of its prediction in a level's plan."""
FOUND = "found.json"
"""In a process's folder: what it does -> level (0: all of them) -> bytes."""
LEVELS = (1, 2, 3, 4)
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train."""

    options: Mapping[str, Any]
    launch: str | None = None
    """Two processes under one of accelerate_configs/; None: one process."""
    plan: tuple[str, ...] = ()
    """What tells `plan` of that launch."""
    sections: Mapping[str, Any] | None = None
    """Of the model file, of a case that looks at image features alone."""


CASES = {
    "lora": Case(options={}),
    "lora-bf16": Case(options={"precision": "bf16"}),
    "lora-nf4": Case(options={"precision": "bf16", "quantization": "nf4", "gradient_checkpointing": True}),
    "full-sgd": Case(options={"tuning": "full", "optimizer": "sgd", "momentum": 0.9}),
    "full-8bit": Case(options={"tuning": "full", "optimizer": "adamw_8bit"}),
    "full-zero2": Case(
        options={"tuning": "full"}, launch="zero2", plan=("--zero_stage", "2", "--world_size", "2")
    ),
    "tower": Case(options={}, sections=TOWER),
    "tower-bf16": Case(options={"precision": "bf16"}, sections=TOWER),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, help="unset: all that this machine can run")
    parser.add_argument("--levels", type=int, nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a model of no weight, to try this script out")
    parser.add_argument("--part", nargs=3, metavar=("CASE", "LEVEL", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("plan_accuracy.py: --device: no CUDA GPU was found; expected one, or cpu.", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    if arguments.part is not None:
        name, level, folder = arguments.part
        measure(CASES[name], int(level), Path(folder), arguments)
        return 0
    names = arguments.cases or [name for name, case in CASES.items() if can_run(case, arguments.device)]
    found = [one for name in names for one in compared(name, arguments)]
    columns = ["case", "level", "", "measured MiB", "planned MiB"]
    rows = [row(one, judged=not arguments.small) for one in found]
    code = show(f"Memory against `scalefl plan`, {arguments.device}", columns, rows)
    print(json.dumps(found))
    return code


def can_run(case: Case, device: str) -> bool:
    """Every process has a GPU of its own."""
    return device == "cpu" or case.launch is None or torch.cuda.device_count() > 1


def row(one: Mapping[str, Any], judged: bool) -> Row:
    """Of a model of no weight ratios are not judged: it is smaller than what a process needs by itself."""
    sizes = (f"{one[kind] / MIB:.0f}" for kind in ("measured", "planned"))
    cells = (one["case"], one["level"], one["where"], *sizes)
    return Row(cells=cells, ratio=one["ratio"], limit=MOST if judged else None, least=LEAST)


def compared(name: str, arguments: Any) -> Iterator[dict[str, Any]]:
    """All that one case's processes do, in bytes."""
    case = CASES[name]
    plans = planned(case, arguments)
    found: dict[str, dict[str, int]] = {}
    for level in (0, *(() if case.sections else arguments.levels)):
        for what, by_level in in_own_process(name, level, arguments).items():
            found.setdefault(what, {}).update(by_level)
    for what, by_level in found.items():
        for level in [0] if what == FEATURES else arguments.levels:
            expected = plans["features"] if what == FEATURES else plans["levels"][level - 1][PARTS[what]]
            size = expected["total"] + (expected["host"] if arguments.device == "cpu" else 0)
            peak = by_level[str(level)]
            sizes = {"measured": peak, "planned": size, "ratio": peak / size}
            yield {"case": name, "level": level or "all", "where": what, **sizes}


def planned(case: Case, arguments: Any) -> Any:
    """What the command says."""
    with tempfile.TemporaryDirectory() as folder:
        options = Path(folder) / "run.yaml"
        options.write_text(yaml.safe_dump(case_options(case, Path(folder), arguments)))
        typed = ["plan", "--config", str(options), "--device", arguments.device, *case.plan, "--json"]
        return json.loads(output_of([sys.executable, "-m", "scalefl", *typed]))


def in_own_process(name: str, level: int, arguments: Any) -> Any:
    """What a process measured: of a round or of image features, as level 0, or of one level alone."""
    print(f"{name}, {f'level {level}' if level else 'all levels'} ...", file=sys.stderr)
    command = [str(Path(__file__).resolve()), "--device", arguments.device]
    command += ["--threads", str(arguments.threads), *["--small"] * arguments.small]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--part", name, str(level), folder]
        output_of([sys.executable, *launcher(CASES[name]), *command])
        return json.loads((Path(folder) / FOUND).read_text())


def launcher(case: Case) -> list[str]:
    if case.launch is None:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = str(ROOT / "accelerate_configs" / f"{case.launch}.yaml")
    return ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", port]


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, env=os.environ | STEADY_MALLOC, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def case_options(case: Case, folder: Path, arguments: Any, **options: Any) -> dict[str, Any]:
    return options_of(
        folder,
        small=arguments.small,
        sections=None if arguments.small else case.sections,
        num_patients=40,  # images and features are in no plan, and are to be few
        num_rounds=1,
        use_gpu=arguments.device == "cuda",
        **case.options,
        **options,
    )


def measure(case: Case, level: int, folder: Path, arguments: Any) -> None:
    """Write, in the first process, the bytes of a round or of image features, as level 0, or of one level."""
    import bitsandbytes  # noqa: F401  # a run imports these late
    import flwr_datasets.partitioner  # noqa: F401
    import peft  # noqa: F401

    import scalefl.data.synthetic
    import scalefl.models.minigptv2  # noqa: F401

    if case.launch is not None:
        import deepspeed  # noqa: F401

    before = 0 if arguments.device == "cuda" else memory_now().anonymous
    rank, in_common = os.environ.get("RANK", "0"), {"save_path": str(folder / "run")}
    found: dict[str, Mapping[int, int]]
    if level or case.sections:
        alone = {"num_clients": 1, "client_levels": [level or 1], "base_store": "file"}
        alone |= {"feature_cache": "off"} if case.sections else {}
        federation = build(*resolve(case_options(case, folder / rank, arguments, **in_common, **alone)))
        if level:
            found = {OWN: {level: peak_of_a_client(federation, level)}}
        else:
            found = {FEATURES: {0: peak_of_features(federation)}}
    else:
        # Two of level 1, so that its second one trains beside the server's sums.
        every = {"num_clients": 5, "client_levels": [1, *LEVELS], "executor": "measuring:PeakSequential"}
        with watched_evaluation() as evaluation:
            train(*resolve(case_options(case, folder / rank, arguments, **in_common, **every)))
        found = {ROUND: PeakSequential.peaks, EVALUATION: evaluation}
    if rank == "0":
        sizes = {what: {at: n - before for at, n in by_level.items()} for what, by_level in found.items()}
        (folder / FOUND).write_text(json.dumps(sizes))


if __name__ == "__main__":
    sys.exit(main())
