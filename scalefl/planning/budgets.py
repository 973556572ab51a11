"""What clients' machines offer, read from a YAML or JSON list."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scalefl.config.values import nearest
from scalefl.config.yamlfile import Loader
from scalefl.contracts import InputError

KEYS = ("client", "memory", "flops", "bandwidth")
TOGETHER = ("flops", "bandwidth")
PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
PREFIXES |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
QUANTITY = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmgtp]i?)?\s*([a-z/]*)", re.IGNORECASE)
"""A number, a prefix, a unit."""

EXAMPLE = "- {client: 0, memory: 8GB, flops: 1e12, bandwidth: 10MB/s}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One client's machine."""

    client: str
    """As the file names it."""
    memory: int
    """Bytes of the device that trains."""
    flops: float | None
    """Floating-point operations a second; None without a bandwidth, too."""
    bandwidth: float | None
    """Bytes a second, each way."""


def read_budgets(path: str, numbered: bool = True) -> tuple[Budget, ...]:
    """Budgets in the order of client numbers. Raises InputError with one line per problem.

    Clients that are named are numbered in the file's order; numbers must be 0, 1, 2 and so on, unless they
    are not `numbered`: then numbers are names like any other.
    """
    problems: list[str] = []
    budgets: list[Budget] = []
    for place, row in enumerate(_rows(path), start=1):
        found = _budget(row, f"{path}: entry {place}", problems)
        if found is not None:
            budgets.append(found)
    names = [budget.client for budget in budgets]
    problems += [
        f"{path}: client {name}: given {names.count(name)} times; expected each client once."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    numbers = [name for name in names if name.isdecimal()]
    if not problems and numbers and numbered:
        if sorted(map(int, numbers)) != list(range(len(names))):
            problems.append(
                f"{path}: clients {', '.join(names)}; expected names, or the numbers 0 to {len(names) - 1}."
            )
        else:
            budgets.sort(key=lambda budget: int(budget.client))
    if problems:
        raise InputError("\n".join(problems))
    return tuple(budgets)


def _rows(path: str) -> Sequence[Any]:
    """The list in a file; JSON is YAML."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise InputError(
            f"--client_budgets {path}: {error.strerror}; expected a list of {EXAMPLE}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"--client_budgets {path}: no valid YAML ({text}); mend that place.") from error
    if not isinstance(content, list) or not content:
        raise InputError(f"--client_budgets {path}: got {_kind(content)}; expected a list of {EXAMPLE}")
    return content


def _kind(content: Any) -> str:
    return "an empty list or file" if not content else f"a {type(content).__name__}"


def _budget(row: Any, where: str, problems: list[str]) -> Budget | None:
    if not isinstance(row, Mapping):
        problems.append(f"{where}: got {row!r}; expected keys and values such as {EXAMPLE}")
        return None
    before = len(problems)
    for key in row:
        if key not in KEYS:
            hint = nearest(str(key), KEYS)
            problems.append(f"{where}: {key}: unknown key; {hint}known: {', '.join(KEYS)}.")
    problems += [f"{where}: {key}: missing; expected {EXAMPLE}" for key in KEYS[:2] if key not in row]
    client = row.get("client")
    if "client" in row and (isinstance(client, bool) or not isinstance(client, str | int) or client == ""):
        problems.append(f"{where}: client: got {client!r}; expected a name or a number.")
    quantities = {
        key: _quantity(row[key], f"{where}: {key}", unit, plain, problems)
        for key, unit, plain in (("memory", "B", 1e9), ("flops", "FLOP/s", 1.0), ("bandwidth", "B/s", 1.0))
        if row.get(key) is not None
    }
    for one, other in (TOGETHER, TOGETHER[::-1]):
        if quantities.get(one) is not None and row.get(other) is None:
            problems.append(
                f"{where}: {one}: given without {other}; expected both, from which seconds a round follow, "
                "or neither."
            )
    if len(problems) > before or "memory" not in quantities:
        if len(problems) == before:
            problems.append(f"{where}: memory: got none; expected {EXAMPLE}")
        return None
    return Budget(
        client=str(client),
        memory=int(quantities["memory"] or 0),
        flops=quantities.get("flops"),
        bandwidth=quantities.get("bandwidth"),
    )


def _quantity(value: Any, where: str, unit: str, plain: float, problems: list[str]) -> float | None:
    """`8`, `8GB`, `8 GiB`, `1e12`, `10MB/s`; without a unit in units of `plain`."""
    text = str(value).strip()
    match, number = QUANTITY.fullmatch(text), math.nan
    if match is not None and not isinstance(value, bool):
        digits, prefix, given = match.groups()
        known = {"", unit.lower(), unit.lower().replace("/s", "s")}
        if given.lower() in known:
            try:
                scale = PREFIXES[(prefix or "").lower()] if prefix or given else plain
                number = float(digits) * scale
            except ValueError:
                pass  # such as "1.2.3": refused below, like any other text
    if math.isfinite(number) and number > 0:
        return number
    shown = {"B": "8GB, 512MiB or a number of GB", "FLOP/s": "1e12 or 1TFLOP/s", "B/s": "10MB/s or 1e7"}[unit]
    problems.append(f"{where}: got {value!r}; expected an amount above 0, such as {shown}.")
    return None
