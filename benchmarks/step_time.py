"""Time of a client's optimizer step: against plain transformers + peft, and of level 1 against level 4.

    python benchmarks/step_time.py [--steps 12] [--precision fp32] [--quantization none] [--threads 1]
        [--small]

A step is batch, forward pass, loss at every exit, backward pass, clipping and AdamW. The three kinds take
turns within one process: step for step on the same examples, in alternating order. Unquantised, the plain
model starts from the same weights, and what both have learned in the end is compared: they do the same work.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Row, milliseconds, show
from midsize import resolved
from plain_peft import PlainTraining
from torch import Tensor

from scalefl.batches import step_order
from scalefl.contracts import ClientTask
from scalefl.federation.client import ClientTrainer
from scalefl.federation.setup import Federation, build
from scalefl.models.cost import level_cost
from scalefl.seeding import numpy_rng

LIMIT, LEVEL_LIMIT = 1.05, 1.25
WARM_UP = 2
"""First steps, which make the optimizer's state and are not counted."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of each kind that are counted")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
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
            local_steps=arguments.steps + WARM_UP,
            num_clients=4,
        )
        return compare(build(run, model_file), judged=not arguments.small)


def compare(federation: Federation, judged: bool) -> int:
    """Print the table; the exit code."""
    store, run = federation.store, federation.run
    turns = Turns(federation)
    learned_apart = turns.take()
    example = federation.batchers["train"].training([0]).inputs
    first, last = store.models.levels[0], store.models.levels[-1]
    macs = {level: level_cost(store.models, level, example).macs for level in (first, last)}
    counted = {name: seconds[WARM_UP:] for name, seconds in turns.seconds.items()}
    share = macs[first] / macs[last]
    level_ratio = _ratio(counted["first"], counted["last"]) / share
    rows = [
        Row(cells=("plain transformers + peft", milliseconds(counted["plain"]))),
        Row(
            cells=(f"client of level {last}", milliseconds(counted["last"])),
            ratio=_ratio(counted["last"], counted["plain"]),
            limit=LIMIT if judged else None,
        ),
        Row(
            cells=(f"client of level {first}, {share:.3f} of the MACs", milliseconds(counted["first"])),
            ratio=level_ratio,
            limit=LEVEL_LIMIT if judged else None,
        ),
    ]
    length = federation.batchers["train"].lengths([0])[0]
    return show(
        f"Step time, {run.precision}, quantization {run.quantization}, "
        f"batches of {run.batch_size} x {length} tokens",
        ["what", "ms, least / median"],
        rows,
        "Ratios are medians over turns; the last one is that of times over that of MACs.",
        f"What level {last} and the plain loop learned differs by {learned_apart} (norms of all parameters).",
    )


def _ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


class Turns:
    """A client of the last level trains; before or after each of its steps the others take theirs."""

    def __init__(self, federation: Federation) -> None:
        self._fed, self.seconds = federation, {"last": [], "plain": [], "first": []}
        store, run = federation.store, federation.run
        levels = {"first": store.models.levels[0], "last": store.models.levels[-1]}
        self._tasks = {
            name: ClientTask(client=0, level=level, round=1, example_ids=federation.clients[0])
            for name, level in levels.items()
        }
        state = federation.initial_state
        self._sent = {name: store.models.level_state(level, state) for name, level in levels.items()}
        self._sessions = {
            name: federation.engine.session(store.submodel(level, state, own=True), run)
            for name, level in levels.items()
        }
        self._weights = None if run.quantization != "none" else {**store.base, **state}
        self._plain = PlainTraining(store.models.config, run, self._weights)
        batcher, ids = federation.batchers["train"], federation.clients[0]
        self._batches = step_order(
            ids,
            [batcher.examples[i].label for i in ids],
            batch_size=run.batch_size,
            num_epoch=1,
            local_steps=run.local_steps,
            balanced=False,
            rng=numpy_rng(run.seed, "batches", round=1, client=0),
        )

    def take(self) -> str:
        """Every step of the client; how far apart it and the plain loop end, of what they learned."""
        update = self._trainer("last", self._before, self._after).train(
            self._sessions["last"], self._tasks["last"], self._sent["last"], self._fed.run.lr
        )
        if self._weights is None:
            return "unknown (blocks of weights are quantised along other axes)"
        plain, apart, moved = self._plain.named_parameters(), 0.0, 0.0
        for name, delta in update.delta.items():
            change = plain[name].detach() - self._sent["last"][name]
            apart, moved = apart + _square(change - delta), moved + _square(change)
        return f"{math.sqrt(apart):.1e} of {math.sqrt(moved):.1e}"

    def _before(self, number: int) -> None:
        if number % 2:
            self._others(number)

    def _after(self, number: int) -> None:
        if number % 2 == 0:
            self._others(number)

    def _others(self, number: int) -> None:
        """The plain loop's step, and the first level's: the second of two, for its optimizer starts anew."""
        started = time.perf_counter()
        self._plain.step(self._fed.batchers["train"], self._batches[number - 1])
        self.seconds["plain"].append(time.perf_counter() - started)
        trainer = self._trainer("first", lambda number: None, lambda number: None)
        two = dataclasses.replace(trainer, run=dataclasses.replace(self._fed.run, local_steps=2))
        two.train(self._sessions["first"], self._tasks["first"], self._sent["first"], self._fed.run.lr)
        del self.seconds["first"][-2]

    def _trainer(
        self, name: str, before: Callable[[int], None], after: Callable[[int], None]
    ) -> ClientTrainer:
        """A client trainer with a clock, which stands still during `before` and `after`."""
        started, number, seconds = 0.0, 0, self.seconds[name]

        def starts(_: Any) -> None:
            nonlocal started, number
            number += 1
            before(number)
            started = time.perf_counter()

        def ends(*_: Any) -> None:
            seconds.append(time.perf_counter() - started)
            after(number)

        return ClientTrainer(
            run=self._fed.run,
            engine=self._fed.engine,
            batcher=self._fed.batchers["train"],
            answer_ids=None,
            vocab_size=self._fed.store.models.vocab_size,
            check_stop=starts,
            on_step=ends,
        )


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())


if __name__ == "__main__":
    sys.exit(main())
