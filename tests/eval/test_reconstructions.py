"""A folder of finished reconstructions as the model."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import SIZE, Toy, batches, pictures

from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.eval.images import evaluate_images
from tokenizers_lab.eval.reconstructions import folder_candidate, is_reconstructions, reconstruction_size
from tokenizers_lab.settings import ImageDataConfig

N = 5


def save(images: torch.Tensor, folder: Path, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:03d}{suffix}", **({"lossless": True} if suffix == ".webp" else {}))


@pytest.fixture
def data(tmp_path: Path) -> ImageDataConfig:
    save(pictures(N), tmp_path / "data")
    return ImageDataConfig(train="", val=str(tmp_path / "data"), size=SIZE, workers=0)


@pytest.fixture
def folder(tmp_path: Path, fitted: Toy) -> Path:
    """Reconstructions under the names of the data, as files of another format."""
    save(fitted.reconstruct(pictures(N)), tmp_path / "made", ".webp")
    return tmp_path / "made"


def measure(folder: Path, data: ImageDataConfig, metrics: tuple[str, ...] = ("psnr",), **options) -> dict:
    return evaluate_images(folder_candidate(str(folder), data), validation_batches(data, 2), metrics, label="x", **options)


def test_files_are_measured_as_the_model_is(folder: Path, data: ImageDataConfig, fitted: Toy) -> None:
    model = evaluate_images(fitted, batches(pictures(N), 2), ("psnr", "ssim"), baselines=False)
    result = measure(folder, data, ("psnr", "ssim"))
    (row,) = result["rows"]
    for name in ("psnr", "ssim"):
        assert row["metrics"][name]["per_image"] == model["rows"][0]["metrics"][name]["per_image"]
    assert len(row["content_hash"]) == 64 and result["protocol"]["latents"] == "none: finished images"
    assert result["converted"] == {"originals": {}, "reconstructions": {}}


def test_limit_may_have_partners_alone(folder: Path, data: ImageDataConfig) -> None:
    data.val_limit = 2      # evenly spaced: 000 and 002
    assert measure(folder, data)["keys"] == ["000.png", "002.png"]
    for number in ("001", "003", "004"):
        (folder / f"{number}.webp").unlink()
    assert measure(folder, data)["n"] == 2


def test_counts_and_names_that_do_not_match(folder: Path, data: ImageDataConfig) -> None:
    (folder / "004.webp").rename(folder / "other.webp")
    with pytest.raises(InputError, match=r"there is no reconstruction of 004\.png"):
        measure(folder, data)
    Image.open(folder / "other.webp").save(folder / "004.webp", lossless=True)
    with pytest.raises(InputError, match=r"has 6 images for the 5 of .*there is no original of other\.webp"):
        measure(folder, data)
    Image.open(folder / "other.webp").save(folder / "004.bmp")
    with pytest.raises(InputError, match=r"004\.bmp and 004\.webp differ in their extension alone"):
        measure(folder, data)


def test_another_resolution_and_unreadable_files_are_named(folder: Path, data: ImageDataConfig) -> None:
    Image.open(folder / "003.webp").resize((16, 16)).save(folder / "003.webp")
    with pytest.raises(InputError, match=r"003\.webp has 16 × 16 pixels, its original 32 × 32"):
        measure(folder, data)
    (folder / "003.webp").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"003\.webp: not an image"):
        measure(folder, data)
    Image.new("RGB", (40, 30)).save(folder / "000.webp")
    with pytest.raises(InputError, match=r"000\.webp has 40 × 30 pixels.*square"):
        reconstruction_size(str(folder))
    Path(str(data.val), "001.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"001\.png: not an image"):
        measure(folder, data)


def test_grey_and_16_bit_images_are_flagged(folder: Path, data: ImageDataConfig) -> None:
    deep = (np.arange(SIZE * SIZE, dtype=np.uint16) * 64).reshape(SIZE, SIZE)
    Image.fromarray(deep).save(Path(str(data.val), "000.png"))
    (folder / "000.webp").unlink()
    Image.fromarray((deep / 257).round().astype(np.uint8)).save(folder / "000.png")
    Image.open(folder / "001.webp").convert("L").convert("RGB").save(folder / "001.webp", lossless=True)
    result = measure(folder, data)
    assert result["converted"] == {
        "originals": {"000.png": "grey, 16 bits or more"}, "reconstructions": {"000.png": "grey"}}
    assert result["rows"][0]["metrics"]["psnr"]["per_image"][0] == 100      # the same after conversion: the cap


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_16_bit_colour_is_flagged(data: ImageDataConfig) -> None:
    """Pillow opens it as RGB."""
    values = np.full((SIZE, SIZE * 3), 257 * 7, dtype=">u2")
    header = f"P6 {SIZE} {SIZE} 65535\n".encode()
    Path(str(data.val), "a.ppm").write_bytes(header + values.tobytes())
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    size = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", size) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    Path(str(data.val), "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    batch = next(iter(validation_batches(data, 9)))
    assert batch.converted == {"a.ppm": "16 bits a channel", "b.png": "16 bits a channel"}
    for name in batch.converted:
        image = batch.images[batch.keys.index(name)]
        assert torch.equal(image, torch.full_like(image, 7 / 255))


def test_what_is_a_folder_of_reconstructions(folder: Path, tmp_path: Path, fitted: Toy) -> None:
    assert is_reconstructions(str(folder)) and not is_reconstructions("nowhere") and not is_reconstructions("org/name")
    (tmp_path / "empty").mkdir()
    assert not is_reconstructions(str(tmp_path / "empty"))
    for part in ("config.json", "config.yaml"):      # saved weights, a run
        (folder / part).write_text("{}")
        assert not is_reconstructions(str(folder))
        (folder / part).unlink()


def test_what_a_folder_cannot_do(folder: Path, data: ImageDataConfig) -> None:
    with pytest.raises(InputError, match="has none"):
        measure(folder, data, latents=True)
    shards = ImageDataConfig(train="", val=str(folder / "x.tar"), size=SIZE)
    (folder / "x.tar").write_bytes(b"")
    with pytest.raises(InputError, match="not with shards"):
        folder_candidate(str(folder), shards)
