"""Tensors in files that others released, by name: safetensors, .bin and .pth, one or many.

A file is opened when a tensor of it is asked for, and let go when the next file's turn comes. It is mapped,
so that memory holds what was read of it since `release`; but a .bin or .pth of the kind before PyTorch 1.6,
which is no zip archive, is read in whole.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalefl.contracts import InputError

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Source(Mapping[str, Tensor]):
    """Named tensors of one or several files. Go through `by_file`, so that each file is opened once."""

    def __init__(
        self, place: Path, of_name: Mapping[str, Path] | None = None, inside: str | None = None
    ) -> None:
        """`of_name` says which file has a tensor, unset: `place` is the one file. `inside` is the entry of a
        .pth file that has the tensors. Raises InputError where a file cannot be read.
        """
        self.place, self._inside = place, inside
        self._open: tuple[Path, Any] | None = None
        if of_name is None:
            of_name = dict.fromkeys(self._opened(place).keys(), place)
        self._of_name = of_name
        self.shapes = {name: self._shape(name) for name in self.by_file()}

    def by_file(self) -> list[str]:
        """All names, those of one file together."""
        return sorted(self._of_name, key=lambda name: (self._of_name[name], name))

    def file_of(self, name: str) -> Path:
        return self._of_name[name]

    def __getitem__(self, name: str) -> Tensor:
        file = self._opened(self._of_name[name])
        return file.get_tensor(name) if hasattr(file, "get_tensor") else file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of_name)

    def __len__(self) -> int:
        return len(self._of_name)

    def release(self) -> None:
        """Let go of a mapped file, whose pages count as memory; the next tensor maps it again."""
        if self._open is not None and is_mapped(self._open[0]):
            self._open = None

    def close(self) -> None:
        """Let go of the file that is open."""
        self._open = None

    def _shape(self, name: str) -> torch.Size:
        file = self._opened(self._of_name[name])
        try:
            shape = file.get_slice(name).get_shape() if hasattr(file, "get_slice") else file[name].shape
        except (KeyError, SafetensorError) as error:
            raise InputError(
                f"{self._of_name[name]}: has no {name}, which the index beside it names; expected the files "
                "that belong together."
            ) from error
        return torch.Size(shape)

    def _opened(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = None  # before the next one is read
            is_safe = path.suffix == ".safetensors"
            self._open = (path, _open_safetensors(path) if is_safe else read_pickle(path, self._inside))
        return self._open[1]


def open_folder(folder: Path) -> Source:
    """The weights of a Hugging Face model folder. Raises InputError if there are none."""
    for single, index in (SAFETENSORS, BIN):
        if (folder / index).is_file():
            return Source(folder, _files_of_index(folder / index))
        if (folder / single).is_file():
            return Source(folder / single)
    raise InputError(
        f"{folder}: no weights there; expected {', '.join((*SAFETENSORS, *BIN))} of a Hugging Face model."
    )


def _files_of_index(path: Path) -> dict[str, Path]:
    try:
        files = json.loads(path.read_text("utf-8"))["weight_map"]
        of_name = {str(name): path.parent / file for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: damaged ({error}); expected a weight_map from tensors to files."
        ) from error
    for file in dict.fromkeys(of_name.values()):
        if not file.is_file():
            raise InputError(
                f"{file}: is missing, but {path.name} names it; expected every file of the index."
            )
    return of_name


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a whole safetensors file.") from error


def is_mapped(path: Path) -> bool:
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def read_pickle(path: Path, inside: str | None) -> Mapping[str, Tensor]:
    """The tensors of a .pth or .bin file, or those in its entry `inside`; nothing else in it is run.

    They are mapped, not read, if the file is a zip archive.
    """
    try:
        with open(path, "rb") as file:
            is_zip = zipfile.is_zipfile(file)
            file.seek(0)
            if not is_zip and file.read(2) == b"PK":
                raise InputError(f"{path}: {_DAMAGED}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}; expected a file that torch.save wrote."
        ) from error
    except pickle.UnpicklingError as error:
        told = " ".join(str(error).split())
        needs = told.partition("Unsupported global: ")[2].partition(" was not")[0].removeprefix("GLOBAL ")
        if needs:
            raise InputError(
                f"{path}: holds {needs}, whose loading would run code; expected tensors alone; save its "
                "tensors again with torch.save where you trust it."
            ) from error
        raise InputError(f"{path}: {_DAMAGED}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: {_DAMAGED}") from error
    if inside is not None:
        content = content.get(inside, content) if isinstance(content, Mapping) else content
    return _tensors(content, path)


_DAMAGED = "cannot be read; expected a whole file that torch.save wrote; was its download cut off?"


def _tensors(content: Any, path: Path) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        found = (
            ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        )
        raise InputError(f"{path}: holds no named tensors (found: {found}); expected a dict of them.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
