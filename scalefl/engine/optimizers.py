"""Local optimizers by name: PyTorch's, and those of bitsandbytes, with small state or state on pages."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scalefl.config.options import RunConfig
from scalefl.contracts import InputError

PYTORCH = ("sgd", "adamw")
PAGED = ("paged_adamw_32bit", "paged_adamw_8bit")


def check_optimizer(run: RunConfig, device: torch.device, *, offloaded: bool = False) -> None:
    """Refuse an optimizer that would fail at its first step, or would silently be another one.

    `offloaded`: DeepSpeed keeps the optimizer's state on the CPU.
    """
    name = run.optimizer
    if name in PAGED and (offloaded or device.type == "cpu"):
        place = "the launch keeps optimizers on the CPU already" if offloaded else "this run is on the CPU"
        instead = "adamw" if name == "paged_adamw_32bit" else "adamw_8bit or adamw"
        way_out = "a launch without optimizer offload" if offloaded else "a CUDA GPU"
        raise InputError(
            f"--optimizer: {name} pages its state between GPU and host, but {place}; "
            f"expected {instead}, or {way_out}."
        )
    if name not in PYTORCH:
        _check_library("--optimizer", name, device, "adamw or sgd")


def check_quantisation(run: RunConfig, device: torch.device) -> None:
    """Refuse a quantised base where bitsandbytes has no kernels for the device."""
    if run.quantization != "none":
        _check_library("--quantization", run.quantization, device, "none")


def _check_library(option: str, value: str, device: torch.device, instead: str) -> None:
    if device.type == "cuda" and not _cuda_library():
        raise InputError(
            f"{option}: {value} needs bitsandbytes' CUDA library, and this installation has none for CUDA "
            f"{torch.version.cuda}; expected {instead}, or another bitsandbytes "
            "(python -m bitsandbytes tells more)."
        )


def make_optimizer(parameters: Iterable[nn.Parameter], run: RunConfig) -> torch.optim.Optimizer:
    """A new optimizer; norms and biases decay like the rest, as in the original.

    The 8-bit ones keep the state of tensors below 4096 elements in fp32.
    """
    if run.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay, fused=True
        )
    if run.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=run.lr, weight_decay=run.weight_decay, fused=True)
    kinds = {
        "adamw_8bit": "AdamW8bit",
        "paged_adamw_32bit": "PagedAdamW",
        "paged_adamw_8bit": "PagedAdamW8bit",
    }
    kind = getattr(_bitsandbytes().optim, kinds[run.optimizer])
    optimizer: Any = kind(parameters, lr=run.lr, weight_decay=run.weight_decay)
    if optimizer.is_paged:
        optimizer.get_state_buffer = functools.partial(
            _page, optimizer.page_mng.paged_tensors, optimizer.get_state_buffer
        )
    return optimizer


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer as good as new.

    Called before each client, and at the end of a session, whose pages the next one then uses.
    """
    for state in optimizer.state.values():
        for value in state.values():
            if getattr(value, "is_paged", False):
                value.is_idle = True
    optimizer.state.clear()


def _page(
    pages: list[Any], allocate: Callable[..., Tensor], parameter: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """State for one parameter, of zeros; pages that `forget` left are used again.

    bitsandbytes (0.50) lists every page it allocates and frees none: memory would grow with every client.
    """
    wanted = (parameter.shape, dtype, parameter.device.index)
    for page in pages:
        if getattr(page, "is_idle", False) and (page.shape, page.dtype, page.page_deviceid) == wanted:
            page.is_idle = False
            _bitsandbytes().functional.fill(page, 0)
            return page
    return allocate(parameter, dtype=dtype)


def _bitsandbytes() -> Any:
    """Imported late: it takes seconds, and speaks of kernels that this CPU lacks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def _cuda_library() -> bool:
    return _bitsandbytes().cextension.lib.compiled_with_cuda
