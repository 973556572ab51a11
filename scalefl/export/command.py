"""`scalefl export`: a level of a checkpoint as a folder for transformers, or its LoRA as one for peft."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig

from scalefl.config.exportoptions import ExportOptions
from scalefl.console import Display
from scalefl.contracts import InputError, State
from scalefl.export.card import card
from scalefl.export.submodel import Exported, dtype_of, exported
from scalefl.models.adapters import is_adapter, write_adapters
from scalefl.models.files import new_folder, write_tensors
from scalefl.prediction.loaded import TASK_FILE

LANGUAGE = "language_model."


def export(options: ExportOptions) -> None:
    """Write what was asked for, and say where."""
    assert options.checkpoint and options.out
    folder, out = Path(options.checkpoint), Path(options.out)
    if out.exists():
        raise InputError(f"--out {out}: is there already; expected a new folder.")
    with exported(folder, options.level, merges=options.merge_lora, init_from=options.init_from) as model:
        if options.part == "adapter" and model.lora is None:
            raise InputError(f"--part adapter: {folder} has no adapters; it was trained with --tuning full.")
        dtype = dtype_of(options.dtype, model.run)
        with new_folder(out) as temporary:
            WRITERS[options.part](model, temporary, dtype)
            (temporary / TASK_FILE).write_text(json.dumps(task(model), indent=1), encoding="utf-8")
            (temporary / "README.md").write_text(card(model, options.part, folder), encoding="utf-8")
    Display(speaks=True, print_freq=1).line(f"{options.part:<12} {out}")


def task(model: Exported) -> dict[str, Any]:
    """What `scalefl predict` asks the model, if nothing else is said."""
    run = model.run
    return {"arch": run.arch, "question": run.question, "answers": run.answers}


def write_whole(model: Exported, folder: Path, dtype: torch.dtype) -> None:
    """The sub-model with its exits, for this project's own class."""
    adapters: State = {}
    write_tensors(folder, _cast(_apart(model.tensors(), adapters), dtype))
    if model.lora is not None:
        write_adapters(folder, model.lora, adapters)
    model.config.architectures = ["MiniGPTv2ForConditionalGeneration"]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    model.processor.save_pretrained(folder)


def write_language(model: Exported, folder: Path, dtype: torch.dtype) -> None:
    """The language model up to its last exit, for `AutoModelForCausalLM` without this project."""
    adapters: State = {}
    names = ((name, tensor) for name, tensor in model.tensors() if name.startswith(LANGUAGE))
    plain = ((name.removeprefix(LANGUAGE), tensor) for name, tensor in names)
    write_tensors(folder, _cast(_apart(plain, adapters), dtype))
    if model.lora is not None:
        write_adapters(folder, model.lora, adapters, prefix="", task_type="CAUSAL_LM")
    config = plain_config(model.config.text_config)
    config.dtype = dtype
    config.save_pretrained(folder)
    model.processor.tokenizer.save_pretrained(folder)


def write_adapter(model: Exported, folder: Path, dtype: torch.dtype) -> None:
    """The whole model's LoRA alone, for `PeftModel.from_pretrained` on the language model."""
    assert model.lora is not None
    adapters = {
        name.removeprefix(LANGUAGE): tensor.to(dtype)
        for name, tensor in model.trained.items()
        if is_adapter(name)
    }
    write_adapters(folder, model.lora, adapters, prefix="", task_type="CAUSAL_LM")


WRITERS = {"whole": write_whole, "language": write_language, "adapter": write_adapter}


def plain_config(text: Any) -> LlamaConfig | MistralConfig:
    """A Llama's config, or a Mistral's where the heads do not divide the hidden size.

    Llama's refuses that even where the size of a head is given; without a sliding window Mistral's model
    computes the same.
    """
    own = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype")
    values = {key: value for key, value in text.to_dict().items() if key not in own}
    if text.hidden_size % text.num_attention_heads == 0:
        return LlamaConfig(**values, architectures=["LlamaForCausalLM"])
    of_llama = ("attention_bias", "mlp_bias", "pretraining_tp")
    values = {key: value for key, value in values.items() if key not in of_llama}
    return MistralConfig(**values, sliding_window=None, architectures=["MistralForCausalLM"])


def _apart(tensors: Iterator[tuple[str, Tensor]], adapters: State) -> Iterator[tuple[str, Tensor]]:
    """All but the adapters, which are put aside."""
    for name, tensor in tensors:
        if is_adapter(name):
            adapters[name] = tensor
        else:
            yield name, tensor


def _cast(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.to(dtype)) for name, tensor in tensors)
