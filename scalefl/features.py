"""What a frozen vision tower says of every image, computed once and kept in memory or in files.

The last bits of a result depend on the shape of the batch that it was computed in, and a resumed run must
find the same ones: batches have a fixed size and follow the order of the images, whoever asks for them.
Shapes: B rows, T image tokens, F features.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scalefl.config.derived import feature_dtype, features_in_files
from scalefl.config.options import RunConfig
from scalefl.contracts import Example, InputError
from scalefl.engine.launch import Engine
from scalefl.models.holding import DTYPES
from scalefl.models.store import Store

log = logging.getLogger("scalefl")

FEATURE_BATCH = 8
"""Images in every pass through the tower, the last one filled up with its last image."""

DECODED_AT_ONCE = 64
"""Images whose pixels are in memory while features are computed."""

MUCH_MEMORY = 2e9
"""Bytes of features in memory, of each process, that are worth a warning."""

INDEX = "features.json"
"""File in which processes of a run find the features of its images."""

LEFTOVER_SECONDS = 3600.0
"""No file takes as long to write."""

Images = Iterable[tuple[str, Tensor]]
"""(image key, uint8 pixels (C, H, W)) of each distinct image, in the order of the data set."""


@dataclass(frozen=True, kw_only=True)
class FrozenTower:
    """From 8-bit pixels to the rows that are kept."""

    normalise: Callable[[Tensor], Tensor]
    """uint8 (1, C, H, W) -> what the tower sees (1, 3, H, W), pixel by pixel."""
    encode: Callable[[Tensor], Tensor]
    """(B, 3, H, W) -> (B, T, F), on any device."""
    dtype: torch.dtype
    """What features are kept in."""

    def rows(self, images: Sequence[Tensor]) -> Tensor:
        """(FEATURE_BATCH, T, F) on the CPU, of up to as many images; the rest repeats the last one."""
        padded = [*images, *[images[-1]] * (FEATURE_BATCH - len(images))]
        said = self.encode(torch.cat([self.normalise(image.unsqueeze(0)) for image in padded]))
        rows = said.to("cpu", self.dtype)
        if not rows.isfinite().all():
            raise InputError(
                f"--feature_dtype: the vision tower's features (computed in {_name(said.dtype)}, largest "
                f"{float(said.abs().max()):g}) are not finite in {_name(self.dtype)}; "
                "expected a wider type, such as fp32, or a tower whose weights are in order."
            )
        return rows


def image_features(
    run: RunConfig,
    engine: Engine,
    store: Store,
    processor: Any,
    examples: Sequence[Example],
    decode: Callable[[Sequence[Example]], dict[str, Tensor]],
) -> Mapping[str, Tensor]:
    """Image key -> what the frozen vision tower says of it (T, F); the tower then leaves the device."""
    family, model = store.models.family, store.vision_tower()
    weights = {name: p for name, p in model.named_parameters() if family.is_vision(name)}

    def encode(pixels_bchw: Tensor) -> Tensor:
        with torch.inference_mode(), engine.autocast():
            return family.encode_images(model, pixels_bchw.to(engine.device))

    held_in = {dtype: name for name, dtype in DTYPES.items()}[next(iter(weights.values())).dtype]
    tower = FrozenTower(
        normalise=processor.normalise, encode=encode, dtype=DTYPES[feature_dtype(run, held_in)]
    )
    distinct = list({example.image_key: example for example in examples}.values())
    starts = range(0, len(distinct), DECODED_AT_ONCE)
    images = (image for at in starts for image in decode(distinct[at : at + DECODED_AT_ONCE]).items())
    features: Mapping[str, Tensor]
    if features_in_files(run):
        settings = family.vision_settings(store.models.config)
        settings |= {"precision": run.precision, "rows": FEATURE_BATCH}
        fingerprint = tower_fingerprint(json.dumps(settings, sort_keys=True), tower, weights)
        folder = Path(run.feature_folder or Path(run.save_path) / "features").absolute()
        features = keep_in_files(images, tower, engine, folder, fingerprint)
    else:
        features = keep_in_memory(images, len(distinct), tower, engine)
    store.drop_vision()
    return features


def keep_in_memory(images: Images, count: int, tower: FrozenTower, engine: Engine) -> dict[str, Tensor]:
    """Image key -> row (T, F) of one table; ranks compute it together and each holds it all.

    `count` is the number of images.
    """
    table = torch.empty(0)
    keys: list[str] = []
    for batches in _batches_of_all_ranks(images, engine.num_processes):
        mine = batches[min(engine.rank, len(batches) - 1)]  # without one: the last, for the gather's sake
        rows = engine.gather_tensor(tower.rows([image for _, image in mine]))
        for batch, rows_btf in zip(batches, rows, strict=False):
            if not keys:
                table = torch.empty((count, *rows_btf.shape[1:]), dtype=rows_btf.dtype)
                if table.nbytes > MUCH_MEMORY and engine.is_main:
                    log.warning(
                        "features of %d images take %.1f GB of memory in every process; "
                        "--feature_cache file keeps them on disk",
                        *(count, table.nbytes / 1e9),
                    )
            table[len(keys) : len(keys) + len(batch)] = rows_btf[: len(batch)]
            keys += [key for key, _ in batch]
    return dict(zip(keys, table, strict=True))


class FeatureFiles(Mapping[str, Tensor]):
    """Rows in files, each mapped into memory for as long as its row is in use."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        """`places`: image key -> file and the row's name in it."""
        self._places = places

    def write_index(self, path: Path) -> None:
        """For `read_index`, in a process that must find the same rows without any image or tower."""
        path.write_text(json.dumps({key: [str(file), row] for key, (file, row) in self._places.items()}))

    @classmethod
    def read_index(cls, path: Path) -> FeatureFiles:
        places = json.loads(path.read_text(encoding="utf-8"))
        return cls({key: (Path(file), row) for key, (file, row) in places.items()})

    def __getitem__(self, key: str) -> Tensor:
        path, name = self._places[key]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: a feature file that was there cannot be read any more ({error}); expected the "
                "folder to be left alone and seen by every process; start again to compute what is missing."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def keep_in_files(
    images: Images, tower: FrozenTower, engine: Engine, folder: Path, fingerprint: str
) -> FeatureFiles:
    """Find the rows of images and tower below `folder`, and compute those that are missing.

    One file for each batch, whole or not there, written by the rank that computed it; runs may share the
    folder. Neither pixels nor rows stay in memory.
    """
    place = folder / fingerprint
    place.mkdir(parents=True, exist_ok=True)
    if engine.is_main:
        _drop_leftovers(place)
    names = sorted(path.name for path in place.glob("*.safetensors"))
    share = [names[i] for i in engine.share(range(len(names)))]
    # Gathered: every rank must miss the same rows, even if another run adds files meanwhile.
    file_of = dict(engine.gather([(row, name) for name in share for row in _whole_rows(place / name)]))
    row_of: dict[str, str] = {}

    def missing() -> Iterator[tuple[str, Tensor]]:
        found = set(file_of)
        for key, image in images:
            row_of[key] = row = _digest(fingerprint, image)
            if row not in found:
                found.add(row)
                yield row, image

    for batches in _batches_of_all_ranks(missing(), engine.num_processes):
        for rank, batch in enumerate(batches):
            rows = [row for row, _ in batch]
            name = f"{_digest(*rows)}.safetensors"
            file_of |= dict.fromkeys(rows, name)
            if rank == engine.rank:
                said = tower.rows([image for _, image in batch])
                _write(place / name, dict(zip(rows, said, strict=False)))
    engine.barrier()
    return FeatureFiles({key: (place / file_of[row], row) for key, row in row_of.items()})


