"""Options of `scalefl client` alone: all else is in its tasks."""

from collections.abc import Iterator
from dataclasses import dataclass

from scalefl.config.own import OwnOptions


@dataclass(frozen=True, kw_only=True)
class ClientOptions(OwnOptions):
    """Which tasks to train, and what this machine has of its own."""

    task: tuple[str, ...] = ()
    """Task files of one level and round, trained in this order."""
    out: str | None = None
    """Where to answer one task: a file .json, beside which the tensors go. Unset: beside the task."""
    data_root: str | None = None
    """Train on all training examples in this folder, the client's own. Unset: the run's, as the task says."""
    init_from: str | None = None
    """Folder of the frozen base on this machine. Unset: where the run has it."""
    save_path: str | None = None
    """Folder for what is made here of base and images. Unset: the run's if it is here, else the task's."""
    use_gpu: bool | None = None
    """Run on a GPU, or not. Unset: as the run says."""

    def problems(self) -> Iterator[str]:
        if not self.task:
            yield "--task: nothing given; expected the task files of a run with --executor jobs."
        if self.out is not None and (len(self.task) != 1 or not self.out.endswith(".json")):
            yield (
                f"--out: got {self.out} for {len(self.task)} task(s); expected a file .json, and one task."
            )
