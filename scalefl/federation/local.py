"""Jobs as processes of this machine, with as many at a time as it has GPUs or cores for."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from scalefl.config.options import RunConfig
from scalefl.contracts import InputError
from scalefl.engine.watchdog import PARENT, who_i_am
from scalefl.federation.job import OF_A_LAUNCH, Job, client_command, shell
from scalefl.federation.resources import Resources

TERM_SECONDS, TERM_SECONDS_OF_LAUNCHES = 5.0, 35.0
"""From SIGTERM to SIGKILL. Launchers give the workers that they started, in sessions of their own, 30."""

PORTS = range(20000, 32000)
"""Below those that Linux gives to connections (32768 and up)."""


class Local:
    def __init__(self, run: RunConfig, resources: Mapping[int, Resources]) -> None:
        """Raises InputError where a level asks for more GPUs than there are."""
        self._resources = resources
        self._gpus = visible_gpus() if run.use_gpu is not False else []
        self._on_cpu = not self._gpus
        problems = [text for level, wanted in resources.items() for text in self._problems(level, wanted)]
        if problems:
            raise InputError("\n".join(problems))
        most = max(resource.processes for resource in resources.values())
        by_cores = max(1, (os.cpu_count() or 1) // most)
        self._max_jobs = run.max_jobs or (by_cores if self._on_cpu else max(1, len(self._gpus)))
        self._threads = max(1, (os.cpu_count() or 1) // (self._max_jobs * most))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._devices: dict[str, list[str]] = {}
        self._ports: dict[str, socket.socket] = {}
        self._is_alone: dict[str, bool] = {}
        """Whether a job is one process, without a launcher."""

    def _problems(self, level: int, wanted: Resources) -> Iterator[str]:
        if wanted.gpus > len(self._gpus):
            yield (
                f"--level_resources: level {level} asks for {wanted.gpus} GPU(s), this machine shows "
                f"{len(self._gpus)}; ask for fewer, or use --job_launcher slurm."
            )
        elif self._gpus and wanted.processes > max(1, wanted.gpus):
            yield (
                f"--level_resources: level {level} asks for {wanted.processes} processes on "
                f"{wanted.gpus} GPU(s); expected a GPU for each: gpus: {wanted.processes}."
            )

    def room(self, level: int) -> int:
        jobs, gpus = self._max_jobs - len(self._running), self._gpus_of(level)
        return max(0, jobs if gpus == 0 else min(jobs, len(self._gpus) // gpus))

    def bundle(self, clients: int) -> int:
        """A start takes seconds: as few jobs as are at work at once."""
        return -(-clients // self._max_jobs)

    def start(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            count = self._gpus_of(job.level)
            self._devices[job.name], self._gpus = self._gpus[:count], self._gpus[count:]
            self._ports[job.name], port = held_port()
            wanted = self._resources[job.level]
            self._is_alone[job.name] = wanted.processes == 1 and wanted.accelerate_config is None
            with open(job.log, "wb") as log:
                self._running[job.name] = subprocess.Popen(
                    self._command(job, port),
                    env=self._environment(job),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def ended(self, jobs: Iterable[Job]) -> dict[str, str]:
        found = {}
        for job in jobs:
            code = self._running[job.name].poll() if job.name in self._running else None
            if code is not None:
                found[job.name] = in_words(code)
                self._forget(job.name)
        return found

    def waits(self, job: Job) -> bool:
        return False

    def cancel(self, job: Job) -> None:
        if job.name in self._running:
            self._end([job.name])

    def close(self) -> None:
        self._end(list(self._running))

    def preview(self, jobs: Sequence[Job]) -> list[str]:
        return [shell(self._command(job, None)) for job in jobs]

    def _command(self, job: Job, port: int | None) -> list[str]:
        return client_command([str(task) for task in job.tasks], self._resources[job.level], port)

    def _gpus_of(self, level: int) -> int:
        """A job on a machine with GPUs sees one at least."""
        wanted = self._resources[level].gpus
        return wanted if self._on_cpu else max(1, wanted)

    def _environment(self, job: Job) -> dict[str, str]:
        """Of this process, less the launch it is part of."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in OF_A_LAUNCH and not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
        }
        kept.setdefault("OMP_NUM_THREADS", str(self._threads))
        kept[PARENT] = who_i_am()
        if not self._on_cpu:
            kept["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices[job.name])
        elif self._resources[job.level].processes > 1:
            config = self._resources[job.level].accelerate_config
            if config is None:  # without it accelerate starts single processes; with it DeepSpeed is dropped
                kept["ACCELERATE_USE_CPU"] = "true"
        return kept

    def _end(self, names: Sequence[str]) -> None:
        """A job leads a session of its own: its process group is its processes, but for launchers' workers,
        which launchers end when they are asked to end.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            for name in names:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._running[name].pid, number)
            alone = all(self._is_alone[name] for name in names)
            end = time.monotonic() + (TERM_SECONDS if alone else TERM_SECONDS_OF_LAUNCHES)
            while any(self._running[n].poll() is None for n in names) and time.monotonic() < end:
                time.sleep(0.02)
        for name in names:
            self._running[name].wait()
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._ports.pop(name).close()
        del self._running[name], self._is_alone[name]
        self._gpus += self._devices.pop(name)


def held_port() -> tuple[socket.socket, int]:
    """A free TCP port that no other run of this machine gets, as long as the socket is open.

    It holds the UDP port of that number, for the TCP port is the job's to open; and it is none of those that
    the system gives away by itself.
    """
    first = os.getpid() % len(PORTS)  # not where another run has just found its own
    for port in [*PORTS[first:], *PORTS[:first]]:
        held = socket.socket(type=socket.SOCK_DGRAM)
        try:
            held.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("", port))
            return held, port
        except OSError:
            held.close()
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()] if torch.cuda.is_available() else []
    return [str(number) for number in range(torch.cuda.device_count())]


def in_words(code: int) -> str:
    """How a process ended."""
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"exit code {code}"
