"""A model folder ready to answer: model, processor, question, candidate answers, and when to leave early."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalefl.batches import Batcher, Candidates
from scalefl.config.saved import CONFIG_FILE, load_config
from scalefl.contracts import Example, InputError
from scalefl.inference import ExitRule, answer
from scalefl.models.build import check_weights
from scalefl.models.files import TensorFiles
from scalefl.registry import resolve

TASK_FILE = "task.json"
"""In an exported folder: `arch`, `question` and `answers` of the run."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model was trained to be asked."""

    arch: str = "MiniGPTv2"
    question: str | None = None
    answers: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says of one image."""

    text: str
    probabilities: Mapping[str, float]
    """Of each candidate at the exit that answered; empty where the model wrote its answer."""
    exit: int
    milliseconds: float
    """Of its batch, divided by the images in it."""


def task_of(folder: Path) -> Task:
    """What is told of it beside the model, if anything. Raises InputError if that is damaged."""
    if (path := folder / TASK_FILE).is_file():
        try:
            content = json.loads(path.read_text("utf-8"))
            answers = content["answers"]
            return Task(**{**content, "answers": None if answers is None else tuple(answers)})
        except (ValueError, KeyError, TypeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{path}: damaged ({told}); remove it, and give --question and --answers."
            ) from error
    if (folder / CONFIG_FILE).is_file():
        run, _ = load_config(folder)
        return Task(arch=run.arch, question=run.question, answers=run.answers)
    return Task()


def check_is_model(folder: Path) -> None:
    """Raises InputError, with the way to a model where one can be made."""
    if (folder / "config.json").is_file():
        return
    made = "expected a folder such as `scalefl convert` or `scalefl export` writes"
    checkpoints = sorted((folder / "checkpoints").glob("round-*[0-9]"))
    if source := checkpoints[-1] if checkpoints else folder if (folder / CONFIG_FILE).is_file() else None:
        made = f"`scalefl export --checkpoint {source}` makes one of this checkpoint"
    raise InputError(f"--model {folder}: no model there (config.json is missing); {made}.")


def device_of(use_gpu: bool | None) -> torch.device:
    """As asked for; unset: a GPU where there is one. Raises InputError where there is none."""
    if use_gpu and not torch.cuda.is_available():
        raise InputError("--use_gpu: no CUDA GPU was found; leave the flag out, or check the driver.")
    wanted = torch.cuda.is_available() if use_gpu is None else use_gpu
    return torch.device("cuda" if wanted else "cpu")


class Answering:
    """One model, one question."""

    def __init__(
        self, folder: Path, device: torch.device, question: str | None, answers: tuple[str, ...] | None
    ) -> None:
        """Raises InputError if the folder holds no whole model, or no question is known."""
        check_is_model(folder)
        task = task_of(folder)
        if (chosen := question or task.question) is None:
            raise InputError(f"--model {folder}: does not say what it was asked; expected --question TEXT.")
        self.question = chosen
        self.family = resolve("arch", task.arch)
        check_weights(self.family, self.family.load_config(str(folder)), TensorFiles(folder))
        self.model = self.family.load_model(str(folder)).eval().requires_grad_(False).to(device)
        self.processor, self.device = self.family.load_processor(str(folder)), device
        self.answers = answers
        self.candidates = None
        if answers is not None:
            self.candidates = Candidates(ids=tuple(tuple(self.processor.encode_answer(a)) for a in answers))

    @property
    def num_exits(self) -> int:
        return len(self.model.config.exit_layers)

    def prepare(self, image: Any) -> Tensor:
        """uint8 pixels at the model's size."""
        return self.processor.resize(image)

    def asking(self, keys: Iterable[str]) -> list[Example]:
        """The question about each image."""
        return [Example(image_key=key, patient=key, question=self.question, answer="") for key in keys]

    @torch.no_grad()
    def answer(self, pixels: Sequence[Tensor], rule: ExitRule, max_new_tokens: int) -> list[Answer]:
        """One answer for each image."""
        started = time.perf_counter()
        shown = {str(number): image for number, image in enumerate(pixels)}
        batcher, ids = Batcher(self.processor, self.asking(shown), shown, self.device), range(len(pixels))
        choices = answer(self.model, batcher, ids, self.candidates, rule)
        if self.answers is not None:
            texts = [_likeliest(self.answers, choice.probabilities) for choice in choices]
        else:
            texts = self._written(batcher, [choice.exit for choice in choices], max_new_tokens)
        milliseconds = 1000 * (time.perf_counter() - started) / len(pixels)
        return [
            Answer(
                text=text,
                probabilities=dict(zip(self.answers or (), choice.probabilities, strict=True)),
                exit=choice.exit,
                milliseconds=milliseconds,
            )
            for text, choice in zip(texts, choices, strict=True)
        ]

    def _written(self, batcher: Batcher, exits: Sequence[int], max_new_tokens: int) -> list[str]:
        """Greedy answers, each from its own exit all through."""
        texts = [""] * len(exits)
        for exit in sorted(set(exits)):
            ids = [number for number, own in enumerate(exits) if own == exit]
            inputs = batcher.prompts(ids)
            out = self.model.generate(**inputs, exit=exit, max_new_tokens=max_new_tokens, do_sample=False)
            for number, row in zip(ids, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                texts[number] = self.processor.decode_answer(row)
        return texts


def _likeliest(answers: Sequence[str], probabilities: Sequence[float]) -> str:
    return answers[max(range(len(answers)), key=probabilities.__getitem__)]
