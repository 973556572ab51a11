"""What a job of each level is launched with, from `--level_resources`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from scalefl.config.values import nearest
from scalefl.config.yamlfile import read_yaml
from scalefl.contracts import InputError

EVERY_LEVEL = "default"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one job."""

    processes: int = 1
    """That train a client together."""
    gpus: int = 0
    """That the job sees."""
    accelerate_config: str | None = None
    """For `accelerate launch --config_file`; unset: none with one process, DDP with several."""
    sbatch: tuple[str, ...] = ()
    """Further arguments of sbatch, such as --partition=a100 --constraint=nvlink --time=02:00:00."""


def read_resources(path: str | None, levels: tuple[int, ...]) -> dict[int, Resources]:
    """Level -> resources. Raises InputError for an unknown level or name, and for a value of another kind."""
    content = read_yaml(path) if path is not None else {}
    base = _read(path, EVERY_LEVEL, content.get(EVERY_LEVEL), Resources())
    unknown = [key for key in content if key != EVERY_LEVEL and key not in levels]
    if unknown:
        raise InputError(
            f"--level_resources {path}: unknown level {unknown[0]!r}; expected {EVERY_LEVEL} or one of "
            f"{', '.join(map(str, levels))}."
        )
    return {level: _read(path, level, content.get(level), base) for level in levels}


def _read(path: str | None, level: Any, given: Any, base: Resources) -> Resources:
    where = f"--level_resources {path}: {level}"
    known = [field.name for field in fields(Resources)]
    if given is None:
        return base
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: got {given!r}; expected entries such as processes: 4.")
    values = dict(given)
    for name in values:
        if name not in known:
            raise InputError(
                f"{where}: unknown name '{name}'; {nearest(name, known)}known: {', '.join(known)}."
            )
    for name, least in (("processes", 1), ("gpus", 0)):
        if name in values and (type(values[name]) is not int or values[name] < least):
            raise InputError(f"{where}: {name}: got {values[name]!r}; expected a whole number >= {least}.")
    if "sbatch" in values:
        arguments = values["sbatch"]
        if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
            raise InputError(f"{where}: sbatch: got {arguments!r}; expected a list such as ['--time=60'].")
        values["sbatch"] = tuple(arguments)
    config = values.get("accelerate_config")
    if config is not None and not Path(str(config)).is_file():
        raise InputError(f"{where}: accelerate_config: no file {config}; expected one for accelerate launch.")
    if config is not None:
        values["accelerate_config"] = str(Path(config).absolute())
    return replace(base, **values)
