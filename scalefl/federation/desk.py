"""A round of the jobs executor: tasks are given out, answered, and given out again where a client failed."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalefl.config.options import RunConfig
from scalefl.config.saved import FREE_ON_RESUME
from scalefl.contracts import ClientFailure, ClientTask, ClientUpdate, Outcome
from scalefl.federation import exchange
from scalefl.federation.attempts import Shapes, halved, lacks_memory, name_of, tell_failure, unusable
from scalefl.federation.client import distils
from scalefl.federation.exchange import BadFileError, ForeignFileError, Note
from scalefl.federation.job import JOB_ENDS, Job, Launcher, NotNowError
from scalefl.federation.resources import Resources

log = logging.getLogger("scalefl")

POLL_SECONDS = 0.05

START_SECONDS = 1800.0
"""What a job gets beside `--client_timeout`, to be started, read its data and build its model."""


@dataclass(kw_only=True)
class Ticket:
    """One client's way through a round."""

    task: ClientTask
    micro_batch_size: int | None
    attempt: int = 1
    file: Path | None = None
    name: str = ""
    """What an answer to the task must name."""
    update: Note | None = None


@dataclass(kw_only=True)
class Running:
    """A job and the tickets that it has not answered yet."""

    job: Job
    waiting: list[Ticket]
    since: float
    """When it was started or answered last."""


