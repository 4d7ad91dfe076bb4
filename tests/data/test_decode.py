"""Every way to store an image gives the same RGB pixels; every way to damage one gives a DataError of one line."""

import io
import struct
import zlib

import numpy as np
import pytest
from data_images import encoded, jpeg, noise
from PIL import Image

from tokenizers_lab.data.decode import open_image, read_image, to_rgb, upright_size
from tokenizers_lab.errors import DataError

PIXELS = noise(40, 24)
PICTURE = Image.fromarray(PIXELS)
GREY = np.asarray(PICTURE.convert("L"))


def pixels(data: bytes) -> np.ndarray:
    image = read_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels(kind):
    assert np.array_equal(pixels(encoded(PICTURE, kind)), PIXELS)


@pytest.mark.parametrize("kind, options", [("JPEG", {"quality": 98}), ("WEBP", {"quality": 99}), ("AVIF", {"quality": 99})])
def test_lossy_formats_come_close(kind, options):
    assert np.abs(pixels(encoded(PICTURE, kind, **options)).astype(int) - PIXELS).mean() < 3


def test_cmyk_jpeg():
    cmyk = encoded(PICTURE.convert("CMYK"), "JPEG", quality=98)
    assert np.abs(pixels(cmyk).astype(int) - PIXELS).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    deep = (GREY.astype(np.uint16) * 257)
    assert np.array_equal(pixels(encoded(Image.fromarray(deep), kind)), three(GREY))


def test_16_bit_rounds_to_the_nearest_level():
    deep = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)   # 65535 / 255 = 257 to a level
    assert pixels(encoded(Image.fromarray(deep), "PNG"))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]


def test_16_bit_rgb_png():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.astype(np.uint16) * 257)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    assert np.array_equal(pixels(png), PIXELS)


def test_float_tiff_in_unit_range_and_beyond():
    unit = GREY.astype(np.float32) / 255
    assert np.array_equal(pixels(encoded(Image.fromarray(unit), "TIFF")), three(GREY))
    with pytest.raises(DataError, match="outside"):
        read_image(encoded(Image.fromarray(unit * 300), "TIFF"))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_bilevel(mode):
    plain = PICTURE.convert(mode)
    assert np.array_equal(pixels(encoded(plain, "PNG")), three(np.asarray(plain.convert("L"))))


def test_palette_with_and_without_transparency():
    palette = PICTURE.quantize(32)
    colours = np.asarray(palette.convert("RGB"))
    assert np.array_equal(pixels(encoded(palette, "PNG")), colours)
    clear = np.asarray(palette) == 7
    expected = np.where(clear[..., None], 255, colours)
    assert clear.any()
    assert np.array_equal(pixels(encoded(palette, "PNG", transparency=7)), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_pasted_on_white(kind):
    alpha = np.zeros((24, 40, 1), np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 255, 128
    image = Image.fromarray(np.concatenate([PIXELS, alpha], axis=2))
    found = pixels(encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))).astype(int)
    assert np.array_equal(found[:, :10], PIXELS[:, :10])
    assert np.abs(found[:, 10:20] - (PIXELS[:, 10:20] * 128.0 + 255 * 127.0) / 255).max() <= 1
    assert (found[:, 20:] == 255).all()


def test_grey_with_alpha_is_pasted_on_white():
    image = Image.fromarray(np.stack([GREY, np.where(np.arange(40) < 20, 255, 0) + 0 * GREY], axis=2).astype(np.uint8))
    assert image.mode == "LA"
    expected = np.where(np.arange(40)[None, :, None] < 20, three(GREY), 255)
    assert np.array_equal(pixels(encoded(image, "PNG")), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(kind, orientation):
    stored = {
        1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2), 6: np.rot90(PIXELS, 1), 7: np.rot90(PIXELS, 2).transpose(1, 0, 2), 8: np.rot90(PIXELS, -1),
    }[orientation]   # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert np.abs(pixels(data).astype(int) - PIXELS).mean() < 3
    with open_image(data) as image:
        if kind in ("JPEG", "TIFF"):
            assert upright_size(image) == (40, 24)
        assert to_rgb(image).size == (40, 24)


def test_damaged_exif_does_not_cost_the_image():
    data = bytearray(encoded(PICTURE, "JPEG", exif=b"Exif\0\0" + b"\xff" * 40))
    assert pixels(bytes(data)).shape == PIXELS.shape


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert (pixels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files(tmp_path, kind, kept):
    data = encoded(Image.fromarray(noise(200, 200)), kind)
    path = tmp_path / "half.img"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(DataError, match="half"):
        read_image(path)


def test_truncated_progressive_jpeg():
    data = encoded(Image.fromarray(noise(200, 200)), "JPEG", progressive=True)
    with pytest.raises(DataError, match="truncated"):
        read_image(data[: len(data) // 2])


@pytest.mark.parametrize("content, reason", [(b"just text\n", "not an image"), (b"", "empty"), (b"%!PS-Adobe", "not an image")])
def test_a_file_that_is_no_image(tmp_path, content, reason):
    path = tmp_path / "fake.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"fake.jpg: .*{reason}") as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")   # Pillow remarks on damaged metadata
def test_any_damage_is_a_data_error_or_an_image():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        whole = np.frombuffer(encoded(PICTURE, kind), np.uint8)
        for _ in range(40):
            data = whole.copy()
            data[rng.integers(0, len(data), 5)] = rng.integers(0, 256, 5)
            try:
                assert read_image(data.tobytes(), max_pixels=10**6).mode == "RGB"
            except DataError as error:
                assert "\n" not in str(error)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises many pixels and whose data end at once."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 4) + b"IDAT" + b"\0" * 8


@pytest.mark.parametrize("side", [11_000, 60_000])   # below and above the limit at which Pillow itself raises
def test_huge_images_are_refused_by_their_header(side, recwarn, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="max_pixels"):
        read_image(bomb(side, side))
    assert not recwarn.list


def test_max_pixels_counts_exactly_and_overrules_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(jpeg(0, 40, 32), max_pixels=1280).size == (40, 32)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(DataError, match="40 × 32"):
        read_image(jpeg(0, 40, 32), max_pixels=1279)


def test_handles_are_closed(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(0))
    with open_image(path) as image:
        stream = image.fp
        to_rgb(image)
    assert isinstance(stream, io.BufferedReader) and stream.closed
