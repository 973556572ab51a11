"""Images a second of a full-level client's epoch, with the frozen vision tower's features cached and without.

    python benchmarks/feature_cache.py [--epochs 2] [--images 16] [--precision fp32] [--threads 1] [--small]

The tower has 29 % of the multiply-accumulates of a forward pass, as ViT-g has in MiniGPT-v2 at 224 pixels
(at 448: 37 %). Epochs with and without take turns within one process. Filling the cache is shown apart: it is
done once, for all clients, rounds and evaluations.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import Row, show
from midsize import resolved

from scalefl import features
from scalefl.contracts import ClientTask
from scalefl.federation import setup
from scalefl.federation.client import ClientTrainer
from scalefl.federation.setup import Federation
from scalefl.models.cost import level_cost

TOWER = {
    "model": {"image_size": 224},
    "vision": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "patch_size": 14,
    },
}
PROMPT_WORDS = 40
"""Beside 64 image tokens, so that a row is mostly image, as in MiniGPT-v2."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each kind that are counted")
    parser.add_argument("--images", type=int, default=16, help="images of the client")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a model of no weight, to try this script out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        without = federation(Path(folder) / "off", "off", arguments)
        with timed(features, "keep_in_memory") as filling:
            cached = federation(Path(folder) / "memory", "memory", arguments)
        return compare(without, cached, sum(filling), arguments)


def federation(folder: Path, feature_cache: str, arguments: Any) -> Federation:
    run, model_file = resolved(
        folder,
        small=arguments.small,
        sections=None if arguments.small else TOWER,
        question_words=PROMPT_WORDS,
        precision=arguments.precision,
        feature_cache=feature_cache,
        num_clients=4,
        num_patients=40,
        local_steps=None,
    )
    return setup.build(run, model_file)


@contextlib.contextmanager
def timed(module: Any, name: str) -> Iterator[list[float]]:
    """Within, seconds of every call of a module's function."""
    function, seconds = getattr(module, name), []

    def with_clock(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(module, name, with_clock)
    try:
        yield seconds
    finally:
        setattr(module, name, function)


def compare(without: Federation, cached: Federation, filling: float, arguments: Any) -> int:
    """Print the table; the exit code."""
    trainers = {name: Epochs(fed, arguments.images) for name, fed in (("without", without), ("with", cached))}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(arguments.epochs + 1):  # the first one warms up
        order = list(trainers) if number % 2 else list(trainers)[::-1]
        for name in order:
            seconds[name].append(trainers[name].one())
    counted = {name: found[1:] for name, found in seconds.items()}
    speed = {name: arguments.images / statistics.median(found) for name, found in counted.items()}
    num_images = sum(len(batcher.examples) for batcher in cached.batchers.values())
    rows = [
        Row(cells=("without", f"{speed['without']:.2f}")),
        Row(cells=("with", f"{speed['with']:.2f}"), ratio=speed["with"] / speed["without"]),
    ]
    return show(
        f"Epochs of {arguments.images} images at the full level, {arguments.precision}",
        ["feature cache", "images/s"],
        rows,
        f"Filling the cache, once in a run, with drawing the images: {num_images / filling:.2f} images/s.",
        f"The tower has {1 - macs(cached) / macs(without):.0%} of a forward pass's multiply-accumulates.",
    )


def macs(fed: Federation) -> int:
    """Of an example's forward pass at the last level."""
    models = fed.store.models
    return level_cost(models, models.levels[-1], fed.batchers["train"].training([0]).inputs).macs


class Epochs:
    """A client of the last level, whose session goes on from epoch to epoch."""

    def __init__(self, fed: Federation, num_images: int) -> None:
        level = fed.store.models.levels[-1]
        run = dataclasses.replace(fed.run, num_epoch=1)
        self._lr, self._sent = run.lr, fed.store.models.level_state(level, fed.initial_state)
        self._task = ClientTask(client=0, level=level, round=1, example_ids=tuple(range(num_images)))
        self._session = fed.engine.session(fed.store.submodel(level, fed.initial_state, own=True), run)
        self._trainer = ClientTrainer(
            run=run,
            engine=fed.engine,
            batcher=fed.batchers["train"],
            answer_ids=None,
            vocab_size=fed.store.models.vocab_size,
        )

    def one(self) -> float:
        """Seconds of an epoch."""
        return self._trainer.train(self._session, self._task, self._sent, self._lr).metrics["seconds"]


if __name__ == "__main__":
    sys.exit(main())
