"""Atomic checkpoints: written to a temporary folder, fsynced, renamed; only safetensors and JSON.

A folder `round-0007` is the state after round 7; `round-0008-part` is in the middle of round 8. Under
`--tuning full` with a trained tower a folder is a Hugging Face model folder as well.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scalefl.contracts import InputError, State

RECORD = "checkpoint.json"
WEIGHTS = "model.safetensors"
SUMS = "sums.safetensors"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Partial:
    """What a round has so far: the aggregator's sums, and the records of the clients that finished."""

    sums: dict[str, State]
    clients: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands."""

    state: State
    """Global trainable state."""
    round: int = 0
    """Rounds completed."""
    best: dict[str, Any] | None = None
    """`round` and `value` of the best validation result so far."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl that belongs to this state."""
    partial: Partial | None = None

    @property
    def folder_name(self) -> str:
        return f"round-{self.round:04d}" if self.partial is None else f"round-{self.round + 1:04d}-part"


def save(folder: Path, progress: Progress, keep_last: int, write_config: Callable[[Path], None]) -> Path:
    """Write a checkpoint below `folder`, then drop what is older than the last `keep_last` and not the best.

    `write_config` adds what makes the weights loadable. A failure (a full disk, a signal) leaves earlier
    checkpoints as they were and nothing half-written.
    """
    target, temporary = folder / progress.folder_name, folder / f".{progress.folder_name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(_contiguous(progress.state), temporary / WEIGHTS, metadata={"format": "pt"})
        record: dict[str, Any] = {
            "format": FORMAT,
            "round": progress.round,
            "best": progress.best,
            "metrics_bytes": progress.metrics_bytes,
            "clients": None,
        }
        if progress.partial is not None:
            record["clients"] = progress.partial.clients
            sums = {f"{kind}/{n}": t for kind, part in progress.partial.sums.items() for n, t in part.items()}
            save_file(_contiguous(sums), temporary / SUMS)
        write_config(temporary)
        (temporary / RECORD).write_text(json.dumps(record, indent=1))
        _fsync_tree(temporary)
        if target.exists():  # a mid-round checkpoint replaces the round's earlier one
            stale = folder / f".{progress.folder_name}.old"
            shutil.rmtree(stale, ignore_errors=True)
            target.rename(stale)
        temporary.rename(target)
        _fsync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (number := os_error_number(error)) is not None:
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    _prune(folder, progress, keep_last)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint below `folder`, or None if there is none."""
    found = (p for p in folder.glob("*round-*") if (p / RECORD).is_file() and not p.name.endswith(".tmp"))
    return max(found, key=_age, default=None)


def load(path: Path) -> Progress:
    """Read one checkpoint folder. Raises InputError if it is none, is damaged, or is of another format."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise InputError(
                f"{path}: checkpoint format {record['format']}; this version reads format {FORMAT}."
            )
        state = _load_tensors(path / WEIGHTS)
        partial = None
        if record["clients"] is not None:
            sums: dict[str, State] = {}
            for key, tensor in _load_tensors(path / SUMS).items():
                kind, _, name = key.partition("/")
                sums.setdefault(kind, {})[name] = tensor
            partial = Partial(sums=sums, clients=record["clients"])
        return Progress(
            state=state,
            partial=partial,
            **{key: record[key] for key in ("round", "best", "metrics_bytes")},
        )
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no checkpoint there ({Path(str(error.filename)).name} is missing); expected a folder "
            "such as SAVE_PATH/checkpoints/round-0005."
        ) from error
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{path}: damaged checkpoint ({error}); remove the folder to go on from the one before."
        ) from error


def _load_tensors(path: Path) -> State:
    if not path.is_file():  # safetensors' own error does not name the file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return load_file(path)


def os_error_number(error: BaseException) -> int | None:
    """safetensors and tokenizers give the system's error, such as a full disk, in their text alone."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and not isinstance(error, OSError) else None


def _age(path: Path) -> tuple[int, bool, bool]:
    """The middle of round 8 comes after round 7 and before the end of round 8; what was replaced, first."""
    name = path.name.strip(".").removesuffix(".old")
    number = int(name.removeprefix("round-").removesuffix("-part"))
    return number, not name.endswith("-part"), not path.name.startswith(".")


def _prune(folder: Path, progress: Progress, keep_last: int) -> None:
    best = f"round-{progress.best['round']:04d}" if progress.best else None
    whole = [p for p in folder.glob("round-*") if p.name != best and not p.name.endswith("-part")]
    surplus = sorted(whole, key=_age)[:-keep_last]
    if progress.partial is None:
        surplus += folder.glob("round-*-part")
    surplus += folder.glob(".round-*")
    for path in surplus:
        shutil.rmtree(path, ignore_errors=True)


def _contiguous(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _fsync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
