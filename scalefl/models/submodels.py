"""What each level's sub-model is: its config, its shapes, and where its parameters lie in the whole model.

Needs no weights; models are made on the meta device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalefl.contracts import LevelSpec, State
from scalefl.models.adapters import LoraSpec, adapter_layouts, add_lora
from scalefl.models.family import ModelFamily
from scalefl.slicing.layout import match_layouts
from scalefl.slicing.ops import cut
from scalefl.slicing.plan import Plan, lost_share, make_plan

WHOLE = 0
"""The level number of the whole model, which no client need have."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One level's sub-model: its config, and where its parameters lie in the whole model."""

    spec: LevelSpec
    config: Any
    base_plan: Plan
    trainable_plan: Plan
    """What travels and is merged."""
    trainable_shapes: Mapping[str, tuple[int, ...]]


class SubModels:
    """The slice of every level, of a whole model whose parameters are frozen base or trainable."""

    def __init__(
        self,
        *,
        family: ModelFamily,
        config: Any,
        base_shapes: Mapping[str, torch.Size],
        trainable_shapes: Mapping[str, torch.Size],
        specs: tuple[LevelSpec, ...],
        lora: LoraSpec | None,
        width_scaler: bool,
    ) -> None:
        self.family, self.config, self.lora = family, config, lora
        self.base_shapes, self.trainable_shapes = base_shapes, trainable_shapes
        self._width_scaler, self._has_vision = width_scaler, True
        table = family.layouts(config)
        self.layouts = match_layouts(
            [*base_shapes, *trainable_shapes], adapter_layouts(table, lora) if lora is not None else table
        )
        self.axes = family.axes(config, cut_vision=True)
        self._sizes = {name: axis.size for name, axis in self.axes.items()}
        whole = LevelSpec(level=WHOLE, width_ratio=1.0, depth=len(config.exit_layers))
        self.slices = {spec.level: self._slice(spec) for spec in (whole, *specs)}

    @property
    def levels(self) -> tuple[int, ...]:
        """Clients' levels, weakest first."""
        return tuple(level for level in self.slices if level != WHOLE)

    @property
    def evaluated_levels(self) -> tuple[int, ...]:
        """Every level, and the whole model where no level is the whole."""
        full = any(self.is_whole(self.slices[level].spec) for level in self.levels)
        return self.levels if full else (*self.levels, WHOLE)

    def is_whole(self, spec: LevelSpec) -> bool:
        """Whether such a level is the whole model, every exit included."""
        return spec.depth == self.slices[WHOLE].spec.depth and spec.is_whole(self._sizes)

    @property
    def vocab_size(self) -> int:
        return self._sizes["vocab"]

    @property
    def has_vision(self) -> bool:
        """Whether sub-models hold the vision tower, or take its features as input."""
        return self._has_vision

    def slice_bytes(self, level: int) -> int:
        """What travels each way for one client and round: its trainable slice in fp32."""
        return sum(4 * math.prod(shape) for shape in self.slices[level].trainable_shapes.values())

    def level_state(self, level: int, state: Mapping[str, Tensor]) -> State:
        """A level's slice of the trainable state, in the sub-model's names."""
        return cut(state, self.slices[level].trainable_plan)

    def empty(self, level: int) -> nn.Module:
        """A level's sub-model on the meta device."""
        with torch.device("meta"):
            model = self.skeleton(self.slices[level].config)
            model.rebuild_buffers()
        return model

    def skeleton(self, config: Any) -> Any:
        """A model of this config on the meta device: shapes without storage."""
        with torch.device("meta"):
            model = self.family.new_model(config)
            if self.lora is not None:
                add_lora(model, self.lora)
        if not self._has_vision:
            self.family.drop_vision(model)
        model.apply_input_scales()
        return model

    def drop_vision(self) -> None:
        """From now on sub-models have no vision tower: its features are their input."""
        self._has_vision = False
        for level, part in self.slices.items():
            kept = {n: e for n, e in part.base_plan.items() if not self.family.is_vision(n)}
            self.slices[level] = dataclasses.replace(part, base_plan=kept)

    def _slice(self, spec: LevelSpec) -> Slice:
        config = self.family.level_config(self.config, spec)
        config.input_scales = self._input_scales(config, spec) or None
        shapes = {name: tuple(p.shape) for name, p in self.skeleton(config).named_parameters()}
        num_exits = len(self.config.exit_layers)
        plan = make_plan(
            shapes,
            self.layouts,
            self._sizes,
            spec.kept,
            lambda n: self.family.global_name(n, spec, num_exits),
        )
        trainable = {name: e for name, e in plan.items() if e.global_name in self.trainable_shapes}
        base = {name: entry for name, entry in plan.items() if name not in trainable}
        return Slice(
            spec=spec,
            config=config,
            base_plan=base,
            trainable_plan=trainable,
            trainable_shapes={name: shapes[name] for name in trainable},
        )

    def _input_scales(self, config: Any, spec: LevelSpec) -> dict[str, float]:
        """The factor of each linear layer's input: whole over kept size where terms were lost (the paper's
        static scaling), times the whole model's own factor, if that is itself a scaled level.
        """
        own = self.config.input_scales or {}
        with torch.device("meta"):
            model = self.family.new_model(config)
        scales = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                layout = self._weight_layout(name)
                lost = lost_share(layout, self._sizes, spec.kept) if self._width_scaler else 1.0
                if (scale := own.get(name, 1.0) * lost) != 1.0:
                    scales[name] = scale
        return scales

    def _weight_layout(self, module_name: str) -> tuple[tuple[str, ...], ...]:
        plain = f"{module_name}.weight"
        return self.layouts[plain if plain in self.layouts else f"{module_name}.base_layer.weight"]
