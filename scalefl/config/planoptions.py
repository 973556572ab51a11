"""Options of `scalefl plan` alone, beside those of a run: name, type, default and meaning."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scalefl.config.own import OwnOptions

COUNTS = ("world_size", "seq_length", "answer_length", "client_examples")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(OwnOptions):
    """What to predict memory for, and for whom. A plan reads no data and no weights."""

    client_budgets: str | None = None
    """YAML or JSON list of {client, memory, flops, bandwidth}: pick each client's level."""
    out: str | None = None
    """Write the assignment to this YAML file, which `scalefl train --config` takes."""
    search: bool = False
    """Search widths and depths for each client's largest sub-model, instead of the run's own levels."""
    zero_stage: int = 0
    """DeepSpeed's ZeRO: share optimizer state (1), gradients (2) and weights (3) among processes."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What ZeRO keeps in host memory; all: weights too, under ZeRO-3."""
    world_size: int = 1
    """Processes that train one client together."""
    seq_length: int | None = None
    """Positions of a row. Unset: image, prompt and answer."""
    answer_length: int | None = None
    """Answer tokens of a row, end symbol included. Unset: those of the longest of --answers."""
    client_examples: int = 100
    """Examples of a client, for seconds per round."""
    device: Literal["cpu", "cuda"] | None = None
    """Where clients train. Unset: what this machine has."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def problems(self) -> Iterator[str]:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name}: got {value}; expected a number at least 1."
        if not 0 <= self.zero_stage <= 3:
            yield f"--zero_stage: got {self.zero_stage}; expected 0 (none), 1, 2 or 3."
        elif self.offload == "all" and self.zero_stage != 3:
            yield f"--offload: all moves weights, under --zero_stage {self.zero_stage}; expected 3."
        elif self.offload == "optimizer" and self.zero_stage == 0:
            yield "--offload: optimizer is ZeRO's; expected --zero_stage 1, 2 or 3 with it."
        for name in ("out", "search"):
            if getattr(self, name) and self.client_budgets is None:
                yield f"--{name}: needs budgets to assign levels by; give --client_budgets FILE."
        if self.answer_length and self.seq_length and self.answer_length >= self.seq_length:
            yield (
                f"--answer_length: got {self.answer_length} of --seq_length {self.seq_length}; "
                "expected fewer: a row holds the prompt as well."
            )
