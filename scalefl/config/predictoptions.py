"""Options of `scalefl predict`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from scalefl.config.askoptions import AskOptions


@dataclass(frozen=True, kw_only=True)
class PredictOptions(AskOptions):
    """Ask a model about images. Without a calibration beside the model, and without a threshold or a budget,
    its deepest exit answers.
    """

    positional: ClassVar[str] = "images"

    images: tuple[str, ...] = ()
    """Image files, folders of them, or patterns such as 'knees/*.png'."""
    batch_size: int = 8
    """Images at a time."""
    json: bool = False
    """Print a JSON list instead of a table."""
    csv: str | None = None
    """Write the answers to this file as well."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.images:
            yield "images: nothing given; expected files, folders or patterns behind the options."
        yield from self.below_one("batch_size")
