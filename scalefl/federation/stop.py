"""Ctrl-C, SIGTERM and SIGUSR1 become a request that the round loop meets at the next step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from scalefl.contracts import Interrupted
from scalefl.engine.launch import Alone, Engine

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Context manager: the first signal asks for a stop, a second Ctrl-C interrupts at once.

    SIGUSR1 leaves the time that the checkpoint takes, where what sends the others soon kills.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = number
        if number != signal.SIGUSR1:
            self._engine.watchdog.signalled(number)

    @property
    def received(self) -> int:
        """The signal that this process got, or 0."""
        return self._received or 0

    def check(self, engine: Engine | Alone | None = None) -> None:
        """Raise Interrupted on every rank if any rank got a signal.

        With the launch's engine all ranks must call it, and leave at the same step; with a rank's own each
        leaves at a step of its own.
        """
        if signum := (engine or self._engine).largest(self._received or 0):
            raise Interrupted(signum)
