"""Manifests in every form and under every usual column name; and the line that a wrong one gets."""

import json

import pytest
from data_audio import write_clips, write_manifest

from tokenizers_lab.data.manifest import Row, open_clips, read_manifest
from tokenizers_lab.data.manifest import write_manifest as write_rows
from tokenizers_lab.errors import DataError

ROWS = [Row("a.wav", "Ahoj, světe!", "s1", "cs", 1.5), Row("sub/b.flac")]


def test_json_lines(tmp_path):
    write_rows(tmp_path / "m.jsonl", ROWS)
    assert list(read_manifest(tmp_path / "m.jsonl")) == ROWS
    assert "null" not in (tmp_path / "m.jsonl").read_text()
    nemo = write_manifest(tmp_path / "nemo.jsonl", [{"audio_filepath": "a.wav", "text": "x", "duration": "2", "offset": 0}])
    assert list(read_manifest(nemo)) == [Row("a.wav", "x", duration=2.0)]


def test_csv_and_tsv(tmp_path):
    (tmp_path / "m.csv").write_text('\ufefffile,text,speaker\na.wav,"one, ""two""",7\nb.wav,,\n', encoding="utf-8")
    assert list(read_manifest(tmp_path / "m.csv")) == [Row("a.wav", 'one, "two"', "7"), Row("b.wav")]
    (tmp_path / "m.tsv").write_text('client_id\tpath\tsentence\tlocale\nx\tc.mp3\tshe said "go"\ten\n')      # Common Voice
    assert list(read_manifest(tmp_path / "m.tsv")) == [Row("c.mp3", 'she said "go"', "x", "en")]


@pytest.mark.parametrize("name, content, line", [
    ("m.jsonl", '{"file": "a"}\n{"text": 1}\n', "line 2: names no file"), ("m.jsonl", "[1]\n", "line 1: is no JSON object"),
    ("m.jsonl", "{a\n", "line 1: is no JSON"), ("m.csv", "file,duration\na.wav,long\n", "line 2: the duration 'long'"),
    ("m.csv", "text\nx\n", "line 2: names no file"), ("m.csv", "", "lists no clip"),
    ("m.jsonl", "\xff".encode("latin-1"), "cannot be read"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=line) as error:
        open_clips(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_folder_with_a_manifest_is_what_the_manifest_says(tmp_path):
    write_clips(tmp_path, 4)
    assert [open_clips(tmp_path).files[i] for i in range(4)] == ["0.flac", "1.flac", "2.flac", "3.flac"]
    write_manifest(tmp_path / "manifest.jsonl", [{"file": "2.flac", "text": "two"}])
    clips = open_clips(tmp_path)
    raw = clips.raw(0)
    assert len(clips) == 1 and raw.content == tmp_path / "2.flac"
    assert raw.about == {"text": "two", "speaker": None, "language": None}
    assert open_clips(tmp_path) is clips


def test_a_changed_manifest_is_read_anew(tmp_path):
    import os

    path = write_manifest(tmp_path / "m.jsonl", [{"file": "a.wav"}])
    assert len(open_clips(path)) == 1
    path.write_text(path.read_text() + json.dumps({"file": "b.wav"}))
    os.utime(path, ns=(1, 1))
    assert len(open_clips(path)) == 2
    with pytest.raises(DataError, match="no manifest"):
        open_clips(tmp_path / "none.csv")
