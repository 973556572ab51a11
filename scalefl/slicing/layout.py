"""Layouts: the named axes of every parameter of a model family, in the notation of einops.

`"(heads head_dim) embed"` says that dimension 0 runs over heads and, within a head, over head_dim, and that
dimension 1 runs over embed. A number stands for an axis of that size that is never cut.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from scalefl.contracts import InputError

Layout = tuple[tuple[str, ...], ...]
"""Per dimension its axis names, outermost first."""

LayoutTable = Sequence[tuple[str, str]]
"""(glob over parameter names, layout) pairs; each parameter matches exactly one."""

_DIMENSION = re.compile(r"\(([^()]+)\)|([^\s()]+)")


def parse_layout(text: str) -> Layout:
    """`"(3 heads head_dim) embed"` -> `(("3", "heads", "head_dim"), ("embed",))`.

    Raises ValueError if the text is not a list of names and parenthesised groups of names.
    """
    if _DIMENSION.sub("", text).strip():
        raise ValueError(
            f"layout '{text}': expected names and groups in parentheses, as in '(heads head_dim) embed'."
        )
    return tuple(tuple((group or name).split()) for group, name in _DIMENSION.findall(text))


def match_layouts(names: Iterable[str], table: LayoutTable) -> dict[str, Layout]:
    """Each parameter's layout.

    Raises InputError naming every parameter without a layout or with several, and every pattern without a
    parameter: a silent mismatch would train or merge the wrong coordinates.
    """
    names = list(names)
    found: dict[str, Layout] = {}
    problems = []
    for pattern, text in table:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            problems.append(f"pattern '{pattern}' matches no parameter")
        for name in matches:
            if name in found:
                problems.append(f"{name} matches several patterns, '{pattern}' among them")
            found[name] = parse_layout(text)
    problems += [f"{name} has no layout" for name in names if name not in found]
    if problems:
        raise InputError(
            f"layout table: {'; '.join(problems[:5])} ({len(problems)} in all); "
            "each parameter needs exactly one pattern."
        )
    return found


def units(axis: str, sizes: Mapping[str, int]) -> int:
    """Size of a named axis, or of a literal number."""
    return int(axis) if axis.isdecimal() else sizes[axis]
