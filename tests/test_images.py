"""Laws of decoding: every supported file becomes 8-bit "L" or "RGB", any other is named with a reason."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scalefl.contracts import Example, InputError
from scalefl.data.images import FULL_SCALES, _scale_deep_grey, decode_all, find_bad_images, read_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", "L"), ("L", "L"), ("LA", "L"), ("P", "RGB"), ("RGB", "RGB"), ("RGBA", "RGB"), ("I;16", "L")],
)
def test_png_of_any_mode_becomes_l_or_rgb(tmp_path: Path, mode: str, expected: str) -> None:
    image = Image.fromarray(RAMP.astype(np.uint16)) if mode == "I;16" else Image.fromarray(RAMP).convert(mode)
    decoded = read_image(save(tmp_path / "image.png", image))
    assert (decoded.mode, decoded.size) == (expected, (16, 16))


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp"])
def test_lossless_grey_is_unchanged(tmp_path: Path, suffix: str) -> None:
    decoded = read_image(save(tmp_path / f"image.{suffix}", Image.fromarray(RAMP)))
    np.testing.assert_array_equal(np.asarray(decoded), RAMP)


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "image.jpg", Image.new("CMYK", (8, 8)))).mode == "RGB"


def test_transparent_parts_are_black_as_air(tmp_path: Path) -> None:
    clear_white = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    assert not np.asarray(read_image(save(tmp_path / "clear.png", clear_white))).any()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 255, 255])
    assert not np.asarray(read_image(save(tmp_path / "palette.png", palette, transparency=0))).any()


@given(st.integers(0, 2**16 - 1))
def test_deep_grey_is_divided_by_the_smallest_full_scale_that_holds_its_maximum(maximum: int) -> None:
    pixels = np.array([[0, maximum // 2, maximum]], dtype=np.uint16)
    full_scale = min(scale for scale in FULL_SCALES if scale >= maximum)
    expected = [round(255 * value / full_scale) for value in (0, maximum // 2, maximum)]
    np.testing.assert_array_equal(np.asarray(_scale_deep_grey(pixels))[0], expected)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_detector_of_any_depth_uses_the_whole_range(tmp_path: Path, bits: int) -> None:
    full = (RAMP.astype(np.float64) / 255 * (2**bits - 1)).round().astype(np.uint16)
    decoded = read_image(save(tmp_path / "deep.png", Image.fromarray(full)))
    np.testing.assert_allclose(np.asarray(decoded), RAMP, atol=1)  # the rounding to `bits` and back


def test_float_tiff_up_to_one_is_scaled_by_one(tmp_path: Path) -> None:
    unit = Image.fromarray(RAMP.astype(np.float32) / 255)
    np.testing.assert_array_equal(np.asarray(read_image(save(tmp_path / "unit.tiff", unit))), RAMP)


@pytest.mark.parametrize("value", [-1.0, 1e6, np.nan, np.inf])
def test_grey_values_off_every_scale_are_refused(tmp_path: Path, value: float) -> None:
    path = save(tmp_path / "odd.tiff", Image.fromarray(np.array([[0, value]], dtype=np.float32)))
    with pytest.raises(InputError, match=r"odd\.tiff: has grey values .* outside 0\.\.65535"):
        read_image(path)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    path = save(tmp_path / "turned.png", Image.fromarray(RAMP[:4]), exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.rot90(RAMP[:4], -1))


def bomb_png() -> bytes:
    """A valid header that claims 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_every_kind_of_bad_file_is_found_with_its_reason(tmp_path: Path) -> None:
    good = save(tmp_path / "good.jpg", Image.fromarray(np.tile(RAMP, (8, 8))))
    (tmp_path / "truncated.jpg").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "bomb.png").write_bytes(bomb_png())
    (tmp_path / "folder.png").mkdir()
    names = ["good.jpg", "truncated.jpg", "text.png", "empty.png", "bomb.png", "folder.png", "gone.png"]
    bad = find_bad_images({name: tmp_path / name for name in names}, workers=2)
    assert list(bad) == names[1:]
    assert "truncated" in bad["truncated.jpg"]
    assert bad["text.png"] == bad["empty.png"] == "not an image"
    assert "pixels" in bad["bomb.png"]
    assert bad["folder.png"] == "a folder"
    assert bad["gone.png"] == "missing"
    for name in bad:
        with pytest.raises(InputError, match=name) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


@given(start=st.integers(0, 400), noise=st.binary(min_size=1, max_size=20))
def test_damage_anywhere_gives_an_image_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, start: int, noise: bytes
) -> None:
    path = save(tmp_path_factory.mktemp("damaged") / "image.png", Image.fromarray(RAMP))
    content = path.read_bytes()
    path.write_bytes(content[:start] + noise + content[start + len(noise) :])
    try:
        assert read_image(path).mode in ("L", "RGB")
    except InputError as error:
        assert str(path) in str(error)


def test_decode_all_reads_each_image_once(tmp_path: Path) -> None:
    reads: list[str] = []

    def read(example: Example) -> Image.Image:
        reads.append(example.image_key)
        return Image.new("L", (4, 4), int(example.image_key))

    def prepare(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image))[None]

    keys = ["3", "1", "2", "1"]
    examples = [
        Example(image_key=key, patient="p", question=f"q{i}", answer="a") for i, key in enumerate(keys)
    ]
    table = decode_all(examples, read, prepare, workers=3)
    assert sorted(reads) == ["1", "2", "3"]
    assert {key: (tensor.shape, int(tensor.max())) for key, tensor in table.items()} == {
        key: ((1, 4, 4), int(key)) for key in "312"
    }
