"""From what a level holds and what its step needs to the peak of one process, under every launch.

Trainable weights, their gradients and optimizer state are fp32. Sources: the code of PyTorch's DDP,
DeepSpeed 0.19 (runtime/zero) and bitsandbytes 0.50 (optim/optimizer.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from scalefl.planning.standin import Held
from scalefl.planning.trace import Moment

BUCKET, BUCKET_OFFLOADED = 50_000_000, 20_000_000
"""Elements that DeepSpeed collects before it sends them: reduce_bucket_size and, of weights that ZeRO-3
gathers, stage3_prefetch_bucket_size in ds_configs/."""
LIVE_ELEMENTS = 300_000_000
"""Elements that ZeRO-3 may have gathered at a time: stage3_max_live_parameters in ds_configs/."""
SMALL = 4096
"""Elements of a tensor below which 8-bit optimizers keep its state in fp32."""
BLOCK_8BIT = 256
"""State values that share a scale in 8-bit optimizers."""
PAGED_FROM = 100_000
"""Elements of a tensor from which paged optimizers put its state on pages."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device at the moment of the peak."""

    weights: int
    gradients: int
    """As far as the backward pass has come at that moment, and what a launch of several adds to them."""
    optimizer: int
    activations: int
    logits: int
    host: int
    """Bytes in host memory besides: what is offloaded or paged, and the trainable states that are merged."""

    def on(self, device: str) -> int:
        """Bytes of that device's memory: on the CPU there is one memory for both."""
        return self.total + self.host if device == "cpu" else self.total

    def with_states(self, held: int, change: int = 0, *, device: str) -> MemoryEstimate:
        """With trainable states in host memory: `held` always, and a client's `change` after its training.

        On the CPU the change comes where gradients and activations were.
        """
        if device == "cpu":
            change = max(0, change - (self.gradients + self.activations + self.logits))
        return dataclasses.replace(self, host=self.host + held + change)

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a client is trained, as far as memory is concerned."""

    optimizer: str
    momentum: float
    zero_stage: int
    offload: str
    """none, optimizer or all."""
    world_size: int
    accumulates: bool
    """Whether a step has several micro-batches: then gradients are there from the second one's start."""
    device: str
    """cpu or cuda."""
    kernels: int = 0
    """Bytes of host memory that PyTorch's kernels take beside tensors."""

    @property
    def bucket(self) -> int:
        """Elements that ZeRO collects before it sends them."""
        return BUCKET if self.offload == "none" else BUCKET_OFFLOADED


def estimate(held: Held, moments: Iterable[Moment], launch: Launch) -> MemoryEstimate:
    """The peak of one process over the moments of its step, the update at its end included."""
    end = Moment(gradients=held.trainable_bytes, activations=_update_bytes(held, launch), logits=0)
    weights, host = _weights(held, launch)
    states, on_pages = optimizer_bytes(held.trainable, launch)
    states, on_host = _optimizer(held, states, launch)
    return max(
        (
            MemoryEstimate(
                weights=weights,
                gradients=_gradients(held, moment, launch),
                optimizer=states,
                activations=moment.activations,
                logits=moment.logits,
                host=host + on_host + on_pages + launch.kernels,
            )
            for moment in (*moments, end)
        ),
        key=lambda found: found.total,
    )


def estimate_inference(held: Held, moments: Iterable[Moment], launch: Launch) -> MemoryEstimate:
    """The peak of one process over the moments of a pass without gradients."""
    weights, host = _weights(held, launch)
    peak = max(moments, key=lambda moment: moment.activations + moment.logits)
    return MemoryEstimate(
        weights=weights,
        gradients=0,
        optimizer=0,
        activations=peak.activations,
        logits=peak.logits,
        host=host + launch.kernels,
    )


def optimizer_bytes(sizes: Iterable[int], launch: Launch) -> tuple[int, int]:
    """State that one process holds for parameters of these sizes: (plain, on pages).

    ZeRO joins parameters into one flat tensor and cuts it in equal parts.
    """
    if launch.zero_stage:
        sizes = (_share(sum(sizes), launch),)
    plain = on_pages = 0
    for size in sizes:
        if launch.optimizer == "sgd":
            state = 4 * size if launch.momentum else 0
        elif launch.optimizer.endswith("8bit") and size >= SMALL:
            state = 2 * (size + 4 * -(-size // BLOCK_8BIT))
        else:
            state = 8 * size
        if launch.optimizer.startswith("paged") and size >= PAGED_FROM:
            on_pages += state
        else:
            plain += state
    return plain, on_pages


def _share(size: int, launch: Launch) -> int:
    return -(-size // launch.world_size)


def _optimizer(held: Held, states: int, launch: Launch) -> tuple[int, int]:
    """Optimizer state with ZeRO's own fp32 copy of the part that a process updates: (device, host)."""
    part = _share(held.trainable_bytes, launch)
    if launch.zero_stage == 0:
        return states, 0
    if launch.offload == "none":
        return states + part, 0
    return 0, states + 3 * part  # beside the copy, a buffer for the updated weights, and gradients


def _weights(held: Held, launch: Launch) -> tuple[int, int]:
    """Weights of a process: (device, host). Under ZeRO-3 a part, and the layers that are gathered."""
    every = held.frozen_bytes + held.trainable_bytes
    if launch.zero_stage < 3:
        return every, 0
    elements = held.frozen_elements + sum(held.trainable)
    live, arriving = (
        min(every, limit * every // max(elements, 1)) for limit in (LIVE_ELEMENTS, launch.bucket)
    )
    gathered, part = live + arriving, _share(every, launch)
    return (gathered, part) if launch.offload == "all" else (part + gathered, 0)


def _gradients(held: Held, moment: Moment, launch: Launch) -> int:
    """Gradients of a process on the device, and the buffers in which they travel."""
    own = held.trainable_bytes if launch.accumulates else moment.gradients
    if launch.zero_stage == 0:
        return own + (held.trainable_bytes if launch.world_size > 1 else 0)  # DDP's buckets are copies
    offloaded = launch.offload != "none"
    bucket = 4 * launch.bucket
    buckets = bucket if launch.zero_stage == 3 else 2 * bucket  # one fills, one travels
    if launch.device == "cpu":
        buckets = min(buckets, held.trainable_bytes)  # memory that is not written to takes none
    part = 0 if offloaded else _share(held.trainable_bytes, launch)
    if launch.zero_stage == 1:
        return own + part + buckets
    waiting = min(own, bucket)  # until they fill a bucket
    return (max(part, waiting) if launch.zero_stage == 2 else part + waiting) + buckets


def _update_bytes(held: Held, launch: Launch) -> int:
    """Temporaries of an update. On the CPU 8-bit states are unpacked, a tensor at a time."""
    if launch.device != "cpu" or not launch.optimizer.endswith("8bit"):
        return 0
    largest = max(held.trainable, default=0)
    if launch.zero_stage:
        largest = _share(sum(held.trainable), launch)
    return 5 * 4 * largest if largest >= SMALL else 0  # two states, the scaled gradient, and two for the root
