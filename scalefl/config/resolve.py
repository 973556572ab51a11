"""Layers of options become one record. Later wins: defaults, preset, recipe, YAML files, flags.

A run that is resumed or evaluated starts from its own saved config in place of the first three.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from scalefl.config.checks import problems as problems_of
from scalefl.config.commands import OWN_OPTIONS
from scalefl.config.modelfile import ModelFile, read_model_file
from scalefl.config.options import LevelOptions, ModelOptions, RunConfig
from scalefl.config.recipes import RECIPES
from scalefl.config.saved import CONFIG_FILE, changed_on_resume, load_config, to_dict
from scalefl.config.values import Given, OptionsRead, read_options
from scalefl.config.yamlfile import read_yaml
from scalefl.contracts import InputError

log = logging.getLogger("scalefl")

RESUME_SAVE_PATH = "in --save_path"
"""`--resume` without a folder: the run in `--save_path`, or a new one where there is none yet."""

FIXED_IN_EVALUATION = {f.name for group in (ModelOptions, LevelOptions) for f in fields(group)} - {
    *("precision", "attn", "base_store", "feature_cache", "feature_dtype"),
    *("gradient_checkpointing", "checkpointing_levels"),
}
"""Options that say what the weights in a checkpoint mean."""


def resolve(
    flags: Mapping[str, Any], *config_files: str, command: str = "train"
) -> tuple[RunConfig, ModelFile]:
    """The run that flags (option -> text, texts or value) and YAML files of options ask for.

    Raises InputError with one line per problem, all of them at once; it names the `command` that was typed.
    """
    asked = read_layers(flags, *config_files, command=command)
    explicit, found = dict(asked.given), list(asked.problems)
    _settle_resume(explicit)
    try:
        base, model_file = _base(explicit)
    except InputError as error:
        raise InputError("\n".join([*found, str(error)])) from error

    layers = {**base, **_recipe(base, explicit), **explicit}
    if "momentum" in explicit and "optimizer" not in explicit:  # as in the original, whose optimizer is SGD
        layers["optimizer"] = Given(value="sgd", where="--optimizer")
    if "save_path" not in explicit and "resume" in layers and layers["resume"].value:
        layers["save_path"] = layers["resume"]  # the folder may have been moved since the run began
    run = _completed(RunConfig(**{name: given.value for name, given in layers.items()}), explicit)
    found += problems_of(
        run,
        model_file,
        lambda name: layers[name].where if name in layers else f"--{name}",
        asked.unread,
        asked_for=explicit,
    )
    found += _changes(run, explicit)
    if found:
        raise InputError("\n".join(found))
    return run, model_file


def read_layers(flags: Mapping[str, Any], *config_files: str, command: str = "train") -> OptionsRead:
    """What flags and YAML files of options say, as one: of two values the later one, flags last."""
    of_plan = OWN_OPTIONS["plan"].kinds()
    common: dict[str, Any] = {"command": command, "of_plan": of_plan}
    layers = [read_options(read_yaml(path), _named_in(path), **common) for path in config_files]
    suggested = OWN_OPTIONS[command].kinds() if command in OWN_OPTIONS else ()
    layers.append(read_options(flags, "--{}".format, **common, suggested=suggested))
    return OptionsRead(
        given={name: given for read in layers for name, given in read.given.items()},
        problems=[problem for read in layers for problem in read.problems],
        unread=_still_unread(layers),
    )


def _named_in(path: str) -> Callable[[str], str]:
    return lambda name: f"{path}: {name}"


def _completed(run: RunConfig, explicit: Mapping[str, Given]) -> RunConfig:
    """With what was left open and follows from the rest."""
    if run.evaluate_from is not None and "save_path" not in explicit:
        folder = Path(run.evaluate_from).absolute().parents[1]  # what a run keeps beside its checkpoints
        if (folder / CONFIG_FILE).is_file():
            run = replace(run, save_path=str(folder))
    if run.init_from is not None:  # a resume may come from another working directory
        run = replace(run, init_from=str(Path(run.init_from).absolute()))
    if run.freeze_vit is None:
        run = replace(run, freeze_vit=run.tuning == "lora")
    return run


def _settle_resume(explicit: dict[str, Given]) -> None:
    """Turn `--resume` without a folder into the folder it means, or into a new run."""
    if "resume" in explicit and explicit["resume"].value == RESUME_SAVE_PATH:
        folder = explicit["save_path"].value if "save_path" in explicit else RunConfig.save_path
        value = folder if Path(folder, CONFIG_FILE).is_file() else None
        if value is None:
            log.info("--resume: no run in %s yet; starting one", folder)
        explicit["resume"] = Given(value=value, where="--resume")


def _base(explicit: Mapping[str, Given]) -> tuple[dict[str, Given], ModelFile]:
    """The layers below what the user gave, and the model file."""
    for source in ("evaluate_from", "resume"):
        if source in explicit and explicit[source].value is not None:
            saved, model_file = load_config(explicit[source].value)
            values = {k: v for k, v in to_dict(saved).items() if k not in ("evaluate_from", "resume")}
            return _layer(values, f"{explicit[source].value}: "), model_file
    cfg_path = explicit.get("cfg_path")
    model_file = read_model_file(cfg_path.value if cfg_path else None)
    values = {"arch": model_file.arch, **model_file.train}
    return _layer(values, f"{model_file.name}: train."), model_file


def _layer(values: Mapping[str, Any], prefix: str) -> dict[str, Given]:
    return {name: Given(value=value, where=prefix + name) for name, value in values.items()}


def _recipe(base: Mapping[str, Given], explicit: Mapping[str, Given]) -> dict[str, Given]:
    """What the recipe sets; nothing where a saved run has applied it already."""
    settled = set(RECIPES["scalefl"]) <= set(base)
    lower = base["recipe"].value if "recipe" in base else RunConfig.recipe
    name = explicit["recipe"].value if "recipe" in explicit else lower
    return {} if settled and name == lower else _layer(RECIPES[name], f"recipe {name}: ")


def _still_unread(layers_read: Sequence[OptionsRead]) -> set[str]:
    """Options whose last value could not be read."""
    unread: set[str] = set()
    for read in layers_read:
        unread = (unread - set(read.given)) | set(read.unread)
    return unread


def _changes(run: RunConfig, explicit: Mapping[str, Given]) -> list[str]:
    """Options that the saved run does not allow to change."""
    source = run.evaluate_from or run.resume
    if not source:
        return []
    saved, _ = load_config(source)
    changed = changed_on_resume(saved, run)
    if run.evaluate_from:
        changed = [name for name in changed if name in FIXED_IN_EVALUATION]
    return [
        f"{explicit[name].where if name in explicit else '--' + name}: got {getattr(run, name)}, "
        f"{source} has {getattr(saved, name)}; a saved run keeps it: drop the option, or start a new run."
        for name in changed
    ]
