"""One process trains in a folder at a time: a second one would take the first one's files away."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from scalefl.contracts import InputError

log = logging.getLogger("scalefl")

LOCK = ".lock"

PATIENCE_SECONDS = 120.0
"""What a file server takes at most to free the lock of a machine that was lost, from which SLURM requeued."""

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(folder: Path, *, takes: bool) -> Iterator[None]:
    """Within, no other process `takes` the folder; the system frees it when this one ends, however it ends.

    Raises InputError if another one has it. Nothing is left of the lock, nor of a folder made for it alone.
    """
    if not takes:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        with _taken(path):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # who waits for it sees that it is gone
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # there is something in it
                each.rmdir()


def _taken(path: Path) -> IO[str]:
    """The lock's file, which is this process's until it is closed."""
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    end = time.monotonic() + (PATIENCE_SECONDS if is_requeued else 0)
    while True:
        file = open(path, "a")  # noqa: SIM115  # open for as long as the run goes on
        is_free = _is_free(file)
        if is_free and _is_there(file, path):
            return file
        file.close()
        if not is_free and time.monotonic() >= end:
            raise InputError(
                f"--save_path {path.parent}: another process trains there; expected a folder of this run's "
                "own, or that process to end first."
            )
        time.sleep(0.2)


def _is_there(file: IO[str], path: Path) -> bool:
    """Whether it is still the lock: who had it may have removed it since it was opened."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_free(file: IO[str]) -> bool:
    """Whether the lock is this process's now; true where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        log.warning("%s: no locks there; see to it that one process at a time trains in it", file.name)
    return True
