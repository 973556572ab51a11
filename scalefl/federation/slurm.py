"""Jobs as SLURM array tasks: one array for the jobs of a level that start together.

What `squeue` and `scontrol` print is taken with care: a line that is not understood says nothing, and a
controller that does not answer means that nothing is known, not that jobs have ended.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scalefl.config.options import RunConfig
from scalefl.contracts import InputError, Unfinished
from scalefl.federation.job import OF_A_LAUNCH, Job, NotNowError, client_command, shell
from scalefl.federation.resources import Resources

log = logging.getLogger("scalefl")

ANSWER_SECONDS = 60.0
"""What SLURM's commands get to answer."""

SECONDS_BETWEEN_LOOKS = 5.0

SECONDS_BETWEEN_TRIES = 30.0
"""From a submission that SLURM did not take for now to the next."""

PATIENCE_SECONDS = 1800.0
"""For which a run goes on while SLURM takes no submission."""

UNLISTED_SECONDS = 10.0
"""A job just submitted may not be listed yet, and files of one that is over may be seen late."""

PASSING = (
    *("contact", "connect", "timed out", "temporar", "try again", "not respond", "communication"),
    "maxsubmit",
)
"""In what sbatch says when the controller is busy or away, or too many jobs of a user are in the queue."""

ALIVE = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED"),
    *("RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "POWER_UP_NODE", "RESV_DEL_HOLD"),
)
"""States of a job that may go on."""

AT_WORK = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING")

NEVER = ("launch failed", "JobHoldMaxRequeue", "BadConstraints", "SPECIAL_EXIT")
"""In the state or reason of a job that SLURM keeps without ever starting it."""


@dataclass(kw_only=True)
class Sent:
    """An array task that was submitted."""

    task: str
    """As in 123_4."""
    seen: float
    """When it was submitted, or last listed."""
    queued: bool = True


