"""Examples -> tensors: training batches, packed scoring batches, the order of a client's examples.

Shapes: B rows, L positions, P longest prompt, K packed candidate tokens, N predicted positions, A answers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalefl.contracts import Example

Ids = Sequence[int] | np.ndarray
"""Indices into a split's examples."""

MAX_SHIFT = 0.06
"""Largest shift of an augmented image, as a share of its side."""

MAX_STRETCH = 50
"""Most batches among which examples move to meet others of their length."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    inputs: Mapping[str, Tensor]
    """Keyword arguments of the model, with `predict_at` (N)."""
    targets: Tensor
    """(N) token ids."""
    labels: Tensor
    """(N) index of the token's answer, -1 in an open answer set."""
    steps: Tensor
    """(N) place of the token in its answer."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The closed answer set, tokenised and packed behind a prompt, so that one pass scores every answer.

    Each answer's tokens but the last follow the prompt side by side; a mask hides the answers from each other
    and every answer's positions go on from the prompt's end.
    """

    ids: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def packed(self) -> list[tuple[int, int]]:
        """(answer, step) of every packed token."""
        return [(a, s) for a, ids in enumerate(self.ids) for s in range(len(ids) - 1)]

    def mask(self) -> Tensor:
        """(K, K): True where a packed token sees another, earlier or itself, of the same answer."""
        answer = torch.tensor([a for a, _ in self.packed])
        step = torch.tensor([s for _, s in self.packed])
        return (answer[:, None] == answer[None]) & (step[:, None] >= step[None])

    def log_likelihoods(self, logits: Tensor) -> Tensor:
        """Logits (B, 1 + K, V) at the prompt's end and each packed token -> (B, A) summed log-likelihood."""
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        place = {key: i for i, key in enumerate(self.packed, start=1)}
        columns = []
        for a, ids in enumerate(self.ids):
            at = [0, *(place[a, s] for s in range(len(ids) - 1))]
            columns.append(log_probs[:, at, list(ids)].sum(-1))
        return torch.stack(columns, dim=1)


class Batcher:
    """Builds batches of one data set for one processor; images are held as uint8 and normalised per batch.

    With `features`, what a frozen tower said of each image (T, F), `pixels` are not read and may be empty.
    """

    def __init__(
        self,
        processor: Any,
        examples: Sequence[Example],
        pixels: Mapping[str, Tensor],
        device: torch.device,
        features: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._processor, self.examples, self._pixels, self._device = processor, examples, pixels, device
        self.features = features
        self._prompt = functools.cache(processor.encode_question)
        self._answer = functools.cache(processor.encode_answer)

    def num_answer_tokens(self, ids: Ids) -> int:
        return sum(len(self._answer(self.examples[i].answer)) for i in ids)

    def lengths(self, ids: Ids) -> list[int]:
        """Tokens of prompt and answer, which are a row of a training batch before padding."""
        shown = [self.examples[i] for i in ids]
        return [len(self._prompt(e.question)) + len(self._answer(e.answer)) for e in shown]

    def training(self, ids: Ids, shifts: np.ndarray | None = None) -> Batch:
        """Prompts with answers, right-padded; the causal mask alone keeps padding from mattering.

        Without ids: a batch that runs through the model and predicts nothing, for a process with no share in
        a step. `shifts` (len(ids), 3) augments: mirrored or not, shift down, shift right as shares of the
        image.
        """
        rows: list[list[int]] = []
        predict_at: list[int] = []
        targets: list[int] = []
        labels: list[int] = []
        steps: list[int] = []
        shown = ids if len(ids) else [0]
        for i in shown:
            example = self.examples[i]
            prompt, answer = self._prompt(example.question), self._answer(example.answer)
            rows.append([*prompt, *answer])
        length = max(map(len, rows))
        for b, i in enumerate(ids):
            answer = self._answer(self.examples[i].answer)
            first = len(rows[b]) - len(answer)
            predict_at += [b * length + first - 1 + s for s in range(len(answer))]
            targets += answer
            labels += [-1 if (label := self.examples[i].label) is None else label] * len(answer)
            steps += range(len(answer))
        inputs = {
            "input_ids": self._padded(rows, length),
            **self._images(shown, shifts if len(ids) else None),
            "predict_at": torch.tensor(predict_at, dtype=torch.long),
        }
        return Batch(
            inputs={name: self._sent(value) for name, value in inputs.items()},
            targets=self._sent(torch.tensor(targets, dtype=torch.long)),
            labels=self._sent(torch.tensor(labels, dtype=torch.long)),
            steps=self._sent(torch.tensor(steps, dtype=torch.long)),
        )

    def scoring(self, ids: Ids, candidates: Candidates) -> dict[str, Tensor]:
        """Model inputs that predict, in each row, at the prompt's end and at each packed candidate token."""
        prompts = [self._prompt(self.examples[i].question) for i in ids]
        width, packed = max(map(len, prompts)), candidates.packed
        num_packed, length = len(packed), width + len(packed)
        tail = [candidates.ids[a][s] for a, s in packed]
        input_ids = self._padded(prompts, length)
        input_ids[:, width:] = torch.tensor(tail, dtype=torch.long)
        mask = torch.tril(torch.ones(length, length, dtype=torch.bool)).repeat(len(ids), 1, 1)
        mask[:, width:, width:] = candidates.mask() if num_packed else mask[:, width:, width:]
        position = torch.arange(length).repeat(len(ids), 1)
        predict_at = []
        for b, prompt in enumerate(prompts):
            mask[b, width:, len(prompt) : width] = False
            position[b, width:] = torch.tensor([len(prompt) + s for _, s in packed], dtype=torch.long)
            predict_at += [b * length + len(prompt) - 1, *(b * length + width + k for k in range(num_packed))]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask.unsqueeze(1),
            "position_ids": position,
            **self._images(ids, None),
            "predict_at": torch.tensor(predict_at),
        }
        return {name: self._sent(value) for name, value in inputs.items()}

    def prompts(self, ids: Ids) -> dict[str, Tensor]:
        """Left-padded prompts and images for `generate`."""
        rows = [self._prompt(self.examples[i].question) for i in ids]
        length, pad = max(map(len, rows)), self._processor.tokenizer.pad_token_id
        inputs = {
            "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
            **self._images(ids, None),
        }
        return {name: self._sent(value) for name, value in inputs.items()}

    def _sent(self, value: Tensor) -> Tensor:
        """On the device; the GPU is not waited for, so that the next batch is made while it computes."""
        if self._device.type == "cuda" and value.device.type == "cpu":
            return value.pin_memory().to(self._device, non_blocking=True)
        return value.to(self._device)

    def _padded(self, rows: Sequence[Sequence[int]], length: int) -> Tensor:
        pad = self._processor.tokenizer.pad_token_id
        return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], dtype=torch.long)

    def _images(self, ids: Ids, shifts: np.ndarray | None) -> dict[str, Tensor]:
        """The model's argument that holds the images."""
        keys = [self.examples[i].image_key for i in ids]
        if self.features is not None:
            if shifts is not None:
                raise ValueError("augmentation moves pixels, but these batches hold features; turn one off.")
            with torch.autocast("cpu", enabled=False):  # to bf16 it refuses to stack rows of fp16
                return {"image_features": torch.stack([self.features[key] for key in keys])}
        images = [self._pixels[key] for key in keys]
        if shifts is not None:
            images = [_shifted(image, *row) for image, row in zip(images, shifts, strict=True)]
        if len({image.shape[0] for image in images}) > 1:  # grey beside colour
            images = [image.expand(3, -1, -1) for image in images]
        return {"pixel_values": self._processor.normalise(torch.stack(images))}


