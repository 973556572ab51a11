"""One model and optimizer, prepared for the launch once and used for one client after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scalefl.config.options import RunConfig
from scalefl.contracts import State
from scalefl.engine.optimizers import make_optimizer


class Session:
    """One model and optimizer, prepared once and used for one client after another."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, run: RunConfig) -> None:
        self._accelerator, self._run = accelerator, run
        self._module = model.to(accelerator.device)
        self._trainable = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(self._trainable.values(), run)
        self._model, self._optimizer = accelerator.prepare(self._module, optimizer)
        self._model.train()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a client's trainable state in place and forget everything about the client before it."""
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                parameter.copy_(state[name])
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.optimizer.state.clear()

    def step(self, losses: Sequence[Callable[[nn.Module], Tensor]], denominator: int, lr: float) -> None:
        """One optimizer step over this rank's micro-batches.

        Each callable gives the summed loss of one micro-batch; `denominator` is the number of answer tokens
        of the whole step over all ranks, which makes the result independent of how the step was divided.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = self._accelerator.num_processes / denominator  # DDP averages over ranks; we want the sum
        for number, loss in enumerate(losses, start=1):
            if number < len(losses):
                with self._accelerator.no_sync(self._model):
                    self._accelerator.backward(self._forward(loss) * scale)
            else:
                self._accelerator.backward(self._forward(loss) * scale)
        if self._run.max_grad_norm is not None:
            self._accelerator.clip_grad_norm_(self._trainable.values(), self._run.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _forward(self, loss: Callable[[nn.Module], Tensor]) -> Tensor:
        with self._accelerator.autocast():
            return loss(self._model)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values, reduction="sum")

    def delta(self, sent: Mapping[str, Tensor]) -> State:
        """Trained minus sent, fp32 on the CPU."""
        return {name: p.detach().to("cpu", torch.float32) - sent[name] for name, p in self._trainable.items()}

    def close(self) -> None:
        self._accelerator.free_memory(self._model, self._optimizer)
