"""The sample speech: enough clips, real speech of the promised format, transcribed, attributed, splits apart, small."""

import csv
import json
import re
from pathlib import Path

import pytest
import soundfile
import torch

import tokenizers_lab
from tokenizers_lab.data.audio import read_audio

SPEECH = Path(tokenizers_lab.__file__).parent / "data" / "samples" / "speech"
FREE = {"CC-BY-SA-3.0", "GPL-2.0-only", "BSD-2-Clause"}      # changed clips may be passed on


@pytest.fixture(scope="module")
def rows():
    with open(SPEECH / "ATTRIBUTION.csv", newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


@pytest.fixture(scope="module")
def clips():
    return {split: [json.loads(line) for line in (SPEECH / split / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
            for split in ("train", "val")}


def words(text):
    return frozenset(re.findall(r"\w+", text.lower()))


def test_there_are_enough_clips_and_speakers(clips):
    seconds = {split: sum(c["duration"] for c in some) for split, some in clips.items()}
    assert len(clips["train"]) + len(clips["val"]) >= 60 and 300 <= sum(seconds.values()) <= 420
    assert len(clips["val"]) >= 15 and seconds["val"] >= 60
    assert len({c["speaker"] for c in clips["train"]}) >= 5


def test_held_out_sentences_are_their_own(clips):
    for held in clips["val"]:
        for c in clips["train"]:
            a, b = words(held["text"]), words(c["text"])
            assert len(a & b) / len(a | b) < 0.7, (held["text"], c["text"])
    assert {c["speaker"] for c in clips["val"]} - {c["speaker"] for c in clips["train"]} == {"fillets_cs_linuxer1"}


def test_every_file_is_listed_and_attributed(rows, clips):
    files = {str(p.relative_to(SPEECH)) for p in SPEECH.rglob("*.flac")}
    assert files == {row["file"] for row in rows} and len(rows) == len(files)
    assert files == {f"{split}/{c['file']}" for split, some in clips.items() for c in some}
    assert len({row["original_sha256"] for row in rows}) == len(rows)
    readme = (SPEECH / "README.md").read_text(encoding="utf-8")
    for row in rows:
        assert row["author"] and row["package"] and row["original"] and row["text"].strip() and row["licence"] in FREE
        assert row["licence"] in readme and row["speaker"].split("_")[0] in readme
    for link in re.findall(r"\]\(([^)]*)\)", readme):
        assert (SPEECH / link).is_file(), link


def test_clips_are_whole_16_bit_flac_with_speech(clips):
    for split, some in clips.items():
        for clip in some:
            path = SPEECH / split / clip["file"]
            info = soundfile.info(path)
            assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
            audio = read_audio(path)[0][0]
            assert abs(len(audio) / 16_000 - clip["duration"]) < 1e-3 and 1.5 < clip["duration"] < 15
            assert 0.01 < audio.pow(2).mean().sqrt() < 0.4, clip["file"]
            assert (audio.abs() > 0.999).sum() <= 2, clip["file"]                  # not clipped
            frames = audio[: len(audio) // 320 * 320].view(-1, 320).pow(2).mean(1).sqrt()
            assert (frames > 0.01).float().mean() > 0.4, clip["file"]              # mostly not silence
            letters = len(re.findall(r"\w", clip["text"]))
            assert 4 < letters / clip["duration"] < 30, clip                       # a transcript of this length could be spoken


def test_spectra_reach_above_telephone_band(clips):
    """16 kHz in fact, not 8 kHz sound at twice the rate."""
    for split, some in clips.items():
        for clip in some:
            audio = read_audio(SPEECH / split / clip["file"])[0][0]
            power = torch.fft.rfft(audio).abs() ** 2
            above = power[int(len(power) * 0.55) : int(len(power) * 0.85)].sum() / power.sum()     # 4.4 to 6.8 kHz
            assert above > 1e-5, clip["file"]


def test_the_set_is_small():
    assert sum(p.stat().st_size for p in SPEECH.rglob("*") if p.is_file()) < 9_000_000
    assert sum(p.stat().st_size for p in SPEECH.parent.rglob("*") if p.is_file()) < 14_000_000
