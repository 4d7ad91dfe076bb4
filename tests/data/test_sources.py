"""What a source names, in which order; and the line that a wrong one gets."""

import os

import pytest
from data_images import jpeg, write_folder, write_shards

from tokenizers_lab.data import sources
from tokenizers_lab.data.folder import Names, open_folder
from tokenizers_lab.data.sources import expand_shards, natural_key, resolve_source, sample_path
from tokenizers_lab.errors import DataError


def test_natural_order():
    assert sorted(["b", "a10", "a2", "A1", "10", "9"], key=natural_key) == ["9", "10", "A1", "a2", "a10", "b"]


def test_folder_is_listed_recursively_in_natural_order(tmp_path):
    images = ("10.jpg", "9.JPG", "sub/2.png", "sub/deep/1.webp")
    for name in (*images, ".hidden.jpg", ".cache/1.jpg", "__MACOSX/1.jpg", "notes.txt", "1.jpg.part"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folder = open_folder(tmp_path)
    assert list(folder.names) == ["9.JPG", "10.jpg", "sub/2.png", "sub/deep/1.webp"]
    assert folder.labels is None and folder.label(0) is None   # 9.JPG has no class


def test_class_folders_give_labels(tmp_path):
    for name in ("10/a.jpg", "9/b.jpg", "9/more/c.jpg", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folder = open_folder(tmp_path)
    assert folder.classes == ["9", "10"]
    assert [(n, folder.label(i)) for i, n in enumerate(folder.names)] == [("9/b.jpg", 0), ("9/more/c.jpg", 0), ("10/a.jpg", 1)]


def test_links_are_followed_once(tmp_path):
    write_folder(tmp_path / "elsewhere", 2)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "set")
    assert list(open_folder(tmp_path / "set").names) == ["class/0.jpg", "class/1.jpg"]


def test_a_changed_folder_is_listed_anew(tmp_path):
    write_folder(tmp_path / "deep", 2)
    first = open_folder(tmp_path)
    assert open_folder(tmp_path) is first
    (tmp_path / "deep/new.jpg").write_bytes(jpeg(0))
    os.utime(tmp_path / "deep", ns=(1, 1))   # whatever the clock of the file system resolves
    assert len(open_folder(tmp_path)) == 3


def test_names_with_odd_characters():
    names = ["ä/ö.jpg", "", "名.png", os.fsdecode(b"\xff.jpg")]
    packed = Names(names)
    assert list(packed) == names and len(packed) == 4
    with pytest.raises(IndexError):
        packed[4]


def test_folder_without_images(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match="no images"):
        open_folder(tmp_path)
    write_shards(tmp_path, [1])
    with pytest.raises(DataError, match=r"write .*/\*\.tar"):
        open_folder(tmp_path)


def test_missing_sources(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    for source, line in [("nowhere", "does not exist"), ("file.txt", "is a file"), ("a-{0..2}.tar", "nothing matches"),
                         ("*.tar", "nothing matches"), ("a-{0..2.tar", "brace")]:   # fmt: skip
        with pytest.raises(DataError, match=line):
            resolve_source(str(tmp_path / source), "train")
    with pytest.raises(DataError, match="nosuchstore"):
        resolve_source("nosuchstore://bucket/a.tar", "train")


def test_brace_ranges_and_globs(tmp_path):
    for i in (0, 1, 2, 10):
        (tmp_path / f"s-{i}.tar").write_bytes(b"")
    names = [str(tmp_path / f"s-{i}.tar") for i in (0, 1, 2, 10)]
    assert expand_shards(str(tmp_path / "s-{0..2}.tar")) == names[:3]
    assert expand_shards(str(tmp_path / "s-*.tar")) == names              # 10 after 2
    assert expand_shards(str(tmp_path / "s-{2,0}.tar")) == [names[2], names[0]]
    assert resolve_source(names[1], "train").shards == (names[1],)
    with pytest.raises(DataError, match=r"s-3\.tar"):                     # one of a range is missing
        expand_shards(str(tmp_path / "s-{0..3}.tar"))
    assert expand_shards("http://host/{00..02}.tar?key=a[1]") == [f"http://host/0{i}.tar?key=a[1]" for i in range(3)]


def test_remote_glob():
    import fsspec

    store = fsspec.filesystem("memory")
    for i in (2, 10):
        store.pipe(f"/bucket/s{i}.tar", b"")
    assert expand_shards("memory://bucket/s*.tar") == ["memory:///bucket/s2.tar", "memory:///bucket/s10.tar"]


def test_sample_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SAMPLES", tmp_path)
    write_folder(tmp_path / "photos/train", 1)
    write_folder(tmp_path / "photos/val", 1)
    assert resolve_source("sample:photos", "val").folder == tmp_path / "photos/val" == sample_path("photos", "val")
    with pytest.raises(DataError, match="known: sample:photos"):
        resolve_source("sample:phtos", "train")
    with pytest.raises(DataError, match="it has: train, val"):
        sample_path("photos", "test")
