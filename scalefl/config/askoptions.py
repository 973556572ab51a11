"""Options of commands that ask a model about images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scalefl.config.own import OwnOptions


@dataclass(frozen=True, kw_only=True)
class AskOptions(OwnOptions):
    """Which model is asked what, and when it may answer from an earlier exit."""

    model: str | None = None
    """Model folder, such as `scalefl export` writes."""
    question: str | None = None
    """Unset: the one that the model was trained on."""
    answers: tuple[str, ...] | None = None
    """Candidate answers, whose probabilities are told. Unset: those that the model was trained on."""
    open: bool = False
    """Let the model write its answer, rather than choose among candidates."""
    exit_threshold: float | None = None
    """Confidence, from 0 to 1, at which an image leaves at an earlier exit. Unset: as calibrated."""
    measure: Literal["probability", "margin", "entropy"] | None = None
    """Confidence: largest probability (unset), its lead over the second, or 1 less the share of entropy."""
    max_exit: int | None = None
    """Exit at which every image is answered at the latest."""
    max_new_tokens: int = 32
    """Tokens of an open answer, at most."""
    use_gpu: bool | None = None
    """Run on a GPU, or not. Unset: where there is one."""

    def problems(self) -> Iterator[str]:
        if self.model is None:
            yield "--model: nothing given; expected a model folder, such as `scalefl export` writes."
        yield from self.below_one("max_exit", "max_new_tokens")
        if self.exit_threshold is not None and not 0 <= self.exit_threshold <= 1:
            yield f"--exit_threshold: got {self.exit_threshold}; expected a number from 0 to 1."
        if self.measure is not None and self.exit_threshold is None:
            yield f"--measure: got {self.measure} without --exit_threshold; expected both."
        if self.answers is not None and len(set(self.answers)) < max(2, len(self.answers)):
            yield f"--answers: got {' '.join(self.answers) or 'nothing'}; expected two or more that differ."
        if self.open and self.answers is not None:
            yield "--answers: --open lets the model write its answer; leave one of them out."

    def below_one(self, *names: str) -> Iterator[str]:
        """Problems of options that count something."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name}: got {value}; expected a number at least 1."
