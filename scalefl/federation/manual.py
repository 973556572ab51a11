"""Jobs that people start: task files are carried to the clients' machines, and their answers back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from scalefl.config.options import RunConfig
from scalefl.federation.job import Job
from scalefl.federation.resources import Resources

log = logging.getLogger("scalefl")


class Manual:
    def __init__(self, run: RunConfig, resources: Mapping[int, Resources]) -> None:
        """Needs nothing of either."""

    def room(self, level: int) -> int:
        return 1 << 30

    def bundle(self, clients: int) -> int:
        return 1

    def start(self, jobs: Sequence[Job]) -> None:
        for line in self.preview(jobs):
            log.info("%s", line)

    def ended(self, jobs: Iterable[Job]) -> dict[str, str]:
        return {}

    def waits(self, job: Job) -> bool:
        return False

    def cancel(self, job: Job) -> None:
        """Whoever started it may end it."""

    def close(self) -> None:
        """Nothing runs here."""

    def preview(self, jobs: Sequence[Job]) -> list[str]:
        return [
            f"waiting for the answer to {task}; at the client, with level-{job.level}.safetensors beside it "
            f"and jobs/model/ beside its folder: scalefl client --task {task.name} --data-root DIR"
            for job in jobs
            for task in job.tasks
        ]
