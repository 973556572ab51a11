"""What the benchmarks measure with, and how they show it: memory of this process, time of steps, a table."""

import contextlib
import ctypes
import dataclasses
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchmetrics.functional.classification  # noqa: F401  # which evaluation imports late: no memory of a round
from torch import Tensor

from scalefl.contracts import ClientTask, ClientUpdate, State
from scalefl.evaluate import Evaluator
from scalefl.federation.client import ClientTrainer
from scalefl.federation.sequential import Sequential
from scalefl.federation.setup import Federation

MIB = 1 << 20
STEADY_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
"""Environment in which glibc gives freed tensors back at once: else peaks depend on the order of calls."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a process in bytes."""

    resident: int
    """With the pages of programs and libraries."""
    anonymous: int
    """What the process itself has put into memory."""


def memory_now() -> Memory:
    status = _status()
    return Memory(resident=status["VmRSS"], anonymous=status["RssAnon"])


def forget_peak() -> None:
    """From now on `peak_memory` is that of what follows."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> Memory:
    """Since `forget_peak`. The kernel keeps the peak of resident memory; pages of files only get more."""
    status = _status()
    of_files = status["RssFile"] + status["RssShmem"]
    return Memory(resident=status["VmHWM"], anonymous=status["VmHWM"] - of_files)


def bytes_in_files(tensors: Iterable[Tensor], folder: Path) -> int:
    """Bytes of tensors whose memory is pages of files below a folder, which `anonymous` leaves out."""
    maps = (
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if f" {folder}/" in line
    )
    ranges = [[int(address, 16) for address in entry[0].split("-")] for entry in maps]
    places = ((tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors)
    return sum(size for at, size in places if any(start <= at < end for start, end in ranges))


def _status() -> dict[str, int]:
    pairs = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in pairs if "kB" in rest}


def forget_device_peak(device: torch.device) -> None:
    """From now on `device_peak` is that of what follows."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()


def device_peak(device: torch.device) -> int:
    """Bytes since `forget_device_peak`: of tensors on a GPU, of anonymous pages on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory().anonymous


class PeakSequential(Sequential):
    """The sequential executor with a look at memory, as `--executor measuring:PeakSequential`."""

    peaks: dict[int, int] = {}
    """Level -> `device_peak` from its sub-model's making to its last client's merge."""

    def _level(
        self, tasks: Sequence[ClientTask], level: int, global_state: State, lr: float
    ) -> Iterator[ClientUpdate]:
        forget_device_peak(self._store.device)
        yield from super()._level(tasks, level, global_state, lr)
        self.peaks[level] = device_peak(self._store.device)


@contextlib.contextmanager
def watched_evaluation() -> Iterator[dict[int, int]]:
    """Within, level -> the largest `device_peak` of its evaluations."""
    peaks: dict[int, int] = {}
    evaluate = Evaluator.level

    def watched(self: Any, level: int, *arguments: Any) -> Any:
        forget_device_peak(self._engine.device)
        found = evaluate(self, level, *arguments)
        peaks[level] = max(peaks.get(level, 0), device_peak(self._engine.device))
        return found

    Evaluator.level = watched
    try:
        yield peaks
    finally:
        Evaluator.level = evaluate


@dataclass
class RoundTimes:
    """Seconds of one round's training."""

    executor: float = 0.0
    """All of it: sub-models built, loaded, trained and torn down."""
    clients: float = 0.0
    """As the clients report it: from loading a state to its change."""
    steps: dict[int, list[float]] = field(default_factory=dict)
    """Of every optimizer step with its batch, by level."""


class TimedSequential(Sequential):
    """The sequential executor with a clock, as `--executor measuring:TimedSequential`."""

    rounds: list[RoundTimes] = []
    """Of this process, first round first."""
    at_start: Callable[[], None] = gc.collect
    """Called when everything is built and the first round is to begin."""

    def __init__(self, trainer: ClientTrainer, federation: Federation) -> None:
        type(self).at_start()
        self._check_stop, self._on_step = trainer.check_stop, trainer.on_step
        self._device = federation.store.device
        timed = dataclasses.replace(trainer, check_stop=self._starts, on_step=self._ends)
        super().__init__(timed, federation)

    def train(self, tasks: Sequence[ClientTask], global_state: State, lr: float) -> Iterator[ClientUpdate]:
        times = RoundTimes()
        self.rounds.append(times)
        updates = super().train(tasks, global_state, lr)
        while True:
            started = time.perf_counter()
            update = next(updates, None)
            times.executor += time.perf_counter() - started
            if update is None:
                return
            times.clients += update.metrics["seconds"]
            yield update
            del update  # else it lives on beside the next client's training

    def _starts(self, engine: Any) -> None:
        self._check_stop(engine)
        self._started = now(self._device)

    def _ends(self, task: ClientTask, step: int, steps: int, loss: float) -> None:
        self.rounds[-1].steps.setdefault(task.level, []).append(now(self._device) - self._started)
        self._on_step(task, step, steps, loss)


def now(device: torch.device) -> float:
    """Seconds on a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: what was measured, and the ratios that are allowed, if any."""

    cells: tuple[Any, ...]
    ratio: float | None = None
    limit: float | None = None
    """The largest."""
    least: float = 0.0
    """The smallest, beside a limit."""

    @property
    def broken(self) -> bool:
        judged = self.ratio is not None and self.limit is not None
        return judged and not self.least <= self.ratio <= self.limit

    @property
    def allowed(self) -> str:
        if self.limit is None:
            return "-"
        return f"{self.least:.3f} to {self.limit:.3f}" if self.least else f"{self.limit:.3f}"


def show(title: str, columns: Sequence[str], rows: Sequence[Row], *notes: str) -> int:
    """Print a Markdown table below the hardware it was measured on; the exit code: 1 if a limit is broken."""
    print(f"\n{title}\n\n{hardware()}\n")
    header = [*columns, "ratio", "limit", "verdict"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        verdict = "-" if row.limit is None else "broken" if row.broken else "holds"
        print(f"| {' | '.join([*map(str, row.cells), ratio, row.allowed, verdict])} |")
    print("".join(f"\n{note}" for note in notes), flush=True)
    return int(any(row.broken for row in rows))


def hardware() -> str:
    names = [x.partition(":")[2].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")]
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = os.getloadavg()[0]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"threads, load {load:.1f}{gpu}; torch {torch.__version__}, Python {sys.version.split()[0]}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def milliseconds(seconds: Sequence[float]) -> str:
    """Least and median."""
    return f"{1e3 * min(seconds):.0f} / {1e3 * statistics.median(seconds):.0f}"
