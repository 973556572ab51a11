"""What a job of each level is launched with, from `--level_resources`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Level -> resources. Raises InputError, a line for each unknown level or name, or value of no use."""
    content = read_yaml(path) if path is not None else {}
    problems = [
        f"--level_resources {path}: {problem}"
        for key, given in content.items()
        for problem in _problems(key, given, levels)
    ]
    if problems:
        raise InputError("\n".join(problems))
    base = _with(Resources(), content.get(EVERY_LEVEL))
    return {level: _with(base, content.get(level)) for level in levels}


def _problems(key: Any, given: Any, levels: tuple[int, ...]) -> Iterator[str]:
    if key != EVERY_LEVEL and key not in levels:
        yield f"unknown level {key!r}; expected {EVERY_LEVEL} or one of {', '.join(map(str, levels))}."
        return
    if given is not None and not isinstance(given, Mapping):
        yield f"{key}: got {given!r}; expected entries such as processes: 4."
        return
    known = [field.name for field in fields(Resources)]
    values = dict(given or {})
    for name in values:
        if name not in known:
            yield f"{key}: unknown name '{name}'; {nearest(str(name), known)}known: {', '.join(known)}."
    for name, least in (("processes", 1), ("gpus", 0)):
        if name in values and (type(values[name]) is not int or values[name] < least):
            yield f"{key}: {name}: got {values[name]!r}; expected a whole number >= {least}."
    arguments = values.get("sbatch", [])
    if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
        yield f"{key}: sbatch: got {arguments!r}; expected a list such as ['--time=60']."
    config = values.get("accelerate_config")
    if config is not None and not Path(str(config)).is_file():
        yield f"{key}: accelerate_config: no file {config}; expected one for accelerate launch."


def _with(base: Resources, given: Mapping[str, Any] | None) -> Resources:
    values = dict(given or {})
    if "sbatch" in values:
        values["sbatch"] = tuple(values["sbatch"])
    if values.get("accelerate_config") is not None:
        values["accelerate_config"] = str(Path(values["accelerate_config"]).absolute())
    return replace(base, **values)
