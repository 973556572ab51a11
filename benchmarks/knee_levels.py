"""The recorded runs of the README: both recipes and central training on the real radiographs, over seeds.

    python benchmarks/knee_levels.py --data-root DIR [--out runs/knee] [--seeds 0 1 2] [--jobs 2]

Prints Markdown tables of test balanced accuracy and kappa of every level's every exit: mean, and lowest to
highest over the seeds. Runs that are there already are not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FEDERATED = ["--num_rounds", "40", "--num_epoch", "2", "--eval_every", "5"]
CENTRAL = ["--num_clients", "1", "--vertical_scale_ratios", "1", "--horizontal_scale_ratios", "4"]
CENTRAL += ["--client_split_ratios", "1", "--num_rounds", "20", "--num_epoch", "2", "--eval_every", "5"]
SETTINGS = {
    "scalefl": [*FEDERATED, "--recipe", "scalefl"],
    "paper": [*FEDERATED, "--recipe", "paper"],
    "central": CENTRAL,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/knee"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    todo = [(name, seed) for name in SETTINGS for seed in arguments.seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda item: run(*item, arguments.data_root, arguments.out), todo))
    for name in SETTINGS:
        print(table(name, [arguments.out / f"{name}-{seed}" for seed in arguments.seeds]))


def run(name: str, seed: int, data_root: str, out: Path) -> None:
    """Train one setting, or go on with what is there of it; its wall time goes to `minutes`."""
    folder = out / f"{name}-{seed}"
    if (folder / "results.json").is_file():
        return
    command = [sys.executable, "-m", "scalefl", "train", "--data-root", data_root, "--seed", str(seed)]
    command += ["--save_path", str(folder), "--resume", "--print_freq", "100000", *SETTINGS[name]]
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}-{seed}.log", "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    (folder / "minutes").write_text(f"{(time.monotonic() - started) / 60:.1f}\n")


def table(name: str, folders: list[Path]) -> str:
    """Markdown: one row per level and exit."""
    results = [json.loads((folder / "results.json").read_text())["levels"] for folder in folders]
    minutes = ", ".join((folder / "minutes").read_text().strip() for folder in folders)
    lines = [
        f"\n{name} (minutes a run: {minutes})\n",
        "| level | exit | balanced accuracy | kappa |",
        "|---|---|---|---|",
    ]
    for level, exits in results[0].items():
        for exit in range(len(exits)):
            cells = [
                _spread([r[level][exit][key] for r in results]) for key in ("balanced_accuracy", "kappa")
            ]
            lines.append(f"| {level} | {exit + 1} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float | None]) -> str:
    if None in values:  # an undefined kappa has no place in a mean
        return "-"
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
