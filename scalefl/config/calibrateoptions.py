"""Options of `scalefl calibrate` alone, beside those that name the data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scalefl.config.own import OwnOptions


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(OwnOptions):
    """How sure an exit must be to answer: chosen on the validation split, told for the test split as well.
    Of a run's options those of the data count.
    """

    model: str | None = None
    """Model folder, such as `scalefl export` writes; the calibration is stored in it."""
    accuracy_drop: float | None = None
    """Most accuracy to give up, as a share of the deepest exit's. Unset: 0.02, but for --mean_cost."""
    mean_cost: float | None = None
    """Mean multiply-accumulates to keep to, as a share of the deepest exit's; the most accurate is taken."""
    measure: Literal["probability", "margin", "entropy"] = "probability"
    """Confidence: largest probability, its lead over the second, or 1 less the share of entropy."""
    batch: int = 16
    """Images at a time."""

    def problems(self) -> Iterator[str]:
        if self.model is None:
            yield "--model: nothing given; expected a model folder, such as `scalefl export` writes."
        if self.accuracy_drop is not None and self.mean_cost is not None:
            yield "--mean_cost: --accuracy_drop is given as well; expected one of them."
        if self.accuracy_drop is not None and not 0 <= self.accuracy_drop < 1:
            yield f"--accuracy_drop: got {self.accuracy_drop}; expected a share from 0 to below 1."
        if self.mean_cost is not None and not 0 < self.mean_cost <= 1:
            yield f"--mean_cost: got {self.mean_cost}; expected a share above 0 and at most 1."
        if self.batch < 1:
            yield f"--batch: got {self.batch}; expected a number at least 1."
