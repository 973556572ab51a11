"""The one resident model, and every level's sub-model cut from it.

The frozen base is held once; a sub-model is a smaller Hugging Face model whose frozen parameters are views of
it.
"""

from __future__ import annotations

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


class ResidentStore:
    """The frozen tensors of the whole model, and the slice of each level."""

    def __init__(
        self,
        *,
        family: ModelFamily,
        config: Any,
        base: State,
        trainable_shapes: Mapping[str, torch.Size],
        specs: tuple[LevelSpec, ...],
        lora: LoraSpec | None,
        width_scaler: bool,
        device: torch.device,
    ) -> None:
        self.family, self.config, self.base, self._device = family, config, base, device
        self._lora, self._width_scaler = lora, width_scaler
        table = family.layouts(config)
        self._layouts = match_layouts(
            [*base, *trainable_shapes], adapter_layouts(table, lora) if lora is not None else table
        )
        self._sizes = {name: axis.size for name, axis in family.axes(config, cut_vision=True).items()}
        whole = LevelSpec(level=WHOLE, width_ratio=1.0, depth=len(config.exit_layers))
        self.slices = {spec.level: self._slice(spec, trainable_shapes) for spec in (whole, *specs)}

    @property
    def levels(self) -> tuple[int, ...]:
        """Clients' levels, weakest first."""
        return tuple(level for level in self.slices if level != WHOLE)

    @property
    def evaluated_levels(self) -> tuple[int, ...]:
        """Every level, and the whole model where no level is the whole."""
        whole = self.slices[WHOLE]
        full = any(
            self.slices[level].spec.depth == whole.spec.depth
            and self.slices[level].spec.is_whole(self._sizes)
            for level in self.levels
        )
        return self.levels if full else (*self.levels, WHOLE)

    @property
    def vocab_size(self) -> int:
        return self._sizes["vocab"]

    def slice_bytes(self, level: int) -> int:
        """What travels each way for one client and round: its trainable slice in fp32."""
        return sum(4 * math.prod(shape) for shape in self.slices[level].trainable_shapes.values())

    def submodel(self, level: int, state: Mapping[str, Tensor], *, own: bool) -> nn.Module:
        """A level's sub-model on the store's device, holding its slice of the trainable `state`.

        With `own` the trainable parameters are copies that require gradients; without, they are views of
        `state` where the cut is a prefix and the state is on that device, for evaluation. Frozen parameters
        are views of the base either way.
        """
        part = self.slices[level]
        model = self._empty(part.config)
        tensors = cut(self.base, part.base_plan)
        trainable = {
            name: tensor.to(self._device, copy=own, memory_format=torch.contiguous_format)
            if own
            else tensor.to(self._device)
            for name, tensor in cut(state, part.trainable_plan).items()
        }
        for name, tensor in (tensors | trainable).items():
            module_name, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(module_name),
                leaf,
                nn.Parameter(tensor, requires_grad=own and name in trainable),
            )
        model.rebuild_buffers()
        return model.to(self._device)

    def level_state(self, level: int, state: Mapping[str, Tensor]) -> State:
        """A level's slice of the trainable state, in the sub-model's names."""
        return cut(state, self.slices[level].trainable_plan)

    def empty(self, level: int) -> nn.Module:
        """A level's sub-model on the meta device."""
        with torch.device("meta"):
            model = self._empty(self.slices[level].config)
            model.rebuild_buffers()
        return model

    def _empty(self, config: Any) -> Any:
        """A model of this config on the meta device: shapes without storage."""
        with torch.device("meta"):
            model = self.family.new_model(config)
            if self._lora is not None:
                add_lora(model, self._lora)
        model.apply_input_scales()
        return model

    def _slice(self, spec: LevelSpec, trainable_shapes: Mapping[str, torch.Size]) -> Slice:
        config = self.family.level_config(self.config, spec)
        config.input_scales = self._input_scales(config, spec) or None
        shapes = {name: tuple(p.shape) for name, p in self._empty(config).named_parameters()}
        num_exits = len(self.config.exit_layers)
        plan = make_plan(
            shapes,
            self._layouts,
            self._sizes,
            spec.kept,
            lambda n: self.family.global_name(n, spec, num_exits),
        )
        trainable = {name: entry for name, entry in plan.items() if entry.global_name in trainable_shapes}
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
        return self._layouts[plain if plain in self._layouts else f"{module_name}.base_layer.weight"]
