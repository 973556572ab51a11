"""Options of `scalefl export`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scalefl.config.own import OwnOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions(OwnOptions):
    """Which model of a checkpoint to write, and how."""

    checkpoint: str | None = None
    """Folder of the checkpoint, such as SAVE_PATH/checkpoints/round-0005."""
    level: int | None = None
    """Level whose sub-model to write. Unset: the whole model."""
    part: Literal["whole", "language", "adapter"] = "whole"
    """The whole sub-model; its language model alone, for plain transformers; or its LoRA alone, for peft."""
    merge_lora: bool = False
    """Add the adapters to the weights, so that the model needs no peft."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision to write. Unset: that of the run."""
    init_from: str | None = None
    """Folder of the frozen base, where it is not where the run found it."""
    out: str | None = None
    """Folder to write, which must not exist yet."""

    def problems(self) -> Iterator[str]:
        for name in ("checkpoint", "out"):
            if getattr(self, name) is None:
                yield f"--{name}: nothing given; see `scalefl export --help`."
        if self.part == "adapter" and (self.merge_lora or self.level is not None):
            yield "--part adapter: is the whole model's LoRA as it is; leave --merge_lora and --level out."
