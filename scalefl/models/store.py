"""Where the frozen base lives, and every level's sub-model built on it.

A sub-model is a smaller Hugging Face model. Its frozen parameters are views of the one base on the device
(`ResidentStore`), or read from disk, a slice at a time (`FileStore`).
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalefl.models.files import TensorFiles, write_tensors
from scalefl.models.quantised import QuantisedLinear, QuantisedWeight
from scalefl.models.submodels import WHOLE, SubModels
from scalefl.slicing.ops import cut, select
from scalefl.slicing.plan import PlanEntry

Frozen = Tensor | QuantisedWeight

Place = Callable[[nn.Parameter], None]
"""What an engine does with each parameter of a sub-model as soon as it is read, such as sharding it."""


class Store(abc.ABC):
    """The frozen base of `models`, and the sub-model of each level."""

    def __init__(
        self, models: SubModels, device: torch.device, compute_dtype: torch.dtype, attn: str = "sdpa"
    ) -> None:
        """`compute_dtype` is what quantised weights are unpacked to; `attn` the kernel used in training."""
        self.models, self.device = models, device
        self._compute_dtype, self._attn = compute_dtype, attn

    @abc.abstractmethod
    def load(self) -> None:
        """Take in what is to stay on the device; until then only what is asked for is read."""

    @abc.abstractmethod
    def frozen(self, entry: PlanEntry) -> Frozen:
        """One frozen weight, cut, on the device."""

    def submodel(
        self,
        level: int,
        state: Mapping[str, Tensor],
        *,
        own: bool,
        place: Place | None = None,
        is_cut: bool = False,
    ) -> nn.Module:
        """A level's sub-model on the store's device, holding its slice of the trainable `state`.

        `is_cut`: the state is that slice already, in the sub-model's names.
        With `own` the trainable parameters are copies that require gradients; without, they are views of
        `state` where the cut is a prefix and the state is on that device, for evaluation.
        """
        part = self.models.slices[level]
        model = self.models.skeleton(copy.deepcopy(part.config))  # its attention kernel is set below
        trainable = {
            name: tensor.to(self.device, copy=own, memory_format=torch.contiguous_format)
            if own
            else tensor.to(self.device)
            for name, tensor in (state if is_cut else cut(state, part.trainable_plan)).items()
        }
        for name, tensor in trainable.items():
            _put(model, name, tensor, place, requires_grad=own)
        for name, entry in part.base_plan.items():
            self._put_frozen(model, name, self.frozen(entry), place)
        model.apply_input_scales()  # again: it hooks modules, and quantised ones are new
        model.rebuild_buffers()
        self.models.family.set_attention(model, self._attn if own else "sdpa")
        return model.to(self.device)

    def vision_tower(self) -> nn.Module:
        """The whole model in eval mode with its vision tower alone; its other parameters hold nothing."""
        part = self.models.slices[WHOLE]
        model = self.models.skeleton(part.config)
        for name, entry in part.base_plan.items():
            if self.models.family.is_vision(name):
                self._put_frozen(model, name, self.frozen(entry), None)
        return model.eval()

    def drop_vision(self) -> None:
        """The vision tower leaves the device, and sub-models take its features as their input."""
        self.models.drop_vision()

    def _put_frozen(self, model: nn.Module, name: str, value: Frozen, place: Place | None) -> None:
        if isinstance(value, Tensor):
            return _put(model, name, value, place)
        module_name = name.removesuffix(".weight")
        parent_name, _, child = module_name.rpartition(".")
        layer = QuantisedLinear(value, self._compute_dtype)
        setattr(model.get_submodule(parent_name), child, layer)
        if place is not None:
            for parameter in layer.parameters():
                place(parameter)


def _put(
    model: nn.Module, name: str, tensor: Tensor, place: Place | None, requires_grad: bool = False
) -> None:
    module_name, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=requires_grad)
    if place is not None:
        place(parameter)
    setattr(model.get_submodule(module_name), leaf, parameter)


class ResidentStore(Store):
    """The frozen base once on the device: sub-models are views of it, or copies where a cut is strided."""

    def __init__(self, models: SubModels, read: Callable[[str], Frozen], **store: Any) -> None:
        """`read` gives a frozen weight of the whole model as it is to be held, on the device."""
        super().__init__(models, **store)
        self._read: Callable[[str], Frozen] | None = read
        self.base: dict[str, Frozen] = {}

    def load(self) -> None:
        for name in self.models.base_shapes:
            if self.models.has_vision or not self.models.family.is_vision(name):
                self._held(name)
        self._read = None  # and with it the weights it reads from, which may be in memory

    def frozen(self, entry: PlanEntry) -> Frozen:
        value = self._held(entry.global_name)
        return value.cut(entry.index) if isinstance(value, QuantisedWeight) else select(value, entry.index)

    def drop_vision(self) -> None:
        super().drop_vision()
        self.base = {n: v for n, v in self.base.items() if not self.models.family.is_vision(n)}

    def _held(self, name: str) -> Frozen:
        if name not in self.base and self._read is not None:
            self.base[name] = self._read(name)
        return self.base[name]


class FileStore(Store):
    """The frozen base on disk: a sub-model takes the memory of its own slice alone, while it lives."""

    def __init__(
        self,
        models: SubModels,
        files: TensorFiles,
        names: Mapping[str, str],
        dtypes: Mapping[str, torch.dtype],
        quantised: Mapping[str, bool],
        kind: str,
        **store: Any,
    ) -> None:
        """`names`: parameter -> tensor in `files`. `dtypes`: parameter -> what it is read as.

        `quantised`: parameter -> whether it is packed transposed; `files` then hold its parts, each under
        the parameter's name, a slash and the part's.
        """
        super().__init__(models, **store)
        self._files, self._names, self._dtypes = files, names, dtypes
        self._quantised, self._kind = quantised, kind

    def load(self) -> None:
        """Nothing stays."""

    def frozen(self, entry: PlanEntry) -> Frozen:
        name = entry.global_name
        if name not in self._quantised:
            return self._files.read(self._names[name], entry.index).to(self.device, self._dtypes[name])
        parts = {n.partition("/")[2]: n for n in self._files if n.startswith(f"{name}/")}
        shapes = {part: torch.empty(self._files.shapes[n], device="meta") for part, n in parts.items()}
        whole = QuantisedWeight(kind=self._kind, transposed=self._quantised[name], tensors=shapes)
        wanted = whole.cut(entry.index).tensors
        return QuantisedWeight(
            kind=self._kind,
            transposed=whole.transposed,
            tensors={part: self._read_prefix(n, wanted[part].shape) for part, n in parts.items()},
        )

    def _read_prefix(self, name: str, shape: torch.Size) -> Tensor:
        return self._files.read(name, tuple(slice(0, size) for size in shape)).to(self.device)


def write_base(folder: Path, base: Iterator[tuple[str, Frozen]]) -> None:
    """Write a base for `FileStore`; never more than one file's part of it is held."""
    write_tensors(folder, _parts(base))


def _parts(base: Iterator[tuple[str, Frozen]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in base:
        if isinstance(value, QuantisedWeight):
            yield from ((f"{name}/{part}", tensor) for part, tensor in value.tensors.items())
        else:
            yield name, value
