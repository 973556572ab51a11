"""Options of `scalefl reorder` alone, beside those that name the data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scalefl.config.own import OwnOptions


@dataclass(frozen=True, kw_only=True)
class ReorderOptions(OwnOptions):
    """Which model to permute, so that its prefixes hold what matters most, and on which examples that is
    measured. Of a run's options those of the data count, and arch, batch_size, precision, use_gpu and seed.
    """

    model: str | None = None
    """Model folder, such as `scalefl convert` or `scalefl export` writes."""
    split: Literal["train", "val", "test"] = "train"
    """Split that examples are drawn from, by the seed."""
    examples: int = 64
    """Examples to measure on."""
    out: str | None = None
    """Folder to write, which must not exist yet."""

    def problems(self) -> Iterator[str]:
        for name in ("model", "out"):
            if getattr(self, name) is None:
                yield f"--{name}: nothing given; see `scalefl reorder --help`."
        if self.examples < 1:
            yield f"--examples: got {self.examples}; expected a number at least 1."
