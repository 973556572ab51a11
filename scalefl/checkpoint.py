"""Atomic checkpoints: written to a temporary folder, fsynced, renamed; only safetensors and JSON.

A folder `round-0007` is the state after round 7; `round-0008-part` is in the middle of round 8, and
`rank-0001-of-round-0008` what rank 1 had then, if ranks train clients of their own. Under
`--tuning full` with a trained tower a folder is a Hugging Face model folder as well.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scalefl.contracts import InputError, State
from scalefl.models.files import os_error_number, save_file

RECORD = "checkpoint.json"
RANK_RECORD = "clients.json"
WEIGHTS = "model.safetensors"
SUMS = "sums.safetensors"
FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Partial:
    """What a round has so far: the aggregator's sums, and the records of the clients that finished."""

    sums: dict[str, State]
    clients: list[dict[str, Any]]
    failures: dict[str, list[str]] = field(default_factory=dict)
    """By client (its number as text, for JSON): why attempts failed that are to be made once more."""


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

    def write(temporary: Path) -> None:
        save_file(_contiguous(progress.state), temporary / WEIGHTS, metadata={"format": "pt"})
        record: dict[str, Any] = {
            "format": FORMAT,
            "round": progress.round,
            "best": progress.best,
            "metrics_bytes": progress.metrics_bytes,
            "clients": None,
            "failures": {},
        }
        if progress.partial is not None:
            record["clients"], record["failures"] = progress.partial.clients, progress.partial.failures
            _save_sums(progress.partial.sums, temporary)
        write_config(temporary)
        (temporary / RECORD).write_text(json.dumps(record, indent=1))

    target = _replace(folder / progress.folder_name, write)
    _prune(folder, progress, keep_last)
    return target


def save_rank_part(folder: Path, round: int, rank: int, partial: Partial) -> None:
    """Write what a rank has of a round in which every rank trains clients of its own."""

    def write(temporary: Path) -> None:
        _save_sums(partial.sums, temporary)
        record = {"clients": partial.clients, "failures": partial.failures}
        (temporary / RANK_RECORD).write_text(json.dumps(record))

    _replace(folder / f"rank-{rank:04d}-of-round-{round:04d}", write)


def rank_parts(folder: Path, progress: Progress) -> list[Path]:
    """What ranks left of the round after `progress`, and is there in whole."""
    found = sorted(folder.glob(f"rank-*-of-round-{progress.round + 1:04d}"))
    return [path for path in found if (path / RANK_RECORD).is_file()]


def with_rank_parts(folder: Path, progress: Progress) -> Progress:
    """The progress and what other ranks had of its round, unless it is in there already."""
    for path in rank_parts(folder, progress):
        record = json.loads((path / RANK_RECORD).read_text(encoding="utf-8"))
        clients = record["clients"]
        partial = progress.partial or Partial(sums={}, clients=[])
        known = {record["client"] for record in partial.clients}
        if known.isdisjoint(record["client"] for record in clients):
            sums = {kind: dict(part) for kind, part in partial.sums.items()}
            for kind, part in _load_sums(path).items():
                of_kind = sums.setdefault(kind, {})
                for name, tensor in part.items():
                    of_kind[name] = of_kind[name] + tensor if name in of_kind else tensor
            partial = Partial(
                sums=sums,
                clients=[*partial.clients, *clients],
                failures=_longest(partial.failures, record["failures"]),
            )
            progress = dataclasses.replace(progress, partial=partial)
    return progress


def _longest(known: Mapping[str, list[str]], others: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Of each client: every rank begins with what is known of all, and adds to its own clients' alone."""
    return {c: max(known.get(c, []), others.get(c, []), key=len) for c in known.keys() | others.keys()}


def drop_rank_parts(folder: Path) -> None:
    for path in folder.glob("*rank-*"):
        shutil.rmtree(path, ignore_errors=True)


def _replace(target: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a folder, and put it in the place of `target` once it is on disk."""
    folder, temporary = target.parent, target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        _fsync_tree(temporary)
        if target.exists():  # a mid-round checkpoint replaces the round's earlier one
            stale = target.with_name(f".{target.name}.old")
            shutil.rmtree(stale, ignore_errors=True)
            target.rename(stale)
        temporary.rename(target)
        _fsync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (number := os_error_number(error)) is not None:
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    shutil.rmtree(target.with_name(f".{target.name}.old"), ignore_errors=True)
    return target


def _save_sums(sums: Mapping[str, State], folder: Path) -> None:
    flat = {f"{kind}/{name}": tensor for kind, part in sums.items() for name, tensor in part.items()}
    save_file(_contiguous(flat), folder / SUMS)


def _load_sums(folder: Path) -> dict[str, State]:
    sums: dict[str, State] = {}
    for key, tensor in _load_tensors(folder / SUMS).items():
        kind, _, name = key.partition("/")
        sums.setdefault(kind, {})[name] = tensor
    return sums


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
            partial = Partial(sums=_load_sums(path), clients=record["clients"], failures=record["failures"])
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


def _age(path: Path) -> tuple[int, bool, bool]:
    """The middle of round 8 comes after round 7 and before the end of round 8; what was replaced, first."""
    name = path.name.strip(".").removesuffix(".old")
    number = int(name.removeprefix("round-").removesuffix("-part"))
    return number, not name.endswith("-part"), not path.name.startswith(".")


def _round_of_part(path: Path) -> int:
    """Of what a rank left, also under a temporary name: `.rank-0001-of-round-0008.tmp`."""
    return int(path.name.rpartition("-")[2].partition(".")[0])


def _prune(folder: Path, progress: Progress, keep_last: int) -> None:
    best = f"round-{progress.best['round']:04d}" if progress.best else None
    whole = [p for p in folder.glob("round-*") if p.name != best and not p.name.endswith("-part")]
    surplus = sorted(whole, key=_age)[:-keep_last]
    if progress.partial is None:
        surplus += folder.glob("round-*-part")
        # Of the next round other ranks may have something already.
        surplus += (p for p in folder.glob("*rank-*") if _round_of_part(p) <= progress.round)
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
