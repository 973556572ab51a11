"""Jobs executor: clients are launched processes, which read tasks from files and answer in files.

Updates are merged in the order of the tasks, whichever comes first: the result does not depend on it. They
wait on disk, so that one of them at a time is in memory.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from scalefl.config.saved import to_dict
from scalefl.contracts import ClientTask, InputError, Outcome, State
from scalefl.features import INDEX, FeatureFiles
from scalefl.federation import exchange
from scalefl.federation.client import ClientTrainer
from scalefl.federation.desk import Desk
from scalefl.federation.job import Job, Launcher
from scalefl.federation.resources import Resources, read_resources
from scalefl.federation.setup import Federation
from scalefl.registry import resolve

MODEL = "model"
"""Folder of what every client needs, and does not change: the model's config and its processor."""


class Jobs:
    splits = False

    def __init__(self, trainer: ClientTrainer, federation: Federation) -> None:
        """Raises InputError where this launch, or the resources asked for, do not go with jobs."""
        self._trainer, self._fed, self._run = trainer, federation, federation.run
        if federation.engine.num_processes > 1:
            raise InputError(
                f"--executor: got jobs in a launch of {federation.engine.num_processes} processes; expected "
                "one process, which launches the clients' own: start with scalefl train, and give "
                "processes: in --level_resources."
            )
        levels = federation.store.models.levels
        self._resources: dict[int, Resources] = read_resources(self._run.level_resources, levels)
        self._launcher: Launcher = resolve("job_launcher", self._run.job_launcher)(self._run, self._resources)
        self._folder = Path(self._run.save_path).absolute() / "jobs"
        self._names: Counter[int] = Counter()
        self._has_written_model = False

    def train(self, tasks: Sequence[ClientTask], global_state: State, lr: float) -> Iterator[Outcome]:
        """Every task's outcome, in the order of levels and clients."""
        ordered = sorted(tasks, key=lambda task: (task.level, task.client))
        if not ordered:
            return
        folder = self._folder / f"round-{ordered[0].round:04d}"
        try:
            desk = self._open(folder, ordered, global_state, lr)
            for ticket in desk.tickets:
                while (outcome := desk.outcome(ticket)) is None:
                    desk.look()
                    self._trainer.check_stop(self._trainer.engine)
                yield outcome
                del outcome  # else it stays in memory while others are waited for
        finally:
            self._launcher.close()

    def end_round(self) -> None:
        for folder in self._folder.glob("round-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def preview(self, tasks: Sequence[ClientTask]) -> list[str]:
        """What a round with these tasks would launch first."""
        folder = self._folder / f"round-{tasks[0].round:04d}"
        lines = []
        for level in sorted({task.level for task in tasks}):
            files = [
                exchange.task_path(folder, task.client, 1)
                for task in sorted(tasks, key=lambda t: t.client)
                if task.level == level
            ]
            size = self._run.clients_per_job or self._launcher.bundle(len(files))
            lines += self._launcher.preview(self.bundles(level, files, size, folder))
        return lines

    def _open(self, folder: Path, tasks: Sequence[ClientTask], state: State, lr: float) -> Desk:
        """Write what clients need; what a killed run left of this round stays where it still holds."""
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [*folder.glob(".*.tmp"), *folder.glob("*.failure.json")]:
            stale.unlink(missing_ok=True)
        if not self._has_written_model:
            self._write_model()
            self._has_written_model = True
        models = self._fed.store.models
        sent = {
            level: exchange.write_tensors(
                folder / f"level-{level}.safetensors", models.level_state(level, state)
            )
            for level in sorted({task.level for task in tasks})
        }
        content = {
            "run": to_dict(dataclasses.replace(self._run, resume=None, dry_run=False)),
            "model_file": to_dict(self._fed.model_file),
            "base": None if self._fed.base is None else self._fed.base.digest,
            "origin": dataclasses.asdict(self._fed.origin),
            "model": f"../{MODEL}",
            "lr": lr,
        }
        desk = Desk(
            folder,
            sent,
            content,
            run=self._run,
            launcher=self._launcher,
            resources=self._resources,
            shapes={level: part.trainable_shapes for level, part in models.slices.items()},
            bundles=self.bundles,
            on_failure=self._trainer.on_failure,
        )
        for task in tasks:
            desk.admit(task)
        return desk

    def _write_model(self) -> None:
        """Anew by every process: paths in it may be others than those of the one before."""
        folder = self._folder / MODEL
        temporary = folder.with_name(f".{MODEL}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self._fed.store.models.config.save_pretrained(temporary)
        self._fed.processor.save_pretrained(temporary)
        features = self._fed.batchers["train"].features
        # Names of images: for processes that read the run's own features, not for a folder that is carried.
        if isinstance(features, FeatureFiles) and self._run.job_launcher != "manual":
            features.write_index(temporary / INDEX)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    def bundles(self, level: int, tasks: Sequence[Path], size: int, folder: Path) -> list[Job]:
        """Jobs of a level, each with up to `size` of the task files."""
        jobs = []
        for start in range(0, len(tasks), size):
            self._names[level] += 1
            name = f"level-{level}.job-{self._names[level]:04d}"
            files = tuple(tasks[start : start + size])
            jobs.append(Job(name=name, level=level, tasks=files, log=folder / f"{name}.log"))
        return jobs
