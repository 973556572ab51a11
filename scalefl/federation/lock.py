"""One process trains in a folder at a time: a second one would take the first one's files away."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from scalefl.contracts import InputError

LOCK = ".lock"

PATIENCE_SECONDS = 120.0
"""What a file server takes at most to free the lock of a machine that was lost, from which SLURM requeued."""


@contextlib.contextmanager
def locked(folder: Path, *, takes: bool) -> Iterator[None]:
    """Within, no other process `takes` the folder; the system frees it when this one ends, however it ends.

    Raises InputError if another one has it.
    """
    if not takes:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    lock = FileLock(folder / LOCK, timeout=PATIENCE_SECONDS if is_requeued else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"--save_path {folder}: another process trains there; expected a folder of this run's own, or "
            "that process to end first."
        ) from error
    try:
        yield
    finally:
        lock.release()
