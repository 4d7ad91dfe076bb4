"""The crops: ADM's against the published formula, the random one by what it may and may not do."""

import numpy as np
import pytest
from data_images import data_config, encoded, noise
from PIL import Image

from tokenizers_lab.data import transforms
from tokenizers_lab.data.decode import open_image, read_image
from tokenizers_lab.data.sampling import view_numbers
from tokenizers_lab.data.transforms import check_crop, fit_image, training_view, validation_view
from tokenizers_lab.errors import ConfigError, DataError


def view(image: Image.Image, numbers: tuple, kind: str = "PNG", **options: object) -> np.ndarray:
    with open_image(encoded(image, kind)) as opened:
        return np.asarray(training_view(opened, data_config("x", **options), numbers, "x"))


@pytest.mark.parametrize("size", [(333, 250), (250, 333), (64, 64), (65, 97), (31, 40), (127, 128), (129, 600)])
def test_center_crop_follows_the_steps_of_adm(size):
    image = Image.fromarray(noise(*size))
    found = fit_image(image, 64)
    assert found.size == (64, 64)
    steps = image                      # Dhariwal & Nichol 2021, guided-diffusion: halve, scale the short side, crop the middle
    for _ in range({333: 1, 250: 1, 129: 1}.get(min(size), 0)):
        steps = steps.resize((steps.size[0] // 2, steps.size[1] // 2), Image.Resampling.BOX)
    if size == (333, 250):
        assert steps.size == (166, 125)
    ratio = 64 / min(steps.size)
    steps = steps.resize((round(steps.size[0] * ratio), round(steps.size[1] * ratio)), Image.Resampling.BICUBIC)
    array = np.asarray(steps)
    y, x = (array.shape[0] - 64) // 2, (array.shape[1] - 64) // 2
    assert np.array_equal(np.asarray(found), array[y : y + 64, x : x + 64])


def test_an_image_of_the_size_is_left_as_it_is():
    image = Image.fromarray(noise(64, 64))
    assert np.array_equal(np.asarray(fit_image(image, 64)), np.asarray(image))


def test_an_elongated_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(DataError, match="elongated"):
        fit_image(Image.new("RGB", (100_000, 1)), 256)


def test_random_crop_takes_the_drawn_square():
    picture = noise(60, 50)
    # side 20 … 40: 0.5 gives 20 + int(0.5 · 21) = 30; left int(0.25 · 31) = 7, top int(0.5 · 21) = 10
    image, options = Image.fromarray(picture), {"size": 30, "crop": "random", "crop_min": 20, "crop_max": 40}
    found = view(image, (0.5, 0.25, 0.5, 0.9), **options)
    assert np.array_equal(found, picture[10:40, 7:37])
    mirrored = view(image, (0.5, 0.25, 0.5, 0.1), **options)
    assert np.array_equal(mirrored, found[:, ::-1])
    straight = view(image, (0.5, 0.25, 0.5, 0.1), flip=False, **options)
    assert np.array_equal(straight, found)


@pytest.mark.parametrize("corner, expected", [(0.0, (slice(0, 50), slice(0, 50))), (1 - 2**-24, (slice(0, 50), slice(10, 60)))])
def test_random_crop_reaches_the_borders_and_not_beyond(corner, expected):
    picture = noise(60, 50)
    found = view(Image.fromarray(picture), (1 - 2**-24, corner, corner, 0.9), size=50, crop="random", crop_min=1)
    assert np.array_equal(found, picture[expected])


def test_random_crop_of_an_image_smaller_than_the_crop_takes_its_short_side():
    small = view(Image.fromarray(noise(20, 12)), view_numbers(0), size=32, crop="random", crop_min=64, crop_max=128)
    assert small.shape == (32, 32, 3)


def test_reduced_decoding_shows_the_same_crop(monkeypatch):
    image = Image.fromarray(noise(803, 605))
    options = {"size": 32, "crop": "random", "crop_min": 300, "crop_max": 500}
    for seed in range(5):
        fast = view(image, view_numbers(seed), "JPEG", **options).astype(float)
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "_draft", lambda image, factor: 1)
            full = view(image, view_numbers(seed), "JPEG", **options).astype(float)
        assert np.abs(fast - full).max() > 0 and np.abs(fast - full).mean() < 1


def test_reduced_decoding_of_a_rotated_jpeg(monkeypatch):
    upright = noise(400, 640)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(Image.fromarray(np.ascontiguousarray(np.rot90(upright))), "JPEG", exif=exif, quality=95)
    cfg = data_config("x", size=32, crop="random", crop_min=400, flip=False)
    with open_image(stored) as opened:
        found = np.asarray(training_view(opened, cfg, (0.0, 0.0, 0.99, 0.9), "x")).astype(float)
        assert opened.size == (160, 100)   # decoded at a quarter
    expected = np.asarray(Image.fromarray(upright[238:638]).resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(found - expected).mean() < 2


def test_the_protocol_never_decodes_reduced(monkeypatch):
    monkeypatch.setattr(transforms, "_draft", lambda image, factor: pytest.fail("draft"))
    data = encoded(Image.fromarray(noise(900, 700)), "JPEG")
    expected = np.asarray(fit_image(read_image(data), 32))
    cfg = data_config("x", size=32, flip=False)
    with open_image(data) as opened:
        assert np.array_equal(np.asarray(validation_view(opened, cfg, "x")), expected)
    with open_image(data) as opened:
        assert np.array_equal(np.asarray(training_view(opened, cfg, view_numbers(0), "x")), expected)


def test_a_random_crop_may_be_a_share_of_the_short_side():
    picture = noise(100, 60)
    image, options = Image.fromarray(picture), {"crop": "random", "crop_share": 0.5, "flip": False}
    # side int(60 · (0.5 + 0.5 · 0.5)) = 45; left int(0.25 · 56) = 14, top int(0.5 · 16) = 8
    assert np.array_equal(view(image, (0.5, 0.25, 0.5, 0.9), size=45, **options), picture[8:53, 14:59])
    assert np.array_equal(view(image, (0.0, 0.0, 0.0, 0.9), size=30, **options), picture[:30, :30])
    assert np.array_equal(view(image, (1 - 2**-24, 0.0, 0.0, 0.9), size=59, **options), picture[:59, :59])
    small = view(Image.fromarray(noise(20, 12)), view_numbers(0), size=32, **options)      # under the size: scaled up
    assert small.shape == (32, 32, 3)


def test_a_random_crop_is_scaled_by_the_filter_that_is_asked_for():
    picture = Image.fromarray(noise(60, 60))
    options = {"size": 20, "crop": "random", "crop_min": 60, "flip": False}
    for name, kind in (("bicubic", Image.Resampling.BICUBIC), ("lanczos", Image.Resampling.LANCZOS)):
        found = view(picture, (0.0, 0.0, 0.0, 0.9), crop_filter=name, **options)
        assert np.array_equal(found, np.asarray(picture.resize((20, 20), kind)))


@pytest.mark.parametrize("options", [
    {"crop": "middle"}, {"crop_filter": "box"}, {"crop_share": 1.5}, {"crop_share": 0.5, "crop_min": 8}, {"size": 0},
    {"crop": "random", "crop_min": 40, "crop_max": 20}, {"crop_max": -1},
])
def test_contradictory_options(options):
    with pytest.raises(ConfigError):
        check_crop(data_config("x", **options))
