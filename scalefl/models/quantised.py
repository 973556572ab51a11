"""Frozen weights in 4 or 8 bits, quantised once and cut without being quantised again.

The kernels are those of bitsandbytes; the layer is ours. bitsandbytes' own layers rewrite their weights in
place when they run in eval mode on a CPU with AVX512-BF16, for good, and then train on nothing; and neither
cuts its columns.
Shapes: O outputs, I inputs of a linear layer; R rows as they are packed, C columns.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalefl.slicing.plan import Index

BLOCK = 64
"""Neighbours that share a scale in NF4."""
NESTED_BLOCK = 256
"""Scales that share a scale under double quantisation."""


@functools.cache
def _bnb() -> Any:
    # bitsandbytes takes seconds to import and speaks as it does: not for runs that do not quantise.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


@dataclass(frozen=True, kw_only=True)
class QuantisedWeight:
    """A frozen weight of a linear layer (O, I) in few bits: a record of tensors, cut as views.

    NF4 packs rows, so a weight whose inputs are cut is held transposed: then R = I, and the cut is a prefix
    of rows in either case. Int8 has one scale an output, and is cut at both sides as it is.
    """

    kind: str
    """ "nf4" or "int8"."""
    transposed: bool
    tensors: Mapping[str, Tensor]
    """nf4: `packed` (R, C/2) uint8 and `scales` (R, C/64) fp32, or under double quantisation uint8 with
    `nested` (ceil(R C / 64 / 256)) fp32 and `offset` (1) fp32. int8: `packed` (O, I), `scales` (O) fp32.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.tensors["packed"].shape
        if self.kind == "int8":
            return rows, columns
        return (columns * 2, rows) if self.transposed else (rows, columns * 2)

    def cut(self, index: tuple[Index, ...]) -> QuantisedWeight:
        """The prefix that `index` (one slice an axis of (O, I)) keeps; shares its storage with the whole."""
        outputs, inputs = (part.stop for part in index if isinstance(part, slice))
        whole, tensors = self.shape, dict(self.tensors)
        if self.kind == "int8":
            tensors["packed"] = tensors["packed"][:outputs, :inputs]
            tensors["scales"] = tensors["scales"][:outputs]
            return QuantisedWeight(kind=self.kind, transposed=False, tensors=tensors)
        rows = inputs if self.transposed else outputs
        if (outputs if self.transposed else inputs) != whole[0 if self.transposed else 1]:
            raise ValueError(f"nf4 weight {whole}: cut to {(outputs, inputs)}, across its packed blocks.")
        tensors["packed"] = tensors["packed"][:rows]
        tensors["scales"] = tensors["scales"][:rows]
        if "nested" in tensors:
            tensors["nested"] = tensors["nested"][: -(-tensors["scales"].numel() // NESTED_BLOCK)]
        return QuantisedWeight(kind=self.kind, transposed=self.transposed, tensors=tensors)


def quantise(weight: Tensor, kind: str, *, transposed: bool, double_quant: bool) -> QuantisedWeight:
    """Quantise a weight (O, I) of any floating dtype on its device; of NF4, R x C blocks along C.

    Raises ValueError where C is no multiple of 64.
    """
    functional = _bnb()
    if kind == "int8":
        packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return QuantisedWeight(
            kind=kind, transposed=False, tensors={"packed": packed, "scales": scales / 127.0}
        )
    matrix = (weight.t() if transposed else weight).contiguous()
    rows, columns = matrix.shape
    if columns % BLOCK:
        raise ValueError(f"nf4: rows of {columns} weights; expected a multiple of {BLOCK}.")
    packed, state = functional.quantize_4bit(
        matrix, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    tensors = {"packed": packed.view(rows, columns // 2), "scales": state.absmax.view(rows, columns // BLOCK)}
    if double_quant:
        tensors |= {"nested": state.state2.absmax, "offset": state.offset.reshape(1)}
    return QuantisedWeight(kind=kind, transposed=transposed, tensors=tensors)


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) as held, that is, its transposed view (I, O) where it is packed so."""
    tensors = weight.tensors
    if weight.kind == "int8":
        return (tensors["packed"].float() * tensors["scales"][:, None]).to(dtype)
    functional, packed = _bnb(), tensors["packed"]
    device, shape = packed.device, torch.Size((packed.shape[0], packed.shape[1] * 2))
    nested = None
    if "nested" in tensors:
        nested = functional.QuantState(
            absmax=tensors["nested"],
            blocksize=NESTED_BLOCK,
            code=_nested_code(device),
            dtype=torch.float32,
        )
    state = functional.QuantState(
        absmax=tensors["scales"].reshape(-1),
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        quant_type="nf4",
        code=_code(device),
        offset=tensors.get("offset"),
        state2=nested,
    )
    return functional.dequantize_4bit(packed.reshape(-1, 1), state)


@functools.cache
def _code(device: torch.device) -> Tensor:
    return _bnb().get_4bit_type("nf4", device=device)


@functools.cache
def _nested_code(device: torch.device) -> Tensor:
    return _bnb().create_dynamic_map().to(device)


class QuantisedLinear(nn.Module):
    """A frozen linear layer without bias over a quantised weight; its backward unpacks the weight anew.

    The parts of the weight are parameters, so that engines which shard parameters shard them.
    """

    def __init__(self, weight: QuantisedWeight, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind, self.transposed, self.compute_dtype = weight.kind, weight.transposed, compute_dtype
        self.parts = tuple(weight.tensors)
        for name, tensor in weight.tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def unpacked(self) -> Tensor:
        """(O, I) in the compute dtype."""
        tensors = {name: getattr(self, name) for name in self.parts}
        weight = QuantisedWeight(kind=self.kind, transposed=self.transposed, tensors=tensors)
        matrix = dequantise(weight, self.compute_dtype)
        return matrix.t() if self.transposed else matrix

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenLinear.apply(x, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _FrozenLinear(torch.autograd.Function):
    """x W^T, with W unpacked once in the forward and once in the backward pass and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(layer.compute_dtype), layer.unpacked()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return (grad.to(ctx.layer.compute_dtype) @ ctx.layer.unpacked()).to(grad.dtype), None
