"""Ends a process that waits for what will not come: a client that hangs, a rank that is gone.

A thread, since the main one may hang in a collective. What is on disk by then can be resumed.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from scalefl import STARTED_BY
from scalefl.contracts import FirstGone, Unfinished
from scalefl.engine.board import Board

log = logging.getLogger("scalefl")

EXIT_UNFINISHED = 75
"""Exit code of a run that stopped before its end and can be resumed (EX_TEMPFAIL)."""

SECONDS_BETWEEN_LOOKS = 0.5

GRACE_SECONDS = 20.0
"""What the main thread gets to leave by itself, after a signal or when a rank gives up: launchers kill after
30.
"""


FAREWELL_SECONDS = 2.0
"""In which other ranks read on the board, which goes with rank 0, why it ends."""

SILENCE_SECONDS = 120.0
"""After which rank 0 takes another rank for lost, with its machine or the way to it. Launchers see what ends
on their own machine at once.
"""

MEETING_SECONDS = 600.0
"""In which the processes of a launch find each other: without their launcher they never do."""

PARENT = "SCALEFL_STARTED_BY"
"""Variable that names the process without which this one has nothing to do."""


class Watchdog:
    """Watches one process, from threads of its own, until `stop`."""

    has_spoken: ClassVar[bool] = False
    """Whether this process, its main thread or a watchdog, has said why it stops: once is enough."""
    others_speak: ClassVar[bool] = False
    """Whether it has heard a rank give up, of which rank 0 speaks."""

    def __init__(self, client_timeout: float | None, next_step: str) -> None:
        """Begins with who started this process; `next_step` is what to do once it has been ended."""
        Watchdog.has_spoken = Watchdog.others_speak = False
        self._rank = int(os.environ.get("RANK", "0"))
        self._speaks = self._rank == 0
        self._client_timeout, self._next_step = client_timeout, next_step
        self._board: Board | None = None
        self._client: tuple[str, float] | None = None
        self._cause, self._given_up, self._signum = "", "", 0
        self._leave_at: float | None = None
        self._heard: dict[int, tuple[int, int]] = {}
        """By rank: how often it said that it lives, and how many looks ago it last said so."""
        self._looks_without_answer, self._since = 0, time.monotonic()
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []
        self._started_by, self._launcher = os.environ.get(PARENT), STARTED_BY
        self._is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self._is_launched or client_timeout is not None or self._started_by is not None:
            self._start(self._watch)

    def listen(self, board: Board) -> None:
        """From now on to the other ranks as well."""
        self._board, self._is_launched = board.again(), True
        if not self._threads:
            self._start(self._watch)
        self._start(self._ask_board)

    def stop(self) -> None:
        """Look no more; what is being looked at is seen to its end."""
        self._done.set()
        atexit.unregister(self.stop)
        for thread in self._threads:
            thread.join(GRACE_SECONDS)  # a board that is frozen never answers

    def _start(self, work: Callable[[], None]) -> None:
        if not self._threads:
            atexit.register(self.stop)  # a thread that asks the board while Python ends aborts the process
        self._threads.append(threading.Thread(target=work, name="watchdog", daemon=True))
        self._threads[-1].start()

    def signalled(self, signum: int) -> None:
        """A signal has come, and the main thread is to leave."""
        self._signum = signum
        if self._is_launched or self._started_by is not None:  # who sent it soon kills
            self._prepare_to_leave(f"stopped by signal {signum}")

    @contextlib.contextmanager
    def client(self, name: str) -> Iterator[None]:
        """Within, a client trains, for `--client_timeout` at most."""
        self._client = (name, time.monotonic())
        try:
            yield
        finally:
            self._client = None

    def _prepare_to_leave(self, cause: str, grace: float | None = None) -> None:
        if self._leave_at is None:
            self._cause = cause
            self._leave_at = time.monotonic() + (GRACE_SECONDS if grace is None else grace)

    def _watch(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            self._look_at_client()
            self._look_at_parents()
            if self._board is not None:
                self._look_at_rank_0()
            if self._leave_at is not None and time.monotonic() >= self._leave_at:
                self._leave()

    def _ask_board(self) -> None:
        """In a thread of its own, which waits for ever where the board does not answer."""
        while self._board is not None and not self._done.wait(SECONDS_BETWEEN_LOOKS):
            self._look_at_board(self._board)
            self._look_at_ranks(self._board)
            self._looks_without_answer = 0

    def _look_at_client(self) -> None:
        client, limit = self._client, self._client_timeout
        if client is None or limit is None or time.monotonic() - client[1] <= limit:
            return
        cause = f"{client[0]} trains for longer than --client_timeout {limit:g} (seconds)"
        if self._board is None:
            self._prepare_to_leave(cause, 0)
        else:  # the first rank says why, and ends the launch: it hears of it from the board
            self._prepare_to_leave(cause, FAREWELL_SECONDS if self._rank == 0 else GRACE_SECONDS)

    def _look_at_parents(self) -> None:
        """Without who started it a process would train on for nobody."""
        if self._is_launched and os.getppid() != self._launcher:
            self._prepare_to_leave("the launcher is gone", 0)
        if self._is_launched and self._board is None and time.monotonic() - self._since > MEETING_SECONDS:
            self._prepare_to_leave(f"the launch's processes did not meet within {MEETING_SECONDS:.0f} s", 0)
        if self._started_by is not None and not _lives(self._started_by):
            self._prepare_to_leave("the process that started this one is gone", 0)

    def _look_at_rank_0(self) -> None:
        """Its machine may be lost, or the process frozen, which closes no connection."""
        self._looks_without_answer += 1
        if self._looks_without_answer * SECONDS_BETWEEN_LOOKS > SILENCE_SECONDS:
            self._speaks = stands_in()
            self._prepare_to_leave(f"rank 0 has not been heard of for {SILENCE_SECONDS:.0f} s", 0)

    def _look_at_board(self, board: Board) -> None:
        try:
            if self._cause and not self._signum:
                board.give_up(self._cause)
            if (cause := board.given_up()) is not None:
                self._given_up, Watchdog.others_speak = cause, self._rank != 0
                self._prepare_to_leave(cause)
        except FirstGone as gone:
            self._speaks = stands_in() and not self._given_up
            self._prepare_to_leave(str(gone))

    def _look_at_ranks(self, board: Board) -> None:
        """Every rank says that it lives; rank 0 listens.

        It counts its own looks, not seconds: a launch that was suspended has not been silent.
        """
        with contextlib.suppress(Unfinished):  # rank 0 is gone, which was seen already
            board.beat()
            if self._rank == 0:
                for rank, beats in board.beats().items():
                    self._listen(board, rank, beats)

    def _listen(self, board: Board, rank: int, beats: int) -> None:
        before, looks = self._heard.get(rank, (None, 0))
        self._heard[rank] = (beats, looks + 1 if beats == before else 0)
        if self._heard[rank][1] * SECONDS_BETWEEN_LOOKS > SILENCE_SECONDS:
            board.give_up(f"rank {rank} has not been heard of for {SILENCE_SECONDS:.0f} s")

    def _leave(self) -> None:
        """End the process past whatever its main thread hangs in; a signal may come from its own end."""
        if self._speaks and not Watchdog.has_spoken:
            log.error("%s", unfinished(self._given_up or self._cause, self._next_step))
        sys.stdout.flush()
        os._exit(128 + self._signum if self._signum and not self._given_up else EXIT_UNFINISHED)


def who_i_am() -> str:
    """This process, by its number and the time it started at: numbers are given again."""
    return f"{os.getpid()}:{_start_time(os.getpid())}"


def _lives(process: str) -> bool:
    number, _, started = process.partition(":")
    return _start_time(int(number)) == started


def _start_time(number: int) -> str:
    """In clock ticks; empty if there is no such process, or where the system does not tell."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def speaks_of(stop: Unfinished) -> bool:
    """Whether this rank is to say why the run stops, now."""
    stands_in_here = isinstance(stop, FirstGone) and stands_in() and not Watchdog.others_speak
    speaks = (os.environ.get("RANK", "0") == "0" or stands_in_here) and not Watchdog.has_spoken
    Watchdog.has_spoken = Watchdog.has_spoken or speaks
    return speaks


def stands_in() -> bool:
    """Whether this rank speaks where rank 0 cannot: its neighbour, which may be lost with it, or the first of
    another machine.
    """
    return os.environ.get("RANK") == "1" or os.environ.get("LOCAL_RANK") == "0"


def to_resume(save_path: str) -> str:
    return f"go on with `scalefl train --resume {save_path}`"


def unfinished(cause: str, next_step: str) -> str:
    """What a process says that stops before its end."""
    return f"scalefl: {cause}; stopped; {next_step}."
