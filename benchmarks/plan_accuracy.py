"""Peak memory of a client of every level, against what `scalefl plan` predicts for it.

    python benchmarks/plan_accuracy.py [--cases lora lora-nf4 ...] [--levels 1 2 3 4] [--device cpu|cuda]
        [--small]

Two kinds of process train, each a fresh one, two optimizer steps a client. "own process": a client of one
level alone, with the base in files, and of the trainable state the slice it was sent; from when its sub-model
is there to its change. "in a round": `scalefl train` with clients of all levels on a resident base; each
level from the making of its sub-model to its last client's merge. Of two processes the first is looked at.

Counted is on the CPU what a process has in memory beyond its imports (anonymous pages, and the weights that
are pages of the base's files); planned is `total` and `host`, which is the same memory there. On a GPU it is
what tensors take (max_memory_allocated), against `total`.
"""

import argparse
import dataclasses
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
from measuring import (
    MIB,
    STEADY_MALLOC,
    PeakSequential,
    Row,
    bytes_in_files,
    device_peak,
    forget_device_peak,
    memory_now,
    show,
)
from midsize import options_of
from safetensors.torch import load_file, save_file

from scalefl.config.resolve import resolve
from scalefl.contracts import ClientTask
from scalefl.federation.client import ClientTrainer
from scalefl.federation.run import train
from scalefl.federation.setup import Federation, build

LEAST, MOST = 0.85, 1.15
ROUND, OWN = "in a round", "own process"
PARTS = {ROUND: "round", OWN: "own"}
"""Where a client trains -> the key of its prediction in the plan."""
FOUND = "found.json"
"""In a process's folder: level -> bytes."""
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


CASES = {
    "lora": Case(options={}),
    "lora-bf16": Case(options={"precision": "bf16"}),
    "lora-nf4": Case(options={"precision": "bf16", "quantization": "nf4", "gradient_checkpointing": True}),
    "full-sgd": Case(options={"tuning": "full", "optimizer": "sgd", "momentum": 0.9}),
    "full-8bit": Case(options={"tuning": "full", "optimizer": "adamw_8bit"}),
    "full-zero2": Case(
        options={"tuning": "full"}, launch="zero2", plan=("--zero_stage", "2", "--world_size", "2")
    ),
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
    """Every level of one case in both kinds of process, in bytes."""
    case = CASES[name]
    plans = planned(case, arguments)
    found = {ROUND: in_own_process(name, 0, arguments), OWN: {}}
    for level in arguments.levels:
        found[OWN] |= in_own_process(name, level, arguments)
    for where, by_level in found.items():
        for level in arguments.levels:
            expected = plans[level - 1][PARTS[where]]
            size = expected["total"] + (expected["host"] if arguments.device == "cpu" else 0)
            peak = by_level[str(level)]
            sizes = {"measured": peak, "planned": size, "ratio": peak / size}
            yield {"case": name, "level": level, "where": where, **sizes}


def planned(case: Case, arguments: Any) -> Any:
    """What the command says of each level."""
    with tempfile.TemporaryDirectory() as folder:
        options = Path(folder) / "run.yaml"
        options.write_text(yaml.safe_dump(case_options(case, Path(folder), arguments)))
        typed = ["plan", "--config", str(options), "--device", arguments.device, *case.plan, "--json"]
        return json.loads(output_of([sys.executable, "-m", "scalefl", *typed]))["levels"]


def in_own_process(name: str, level: int, arguments: Any) -> Any:
    """Level -> bytes: of all levels of a round, as level 0, or of one alone."""
    print(f"{name}, {f'level {level}' if level else 'a round'} ...", file=sys.stderr)
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
        num_patients=40,  # images and features are in no plan, and are to be few
        num_rounds=1,
        use_gpu=arguments.device == "cuda",
        **case.options,
        **options,
    )


def measure(case: Case, level: int, folder: Path, arguments: Any) -> None:
    """Write the bytes of each level of a round, as level 0, or of one level alone, in the first process."""
    import bitsandbytes  # noqa: F401  # a run imports these late
    import flwr_datasets.partitioner  # noqa: F401
    import peft  # noqa: F401

    import scalefl.data.synthetic
    import scalefl.models.minigptv2  # noqa: F401

    if case.launch is not None:
        import deepspeed  # noqa: F401

    before = 0 if arguments.device == "cuda" else memory_now().anonymous
    rank, in_common = os.environ.get("RANK", "0"), {"save_path": str(folder / "run")}
    if level:
        alone = {"num_clients": 1, "client_levels": [level], "base_store": "file"}
        run, model_file = resolve(case_options(case, folder / rank, arguments, **in_common, **alone))
        peaks = {level: peak_of_a_client(build(run, model_file), level)}
    else:
        # Two of level 1, so that its second one trains beside the server's sums.
        every = {"num_clients": 5, "client_levels": [1, *LEVELS], "executor": "measuring:PeakSequential"}
        train(*resolve(case_options(case, folder / rank, arguments, **in_common, **every)))
        peaks = PeakSequential.peaks
    if rank == "0":
        (folder / FOUND).write_text(json.dumps({at: peak - before for at, peak in peaks.items()}))


def peak_of_a_client(federation: Federation, level: int) -> int:
    """From a state in a file, of which it takes its slice, to its change."""
    run, store, engine = federation.run, federation.store, federation.engine
    path = Path(run.save_path) / "state.safetensors"
    if engine.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(federation.initial_state, path)
    engine.barrier()
    federation = dataclasses.replace(federation, initial_state={})
    state = load_file(path)  # pages of the file, which go with it
    received = {name: t.clone() for name, t in store.models.level_state(level, state).items()}
    model: Any = store.submodel(level, state, own=True, place=engine.place)
    del state
    if run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    # On the CPU a base in files is pages of these; of what is read in passing nothing need stay in memory.
    base = bytes_in_files(model.parameters(), Path(run.save_path) / "base")
    task = ClientTask(client=0, level=level, round=1, example_ids=federation.clients[0])
    forget_device_peak(store.device)
    session = engine.session(model, run)
    update = trainer_of(federation).train(session, task, received, run.lr)
    assert update.metrics["steps"] == run.local_steps
    return device_peak(store.device) + base


def trainer_of(federation: Federation) -> ClientTrainer:
    return ClientTrainer(
        run=federation.run,
        engine=federation.engine,
        batcher=federation.batchers["train"],
        answer_ids=None,
        vocab_size=federation.store.models.vocab_size,
        check_stop=lambda engine: None,
        on_step=lambda *_: None,
    )


if __name__ == "__main__":
    sys.exit(main())
