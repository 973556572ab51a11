"""What the ranks of a launch tell each other outside of collectives, which a rank that failed never reaches.

A key-value store on rank 0: requests to stop, the news that a rank cannot go on, and votes on what happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from scalefl.contracts import FirstGone, Unfinished

POLL_SECONDS = 0.02
STORE_TIMEOUT = timedelta(seconds=60)


class Board:
    """One rank's access to the board."""

    def __init__(self, rank: int, num_ranks: int, port: int = 0) -> None:
        """Rank 0 opens it, at a free port; the others then name that one."""
        self._rank, self.num_ranks = rank, num_ranks
        self._store = _connect(port, opens=rank == 0 and port == 0)
        self._meetings = self._beats = 0

    @property
    def port(self) -> int:
        return int(self._store.port)

    def again(self) -> Board:
        """Another connection, for another thread."""
        return Board(self._rank, self.num_ranks, self.port)

    def ask_to_stop(self, signum: int) -> None:
        self._write("stop", signum)

    def stop_asked(self) -> int:
        """The signal that some rank got, or 0."""
        return int(self._read("stop") or 0)

    def give_up(self, cause: str) -> None:
        """Say that this rank cannot go on, and why; the first cause stays."""
        if self.given_up() is None:
            self._write("given up", f"rank {self._rank}: {cause}")

    def given_up(self) -> str | None:
        """Why some rank cannot go on."""
        return self._read("given up")

    def beat(self) -> None:
        """Say that this rank lives."""
        self._beats += 1
        self._write(f"beat {self._rank}", self._beats)

    def beats(self) -> dict[int, int]:
        """How often each rank said that it lives; of those that did, and have not left."""
        ranks = range(self.num_ranks)
        found = {rank: self._read(f"beat {rank}") for rank in ranks if not self._has([f"leaves {rank}"])}
        return {rank: count for rank, count in found.items() if count is not None}

    def meet(self, word: Any, poll: Callable[[], None], patience: float | None = None) -> list[Any]:
        """Every rank's word (JSON), in rank order, once all have said theirs; all ranks meet equally often.

        `poll` is called while waiting. Raises Unfinished when a rank has given up, or after `patience`
        seconds.
        """
        self._meetings += 1
        self._write(f"meeting {self._meetings}/{self._rank}", word)
        keys = [f"meeting {self._meetings}/{rank}" for rank in range(self.num_ranks)]
        started = time.monotonic()
        while not self._has(keys):
            poll()
            if (cause := self.given_up()) is not None:
                raise Unfinished(cause)
            if patience is not None and time.monotonic() - started > patience:
                missing = [r for r, key in enumerate(keys) if not self._has([key])]
                raise Unfinished(f"rank(s) {missing} did not answer within {patience:.0f} s")
            time.sleep(POLL_SECONDS)
        if (cause := self.given_up()) is not None:  # having said its word
            raise Unfinished(cause)
        words = [self._read(key) for key in keys]
        if self._meetings > 1:  # everybody is at this meeting, so has read the one before
            self._asked(lambda: self._store.delete_key(f"meeting {self._meetings - 1}/{self._rank}"))
        return words

    def leave(self) -> None:
        """Say that this rank may end, and wait until every rank says so, or one cannot go on."""
        keys = [f"leaves {rank}" for rank in range(self.num_ranks)]
        with contextlib.suppress(Unfinished):  # the board is gone with rank 0, which had seen all
            self._write(f"leaves {self._rank}", True)
            while not self._has(keys) and self.given_up() is None:
                time.sleep(POLL_SECONDS)

    def _write(self, key: str, value: Any) -> None:
        self._asked(lambda: self._store.set(key, json.dumps(value)))

    def _read(self, key: str) -> Any:
        return json.loads(self._asked(lambda: self._store.get(key))) if self._has([key]) else None

    def _has(self, keys: list[str]) -> bool:
        return bool(self._asked(lambda: self._store.check(keys)))

    def _asked(self, question: Callable[[], Any]) -> Any:
        """An answer of the store. Raises Unfinished where there is none: it went with rank 0."""
        try:
            return question()
        except RuntimeError as error:
            raise FirstGone("rank 0 is gone") from error


def _connect(port: int, *, opens: bool) -> Any:
    return torch.distributed.TCPStore(
        host_name=os.environ["MASTER_ADDR"],
        port=port,
        is_master=opens,
        wait_for_workers=False,
        timeout=STORE_TIMEOUT,
    )
