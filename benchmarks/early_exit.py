"""What early exits save: accuracy over multiply-accumulates and seconds, on a model trained on radiographs.

    python benchmarks/early_exit.py --data-root DIR [--out runs/early-exit] [--seeds 0 1 2]

For each seed: federated training of the tiny model (the README's recipe), export of the whole model,
`scalefl calibrate` for at most 2 % of the deepest exit's accuracy on the validation split, and the test split
answered with and without leaving early, in turns. Prints a Markdown table; the curves of the test split go to
OUT/early_exit.csv and .png. Runs that are there already are not repeated.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import torch
from knee_levels import FEDERATED
from measuring import Row, show
from torch import Tensor

from scalefl.config.flags import parse
from scalefl.config.resolve import resolve
from scalefl.data.images import decode_all
from scalefl.inference import ExitRule
from scalefl.prediction.calibration import read_calibration
from scalefl.prediction.loaded import Answering, task_of
from scalefl.registry import resolve as registered

SMALL = ["--num_rounds", "1", "--num_epoch", "1", "--num_patients", "24"]
BATCH = 16
REPEATS = 7
TAKEN = 0.02
"""Share of the deepest exit's accuracy that may be lost."""
COLUMNS = (
    *("seed", "accuracy, deepest exit", "leaving early", "loss", "times as few MACs", "times as fast"),
    "times as few MACs, threshold by the test split",
)
Points = list[dict[str, float]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", help="radiographs; without it, synthetic ones")
    parser.add_argument("--out", type=Path, default=Path("runs/early-exit"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--small", action="store_true", help="to try the script out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = ["--data", "synthetic"]
    if arguments.data_root is not None:
        data = ["--data", "kneexray", "--data-root", arguments.data_root]
    if arguments.small:
        data += SMALL[-2:]
    rows, curves = [], []
    for seed in arguments.seeds:
        folder = arguments.out / f"seed-{seed}"
        model = trained(folder, seed, [*data, *(SMALL[:4] if arguments.small else FEDERATED)])
        scalefl("calibrate", "--model", str(model), "--accuracy_drop", str(TAKEN), *data)
        points = test_curve(model)
        curves.append((seed, points))
        rows.append(Row(cells=(seed, *compared(model, points, data))))
    write_curves(arguments.out, curves)
    return show(
        "Leaving early, calibrated for 2 % of the validation accuracy; on the test split", COLUMNS, rows
    )


def scalefl(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "scalefl", *command], check=True, stdout=subprocess.DEVNULL)


def trained(folder: Path, seed: int, options: Sequence[str]) -> Path:
    """The whole model of the run's best round."""
    run = folder / "run"
    if not (run / "results.json").is_file():
        typed = ["--seed", str(seed), "--save_path", str(run), "--resume", "--print_freq", "100000"]
        scalefl("train", *typed, *options)
    number = json.loads((run / "results.json").read_text())["selected_round"]
    if not (folder / "model").is_dir():
        checkpoint = run / "checkpoints" / f"round-{number:04d}"
        scalefl("export", "--checkpoint", str(checkpoint), "--out", str(folder / "model"))
    return folder / "model"


def test_curve(model: Path) -> Points:
    """Of each threshold, as `scalefl calibrate` has left it: cheapest first."""
    with open(model / "calibration.csv", newline="") as file:
        points = [
            {name: float(value) for name, value in row.items() if name != "split"}
            for row in csv.DictReader(file)
            if row["split"] == "test"
        ]
    return sorted(points, key=lambda point: point["mean_cost"])


def compared(model: Path, points: Points, data: Sequence[str]) -> list[str]:
    """The test split answered by the deepest exit, and leaving early as calibrated."""
    answering = Answering(model, torch.device("cpu"), None, task_of(model).answers)
    calibration = read_calibration(model, answering.num_exits)
    assert calibration is not None
    deepest = ExitRule(thresholds=(2.0,) * (answering.num_exits - 1))
    pixels, ratios = test_images(answering, data), []
    seconds_to_answer(answering, pixels, deepest)  # to warm up
    for _ in range(REPEATS):  # in turns, since the machine is shared
        whole = seconds_to_answer(answering, pixels, deepest)
        ratios.append(whole / seconds_to_answer(answering, pixels, calibration.rule()))
    chosen = min(points, key=lambda point: abs(point["threshold"] - calibration.thresholds[0]))
    full = max(points, key=lambda point: point["threshold"])
    loss = (full["accuracy"] - chosen["accuracy"]) / max(full["accuracy"], 1e-9)
    accuracies = [f"{full['accuracy']:.3f}", f"{chosen['accuracy']:.3f}", f"{100 * loss:.1f} %"]
    found = [1 / chosen["mean_cost"], statistics.median(ratios), 1 / _cheapest(points, full["accuracy"])]
    return [*accuracies, *(f"{value:.2f}" for value in found)]


def _cheapest(points: Points, accuracy: float) -> float:
    """Mean cost of the threshold that would have been best, had the test split been known."""
    return min(point["mean_cost"] for point in points if point["accuracy"] >= (1 - TAKEN) * accuracy)


def test_images(model: Answering, data: Sequence[str]) -> list[Tensor]:
    run, _ = resolve(parse(["train", *data]).flags)
    splits = registered("data", run.data)(run)
    examples = splits.splits["test"]
    pixels = decode_all(examples, splits.read_image, model.prepare, run.workers)
    return [pixels[example.image_key] for example in examples]


def seconds_to_answer(model: Answering, pixels: Sequence[Tensor], rule: ExitRule) -> float:
    started = time.perf_counter()
    for start in range(0, len(pixels), BATCH):
        model.answer(pixels[start : start + BATCH], rule, 1)
    return time.perf_counter() - started


def write_curves(folder: Path, curves: Sequence[tuple[int, Points]]) -> None:
    """Of every seed, as numbers and as a picture."""
    with open(folder / "early_exit.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", *curves[0][1][0]])
        writer.writerows([seed, *(f"{v:.5g}" for v in p.values())] for seed, points in curves for p in points)
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for seed, points in curves:
        axes.plot([p["mean_cost"] for p in points], [p["accuracy"] for p in points], label=f"seed {seed}")
    axes.set_xlabel("mean multiply-accumulates of an image, share of the deepest exit's")
    axes.set_ylabel("accuracy on the test split")
    axes.legend()
    figure.savefig(folder / "early_exit.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