def tower_fingerprint(settings: str, tower: FrozenTower, weights: Mapping[str, Tensor]) -> str:
    """Changes with everything that decides what a tower says: settings, preprocessing, types and weights."""
    every_value = tower.normalise(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    return _digest(settings, _name(tower.dtype), every_value, _digest_of_all(weights))


def _batches_of_all_ranks(
    images: Iterable[tuple[str, Tensor]], num_processes: int
) -> Iterator[list[list[tuple[str, Tensor]]]]:
    """Batches in order, as many at a time as there are ranks; where a batch ends does not depend on them."""
    rest = iter(images)
    while group := list(itertools.islice(rest, FEATURE_BATCH * num_processes)):
        yield [group[start : start + FEATURE_BATCH] for start in range(0, len(group), FEATURE_BATCH)]


def _whole_rows(path: Path) -> list[str]:
    """The rows of a file that is as it was written; none of any other, which is said."""
    try:
        with safe_open(path, "pt") as file:
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            if (file.metadata() or {}).get("digest") == _digest_of_all(rows):
                return list(rows)
        reason = "its contents are not what was written"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    log.warning("%s: no whole feature file (%s); its images are computed anew", path, reason)
    return []


def _write(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Write a file with the digest of its rows; a write that is killed leaves nothing of this name."""
    content = save(dict(rows), metadata={"digest": _digest_of_all(rows)})
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # of a full disk it names no file
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _drop_leftovers(place: Path) -> None:
    """Remove what killed writes left behind; younger ones may be another run's."""
    for path in place.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def _digest_of_all(tensors: Mapping[str, Tensor]) -> str:
    """Of names and tensors."""
    parts: list[str | Tensor] = []
    for name in sorted(tensors):
        parts += [name, tensors[name]]
    return _digest(*parts)


def _digest(*parts: str | Tensor) -> str:
    """Of texts and tensors: their types, shapes and bytes."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            found.update(f"text {len(part)} {part}".encode())
        else:
            found.update(f"{_name(part.dtype)} {tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