class Slurm:
    def __init__(self, run: RunConfig, resources: Mapping[int, Resources]) -> None:
        """Cancels what a killed process of this run left. Raises InputError without SLURM's commands."""
        self._resources, self._max_jobs = resources, run.max_jobs
        self._name = "scalefl-" + _digest(os.path.abspath(run.save_path))
        self._running: dict[str, Sent] = {}
        self._looked = 0.0
        self._taken: set[int] = set()
        """Levels of which a job was submitted: what they ask for is in order."""
        self._refused_since: float | None = None
        self._try_again_at = 0.0
        if run.dry_run:
            return
        if _ask(["sbatch", "--version"]) is None:
            raise InputError(
                "--job_launcher: got slurm, but `sbatch --version` does not run here; expected a machine of "
                "the cluster that may submit, or --job_launcher local."
            )
        self._cancel_all()

    def room(self, level: int) -> int:
        if time.monotonic() < self._try_again_at:
            return 0
        return 1 << 30 if self._max_jobs is None else max(0, self._max_jobs - len(self._running))

    def bundle(self, clients: int) -> int:
        return 1

    def start(self, jobs: Sequence[Job]) -> None:
        """Raises InputError with sbatch's own words if it refuses, NotNowError if only for a time."""
        script = _script_path(jobs)
        script.write_text(self._script(jobs))
        try:
            done = _run(self._command(jobs))
            array, said = re.match(r"\d+", done.stdout.strip()), done.stderr or done.stdout
            refused = done.returncode != 0 or array is None
        except subprocess.TimeoutExpired:
            array, said, refused = None, f"no answer for {ANSWER_SECONDS:g} s, timed out", True
        if refused or array is None:
            self._refused(jobs[0].level, script, " ".join(said.split()))
            return
        self._refused_since = None
        self._taken.add(jobs[0].level)
        for number, job in enumerate(jobs):
            self._running[job.name] = Sent(task=f"{array[0]}_{number}", seen=time.monotonic())

    def ended(self, jobs: Iterable[Job]) -> dict[str, str]:
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return {}
        self._looked = now
        listed = listed_tasks(_ask(["squeue", "-h", "-r", *self._ours(), "-o", "%F_%K %T %r"]))
        if listed is None:
            return {}
        found = {}
        for job in jobs:
            if (sent := self._running.get(job.name)) is None:
                continue
            if (how := self._end_of(sent, listed.get(sent.task), now)) is not None:
                found[job.name] = how
                del self._running[job.name]
        return found

    def waits(self, job: Job) -> bool:
        return job.name in self._running and self._running[job.name].queued

    def cancel(self, job: Job) -> None:
        if job.name in self._running:
            _ask(["scancel", "--quiet", self._running.pop(job.name).task])

    def close(self) -> None:
        if self._running:
            self._cancel_all()
        self._running.clear()

    def preview(self, jobs: Sequence[Job]) -> list[str]:
        script = _script_path(jobs)
        return [shell(self._command(jobs)), f"where {script.name} is", *self._script(jobs).splitlines()]

    def _ours(self) -> list[str]:
        return [f"--user={os.getuid()}", f"--name={self._name}"]

    def _cancel_all(self) -> None:
        command = ["scancel", "--quiet", *self._ours()]
        if _ask(command) is None:
            log.warning("jobs may be left in SLURM's queue; `%s` ends them", shell(command))

    def _refused(self, level: int, script: Path, said: str) -> None:
        """Raise what it means that sbatch did not take a job."""
        now, said_low = time.monotonic(), said.lower()
        passes = any(word in said_low for word in PASSING) or ("limit" in said_low and self._running)
        if level not in self._taken and not passes:
            raise InputError(
                f"sbatch {script.name}: {said}; mend `sbatch` of level {level} in --level_resources."
            )
        self._refused_since = now if self._refused_since is None else self._refused_since
        if now - self._refused_since > PATIENCE_SECONDS:
            raise Unfinished(f"SLURM took no job for {PATIENCE_SECONDS:g} s; sbatch says: {said}")
        self._try_again_at = now + SECONDS_BETWEEN_TRIES
        raise NotNowError(f"sbatch {script.name}: {said}")

    def _end_of(self, sent: Sent, listed: str | None, now: float) -> str | None:
        """How a task ended, as far as that is known; `listed` is its state and reason in the queue."""
        if listed is not None:
            sent.seen, sent.queued = now, listed.split()[0] not in AT_WORK
            if not any(words in listed for words in NEVER):
                return None
            _ask(["scancel", "--quiet", sent.task])
            return f"SLURM keeps it: {listed}"
        state, text = how_it_ended(_ask(["scontrol", "-o", "show", "job", sent.task]))
        if state in ALIVE:
            return None
        failed = state not in (None, "COMPLETED")
        return text if failed or now - sent.seen > UNLISTED_SECONDS else None

    def _command(self, jobs: Sequence[Job]) -> list[str]:
        """Options on the command line win over variables such as SBATCH_PARTITION."""
        wanted, script = self._resources[jobs[0].level], _script_path(jobs)
        asks_for_gpus = any(re.match(r"--(gres|gpus)\b|-G", a) for a in wanted.sbatch)
        gpus = [f"--gres=gpu:{wanted.gpus}"] if wanted.gpus and not asks_for_gpus else []
        return [
            *("sbatch", "--parsable", "--requeue", "--open-mode=append"),
            f"--output={script.with_suffix('')}.%a.slurm.log",
            *gpus,
            *wanted.sbatch,
            *(f"--array=0-{len(jobs) - 1}", f"--job-name={self._name}", str(script)),
        ]

    def _script(self, jobs: Sequence[Job]) -> str:
        wanted = self._resources[jobs[0].level]
        lines = ["#!/bin/bash", f"cd {shell([os.getcwd()])} || exit"]
        if (count := wanted.processes) > 1:
            threads = f"$((SLURM_CPUS_ON_NODE > {count} ? SLURM_CPUS_ON_NODE / {count} : 1))"
            lines.append(f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"')
            if wanted.accelerate_config is None:
                lines.append('[ -n "$SLURM_GPUS_ON_NODE" ] || export ACCELERATE_USE_CPU=true')
        lines.append('case "$SLURM_ARRAY_TASK_ID" in')
        for number, job in enumerate(jobs):
            command = shell(client_command([str(task) for task in job.tasks], wanted, None))
            lines.append(f"{number}) exec {command} >>{shell([str(job.log)])} 2>&1 ;;")
        return "\n".join([*lines, "esac", ""])


def listed_tasks(squeue: str | None) -> dict[str, str] | None:
    """`123_4` of every array task that `squeue -o "%F_%K %T %r"` lists -> its state and the reason for it.

    None if it did not answer.
    """
    if squeue is None:
        return None
    lines = (line.split(maxsplit=1) for line in squeue.splitlines())
    return {parts[0]: parts[1] for parts in lines if len(parts) == 2 and re.fullmatch(r"\d+_\d+", parts[0])}


def how_it_ended(scontrol: str | None) -> tuple[str | None, str]:
    """A job's state, and how it ended in words, as far as `scontrol -o show job` says so."""
    text = scontrol or ""
    state = re.search(r"(?:^|\s)JobState=([A-Z_]+)", text)
    code = re.search(r"\sExitCode=(\d+):(\d+)", text)
    said = [f"SLURM says {state[1]}"] if state else []
    if code and code[2] != "0":
        said.append(f"signal {code[2]}")
    elif code:
        said.append(f"exit code {code[1]}")
    return (state[1] if state else None), ", ".join(said) or "gone from the queue"


def _script_path(jobs: Sequence[Job]) -> Path:
    return jobs[0].log.with_suffix(".sbatch")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _ask(command: Sequence[str]) -> str | None:
    """What a command prints, or None if it fails or does not answer."""
    try:
        done = _run(command)
    except subprocess.TimeoutExpired:
        log.debug("%s: no answer", shell(command))
        return None
    if done.returncode:
        log.debug("%s: %s", shell(command), done.stderr.strip())
    return done.stdout if done.returncode == 0 else None


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands, which a signal to all processes of the job must not break off."""
    return subprocess.run(
        ["/bin/sh", "-c", 'trap "" INT TERM USR1; exec "$0" "$@"', *command],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=ANSWER_SECONDS,
    )


def _environment() -> dict[str, str]:
    """Of jobs that are no part of this one, and of commands that print what is asked for, in one form."""
    foreign = ("ACCELERATE_", "TORCHELASTIC_", "SLURM_", "SQUEUE_", "SCANCEL_", "SRUN_")
    reach = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
    return {
        name: value
        for name, value in os.environ.items()
        if name in reach or not (name in (*OF_A_LAUNCH, "CUDA_VISIBLE_DEVICES") or name.startswith(foreign))
    }
