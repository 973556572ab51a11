"""What `scalefl reorder` is worth: levels of a pretrained model before and after federated LoRA, over seeds.

    python benchmarks/importance_order.py --data-root DIR [--out runs/order] [--seeds 0 1 2]

The tiny model is trained centrally, whole and without early exits, on half of the training patients. Eight
clients of four levels then train adapters on the other half, from that model and from its reordered copy, cut
along width alone, or along width and depth. Prints a Markdown table of each level's deepest exit on the test
split: mean, and lowest to highest over the seeds. Runs that are there already are not repeated.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measuring import hardware

from scalefl.config.options import RunConfig
from scalefl.contracts import DataSplits
from scalefl.registry import resolve
from scalefl.seeding import numpy_rng

HERE = Path(__file__).resolve().parent
CENTRAL = ["--num_clients", "1", "--vertical_scale_ratios", "1", "--horizontal_scale_ratios", "1"]
CENTRAL += ["--client_split_ratios", "1", "--tuning", "full", "--ee_locs"]
CUTS = {"width": ["--horizontal_scale_ratios", "1", "1", "1", "1", "--ee_locs"], "width and depth": []}
STARTS = ("plain", "reordered")
METRICS = {"balanced_accuracy": "balanced accuracy", "loss": "loss, nats per token"}
LEVELS = ("1", "2", "3", "4")


def first_half(run: RunConfig) -> DataSplits:
    """The data with the training patients that the base is pretrained on."""
    return _half(run, 0)


def second_half(run: RunConfig) -> DataSplits:
    """The data with the training patients that are dealt to clients."""
    return _half(run, 1)


def _half(run: RunConfig, which: int) -> DataSplits:
    data = resolve("data", "synthetic" if run.data_root is None else "kneexray")(run)
    patients = sorted({example.patient for example in data.splits["train"]})
    chosen = {patients[i] for i in numpy_rng(run.seed, "halves").permutation(len(patients))[which::2]}
    train = tuple(example for example in data.splits["train"] if example.patient in chosen)
    return dataclasses.replace(data, splits={**data.splits, "train": train})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root")
    parser.add_argument("--out", type=Path, default=Path("runs/order"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, nargs=2, default=[20, 10], help="pretraining, federated")
    parser.add_argument("--examples", type=int, default=64, help="of the clients' half, to measure on")
    parser.add_argument(
        "--small",
        action="store_true",
        help="a round each, cut along width alone, nothing kept; without --data-root synthetic data",
    )
    arguments = parser.parse_args()
    data = ["--data-root", arguments.data_root] if arguments.data_root else ["--num_patients", "60"]
    rounds = (1, 1) if arguments.small else tuple(arguments.rounds)
    with tempfile.TemporaryDirectory() as spare:
        out = Path(spare) if arguments.small else arguments.out
        folders = [out / f"seed-{seed}" for seed in arguments.seeds]
        cuts = [*CUTS][:1] if arguments.small else [*CUTS]
        for seed, folder in zip(arguments.seeds, folders, strict=True):
            one_seed([*data, "--seed", str(seed)], folder, rounds, arguments.examples, cuts)
        print(f"{hardware()}; seeds {' '.join(map(str, arguments.seeds))}\n\n{table(folders, cuts)}")


def one_seed(
    data: list[str], folder: Path, rounds: tuple[int, int], examples: int, cuts: Sequence[str]
) -> None:
    """Pretrain, reorder, and train from both; each as `scalefl` does it on the command line."""
    of_base = ["--data", "importance_order:first_half", "--num_rounds", str(rounds[0]), *data]
    train(folder / "base", [*of_base, *CENTRAL])
    chosen = json.loads((folder / "base" / "results.json").read_text())["selected_round"]
    plain = folder / "base" / "checkpoints" / f"round-{chosen:04d}"
    starts = dict(zip(STARTS, (plain, folder / "reordered"), strict=True))
    of_clients = ["--data", "importance_order:second_half", *data]
    if not starts["reordered"].is_dir():
        typed = ["--model", str(plain), "--out", str(starts["reordered"]), "--examples", str(examples)]
        scalefl(folder / "reorder.log", ["reorder", *typed, *of_clients])
    for (name, start), cut in itertools.product(starts.items(), cuts):
        lora = [*of_clients, *CUTS[cut], "--tuning", "lora", "--init_from", str(start)]
        still = ["--num_rounds", "1", "--local_steps", "1", "--lr", "0"]  # is evaluated as it started
        train(folder / _run(cut, "before", name), [*lora, *still])
        train(folder / _run(cut, "after", name), [*lora, "--num_rounds", str(rounds[1])])


def _run(cut: str, when: str, start: str) -> str:
    return f"{cut} {when} {start}".replace(" ", "-")


def train(folder: Path, options: list[str]) -> None:
    """One run, or what is missing of it."""
    if not (folder / "results.json").is_file():
        typed = ["--save_path", str(folder), "--resume", "--eval_every", "5", "--print_freq", "100000"]
        scalefl(folder.with_suffix(".log"), ["train", *typed, *options])


def scalefl(log: Path, command: list[str]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    with open(log, "a") as output:
        whole = [sys.executable, "-m", "scalefl", *command]
        subprocess.run(whole, check=True, env=environment, stdout=output, stderr=output)


def table(folders: Sequence[Path], cuts: Sequence[str]) -> str:
    """Markdown: rows by metric, cut, before or after, and start; a column for each level."""
    columns = ["test", "cut along", "LoRA", "start", *(f"level {level}" for level in LEVELS)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for metric, cut, when, name in itertools.product(METRICS, cuts, ("before", "after"), STARTS):
        files = [folder / _run(cut, when, name) / "results.json" for folder in folders]
        results = [json.loads(file.read_text())["levels"] for file in files]
        cells = [_spread([r[level][-1][metric] for r in results]) for level in LEVELS]
        lines.append(f"| {METRICS[metric]} | {cut} | {when} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
