"""The file that an assignment is written to, whole or not at all; `scalefl train --config` takes it."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from scalefl.contracts import InputError
from scalefl.planning.assign import Assignment

HEADER = "# Written by `scalefl plan`."
"""The first words of an assignment: a file that begins otherwise is not written over."""


def check_out(path: Path, read: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError where no file can be written, or one is there that no plan wrote, or this plan reads.

    `read`: option -> files.
    """
    for option, names in read.items():
        for name in names:
            if Path(name).resolve() == path.resolve():
                raise InputError(f"--out {path}: is what --{option} {name} reads; expected another name.")
    if not path.parent.exists():
        raise _unwritable(path, os.strerror(errno.ENOENT))
    try:
        with open(path, "rb") as file:
            if file.read(len(HEADER)) == HEADER.encode():
                return
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(path, error.strerror) from error
    raise InputError(f"--out {path}: a file that `scalefl plan` did not write; expected another name.")


def write(path: Path, assignment: Assignment, notes: Sequence[str]) -> None:
    """Raises InputError where it cannot; a file that is there then stays as it was."""
    header = "".join(f"{line}\n" for line in (f"{HEADER} For:", *(f"# {note}" for note in notes)))
    options = yaml.safe_dump(assignment.options(), sort_keys=False, default_flow_style=None)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(header + options, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error.strerror) from error


def _unwritable(path: Path, reason: str | None) -> InputError:
    return InputError(
        f"--out {path}: {reason}; expected a file in a folder that is there and can be written."
    )
