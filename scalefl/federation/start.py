"""What a run starts from: random weights, a saved model folder, or a checkpoint of an earlier run."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from scalefl import checkpoint
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.saved import CONFIG_FILE, load_config
from scalefl.contracts import InputError, State
from scalefl.models.build import build_global, new_model
from scalefl.models.family import ModelFamily
from scalefl.models.store import ResidentStore

log = logging.getLogger("scalefl")

SAME_PART = ("tuning", "freeze_vit", "lora_r", "lora_alpha", "lora_targets", "ee_locs")
"""Options that decide what the trained part of a model is; it can go on only under the same ones."""


def start_from(
    run: RunConfig,
    model_file: ModelFile,
    family: ModelFamily,
    texts: list[str],
    processor_from: str | None,
    device: torch.device,
) -> tuple[Any, ResidentStore, State]:
    """The processor, the store and the trainable state a run starts from.

    A tokenizer is trained on `texts` unless `processor_from` or `--init_from` names a folder that has one.
    """
    if run.init_from is None:
        processor = (
            family.load_processor(processor_from) if processor_from else family.processor(model_file, texts)
        )
        if run.tuning == "lora":
            log.warning("--tuning lora without --init_from: adapters on a base of random weights")
        model = new_model(run, family, family.config(model_file, processor))
        store, state = build_global(run, family, model, from_scratch=True, device=device)
        return processor, store, state
    source = Path(run.init_from)
    if (source / CONFIG_FILE).is_file():
        earlier, earlier_file = load_config(source)
        if earlier.arch != run.arch:
            raise InputError(f"--init_from {source}: holds a {earlier.arch}; expected a {run.arch}.")
        if earlier.tuning == "lora" or earlier.freeze_vit:
            return _from_part(run, source, earlier, earlier_file, family, device)
    if not (source / "config.json").is_file():
        raise InputError(
            f"--init_from {source}: no model there; expected a folder with config.json and model.safetensors "
            "or a checkpoint such as SAVE_PATH/checkpoints/round-0005."
        )
    model, processor = family.load_folder(str(source))
    store, state = build_global(run, family, model, from_scratch=False, device=device)
    return processor, store, state


def _from_part(
    run: RunConfig,
    source: Path,
    earlier: RunConfig,
    earlier_file: ModelFile,
    family: ModelFamily,
    device: torch.device,
) -> tuple[Any, ResidentStore, State]:
    """A checkpoint without its frozen base: build the base as that run did, then take its trainable state."""
    differing = [name for name in SAME_PART if getattr(earlier, name) != getattr(run, name)]
    if differing:
        raise InputError(
            f"--init_from {source}: holds only the trained part of a model; expected the options it was "
            f"trained with: {', '.join(f'--{name} {getattr(earlier, name)}' for name in differing)}."
        )
    base_run = dataclasses.replace(run, init_from=earlier.init_from, seed=earlier.seed)
    processor, store, initial = start_from(base_run, earlier_file, family, [], str(source), device)
    state = dict(checkpoint.load(source).state)
    check_same_parameters(state, initial, str(source))
    return processor, store, state


def check_same_parameters(state: State, initial: State, source: str) -> None:
    """A checkpoint of another architecture is refused by the first parameter that differs."""
    for name in sorted(state.keys() | initial.keys()):
        got, expected = (tuple(s[name].shape) if name in s else "nothing" for s in (state, initial))
        if got != expected:
            raise InputError(
                f"{source}: checkpoint of another architecture: {name} has shape {got}, this run's model "
                f"expects {expected}; use the --cfg-path, --tuning and --lora_r it was trained with."
            )
