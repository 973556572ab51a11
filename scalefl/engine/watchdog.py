"""Ends a process that waits for what will not come: a client that hangs, a rank that is gone.

A thread, since the main one may hang in a collective. What is on disk by then can be resumed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

from scalefl.engine.board import Board

log = logging.getLogger("scalefl")

EXIT_UNFINISHED = 75
"""Exit code of a run that stopped before its end and can be resumed (EX_TEMPFAIL)."""

SECONDS_BETWEEN_LOOKS = 0.5

GRACE_SECONDS = 20.0
"""What the main thread gets to leave by itself, after a signal or when a rank gives up: launchers kill after
30.
"""


class Watchdog:
    """Watches one process, from a thread of its own, until `stop`."""

    def __init__(self, board: Board | None, rank: int, client_timeout: float | None, save_path: str) -> None:
        self._board = board.again() if board is not None else None
        self._rank, self._client_timeout, self._save_path = rank, client_timeout, save_path
        self._client: tuple[str, float] | None = None
        self._cause, self._signum = "", 0
        self._leave_at: float | None = None
        self._done = threading.Event()
        if board is not None or client_timeout is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._done.set()

    def signalled(self, signum: int) -> None:
        """A signal has come, and the main thread is to leave."""
        self._signum = signum
        self._prepare_to_leave(f"stopped by signal {signum}")

    @contextlib.contextmanager
    def client(self, name: str) -> Iterator[None]:
        """Within, a client trains, for `--client_timeout` at most."""
        self._client = (name, time.monotonic())
        try:
            yield
        finally:
            self._client = None

    def _prepare_to_leave(self, cause: str, grace: float = GRACE_SECONDS) -> None:
        if self._leave_at is None:
            self._cause, self._leave_at = cause, time.monotonic() + grace

    def _watch(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            self._look_at_client()
            if self._board is not None:
                self._look_at_board(self._board)
            if self._leave_at is not None and time.monotonic() >= self._leave_at:
                self._leave()

    def _look_at_client(self) -> None:
        client, limit = self._client, self._client_timeout
        if client is None or limit is None or time.monotonic() - client[1] <= limit:
            return
        cause = f"{client[0]} trains for longer than --client_timeout {limit:g} (seconds)"
        if self._board is not None:
            with contextlib.suppress(RuntimeError):
                self._board.give_up(cause)
        # The first rank says why, and ends the launch; it looks at the board as well.
        self._prepare_to_leave(cause, 0 if self._rank == 0 else GRACE_SECONDS)

    def _look_at_board(self, board: Board) -> None:
        try:
            if (cause := board.given_up()) is not None:
                self._prepare_to_leave(cause)
        except RuntimeError:  # the board goes with the first rank
            self._prepare_to_leave("rank 0 is gone")

    def _leave(self) -> None:
        """End the process past whatever its main thread hangs in."""
        if self._rank == 0:
            log.error("%s", unfinished(self._cause, self._save_path))
        sys.stdout.flush()
        os._exit(128 + self._signum if self._signum else EXIT_UNFINISHED)


def unfinished(cause: str, save_path: str) -> str:
    """What a run says that stops before its end."""
    return f"scalefl: {cause}; the run stops here; go on with `scalefl train --resume {save_path}`."