def _shifted(image: Tensor, mirrored: float, down: float, right: float) -> Tensor:
    """An image mirrored and shifted; what enters at an edge repeats the edge."""
    if mirrored > 0.5:
        image = image.flip(-1)
    for dim, share in ((-2, down), (-1, right)):
        size = image.shape[dim]
        source = (torch.arange(size) - round(share * size)).clamp(0, size - 1)
        image = image.index_select(dim, source)
    return image


def draw_shifts(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3): mirrored (above 0.5), shift down and shift right as shares of the image."""
    return np.column_stack([rng.random(count), rng.uniform(-MAX_SHIFT, MAX_SHIFT, (count, 2))])


def step_order(
    ids: Ids,
    labels: Sequence[int | None],
    *,
    batch_size: int,
    num_epoch: int,
    local_steps: int | None,
    balanced: bool,
    rng: np.random.Generator,
    lengths: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """The examples of each optimizer step: shuffled epochs whose last batch may be smaller.

    No example is repeated or dropped within an epoch, unless `balanced`: then an epoch draws as many examples
    with replacement, each label equally often in expectation. With `lengths`, one for each of `ids`, examples
    of similar length share a batch.
    """
    pool = np.asarray(ids)
    length_of = None if lengths is None else dict(zip(ids, lengths, strict=True))
    weights = None
    if balanced:
        of_label: dict[int | None, int] = {}
        for label in labels:
            of_label[label] = of_label.get(label, 0) + 1
        weights = np.array([1.0 / of_label[label] for label in labels])
        weights /= weights.sum()
    steps: list[np.ndarray] = []
    while len(pool) and len(steps) < (
        local_steps if local_steps is not None else num_epoch * -(-len(pool) // batch_size)
    ):
        epoch = rng.permutation(pool) if weights is None else rng.choice(pool, size=len(pool), p=weights)
        batches = [epoch[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        steps += batches if length_of is None else _bucketed(batches, length_of, rng)
    return steps[:local_steps]


def _bucketed(
    batches: Sequence[np.ndarray], length_of: Mapping[int, int], rng: np.random.Generator
) -> list[np.ndarray]:
    """An epoch's batches, refilled by length and in random order.

    Examples move within stretches of half the epoch, or 50 batches if that is less, so that others meet in
    the next epoch. A smaller last batch stays as it is. Sorting is the best division of a stretch: there is
    never more padding than before. Where the answer decides the length, batches cluster by answer.
    Source: the LengthGroupedSampler of transformers, whose stretches are quarters.
    """
    whole = len(batches) - (len(batches[-1]) < len(batches[0]))
    stretch = min(MAX_STRETCH, max(1, -(-whole // 2)))
    refilled: list[np.ndarray] = []
    for start in range(0, whole, stretch):
        part = batches[start : min(start + stretch, whole)]
        examples = np.concatenate(part)
        order = np.argsort([length_of[i] for i in examples], kind="stable")
        refilled += np.split(examples[order], len(part))
    return [refilled[i] for i in rng.permutation(whole)] + list(batches[whole:])
