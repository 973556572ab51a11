"""Jobs as SLURM array tasks: one array for the jobs of a level that start together.

What `squeue` and `scontrol` print is taken with care: a line that is not understood says nothing, and a
controller that does not answer means that nothing is known, not that jobs have ended.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from scalefl.config.options import RunConfig
from scalefl.contracts import InputError
from scalefl.federation.job import Job, client_command, shell
from scalefl.federation.local import OF_A_LAUNCH
from scalefl.federation.resources import Resources

log = logging.getLogger("scalefl")

SUBMITTED = "submitted.json"
"""In a round's folder: the arrays that were submitted for it."""

ANSWER_SECONDS = 60.0
"""What SLURM's commands get to answer."""

SECONDS_BETWEEN_LOOKS = 2.0

GONE_AFTER_SECONDS = 10.0
"""A job just submitted may not be listed yet."""


class Slurm:
    def __init__(self, run: RunConfig, resources: Mapping[int, Resources]) -> None:
        """Raises InputError where SLURM's commands are not to be found."""
        self._resources, self._max_jobs = resources, run.max_jobs
        self._running: dict[str, tuple[str, float]] = {}  # job's name -> array task, time of submission
        self._looked = 0.0
        if not run.dry_run and _ask(["sbatch", "--version"]) is None:
            raise InputError(
                "--job_launcher: got slurm, but `sbatch --version` does not run here; expected a machine of "
                "the cluster that may submit, or --job_launcher local."
            )

    def room(self, level: int) -> int:
        return 1 << 30 if self._max_jobs is None else max(0, self._max_jobs - len(self._running))

    def bundle(self, clients: int) -> int:
        return 1

    def start(self, jobs: Sequence[Job]) -> None:
        """Raises InputError with sbatch's own words if it refuses."""
        folder = jobs[0].log.parent
        script = folder / f"{jobs[0].name}.sbatch"
        script.write_text(self._script(jobs))
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        found = re.match(r"\d+", done.stdout.strip())
        if done.returncode or found is None:
            said = " ".join((done.stderr or done.stdout).split())
            raise InputError(
                f"sbatch {script.name}: {said}; mend `sbatch` of level {jobs[0].level} in --level_resources."
            )
        array = found[0]
        remember(folder, array)
        for number, job in enumerate(jobs):
            self._running[job.name] = (f"{array}_{number}", time.monotonic())

    def ended(self, jobs: Iterable[Job]) -> dict[str, str]:
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return {}
        self._looked = now
        listed = listed_tasks(_ask(["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%F_%K %T"]))
        if listed is None:
            return {}
        found = {}
        for job in jobs:
            task, submitted = self._running.get(job.name, ("", now))
            if task not in listed and now - submitted > GONE_AFTER_SECONDS:
                found[job.name] = how_it_ended(_ask(["scontrol", "-o", "show", "job", task]))
                del self._running[job.name]
        return found

    def cancel(self, job: Job) -> None:
        if job.name in self._running:
            _ask(["scancel", self._running.pop(job.name)[0]])

    def close(self) -> None:
        if self._running:
            _ask(["scancel", *(task for task, _ in self._running.values())])
        self._running.clear()

    def preview(self, jobs: Sequence[Job]) -> list[str]:
        return [f"sbatch {jobs[0].name}.sbatch, which is", *self._script(jobs).splitlines()]

    def _script(self, jobs: Sequence[Job]) -> str:
        wanted = self._resources[jobs[0].level]
        named = " ".join(wanted.sbatch)
        gpus = f"--gres=gpu:{wanted.gpus}" if wanted.gpus and "--g" not in named else None
        log = str(jobs[0].log.parent / f"{jobs[0].name}.%a.log")
        directives = [
            f"--job-name=scalefl-level-{jobs[0].level}",
            f"--array=0-{len(jobs) - 1}",
            f"--output={log}",
            "--requeue",
            *([gpus] if gpus is not None else []),
            *wanted.sbatch,
        ]
        lines = ["#!/bin/bash", *(f"#SBATCH {each}" for each in directives)]
        lines += [f"cd {shell([os.getcwd()])}", 'case "$SLURM_ARRAY_TASK_ID" in']
        for number, job in enumerate(jobs):
            command = shell(client_command([str(task) for task in job.tasks], wanted, None))
            lines.append(f"{number}) exec {command} ;;")
        return "\n".join([*lines, "esac", ""])


def remember(folder: Path, array: str) -> None:
    """A run that is killed leaves its arrays behind; the next one cancels them."""
    path = folder / SUBMITTED
    known = json.loads(path.read_text()) if path.is_file() else []
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps([*known, array]))
    os.replace(temporary, path)


def cancel_left_behind(folder: Path) -> None:
    """Cancel what a killed run submitted for the round of this folder."""
    with contextlib.suppress(OSError, ValueError):
        arrays = json.loads((folder / SUBMITTED).read_text())
        if arrays:
            _ask(["scancel", *arrays])


def listed_tasks(squeue: str | None) -> set[str] | None:
    """`123_4` of every array task that `squeue -o "%F_%K %T"` lists; None if it did not answer."""
    if squeue is None:
        return None
    lines = (line.split() for line in squeue.splitlines())
    return {parts[0] for parts in lines if len(parts) == 2 and re.fullmatch(r"\d+_\d+", parts[0])}


def how_it_ended(scontrol: str | None) -> str:
    """From `scontrol -o show job`, as far as it says so."""
    text = scontrol or ""
    state = re.search(r"\bJobState=(\w+)", text)
    code = re.search(r"\bExitCode=(\d+:\d+)", text)
    said = [f"SLURM says {state[1]}" if state else "", f"exit code {code[1]}" if code else ""]
    return ", ".join(part for part in said if part) or "gone from the queue"


def _ask(command: Sequence[str]) -> str | None:
    """What a command prints, or None if it fails or does not answer."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("%s: %s", shell(command), error)
        return None
    return done.stdout if done.returncode == 0 else None


def _environment() -> dict[str, str]:
    """Of a job that is no part of this one."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in OF_A_LAUNCH
        and not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
        and (not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF")
    }
