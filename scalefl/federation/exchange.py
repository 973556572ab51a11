"""The files that the jobs executor and its clients exchange: JSON beside safetensors, with checksums.

Each is written under a temporary name, synced and renamed; the JSON comes last and holds the digest of the
tensors and of itself. A file that is cut off, changed or an answer to another task is never merged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from scalefl.contracts import State
from scalefl.models.files import os_error_number, save_file

FORMAT = 1


class BadFileError(ValueError):
    """A file that is there, but not what was expected: cut off, changed, of another task or version."""


class ForeignFileError(BadFileError):
    """A whole file that answers another task."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A JSON file that was read and is whole."""

    path: Path
    content: dict[str, Any]

    def tensors(self) -> State:
        """Those of the file that the note names. Raises BadFileError unless they are what was written."""
        return read_tensors(self.path.parent, self.content["tensors"])


def task_path(folder: Path, client: int, attempt: int) -> Path:
    return folder / f"client-{client:04d}.a{attempt}.task.json"


def answer_path(task: Path, kind: str) -> Path:
    """Where a client answers a task, or beside another answer: `kind` is "update" or "failure"."""
    name = task.name.removesuffix(".json")
    for ending in (".task", ".update"):
        name = name.removesuffix(ending)
    return task.with_name(f"{name}.{kind}.json")


def write_note(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a note of a kind, with the digest of its content."""
    body = {"kind": kind, "format": FORMAT, **content}
    data = json.dumps({**body, "digest": digest_of(body)}, indent=1).encode()

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    _put(path, write)


def read_note(path: Path, kind: str, *, answers: str | None = None) -> Note:
    """Read a note of a kind; `answers` names the task that it must answer. Raises BadFileError."""
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError(f"{path.name} is cut off, or is no file of this exchange") from error
    if digest != digest_of(content):
        raise BadFileError(f"{path.name} has changed since it was written")
    if (content["kind"], content["format"]) != (kind, FORMAT):
        raise BadFileError(
            f"{path.name} holds kind {content['kind']}, format {content['format']}, not {kind}, {FORMAT}"
        )
    if answers is not None and content.get("task") != answers:
        raise ForeignFileError(f"{path.name} answers another task")
    return Note(path=path, content=content)


def write_tensors(path: Path, tensors: State) -> dict[str, Any]:
    """Write tensors; what a note beside them says of them: file, digest, bytes of the tensors."""

    def write(temporary: Path) -> None:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, temporary)

    _put(path, write)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return {"file": path.name, "digest": _file_digest(path), "bytes": nbytes}


def read_tensors(folder: Path, said: Mapping[str, Any]) -> State:
    """The tensors that a note speaks of. Raises BadFileError unless they are what was written."""
    path = folder / Path(said["file"]).name
    try:
        if _file_digest(path) != said["digest"]:
            raise BadFileError(f"{path.name} is cut off, or has changed since it was written")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadFileError(f"{path.name} cannot be read ({error})") from error


def _put(path: Path, write: Any) -> None:
    """Let `write` fill a temporary file, sync it, and give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        number = error.errno if isinstance(error, OSError) else os_error_number(error)
        if number is not None:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def digest_of(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
