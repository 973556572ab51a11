"""What `--init_from` names: a whole model, or the trained part of one whose frozen base is elsewhere."""

import dataclasses
from pathlib import Path

from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.saved import CONFIG_FILE, load_config
from scalefl.contracts import InputError

SAME_PART = ("tuning", "freeze_vit", "lora_r", "lora_alpha", "lora_targets", "ee_locs")
"""Options that decide what the trained part of a model is; it can go on only under the same ones."""


def base_of_part(run: RunConfig) -> tuple[RunConfig, ModelFile] | None:
    """How to build the base of a trained part: the run and model file that built it. None for a whole model.

    Raises InputError where `--init_from` names neither, or what this run cannot start from. Weights are not
    looked at.
    """
    assert run.init_from is not None
    source = Path(run.init_from)
    if (source / CONFIG_FILE).is_file():
        earlier, earlier_file = load_config(source)
        if earlier.arch != run.arch:
            raise InputError(f"--init_from {source}: holds a {earlier.arch}; expected a {run.arch}.")
        if earlier.tuning == "lora" or earlier.freeze_vit:
            _check_same_part(run, earlier, source)
            return dataclasses.replace(run, init_from=earlier.init_from, seed=earlier.seed), earlier_file
    if not (source / "config.json").is_file():
        raise InputError(
            f"--init_from {source}: no model there; expected a folder with config.json and model.safetensors "
            "or a checkpoint such as SAVE_PATH/checkpoints/round-0005; if it has moved, name its new place."
        )
    return None


def _check_same_part(run: RunConfig, earlier: RunConfig, source: Path) -> None:
    differing = [name for name in SAME_PART if getattr(earlier, name) != getattr(run, name)]
    if differing:
        raise InputError(
            f"--init_from {source}: holds only the trained part of a model; expected the options it was "
            f"trained with: {', '.join(f'--{name} {getattr(earlier, name)}' for name in differing)}."
        )
