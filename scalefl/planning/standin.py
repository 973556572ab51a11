"""A level's sub-model without memory: the code that trains, on tensors that have a shape and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalefl.config.options import RunConfig
from scalefl.models.holding import Holding
from scalefl.models.quantised import BLOCK, NESTED_BLOCK, QuantisedLinear, QuantisedWeight
from scalefl.models.submodels import WHOLE


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a process holds of a model all the time."""

    frozen_bytes: int
    frozen_elements: int
    """Packed values, where they are packed."""
    trainable: tuple[int, ...]
    """Elements of every trainable parameter, all fp32."""

    @property
    def trainable_bytes(self) -> int:
        return 4 * sum(self.trainable)


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """Makes stand-ins of a run's sub-models."""

    holding: Holding
    """Its run's gradient_checkpointing is that of the level."""

    def make(self, level: int, mode: FakeTensorMode) -> Any:
        """The sub-model that a client of this level trains, in training mode, as a store would build it."""
        models, run = self.holding.models, self.holding.run
        part = models.slices[level]
        model: Any = models.empty(level)
        with mode:
            for name in part.trainable_plan:
                _put(model, name, torch.empty(part.trainable_shapes[name]), requires_grad=True)
            for name, entry in part.base_plan.items():
                shape, whole = model.get_parameter(name).shape, entry.global_name
                if self.holding.is_quantised(whole):
                    self._put_quantised(model, name, shape, self.holding.is_transposed(whole))
                else:
                    _put(model, name, torch.empty(shape, dtype=self.holding.dtype(whole)))
            model.apply_input_scales()
            model.rebuild_buffers()
        # Flash attention keeps as little as PyTorch's own kernel; its package need not be here.
        models.family.set_attention(model, "eager" if run.attn == "eager" else "sdpa")
        if run.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return model.train()

    def tower(self, mode: FakeTensorMode) -> Any:
        """The vision tower alone, as it computes features; the model's other parameters hold nothing."""
        models = self.holding.models
        model: Any = models.empty(WHOLE)
        with mode:
            for name, shape in models.base_shapes.items():
                if models.family.is_vision(name):
                    _put(model, name, torch.empty(shape, dtype=self.holding.dtype(name)))
            model.rebuild_buffers()
        return model

    def _put_quantised(self, model: nn.Module, name: str, shape: torch.Size, transposed: bool) -> None:
        parent_name, _, child = name.removesuffix(".weight").rpartition(".")
        weight = _quantised(shape, transposed, self.holding.run)
        setattr(model.get_submodule(parent_name), child, _Unpacking(weight, self.holding.compute_dtype))


def held_by(model: nn.Module) -> Held:
    """What a sub-model's parameters take; those on the meta device are not held."""
    held = [p for p in model.parameters() if not p.is_meta]
    frozen = [p for p in held if not p.requires_grad]
    return Held(
        frozen_bytes=sum(p.numel() * p.element_size() for p in frozen),
        frozen_elements=sum(p.numel() for p in frozen),
        trainable=tuple(p.numel() for p in held if p.requires_grad),
    )


class _Unpacking(QuantisedLinear):
    """A quantised layer whose NF4 kernel, of which a stand-in knows the output alone, need not be loaded."""

    def unpacked(self) -> Tensor:
        if self.kind == "int8":
            return super().unpacked()
        return torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype)


def _put(model: nn.Module, name: str, tensor: Tensor, requires_grad: bool = False) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=requires_grad))


def _quantised(shape: torch.Size, transposed: bool, run: RunConfig) -> QuantisedWeight:
    """A weight of this shape as `quantise` packs it, once it is cut."""
    outputs, inputs = shape
    if run.quantization == "int8":
        tensors = {"packed": torch.empty(shape, dtype=torch.int8), "scales": torch.empty(outputs)}
        return QuantisedWeight(kind="int8", transposed=False, tensors=tensors)
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    scales = (rows, columns // BLOCK)
    tensors = {"packed": torch.empty(rows, columns // 2, dtype=torch.uint8), "scales": torch.empty(scales)}
    if run.double_quant:
        tensors["scales"] = torch.empty(scales, dtype=torch.uint8)
        tensors["nested"] = torch.empty(-(-math.prod(scales) // NESTED_BLOCK))
        tensors["offset"] = torch.empty(())
    return QuantisedWeight(kind="nf4", transposed=transposed, tensors=tensors)
