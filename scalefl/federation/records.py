"""What a run leaves in its folder: config, metrics.jsonl, results, checkpoints; only rank 0 writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class RunFolder:
    def __init__(self, path: str, *, writes: bool) -> None:
        self.path, self._writes = Path(path), writes
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.results = self.path / "results.json"

    def write_config(self, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, then move its files here: a run killed meanwhile keeps its config."""
        if not self._writes:
            return
        temporary = self.path / ".config.tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            for file in temporary.iterdir():
                os.replace(file, self.path / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def drop_rounds_of_jobs(self, *, before: int | None) -> None:
        """Remove what clients exchanged in rounds that are over, or in any if nobody goes on with it."""
        for path in self.path.glob("jobs/round-*") if self._writes else ():
            if before is None or int(path.name.removeprefix("round-")) < before:
                shutil.rmtree(path, ignore_errors=True)

    def append_metrics(self, record: Mapping[str, Any], *, at: int) -> int:
        """Write a line at byte `at`, dropping what a killed run left behind it; the length afterwards."""
        if not self._writes:
            return at
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.metrics, "ab") as file:
            file.truncate(min(at, file.seek(0, os.SEEK_END)))  # never beyond the end: it would add zero bytes
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def write_results(self, results: Mapping[str, Any]) -> None:
        if self._writes:
            self._replace(self.results, json.dumps(results, indent=1))

    def read_results(self) -> dict[str, Any] | None:
        return json.loads(self.results.read_text()) if self.results.is_file() else None

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text)
        os.replace(temporary, path)
