"""Image files -> 8-bit pixels, and a table of decoded images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from scalefl.contracts import Example, InputError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
"""Decoders that may run. Others that Pillow knows start further programs (EPS) or are not still images."""
MAX_PIXELS = 80_000_000
"""Ten times a large detector; a small file that claims more is a decompression bomb."""
FULL_SCALES = (2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1)


class _UnreadableError(Exception):
    """Why an image cannot be used, in a few words."""


def read_image(path: Path, called: str | None = None) -> Image.Image:
    """Decode one file to 8 bits per channel, mode "L" or "RGB".

    An EXIF orientation is applied, so that pixels stand as a viewer shows them. Transparent parts turn black,
    as air does on a radiograph. Raises InputError if the file is missing, corrupt or too large; it names the
    file, or says what it is `called`.
    """
    try:
        return _decode(path)
    except _UnreadableError as error:
        raise InputError(
            f"{called or path}: {error}; expected a readable {', '.join(FORMATS)} image; "
            "replace or remove the file."
        ) from error


def find_bad_images(paths: Mapping[str, Path], workers: int) -> dict[str, str]:
    """Decode every file in full (a truncated one fails only at its end); key -> what is wrong with it."""

    def check(path: Path) -> str | None:
        try:
            _decode(path)
        except _UnreadableError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        reasons = pool.map(check, paths.values())
        return {key: reason for key, reason in zip(paths, reasons, strict=True) if reason is not None}


def decode_all(
    examples: Sequence[Example],
    read_image: Callable[[Example], Image.Image],
    prepare: Callable[[Image.Image], Tensor],
    workers: int,
) -> dict[str, Tensor]:
    """image_key -> `prepare(image)`, each image read once, on `workers` threads.

    `prepare` resizes; it returns uint8 of shape (C, H, W).
    """
    by_key = {example.image_key: example for example in examples}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        tensors = pool.map(lambda example: prepare(read_image(example)), by_key.values())
        return dict(zip(by_key, tensors, strict=True))


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _UnreadableError(
                    f"claims {image.width} x {image.height} pixels, more than {MAX_PIXELS}"
                )
            image.load()
            return _to_8_bits(ImageOps.exif_transpose(image))
    except Exception as error:  # a corrupt file makes Pillow raise nearly any type
        raise _UnreadableError(_reason(error)) from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_deep_grey(np.asarray(image))
    if image.mode in ("1", "L"):
        return image.convert("L")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        flat = Image.alpha_composite(black, rgba)
        return flat.convert("L" if image.mode in ("LA", "La") else "RGB")
    return image.convert("RGB")


def _scale_deep_grey(pixels: np.ndarray) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats -> "L".

    Detectors of 10, 12 or 14 bits store in 16: divided by 65535 their images would be nearly black. The full
    scale is therefore the smallest of the usual ones that holds the image's maximum (1.0 for floats up to 1).
    """
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite([low, high]).all() or low < 0 or high > FULL_SCALES[-1]:
        raise _UnreadableError(f"has grey values from {low:g} to {high:g}, outside 0..{FULL_SCALES[-1]}")
    is_unit_float = pixels.dtype.kind == "f" and high <= 1
    full_scale = 1 if is_unit_float else next(scale for scale in FULL_SCALES if high <= scale)
    return Image.fromarray(np.rint(pixels.astype(np.float64) * (255 / full_scale)).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, IsADirectoryError):
        return "a folder"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, (_UnreadableError, Image.DecompressionBombError)):
        return " ".join(str(error).split())
    return f"corrupt ({' '.join(str(error).split()) or type(error).__name__})"
