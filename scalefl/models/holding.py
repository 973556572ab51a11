"""How a run holds each frozen weight: in which precision, in few bits or not, and packed along which side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scalefl.config.derived import compute_dtype
from scalefl.config.options import RunConfig
from scalefl.models.submodels import SubModels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Holding:
    """For those who hold weights, and for those who plan to. Weights go by their names in the whole model."""

    run: RunConfig
    models: SubModels
    vit_dtype: torch.dtype
    """What a frozen vision tower is held in."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What quantised weights are unpacked to."""
        return DTYPES[compute_dtype(self.run)]

    def dtype(self, name: str) -> torch.dtype:
        """What a weight is held in that is not quantised."""
        return self.vit_dtype if self.models.family.is_vision(name) else DTYPES[self.run.precision]

    def is_quantised(self, name: str) -> bool:
        return self.run.quantization != "none" and self.models.family.is_block_weight(name)

    def is_transposed(self, name: str) -> bool:
        """NF4 packs rows: a weight whose inputs levels cut is held transposed."""
        inputs, axes = self.models.layouts[name][1], self.models.axes
        cut = any(axis in axes and axes[axis].cut_by == "inner" for axis in inputs)
        return self.run.quantization == "nf4" and cut
