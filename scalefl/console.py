"""What people see: a progress bar on a terminal, plain lines elsewhere; only rank 0 speaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_WIDTH = 140
"""Columns where there is no terminal to ask, so that tables in a log are not folded."""


class Display:
    """Lines, tables and one progress bar per round, on standard output."""

    def __init__(self, *, speaks: bool, print_freq: int) -> None:
        self._console = Console(quiet=not speaks, highlight=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console.width = PLAIN_WIDTH
        self._speaks, self._print_freq = speaks, print_freq
        self._progress: Progress | None = None

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*("-" if cell is None else str(cell) for cell in row))
        self._console.print(table)

    def round_starts(self, round: int, num_rounds: int, num_clients: int) -> None:
        if self._speaks and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(f"round {round}/{num_rounds}", total=num_clients)

    def client_step(
        self, client: int, level: int, done_clients: int, step: int, steps: int, loss: float
    ) -> None:
        shown = "" if math.isnan(loss) else f" loss {loss:.3f}"
        text = f"client {client} (level {level}) step {step}/{steps}{shown}"
        if self._progress is not None:
            self._progress.update(self._task, completed=done_clients + step / steps, description=text)
        elif self._print_freq and step % self._print_freq == 0:
            self.line(f"  {text}")

    def stop(self) -> None:
        """Take the progress bar down; safe to call at any time."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
