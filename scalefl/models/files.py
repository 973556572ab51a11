"""Tensors in safetensors files, one or many, read one by one or slice by slice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as save_for_its_owner
from torch import Tensor

from scalefl.contracts import InputError
from scalefl.slicing.order import Order
from scalefl.slicing.plan import Index

UMASK = os.umask(0)
os.umask(UMASK)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ORDER = "order.safetensors"
"""Beside weights whose heads and channels are in another order: which one that is."""
SHARD_BYTES = 1 << 28
"""What a writer gathers before it writes a file."""


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a model folder, by name. Reading one takes the memory of that one."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError unless the folder has model.safetensors, or the files its index names."""
        self.folder = folder
        self._readers: dict[str, Any] = {}
        try:
            if (folder / INDEX).is_file():
                self._files = _read_index(folder / INDEX)
            else:
                self._files = dict.fromkeys(self._reader(SINGLE).keys(), SINGLE)
            self.shapes = {name: torch.Size(self._lazy(name).get_shape()) for name in self._files}
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(
                f"{folder}: cannot read its weights ({error}); expected {SINGLE}, or {INDEX} and its files."
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        return self._reader(self._files[name]).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, name: str, index: tuple[Index, ...]) -> Tensor:
        """A slice of a tensor; of a strided selection, the rows and columns around it are read as well."""
        prefix = tuple(part if isinstance(part, slice) else slice(None) for part in index)
        tensor = self._lazy(name)[prefix] if index else self[name]
        for dim, part in enumerate(index):
            if not isinstance(part, slice):
                tensor = tensor.index_select(dim, part)
        return tensor

    def _lazy(self, name: str) -> Any:
        return self._reader(self._files[name]).get_slice(name)

    def _reader(self, file: str) -> Any:
        if file not in self._readers:
            path = self.folder / file
            if not path.is_file():  # safetensors' own error does not name the file
                raise FileNotFoundError(f"{file} is missing")
            try:
                self._readers[file] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file}: {error}") from error
        return self._readers[file]

    def digest(self) -> str:
        """Of names, types, shapes, and of every tensor its first and last row.

        Training moves nearly every value, and a base of full size has 14 GB: a change that spares the first
        and last row of every tensor is seen in `stamps` alone. A folder may be moved, and divided into other
        files.
        """
        found = hashlib.blake2b(digest_size=16)
        for name in sorted(self._files):
            lazy = self._lazy(name)
            shape = lazy.get_shape()
            found.update(f"{name} {lazy.get_dtype()} {shape};".encode())
            for rows in [slice(0, 1), slice(shape[0] - 1, None)] if shape else [...]:
                found.update(lazy[rows].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def stamps(self) -> dict[str, list[int]]:
        """File -> its size in bytes and its time of change in nanoseconds."""
        stats = {file: (self.folder / file).stat() for file in sorted(set(self._files.values()))}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file."""
    content = json.loads(path.read_text("utf-8"))
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{path.name} has no weight_map from tensors to files")
    return files


def os_error_number(error: BaseException) -> int | None:
    """safetensors and tokenizers give the system's error, such as a full disk, in their text alone."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and not isinstance(error, OSError) else None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end of the block.

    After an error nothing is left of it; one of the system's, such as a full disk, is an OSError.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (number := os_error_number(error)) is not None:
            raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """As safetensors does it, but for all who may read other files of the process."""
    save_for_its_owner(dict(tensors), path, metadata)
    path.chmod(0o666 & ~UMASK)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as they come, in files of about `SHARD_BYTES`, and an index of them."""
    folder.mkdir(parents=True, exist_ok=True)
    of_name: dict[str, str] = {}
    part: dict[str, Tensor] = {}
    for name, tensor in tensors:
        part[name] = tensor.detach().cpu().contiguous()
        if sum(t.nbytes for t in part.values()) >= SHARD_BYTES:
            of_name |= _write_part(folder, part, len(of_name))
            part = {}
    of_name |= _write_part(folder, part, len(of_name))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": of_name}))


def _write_part(folder: Path, part: dict[str, Tensor], already: int) -> dict[str, str]:
    file = f"model-{already:05d}.safetensors"
    save_file(part, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(part, file)


def write_order(folder: Path, order: Order) -> None:
    """Beside weights in that order; nothing where they are in their own."""
    if order:
        save_file({key: now.contiguous() for key, now in order.items()}, folder / ORDER)


def saved_order(folder: Path) -> Order:
    """That of the weights in a folder; empty if they are in their own. Raises InputError if it is damaged."""
    if not (folder / ORDER).is_file():
        return {}
    try:
        return load_file(folder / ORDER)
    except SafetensorError as error:
        raise InputError(
            f"{folder / ORDER}: cannot be read ({error}); expected what `scalefl reorder` wrote; put it back."
        ) from error
