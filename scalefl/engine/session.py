"""One model and optimizer, prepared for the launch once and used for one client after another."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scalefl.config.options import RunConfig
from scalefl.contracts import State
from scalefl.engine.optimizers import forget, make_optimizer


class OneProcess:
    """What a session asks of an accelerator, for a rank that trains clients of its own."""

    num_processes = 1
    is_main_process = True

    def __init__(self, autocast: Callable[[], Any]) -> None:
        self.autocast = autocast

    def prepare(self, *parts: Any) -> tuple[Any, ...]:
        return parts

    def no_sync(self, model: nn.Module) -> Any:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values

    def free_memory(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Session:
    """One process, or one of several under DDP."""

    def __init__(self, accelerator: Accelerator | OneProcess, model: nn.Module, run: RunConfig) -> None:
        self._accelerator, self._run = accelerator, run
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._model: Any
        self._optimizer: Any
        self._own_optimizer: Any = make_optimizer(self._trainable.values(), run)
        self._model, self._optimizer = accelerator.prepare(model, self._own_optimizer)
        self._model.train()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a client's trainable state in place and forget everything about the client before it."""
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                parameter.copy_(state[name])
        self._optimizer.zero_grad(set_to_none=True)
        forget(self._own_optimizer)

    def step(self, losses: Sequence[Callable[[nn.Module], Tensor]], denominator: int, lr: float) -> None:
        """One optimizer step over this rank's micro-batches.

        Each callable gives the summed loss of one micro-batch; `denominator` is the number of answer tokens
        of the whole step over all ranks, which makes the result independent of how the step was divided.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = self._accelerator.num_processes / denominator  # engines average over ranks; we want the sum
        for number, loss in enumerate(losses, start=1):
            last = number == len(losses)
            with contextlib.nullcontext() if last else self._without_sync():
                with self._accelerator.autocast():
                    value = loss(self._model) * scale
                self._backward(value, last)
        self._update()

    def _without_sync(self) -> Any:
        """Within, gradients add up on each rank and do not travel."""
        return self._accelerator.no_sync(self._model)

    def _backward(self, loss: Tensor, last: bool) -> None:
        self._accelerator.backward(loss)

    def _update(self) -> None:
        if self._run.max_grad_norm is not None:
            self._accelerator.clip_grad_norm_(self._trainable.values(), self._run.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values, reduction="sum")

    def delta(self, sent: Mapping[str, Tensor]) -> State:
        """Trained minus sent, fp32 on the CPU; on ranks other than 0 empty."""
        if not self._accelerator.is_main_process:
            return {}
        return {name: p.detach().to("cpu", torch.float32) - sent[name] for name, p in self._trainable.items()}

    def close(self) -> None:
        """Let go of everything: prepared models sit in reference cycles, which `free_memory` collects."""
        forget(self._own_optimizer)
        self._trainable, self._model, self._optimizer, self._own_optimizer = {}, None, None, None
        self._accelerator.free_memory()


def hide_frozen(model: nn.Module) -> None:
    """Make frozen parameters plain tensors, in place.

    DDP and DeepSpeed send every parameter they see around at start, and DeepSpeed cannot send strided views;
    frozen weights are the store's, and the same on every rank already.
    """
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                setattr(module, name, parameter.data)
