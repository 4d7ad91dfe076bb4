"""Images with captions: manifests, folders and shards that tell them, and pairs made of Tux Paint's stamps."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_images import data_config, jpeg, write_folder, write_shards
from PIL import Image

from tokenizers_lab.data.loader import build_loader, len_samples, validation_batches
from tokenizers_lab.data.manifest import Row, read_manifest, write_manifest
from tokenizers_lab.data.pairs import open_images, split_pairs, stamp_pairs
from tokenizers_lab.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ["a red fox", "a blue bird", "", "a green frog"]


@pytest.fixture
def listed(tmp_path):
    """Four images of which one has no caption, with a manifest."""
    write_folder(tmp_path, 4)
    rows = [Row(f"{i}.jpg", text or None, label="mammal" if i == 0 else "other") for i, text in enumerate(CAPTIONS)]
    write_manifest(tmp_path / "manifest.jsonl", rows)
    return tmp_path


def test_a_manifest_tells_captions_and_classes(listed):
    folder = open_images(listed, texts=True)
    assert list(folder.names) == ["0.jpg", "1.jpg", "3.jpg"] and folder.classes == ["mammal", "other"]
    assert folder.labels.tolist() == [0, 1, 1] and folder.raw(2).about == {"label": 1, "text": "a green frog"}
    assert open_images(listed / "manifest.jsonl", texts=True) is folder
    assert len(open_images(listed)) == 4
    (listed / "other.csv").write_text("image,caption,class\n0.jpg,\"one, two\",7\n1.jpg,x,11\n")
    other = open_images(listed / "other.csv")
    assert other.labels.tolist() == [7, 11] and list(other.texts) == ["one, two", "x"]


def test_batches_carry_the_captions_of_their_images(listed):
    config = data_config(listed, texts=True, val=str(listed), flip=False)
    assert len_samples(config) == 3
    batch, _ = next(build_loader(config, 3, seed=0))
    wanted = {f"{i}.jpg": text for i, text in enumerate(CAPTIONS)}
    assert sorted(batch.keys) == ["0.jpg", "1.jpg", "3.jpg"] and batch.texts == [wanted[key] for key in batch.keys]
    assert batch.to("cpu").texts == batch.texts
    (held_out,) = validation_batches(config, 4)
    assert held_out.texts == ["a red fox", "a blue bird", "a green frog"] and held_out.labels.tolist() == [0, 1, 1]
    assert next(build_loader(data_config(listed), 3, seed=0))[0].texts is None


def test_captions_that_nobody_tells_are_an_error(tmp_path):
    write_folder(tmp_path / "plain", 2)
    with pytest.raises(DataError, match="needs a manifest"):
        build_loader(data_config(tmp_path / "plain", texts=True), 2, seed=0)
    write_manifest(tmp_path / "plain" / "manifest.jsonl", [Row("0.jpg")])
    with pytest.raises(DataError, match="lists no image with a caption"):
        build_loader(data_config(tmp_path / "plain", texts=True), 2, seed=0)
    with pytest.raises(DataError, match="does not exist"):
        build_loader(data_config(tmp_path / "none.jsonl", texts=True), 2, seed=0)


def shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, parts in enumerate(samples):
            for ending, content in {"jpg": jpeg(number), **parts}.items():
                info = tarfile.TarInfo(f"{number:04d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_shards_have_captions_beside_the_images(tmp_path):
    path = shard(tmp_path / "0.tar", [
        {"txt": "ein Fuchs ü\n".encode()}, {"json": json.dumps({"caption": "a bird", "width": 5}).encode()},
        {"txt": b" "}, {"txt": b"\xff\xfe"}, {"json": b"{}"}, {"txt": b"a frog", "cls": b"3"}])
    batch, _ = next(build_loader(data_config(path, texts=True, bad_fraction=1.0), 3, seed=0, quarantine=tmp_path / "bad.jsonl"))
    texts = dict(zip(batch.keys, batch.texts))
    assert texts == {"0.tar/0000": "ein Fuchs ü", "0.tar/0001": "a bird", "0.tar/0005": "a frog"}
    reasons = (tmp_path / "bad.jsonl").read_text()
    assert reasons.count("has no caption") == 2 and reasons.count("cannot be read") == 1


def test_without_the_option_captions_in_shards_are_not_read(tmp_path):
    write_shards(tmp_path, [4])
    batch, _ = next(build_loader(data_config(tmp_path / "0.tar"), 4, seed=0))
    assert batch.texts is None and sorted(batch.labels.tolist()) == [0, 1, 2, 3]


def test_training_may_see_larger_images_than_validation(listed):
    config = data_config(listed, size=16, train_size=24, val=str(listed))
    assert next(build_loader(config, 2, seed=0))[0].images.shape == (2, 3, 24, 24)
    assert next(validation_batches(config, 2)).images.shape == (2, 3, 16, 16)
    with pytest.raises(ConfigError, match="train_size"):
        build_loader(data_config(listed, train_size=0), 2, seed=0)


@pytest.fixture
def stamps(tmp_path):
    """The tree of the Debian package, with synthetic stamps: 10 animals, two of them with one caption, and 2 plants."""
    folder = tmp_path / "package/usr/share/tuxpaint/stamps"
    for number in range(12):
        path = folder / ("animals" if number < 10 else "plants") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((20, 30, 4), np.uint8)
        pixels[5:15, 5:15] = 20 * number, 0, 0, 255
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"Stamp {min(number, 8) if number < 10 else number}.\nfr.utf8=Tampon.\n")
    Image.fromarray(pixels).save(folder / "plants/11_mirror.png")
    return tmp_path


def test_a_fixed_fifth_of_each_class_is_held_out(stamps):
    pairs = list(stamp_pairs(stamps / "package"))
    assert len(pairs) == 12 and pairs[2].key == "animals/2" and (pairs[2].text, pairs[2].label) == ("Stamp 2.", "animals")
    parts = split_pairs(pairs, 0.2)
    captions = {split: {pair.text for pair in part} for split, part in parts.items()}
    assert not captions["train"] & captions["val"] and len(captions["val"]) == 3      # 2 of 9 and 1 of 2 captions
    assert {pair.label for pair in parts["val"]} == {pair.label for pair in parts["train"]} == {"animals", "plants"}
    assert {p.key for p in split_pairs(pairs[::-1], 0.2)["val"]} == {p.key for p in parts["val"]}
    assert not split_pairs(pairs, 0)["val"]
    with pytest.raises(DataError, match="holds no stamps"):
        list(stamp_pairs(stamps))


@pytest.mark.slow
def test_the_script_makes_pairs_that_training_reads(stamps):
    control = stamps / "package/DEBIAN/control"
    control.parent.mkdir()
    control.write_text("Package: tuxpaint-stamps-default\nVersion: 1\nArchitecture: all\nMaintainer: t <t@t.t>\nDescription: t\n")
    (stamps / "debs").mkdir()
    subprocess.run(["dpkg-deb", "-b", stamps / "package", stamps / "debs/tuxpaint-stamps-default_1_all.deb"], check=True,
                   stdout=subprocess.DEVNULL)
    command = [sys.executable, ROOT / "scripts/prepare_pairs.py", stamps / "out", "--packages", stamps / "debs", "--side", "15"]
    subprocess.run(command, check=True)
    rows = list(read_manifest(stamps / "out/train/manifest.jsonl"))
    assert len(rows) + len(list(read_manifest(stamps / "out/val/manifest.jsonl"))) == 12
    with Image.open(stamps / "out/train" / rows[0].file) as image:
        assert image.size == (15, 15) and image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    batch, _ = next(build_loader(data_config(stamps / "out/train", texts=True), 4, seed=0))
    assert all(text.startswith("Stamp") for text in batch.texts) and batch.labels is not None
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "not empty" in again.stderr
    missing = subprocess.run([*command[:2], stamps / "new", "--packages", stamps / "out"], capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr.startswith("there is no tuxpaint-stamps-default")