class Desk:
    """One round's tasks: given out, answered, given out again."""

    def __init__(
        self,
        folder: Path,
        sent: Mapping[int, Any],
        content: Mapping[str, Any],
        *,
        run: RunConfig,
        launcher: Launcher,
        resources: Mapping[int, Resources],
        shapes: Mapping[int, Shapes],
        bundles: Callable[[int, Sequence[Path], int, Path], list[Job]],
        on_failure: Callable[[ClientTask, str], None],
    ) -> None:
        """`sent` and `content` are what tasks say of a level's slice and of the run; `shapes`, by level, are
        those of an update.
        """
        self._folder, self._sent, self._content = folder, sent, content
        self._run, self._launcher, self._resources = run, launcher, resources
        self._shapes, self._bundles, self._on_failure = shapes, bundles, on_failure
        self.tickets: list[Ticket] = []
        self._ready: list[Ticket] = []
        self._running: list[Running] = []
        self._told: set[str] = set()
        self._files = _files_in(folder)

    def admit(self, task: ClientTask) -> None:
        """Write a client's task, unless it was answered already, in a run that was killed."""
        ticket = Ticket(task=task, micro_batch_size=self._run.micro_batch_size)
        self.tickets.append(ticket)
        if not self._goes_on(ticket):
            self._write_task(ticket)
        if not self._answered(ticket, counts=False):
            self._ready.append(ticket)

    def _goes_on(self, ticket: Ticket) -> bool:
        """Take up the last further attempt that a run before this one gave out, if there was one."""
        for attempt in range(self._run.client_retries + 1, 1, -1):
            path = exchange.task_path(self._folder, ticket.task.client, attempt)
            if path.name not in self._files:
                continue
            name = _name_of_task(self._content_of(ticket.task, attempt))
            try:
                note = exchange.read_note(path, "task", answers=name)
            except (BadFileError, OSError, KeyError):
                continue
            ticket.attempt, ticket.file, ticket.name = attempt, path, name
            ticket.micro_batch_size = note.content["micro_batch_size"]
            return True
        return False

    def look(self) -> None:
        """Give out what there is room for, and take in what has come."""
        self._give_out()
        # Asked first: what a job answered before its end is seen below.
        ended = self._launcher.ended([running.job for running in self._running])
        self._files = _files_in(self._folder)
        for running in list(self._running):
            if self._launcher.waits(running.job):
                running.since = time.monotonic()
            for ticket in list(running.waiting):
                if self._answered(ticket):
                    running.waiting.remove(ticket)
                    running.since = time.monotonic()
            self._settle(running, ended.get(running.job.name))
        time.sleep(POLL_SECONDS)

    def outcome(self, ticket: Ticket) -> Outcome | None:
        """A client's update, its failure after the last attempt, or None while neither is there."""
        task = ticket.task
        if ticket.update is not None:
            content = ticket.update.content
            try:
                delta = ticket.update.tensors()
            except BadFileError as error:  # it was whole when it came
                ticket.update = None
                self._failed(ticket, str(error))
                return None
            return ClientUpdate(
                client=task.client,
                level=task.level,
                delta=delta,
                num_examples=content["num_examples"],
                metrics=content["metrics"],
                batches=content["batches"],
            )
        if ticket.attempt <= self._run.client_retries + 1:
            return None
        return ClientFailure(client=task.client, level=task.level, num_examples=len(task.example_ids))

    def _give_out(self) -> None:
        for level in sorted({ticket.task.level for ticket in self._ready}):
            ready = [ticket for ticket in self._ready if ticket.task.level == level]
            room = self._launcher.room(level)
            size = self._run.clients_per_job or self._launcher.bundle(len(ready))
            given = ready[: room * size]
            if not given:
                continue
            by_file = {ticket.file: ticket for ticket in given}
            files = [file for file in by_file if file is not None]
            jobs = self._bundles(level, files, size, self._folder)
            try:
                self._launcher.start(jobs)
            except NotNowError as error:
                log.warning("%s; tried again later", error)
                return
            now = time.monotonic()
            for job in jobs:
                self._running.append(
                    Running(job=job, waiting=[by_file[file] for file in job.tasks], since=now)
                )
            self._ready = [ticket for ticket in self._ready if ticket not in given]

    def _settle(self, running: Running, ended: str | None) -> None:
        """What becomes of a job, and of what it has not answered."""
        if not running.waiting:
            if ended is not None or time.monotonic() - running.since > START_SECONDS:
                self._launcher.cancel(running.job)
                self._running.remove(running)
            return
        limit = self._run.client_timeout
        if ended is not None:
            cause = f"its job ended without an answer ({ended}){_last_words(running.job.log)}"
        elif limit is not None and time.monotonic() - running.since > limit + START_SECONDS:
            cause = f"no answer within --client_timeout {limit:g} and {START_SECONDS:g} s to start"
            self._launcher.cancel(running.job)
        else:
            return
        self._running.remove(running)
        first, *rest = running.waiting
        self._failed(first, cause)
        self._ready += rest

    def _answered(self, ticket: Ticket, *, counts: bool = True) -> bool:
        """Take in a client's answer, if there is one; one to an earlier form of the task is none.

        An answer that is no good is a failure, unless it does not count: then it goes, and is none.
        """
        assert ticket.file is not None
        try:
            note = self._note(ticket, "update") or self._note(ticket, "failure")
            if note is None:
                return False
            problem = self._problem(ticket, note)
        except (BadFileError, OSError, KeyError, TypeError) as error:
            if self._run.job_launcher == "manual":  # somebody may still be copying it
                self._not_taken(str(error))
                return False
            problem = str(error)
        if problem is None:
            ticket.update = note
            if self._run.job_launcher == "manual":
                left = sum(other.update is None for other in self.tickets)
                log.info("%s answered; %d to go", name_of(ticket.task), left)
        elif counts:
            self._failed(ticket, problem)
        else:
            exchange.answer_path(ticket.file, "update").unlink(missing_ok=True)
        return problem is None or counts

    def _note(self, ticket: Ticket, kind: str) -> Note | None:
        """A client's answer of this kind, if there is one to this very task."""
        assert ticket.file is not None
        path = exchange.answer_path(ticket.file, kind)
        try:
            return exchange.read_note(path, kind, answers=ticket.name) if path.name in self._files else None
        except ForeignFileError as error:
            self._not_taken(str(error))
            return None

    def _problem(self, ticket: Ticket, note: Note) -> str | None:
        """Why a client, or its update, failed; None for an update that can be merged."""
        content = note.content
        if content["kind"] == "failure":
            return str(content["cause"])
        metrics, examples = content["metrics"], content["num_examples"]
        are_numbers = isinstance(metrics, dict) and all(type(v) in (int, float) for v in metrics.values())
        if not (are_numbers and "loss" in metrics and isinstance(content["batches"], str)):
            return f"{note.path.name} tells no metrics or batches"
        if type(examples) is not int or examples < 1:
            return "it was trained on no examples"
        return unusable(note.tensors(), self._shapes[ticket.task.level])

    def _not_taken(self, why: str) -> None:
        """Say once of a file why it is not merged; the right one is waited for."""
        if self._run.job_launcher == "manual" and why not in self._told:
            self._told.add(why)
            log.warning("%s; not taken, waiting for the right one", why)

    def _failed(self, ticket: Ticket, cause: str) -> None:
        """Write down why, and give the task out again if it may be tried again."""
        task, attempts = ticket.task, self._run.client_retries + 1
        tell_failure(task, ticket.attempt, attempts, cause)
        self._on_failure(task, cause)
        ticket.attempt += 1
        if lacks_memory(cause):
            processes = self._resources[task.level].processes
            run = dataclasses.replace(self._run, micro_batch_size=ticket.micro_batch_size)
            ticket.micro_batch_size = halved(run, processes)
        if ticket.attempt <= attempts:
            self._write_task(ticket)
            self._ready.append(ticket)
            return
        for attempt in range(2, attempts + 1):  # a resume, which tries it anew, begins with the first
            exchange.task_path(self._folder, task.client, attempt).unlink(missing_ok=True)

    def _content_of(self, task: ClientTask, attempt: int) -> dict[str, Any]:
        """All that decides the answer."""
        return {
            **self._content,
            "client": task.client,
            "level": task.level,
            "round": task.round,
            "attempt": attempt,
            "example_ids": list(task.example_ids),
            "tensors": self._sent[task.level],
            "distils": distils(self._run, task.round),
        }

    def _write_task(self, ticket: Ticket) -> None:
        ticket.file = exchange.task_path(self._folder, ticket.task.client, ticket.attempt)
        content = self._content_of(ticket.task, ticket.attempt)
        ticket.name = _name_of_task(content)
        more = {"task": ticket.name, "micro_batch_size": ticket.micro_batch_size}
        exchange.write_note(ticket.file, "task", {**content, **more})


def _name_of_task(content: Mapping[str, Any]) -> str:
    """Of all that decides the answer: a run may go on under other options that are free, or elsewhere."""
    options = {name: value for name, value in content["run"].items() if name not in FREE_ON_RESUME}
    return exchange.digest_of({**content, "run": options, "origin": None})


def _files_in(folder: Path) -> frozenset[str]:
    """Names; asked for one by one, files that came meanwhile are seen a minute late on NFS.

    A folder that cannot be read for the moment counts as empty.
    """
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def _last_words(log: Path) -> str:
    """The last line that a job printed, for its failure's cause."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    own = [line for line in lines if line.startswith("scalefl: ")]
    said = (own or lines)[-1][:300] if lines else ""
    said = said.removeprefix("scalefl: ").removesuffix(f"; stopped; {JOB_ENDS}.")
    return f": {said}" if said else ""
