"""Records and Protocols that the packages exchange; the lowest tier, importing nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

State = dict[str, "Tensor"]
"""Parameter name -> tensor."""

SPLITS = ("train", "val", "test")


class InputError(ValueError):
    """Something a user can mend: one line saying where, what was got, what was expected, and the next step.

    The command line prints it without a traceback and exits with 2.
    """


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question about one image."""

    image_key: str
    """Unique within a data set: the file's path below the data root, or a synthetic image's name."""
    patient: str
    """Both knees of one person share it; a partition never splits it."""
    site: str | None = None
    """Hospital or scanner, where known."""
    question: str
    answer: str
    label: int | None = None
    """Index into the closed answer set; None where the answers are open."""


@dataclass(frozen=True, kw_only=True)
class DataSplits:
    """A data set: the examples of each split, and how to read an image."""

    name: str
    splits: Mapping[str, tuple[Example, ...]]
    """Keys are `SPLITS`; every example of a split, in a fixed order."""
    answers: tuple[str, ...] | None
    """The closed answer set, ordered by label (so that |label difference| is a distance); None if open."""
    read_image: Callable[[Example], Image]
    """Decode one image to 8 bits per channel, mode "L" or "RGB"."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One named axis of a model family's parameters."""

    size: int
    cut_by: str | None = None
    """The weakest `--width_axes` choice that cuts it ("inner" or "all"); None = always whole."""
    follows: str | None = None
    """An axis this one is tied to: its kept share of units is the other's, exactly."""
    seen_in: str = ""
    """A parameter that has this axis, for error messages."""


@dataclass(frozen=True, kw_only=True)
class LevelSpec:
    """What the clients of one capacity class keep of the global model."""

    level: int
    """Counted from 1 = weakest."""
    width_ratio: float
    depth: int
    """Number of exits kept; the last one kept is where the sub-model ends."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Axis name -> units kept (a prefix); axes not named here stay whole."""

    def is_whole(self, sizes: Mapping[str, int]) -> bool:
        """Whether the full width is kept."""
        return all(sizes[axis] == kept for axis, kept in self.kept.items())


@dataclass(frozen=True, kw_only=True)
class ClientTask:
    """What one client is asked to do in one round."""

    client: int
    level: int
    round: int
    example_ids: tuple[int, ...]
    """Indices into the training split."""


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """What one client returns."""

    client: int
    level: int
    delta: State
    """Trained minus sent, fp32 on the CPU, in the sub-model's own names and shapes."""
    num_examples: int
    metrics: Mapping[str, float]
    """`loss` (mean training loss per answer token), `steps`, `seconds`."""
    batches: str = ""
    """Digest of which examples it trained on, in their order and in their steps."""


@dataclass(frozen=True, kw_only=True)
class ClientFailure:
    """A client that is left out of a round: no attempt gave an update."""

    client: int
    level: int
    num_examples: int


Outcome = ClientUpdate | ClientFailure


class Interrupted(Exception):  # noqa: N818  # a request, not an error
    """A signal asked the run to stop; a resumable checkpoint has been written."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


class Unfinished(Exception):  # noqa: N818  # what happened, not whose fault
    """The run stops before its end, at a state on disk from which it can be resumed."""


class FirstGone(Unfinished):  # noqa: N818  # as above
    """Rank 0, which speaks for all, is gone."""


class Aggregator(Protocol):
    """A streaming merge of one round's updates into the global trainable state."""

    sums: dict[str, State]
    """All it has gathered so far, by kind: a checkpoint in mid-round saves and restores it, and those of
    several ranks are added up.
    """

    def add(self, update: ClientUpdate) -> None: ...

    def finish(self) -> State: ...


class Executor(Protocol):
    """Where and in which order the clients of a round train."""

    splits: bool
    """Whether every rank yields outcomes of its own; else all ranks yield the same ones, with deltas on
    rank 0 alone.
    """

    def train(self, tasks: Sequence[ClientTask], global_state: State, lr: float) -> Iterator[Outcome]:
        """Each task's outcome, one at a time, in an order that the tasks and the launch alone decide."""
        ...

    def end_round(self) -> None:
        """The round that was trained is in a checkpoint: what it needed may go."""
        ...
