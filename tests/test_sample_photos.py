"""The sample photographs: enough of them, small, real JPEGs of the promised size, each attributed, splits apart."""

import csv
from pathlib import Path

import pytest
from PIL import Image, ImageStat

import tokenizers_lab

PHOTOS = Path(tokenizers_lab.__file__).parent / "data" / "samples" / "photos"
# Licences under which changed pictures may be passed on; each has its text or its address in the README beside the pictures.
FREE = {"CC0-1.0", "CC-BY-2.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "GPL-2.0-only", "GPL-2.0-or-later", "LGPL-3.0-only",
        "public domain"}


@pytest.fixture(scope="module")
def rows():
    with open(PHOTOS / "ATTRIBUTION.csv", newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def originals(rows, split):
    return {row["original_sha256"] for row in rows if row["file"].startswith(f"{split}/")}


def test_there_are_enough_pictures_from_enough_photographs(rows):
    assert len(rows) >= 120
    assert len(originals(rows, "train") | originals(rows, "val")) >= 30
    assert sum(row["file"].startswith("val/") for row in rows) == 24


def test_no_photograph_gives_to_both_splits(rows):
    assert not originals(rows, "train") & originals(rows, "val")
    names = {split: {row["original"] for row in rows if row["file"].startswith(split)} for split in ("train", "val")}
    assert not names["train"] & names["val"]


def test_every_file_is_attributed_and_every_entry_is_a_file(rows):
    listed = [row["file"] for row in rows]
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(p.relative_to(PHOTOS)) for p in PHOTOS.rglob("*.jpg")}
    readme = (PHOTOS / "README.md").read_text(encoding="utf-8")
    for row in rows:
        assert row["author"] and row["package"] and row["original"] and row["licence"] in FREE
        assert row["licence"] in readme


def test_crops_of_one_photograph_do_not_overlap(rows):
    boxes: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        boxes.setdefault(f"{row['original_sha256']} {row['short_side']}", []).append((int(row["left"]), int(row["top"])))
    assert len(boxes) == len({row["original_sha256"] for row in rows})      # one scale for each photograph
    for corners in boxes.values():
        for i, (left, top) in enumerate(corners):
            assert all(abs(left - x) >= 288 or abs(top - y) >= 288 for x, y in corners[i + 1:])


def test_pictures_are_whole_jpegs_of_the_promised_size_with_content(rows):
    for row in rows:
        with Image.open(PHOTOS / row["file"]) as image:
            image.load()
            assert image.format == "JPEG" and image.mode == "RGB"
            assert all(256 <= side <= 320 for side in image.size)
            assert max(ImageStat.Stat(image).stddev) > 5, row["file"]


def test_the_set_is_under_five_megabytes():
    assert sum(p.stat().st_size for p in PHOTOS.rglob("*") if p.is_file()) < 5_000_000
