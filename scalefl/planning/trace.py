"""The bytes of a step, moment by moment: the code that trains or evaluates is run on stand-ins and watched.

On the CPU the watched peak equals what a real step allocates. On a GPU the kernels are others, but keep the
same tensors; only a vision tower that is trained there keeps its layer norms' inputs in fp32 as well.
Shapes: B rows, L positions, N predicted positions, V vocabulary, A answers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from scalefl.batches import Candidates
from scalefl.objective import exit_losses


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes beyond weights and optimizer state that live at the same time."""

    gradients: int
    """Of parameters, as far as the backward pass has come."""
    activations: int
    """What the backward pass will need, and temporaries."""
    logits: int
    """Of every exit, with their softmax and gradient."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """One micro-batch of a client, and how its loss is computed."""

    rows: int
    length: int
    """Positions of a row."""
    answer_length: int
    """Predicted positions of a row."""
    images: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """The argument of the model that holds the images -> its shape and dtype."""
    autocast: bool
    """Whether the step computes in bf16."""
    distill_weight: float
    temperature: float
    adjusts_logits: bool

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model."""
        return {
            "input_ids": torch.zeros(self.rows, self.length, dtype=torch.long),
            "predict_at": torch.zeros(self.rows * self.answer_length, dtype=torch.long),
            **{name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.images.items()},
        }


def trace_step(
    model: nn.Module, vocab_size: int, step: StepShape, mode: AbstractContextManager[Any]
) -> tuple[Moment, ...]:
    """The moments of a step that could be its peak: none has less of everything than another.

    `mode` is the FakeTensorMode of the model's stand-ins; a null context measures a real model.
    """
    num_predicted = step.rows * step.answer_length
    return _watched(
        model, lambda: _step(model, vocab_size, step), logits=(num_predicted, vocab_size), mode=mode
    )


def trace_scoring(
    model: nn.Module,
    vocab_size: int,
    step: StepShape,
    candidates: Candidates,
    num_generated: int,
    mode: AbstractContextManager[Any],
) -> tuple[Moment, ...]:
    """As `trace_step`, of a batch in evaluation: packed candidate answers behind each prompt are scored.

    Then, unless `num_generated` is 0, so many tokens are generated at the deepest exit.
    """
    packed = len(candidates.packed)
    num_predicted, length = step.rows * (1 + packed), step.length - step.answer_length + packed

    def score() -> None:
        inputs = {
            **step.inputs(),
            "input_ids": torch.zeros(step.rows, length, dtype=torch.long),
            "attention_mask": torch.ones(step.rows, 1, length, length, dtype=torch.bool),
            "position_ids": torch.zeros(step.rows, length, dtype=torch.long),
            "predict_at": torch.zeros(num_predicted, dtype=torch.long),
        }
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=step.autocast):
            for logits in model(**inputs).exit_logits:
                candidates.log_likelihoods(logits.unflatten(0, (step.rows, -1)))
            del logits
            if num_generated:
                _generate(model, step, num_generated)

    return _watched(model, score, logits=(num_predicted, vocab_size), mode=mode)


def trace_features(
    model: nn.Module,
    encode: Callable[[nn.Module, Tensor], Tensor],
    images: tuple[int, ...],
    autocast: bool,
    mode: AbstractContextManager[Any],
) -> tuple[Moment, ...]:
    """As `trace_step`, of a frozen vision tower's pass over one batch of images (B, 3, height, width)."""

    def look() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            encode(model, torch.empty(images))

    return _watched(model, look, logits=None, mode=mode)


def _watched(
    model: nn.Module,
    work: Callable[[], None],
    logits: tuple[int, int] | None,
    mode: AbstractContextManager[Any],
) -> tuple[Moment, ...]:
    watch = LiveBytes([*model.parameters(), *model.buffers()], logits=logits)
    hooks = [
        parameter.register_post_accumulate_grad_hook(watch.is_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    with mode, watch:
        work()
    for hook in hooks:
        hook.remove()
    return watch.largest_moments()


def _step(model: nn.Module, vocab_size: int, step: StepShape) -> None:
    """Forward and backward as a session does them."""
    num_predicted = step.rows * step.answer_length
    targets_n = torch.zeros(num_predicted, dtype=torch.long)
    adjustment_nv = torch.zeros(num_predicted, vocab_size) if step.adjusts_logits else None
    with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast):
        logits = [exit_nv.float() for exit_nv in model(**step.inputs()).exit_logits]
        loss, _ = exit_losses(
            logits,
            targets_n,
            distill_weight=step.distill_weight,
            temperature=step.temperature,
            adjustment_nv=adjustment_nv,
        )
    del logits
    loss.backward()


def _generate(model: nn.Module, step: StepShape, num_tokens: int) -> None:
    """As `generate` does of prompts of one length: all of them at once, then a token at a time."""
    images = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in step.images.items()}
    prompts = torch.zeros(step.rows, step.length - step.answer_length, dtype=torch.long)
    cached = model(input_ids=prompts, **images, use_cache=True, logits_to_keep=1).past_key_values
    token = torch.zeros(step.rows, 1, dtype=torch.long)
    for _ in range(num_tokens - 1):
        model(input_ids=token, past_key_values=cached, use_cache=True, logits_to_keep=1)


class LiveBytes(TorchDispatchMode):
    """Within, knows at any moment which tensors' storages live, and how large they are."""

    def __init__(self, weights: Iterable[Tensor], logits: tuple[int, int] | None) -> None:
        """`weights` are not counted. `logits` is the shape that tells logits from other activations."""
        super().__init__()
        self._logits = logits
        self._kinds: dict[int, str] = {}
        self._bytes = {"weights": 0, "gradients": 0, "activations": 0, "logits": 0}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._moments: set[tuple[int, int, int]] = set()
        for tensor in weights:
            self._watch(tensor, "weights")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor, "logits" if tuple(tensor.shape) == self._logits else "activations")
        held = self._bytes
        self._moments.add((held["activations"] + held["logits"], held["gradients"], held["logits"]))
        return result

    def is_gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is complete: from now on it counts as one."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self._bytes[self._kinds[storage._cdata]] -= storage.nbytes()
        self._kinds[storage._cdata] = "gradients"
        self._bytes["gradients"] += storage.nbytes()

    def largest_moments(self) -> tuple[Moment, ...]:
        """No moment that another one exceeds both in gradients and in what comes beside them."""
        largest: list[Moment] = []
        most_gradients = -1
        for rest, gradients, logits in sorted(self._moments, reverse=True):
            if gradients > most_gradients:
                largest.append(Moment(gradients=gradients, activations=rest - logits, logits=logits))
                most_gradients = gradients
        return tuple(largest)

    def _watch(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._kinds:
            return

        def freed(_: object) -> None:
            self._bytes[self._kinds.pop(key)] -= size
            del self._watched[key]

        self._kinds[key] = kind
        self._bytes[kind] += size
        self._watched[key] = weakref.ref(storage, freed)
