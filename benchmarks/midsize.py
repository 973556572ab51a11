"""The run that the benchmarks share: a MiniGPT-v2 of 211 M random weights, and synthetic radiographs.

Text: 16 layers of 1024, exits after 4, 8, 12 and 16, LoRA of rank 64 on q and v; four levels of widths .4,
.55, .75 and 1. Vision: 4 layers of 256. A row of a batch has about 260 tokens. `small` is for trying a script
out.
"""

import copy
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.resolve import resolve

VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
MIDSIZE = {
    "model": {"arch": "minigpt_v2", "image_size": 112, "vit_precision": "fp32", "end_sym": "</s>"},
    "vision": {**VISION, "patch_size": 28},
    "text": {
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
    },
    "tokenizer": {"kind": "trained", "vocab_size": 4096},
    "train": {"ee_locs": [4, 8, 12], "lora_r": 64},
}
SMALL = {
    "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
    "text": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
    "tokenizer": {"vocab_size": 512},
    "train": {"ee_locs": [1, 2, 3], "lora_r": 4},
}
"""What differs from MIDSIZE."""

RUN = {
    "tuning": "lora",
    "data": "synthetic",
    "num_patients": 160,
    "partitioner": "iid",
    "logit_adjustment": "off",  # plain training has no counterpart
    "KD_start": 0.0,
    "batch_size": 2,
    "local_steps": 2,
    "eval_limit": 4,
    "eval_batch_size": 2,
    "print_freq": 1_000_000,
    "use_gpu": False,
}


def resolved(folder: Path, *, small: bool, **options: Any) -> tuple[RunConfig, ModelFile]:
    """The run and its model file; what it takes is as for `options_of`."""
    return resolve(options_of(folder, small=small, **options))


def options_of(
    folder: Path,
    *,
    small: bool,
    sections: Mapping[str, Any] | None = None,
    question_words: int = 250,
    **options: Any,
) -> dict[str, Any]:
    """The run's options, with a model file in `folder`, where the run is saved as well.

    `sections` change the model file, `options` the run.
    """
    content: dict[str, Any] = copy.deepcopy(MIDSIZE)
    for changes in (SMALL if small else {}, sections or {}):
        for name, section in changes.items():
            content[name] = content.get(name, {}) | section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(content))
    asked = question(16 if small else question_words)
    flags = {"cfg_path": str(path), "save_path": str(folder / "run"), "question": asked}
    return RUN | flags | options


def question(num_words: int) -> str:
    """A prompt of about as many tokens: made-up words, so that there is a vocabulary to learn."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(draw.choices(letters, k=16)) for _ in range(num_words)) + "?"
