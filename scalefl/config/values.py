"""Text from a command line, or what YAML made of a file, becomes the value a field asks for."""

import difflib
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from scalefl.config.options import RunConfig
from scalefl.contracts import InputError

OPTION_KINDS: Mapping[str, Any] = get_type_hints(RunConfig)
"""Option -> its type."""

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class Given:
    """A value and the place it came from, which an error names."""

    value: Any
    where: str


def nearest(name: str, known: Iterable[str], spelled: Callable[[str], str] = repr) -> str:
    """A hint such as "did you mean 'adamw'? ", or nothing where no known name is close."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f"did you mean {spelled(by_lower_case[near[0]])}? " if near else ""


def coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`: bool, int, float, str, a Literal, a tuple of one of these, or one of these or None.

    Raises InputError for anything that would have to be guessed, such as 1.5 for an int.
    """
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (k for k in get_args(kind) if k is not types.NoneType)
        if value is None or (inner is not str and value == "none"):
            return None
        if value == "":
            raise InputError(f"{where}: got an empty text; expected a value, or leave the option out.")
        return coerce(value, inner, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}: got {value!r}; expected a list, such as [{value}].")
        return tuple(coerce(item, get_args(kind)[0], where) for item in value)
    if get_origin(kind) is Literal:
        return _choice(value, get_args(kind), where)
    return _plain(value, kind, where)


def _choice(value: Any, choices: tuple[str, ...], where: str) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise InputError(
        f"{where}: got {value!r}; {nearest(str(value), choices)}expected one of {', '.join(choices)}."
    )


def _plain(value: Any, kind: type, where: str) -> Any:
    is_text, is_number = isinstance(value, str), type(value) in (int, float)
    try:
        if kind is bool and (isinstance(value, bool | str) or value in (0, 1)):
            return BOOLEANS[str(value).lower()]
        if kind is int and (is_text or type(value) is int):
            return int(value)
        if kind is float and (is_text or is_number):
            return float(value)
        if kind is str and is_text:
            return value
    except (KeyError, ValueError, OverflowError):
        pass  # the text does not read as such a value: refused below, like a value of another type
    expected = {
        bool: "true, false, 1 or 0",
        int: "a whole number",
        float: "a number",
        str: "a text; put it in quotes",
    }
    raise InputError(f"{where}: got {value!r}; expected {expected[kind]}.")


@dataclass(frozen=True, kw_only=True)
class OptionsRead:
    """One layer of options: what could be read, and what was wrong with the rest."""

    given: Mapping[str, Given]
    problems: list[str]
    unread: Collection[str]
    """Options that were given with a value that could not be read."""


def read_options(
    raw: Mapping[Any, Any],
    where: Callable[[str], str],
    *,
    command: str = "train",
    of_plan: Collection[str] = (),
    suggested: Collection[str] = (),
) -> OptionsRead:
    """Options by name, with dashes or underscores; `where` says how an error names one of them.

    `command` is the one that lists them. `of_plan` are those of `scalefl plan` alone; `suggested` are further
    ones that may be meant by an unknown name.
    """
    given: dict[str, Given] = {}
    problems, unread = [], set()
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name in of_plan:
            problems.append(f"{where(str(key))}: only `scalefl plan` takes it, on its command line.")
        elif name not in OPTION_KINDS:
            hint = nearest(name, [*OPTION_KINDS, *suggested], spelled=where)
            problems.append(
                f"{where(str(key))}: unknown option; {hint}`scalefl {command} --help` lists them."
            )
        elif name in given:
            problems.append(f"{where(str(key))}: given twice, with dashes and with underscores; keep one.")
        else:
            try:
                given[name] = Given(value=coerce(value, OPTION_KINDS[name], where(name)), where=where(name))
            except InputError as error:
                problems.append(str(error))
                unread.add(name)
    return OptionsRead(given=given, problems=problems, unread=unread)
