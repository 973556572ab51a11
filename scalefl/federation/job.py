"""One job: a launched process, or group of processes, that trains clients of one level in turn."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scalefl.federation.resources import Resources

JOB_ENDS = "its job ends"
"""The next step of a client that stops: what started it sees to the rest."""

OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of the launch that this process may be part of, and a job is not."""


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str
    """Unique in a round."""
    level: int
    tasks: tuple[Path, ...]
    """Task files, in the order in which they are trained."""
    log: Path
    """What it prints."""


class NotNowError(Exception):
    """Jobs could not be started at present; `room` says when to try again."""


class Launcher(Protocol):
    """What starts jobs, and tells how they end."""

    def room(self, level: int) -> int:
        """How many further jobs of a level may start now."""
        ...

    def bundle(self, clients: int) -> int:
        """How many of a level's clients, of so many that are ready, a job had better train in turn."""
        ...

    def start(self, jobs: Sequence[Job]) -> None:
        """Start jobs of one level: all, or none, which NotNowError says."""
        ...

    def ended(self, jobs: Iterable[Job]) -> dict[str, str]:
        """Name -> how it ended, of the jobs that have ended; those that nothing is known of are not named."""
        ...

    def waits(self, job: Job) -> bool:
        """Whether a job that was started waits for its turn, so that its time does not run yet."""
        ...

    def cancel(self, job: Job) -> None:
        """End a job and all its processes."""
        ...

    def close(self) -> None:
        """End whatever still runs."""
        ...

    def preview(self, jobs: Sequence[Job]) -> list[str]:
        """What starting these jobs of one level would run, as lines for people."""
        ...


def client_command(tasks: Sequence[str], resources: Resources, port: int | None) -> list[str]:
    """The command line of a job; `port` is free on its machine, unset: the launcher looks for one."""
    client = ["-m", "scalefl", "client", "--task", *tasks]
    if resources.processes == 1 and resources.accelerate_config is None:
        return [sys.executable, *client]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if resources.accelerate_config is not None:
        launch += ["--config_file", resources.accelerate_config]
    else:
        launch += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_processes", str(resources.processes), "--main_process_port", str(port or 0)]
    return [*launch, *client]


def shell(command: Sequence[str]) -> str:
    return shlex.join(command)
