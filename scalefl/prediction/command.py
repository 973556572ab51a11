"""`scalefl predict`: images in; answers, probabilities, exits and milliseconds out."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor

from scalefl.config.predictoptions import PredictOptions
from scalefl.console import Display
from scalefl.contracts import InputError
from scalefl.data.images import read_image
from scalefl.prediction.asked import load
from scalefl.prediction.loaded import Answer, Answering

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def predict(options: PredictOptions) -> None:
    """Answer about every image that can be read; raises InputError at the end if some could not be."""
    if options.csv is not None and not Path(options.csv).absolute().parent.is_dir():
        raise InputError(f"--csv {options.csv}: its folder is not there; expected one to write into.")
    paths = find_images(options.images)
    asked = load(options)
    found: list[tuple[Path, Answer]] = []
    unread: list[str] = []
    batches = [paths[at : at + options.batch_size] for at in range(0, len(paths), options.batch_size)]
    console = Console(stderr=True)
    for batch in track(
        batches, "answering", console=console, transient=True, disable=not console.is_terminal
    ):
        pixels = _read(batch, asked.model, unread)
        if pixels:
            found += zip(pixels, asked.answer(list(pixels.values())), strict=True)
    _tell(found, options)
    if unread:
        raise InputError("\n".join(unread))


def find_images(given: Sequence[str]) -> list[Path]:
    """Every image once, in the order given; those of a folder and of a pattern by name.

    Raises InputError for what names no image.
    """
    found: dict[Path, None] = {}
    for text in given:
        path = Path(text)
        if path.is_dir():
            paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.exists():
            paths = [path]
        else:
            paths = sorted(Path(name) for name in glob.glob(text, recursive=True) if Path(name).is_file())
        if not paths:
            raise InputError(
                f"{text}: no image there; expected a file, a folder with {', '.join(SUFFIXES)} files, or a "
                "pattern that fits some."
            )
        found |= dict.fromkeys(paths)
    return list(found)


def _read(paths: Sequence[Path], model: Answering, unread: list[str]) -> dict[Path, Tensor]:
    pixels = {}
    for path in paths:
        try:
            pixels[path] = model.prepare(read_image(path))
        except InputError as error:
            unread.append(str(error))
    return pixels


def _tell(found: Sequence[tuple[Path, Answer]], options: PredictOptions) -> None:
    display, records = Display(speaks=True, print_freq=1), list(_records(found))
    if options.json:
        display.line(json.dumps(records, indent=1))
    elif records:
        folder = os.path.commonpath([path.absolute().parent for path, _ in found])
        rows = [{**record, "image": os.path.relpath(record["image"], folder)} for record in records]
        display.table(f"{folder}", list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
    if options.csv is not None and records:
        _write_csv(options.csv, records)
        if not options.json:
            display.line(f"answers      {options.csv}")


def _write_csv(path: str, records: Sequence[dict[str, Any]]) -> None:
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    except OSError as error:
        raise InputError(f"--csv {path}: {error.strerror}; give another path.") from error


def _records(found: Sequence[tuple[Path, Answer]]) -> Iterator[dict[str, Any]]:
    for path, answer in found:
        shown = {f"p({name})": round(value, 6) for name, value in answer.probabilities.items()}
        yield {"image": str(path), "answer": answer.text, **shown, "exit": answer.exit} | {
            "milliseconds": round(answer.milliseconds, 2)
        }


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
