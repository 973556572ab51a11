"""What is planned for, known without data and weights: the model's config, and the length of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.origin import base_of_part
from scalefl.config.planoptions import PlanOptions
from scalefl.contracts import InputError
from scalefl.models.family import ModelFamily

CHARACTERS_PER_TOKEN = 3
"""Of English under a pretrained tokenizer, rather few: a longer row is the safer guess."""
PLACEHOLDER_ID = 4
"""An image token's id; which one it is changes no memory."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run's model and rows."""

    family: ModelFamily
    config: Any
    """The whole model's, with the exits that it was saved with."""
    model_file: ModelFile
    """The one that describes the model, which may be an earlier run's."""
    length: int
    """Positions of a row."""
    answer_length: int
    """Predicted positions of a row."""
    image_features: tuple[int, int]
    """Image tokens T, and the features F of each."""
    notes: tuple[str, ...]
    """What was assumed, for people."""


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """In place of a tokenizer that is not there yet."""

    size: int
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 3

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True, kw_only=True)
class _Processor:
    """What a family's `config` reads of a processor."""

    tokenizer: _Vocabulary
    image_token_id: int = PLACEHOLDER_ID


def subject_of(run: RunConfig, model_file: ModelFile, family: ModelFamily, options: PlanOptions) -> Subject:
    """Raises InputError where `--init_from` names nothing that a run could start from."""
    config, model_file, vocabulary = _config(run, model_file, family)
    tokens, features = _image_features(family, config)
    prompt, answer, text = _text_lengths(run, model_file, family)
    answer = options.answer_length or answer
    if options.seq_length is not None:
        length, rows = options.seq_length, f"rows of {options.seq_length} positions (--seq_length)"
    else:
        length = tokens + prompt + answer
        rows = (
            f"rows of {length} positions: {tokens} of the image, {prompt} of the prompt, {answer} to predict"
        )
        rows += f" ({text})"
    if tokens + answer >= length:
        raise InputError(
            f"--seq_length: got {length}, of which {tokens} are the image and {answer} the answer; "
            "expected room for the question too."
        )
    return Subject(
        family=family,
        config=config,
        model_file=model_file,
        length=length,
        answer_length=answer,
        image_features=(tokens, features),
        notes=(rows, vocabulary),
    )


def _config(run: RunConfig, model_file: ModelFile, family: ModelFamily) -> tuple[Any, ModelFile, str]:
    """The model's config, the file that describes it, and what its vocabulary was taken from."""
    if run.init_from is None:
        size = model_file.tokenizer.get("vocab_size") or model_file.text["vocab_size"]
        processor = _Processor(tokenizer=_Vocabulary(size=size))
        is_trained = model_file.tokenizer.get("kind") == "trained"
        taken = "at most, since its tokenizer is trained on the data" if is_trained else "of its tokenizer"
        return family.config(model_file, processor), model_file, f"vocabulary {size}, {taken}"
    if (base := base_of_part(run)) is not None:
        return _config(*base, family)
    source = Path(run.init_from)
    return family.load_config(str(source)), model_file, f"sizes from {source / 'config.json'}"


def _image_features(family: ModelFamily, config: Any) -> tuple[int, int]:
    """(T, F) of one image."""
    size = config.vision_config.image_size
    with torch.device("meta"), torch.no_grad():
        said = family.encode_images(family.new_model(config), torch.empty(1, 3, size, size))
    return said.shape[1], said.shape[2]


def _text_lengths(run: RunConfig, model_file: ModelFile, family: ModelFamily) -> tuple[int, int, str]:
    """Tokens of the prompt without the image, of the longest answer, and how they were counted."""
    if model_file.tokenizer.get("kind") == "trained":
        processor = family.processor(model_file, [run.question, *run.answers])
        prompt = len(processor.encode_question(run.question)) - processor.num_image_tokens
        return prompt, max(len(processor.encode_answer(a)) for a in run.answers), "of --question, --answers"
    question = model_file.prompt_template.format(f"<Img></Img> {run.question}")
    longest = max(len(answer) for answer in run.answers)
    prompt, answer = (-(-count // CHARACTERS_PER_TOKEN) + 1 for count in (len(question), longest))
    counted = f"of --question and --answers, at {CHARACTERS_PER_TOKEN} characters a token"
    return prompt, answer, counted
