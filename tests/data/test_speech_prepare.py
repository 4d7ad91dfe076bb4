"""Collections in the layout of their publishers become manifests and shards that training reads; what is refused is listed."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_audio import encoded, sound, speech_config, write_manifest, write_shards

from tokenizers_lab.data import corpora
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.data.corpora import Clip, Refused
from tokenizers_lab.data.loader import len_samples, validation_batches
from tokenizers_lab.data.prepare import Limits, prepare
from tokenizers_lab.errors import DataError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_speech.py"


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def wave(seconds: float = 1.0, seed: int = 0, kind: str = "FLAC") -> bytes:
    return encoded(sound(int(16_000 * seconds), seed=seed), kind=kind)


@pytest.fixture
def libri(tmp_path):
    root = tmp_path / "LibriSpeech/dev-clean"
    for i in range(12):
        put(root / f"84/121123/84-121123-{i:04d}.flac", wave(1 + i / 10, i))
    put(root / "84/121123/84-121123.trans.txt", "".join(f"84-121123-{i:04d} SENTENCE NUMBER {i}\n" for i in range(13)))
    put(root / "174/50561/174-50561-0000.flac", b"broken")
    put(root / "174/50561/174-50561-0001.flac", encoded(np.zeros((16_000, 1), np.float32), kind="FLAC"))
    put(root / "174/50561/174-50561-0002.flac", wave(0.1))
    put(root / "174/50561/174-50561-0003.flac", wave())
    put(root / "174/50561/174-50561.trans.txt", "".join(f"174-50561-{i:04d} WORDS {i}\n" for i in range(3)))
    return root.parent


def reasons(out: Path) -> dict[str, str]:
    return {r["key"].rpartition("/")[2]: r["reason"] for r in map(json.loads, (out / "refused.jsonl").read_text().splitlines())}


def test_librispeech(libri, tmp_path):
    out = tmp_path / "out"
    report = prepare(corpora.librispeech(libri), out, Limits(), "both", per_shard=5, in_place=True)
    assert report.clips == {"all": 12} and report.speakers.keys() == {"84"} and abs(report.seconds["all"] - 18.6) < 1e-6
    found = reasons(out)
    assert found["84-121123-0012"] == "no sound file" and found["174-50561-0003"] == "no transcript"
    assert "not a sound file" in found["174-50561-0000"] and found["174-50561-0001"] == "silent"
    assert found["174-50561-0002"] == "too short: 0.10 s" and len(found) == 5
    assert sum(json.loads((out / "report.json").read_text())["refused"].values()) == 5
    assert not (out / "clips").exists()                                   # the manifest names the files where they are
    by_manifest = list(validation_batches(speech_config("none", val=str(out)), 4))
    by_shards = list(validation_batches(speech_config("none", val=str(out / "*.tar")), 4))
    assert sorted(p.name for p in out.glob("*.tar")) == [f"shard-{i:06d}.tar" for i in range(3)]
    for a, b in zip(by_manifest, by_shards, strict=True):
        assert a.audio.equal(b.audio) and a.texts == b.texts and a.speakers == b.speakers == ["84"] * 4
    assert by_manifest[0].texts[1] == "SENTENCE NUMBER 1"


def test_the_same_clips_give_the_same_shards(libri, tmp_path):
    made = []
    for name in ("a", "b"):
        prepare(corpora.librispeech(libri), tmp_path / name, Limits(sample_rate=8000), "shards")
        made.append((tmp_path / name / "shard-000000.tar").read_bytes())
    assert made[0] == made[1]


def test_a_split_by_sentences(tmp_path):
    clips = [Clip(f"{i}", wave(0.5, i), f"Sentence {i % 50}!" if i < 100 else f"sentence {i % 50}", "s") for i in range(150)]
    report = prepare(clips, tmp_path / "out", Limits(val_share=0.3))
    lines = {split: (tmp_path / "out" / split / "manifest.jsonl").read_text().splitlines() for split in ("train", "val")}
    texts = {split: {json.loads(line)["text"].lower().strip("!") for line in some} for split, some in lines.items()}
    assert not texts["train"] & texts["val"] and len(texts["train"] | texts["val"]) == 50
    assert 20 < report.clips["val"] < 75 and report.clips["val"] + report.clips["train"] == 150
    assert len_samples(speech_config(tmp_path / "out/train")) == report.clips["train"]


def test_a_manifest_in_csv_resampled(tmp_path):
    put(tmp_path / "in/a.b.wav", encoded(sound(44_100, 2, rate=44_100), 44_100))
    put(tmp_path / "in/sub/a.b.wav", wave(1, 1, "WAV"))
    put(tmp_path / "in/list.csv", "path,transcription,speaker_id\na.b.wav,One,x\nsub/a.b.wav,Two,y\nnone.wav,Three,z\n")
    prepare(corpora.listed_clips(tmp_path / "in/list.csv"), tmp_path / "out", Limits(sample_rate=16_000), "both", in_place=True)
    rows = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [r["file"] for r in rows] == ["clips/a-b.flac", "clips/sub_a-b.flac"] and rows[1]["text"] == "Two"
    audio, rate = read_audio(tmp_path / "out" / rows[0]["file"])
    assert audio.shape == (1, 16_000) and rate == 16_000 and rows[0]["duration"] == 1.0
    (batch,) = validation_batches(speech_config("none", val=str(tmp_path / "out/*.tar")), 4)
    assert batch.keys == ["shard-000000.tar/a-b", "shard-000000.tar/sub_a-b"] and batch.speakers == ["x", "y"]
    assert reasons(tmp_path / "out") == {"none": "no sound file"}


def test_emilia_by_the_script(tmp_path):
    write_shards(tmp_path / "in", [4, 3], bad=(2,))
    done = subprocess.run([sys.executable, SCRIPT, "emilia", tmp_path / "out", "--source", tmp_path / "in" / "{0..1}.tar",
                           "--min-seconds", "0.2", "--form", "both"], capture_output=True, text=True)
    assert done.returncode == 0 and "language en" in done.stdout, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[0]["speaker"] == "EN_B00000_S00000" and rows[0]["file"].endswith("W000000.mp3")
    assert len(reasons(tmp_path / "out")) == 1
    again = subprocess.run([sys.executable, SCRIPT, "emilia", tmp_path / "out", "--source", tmp_path / "in/0.tar"],
                           capture_output=True, text=True)
    assert again.returncode == 1 and "not empty" in again.stderr and "Traceback" not in again.stderr


def test_asterisk_prompts(tmp_path):
    sounds = tmp_path / "usr/share/asterisk/sounds/en_US_f_Allison"
    for name in ("added", "digits/1", "beep", "unknown"):
        put(sounds / f"{name}.g722", b"\0" * 8000)
    put(tmp_path / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz",
        gzip.compress(b"; Core\n\nadded: Added.\nbeep: [a beep]\ndigits/1:  one\n"))
    found = list(corpora.asterisk_prompts(tmp_path))
    assert found[0] == Clip("en_US_f_Allison/added", sounds / "added.g722", "Added.", "en_US_f_Allison", "en")
    assert found[1] == Refused("en_US_f_Allison/beep", "no plain speech: [a beep]")
    assert isinstance(found[2], Clip) and (found[2].key, found[2].text) == ("en_US_f_Allison/digits/1", "one")
    assert found[3] == Refused("en_US_f_Allison/unknown", "no transcript")


def test_g722(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.g722"
    tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)).astype(np.int16)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        for chunk in tone.reshape(-1, 320):
            frame = av.AudioFrame.from_ndarray(chunk[None], format="s16", layout="mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    audio, rate = corpora.read_g722(path)
    assert rate == 16_000 and audio.shape == (1, 32_000)
    spectrum = np.abs(np.fft.rfft(audio[0].numpy()))
    assert spectrum.argmax() == 880 and 0.2 < audio.abs().max() < 0.3
    with pytest.raises(DataError, match="no samples"):
        corpora.read_g722(put(tmp_path / "empty.g722", b""))


def test_tuxpaint_descriptions(tmp_path):
    stamps = tmp_path / "usr/share/tuxpaint/stamps/animals"
    for name in ("bee_desc.ogg", "bee_desc_fr.ogg", "bee_desc_pt_BR.wav", "bee_desc_xx.ogg", "bee.ogg", "ant_desc.ogg"):
        put(stamps / name, b"-")
    put(stamps / "bee.txt", "A bee.\nfr.utf8=Une abeille.\npt.utf8=Uma abelha.\n")
    found = {item.key: item for item in corpora.tuxpaint_descriptions(tmp_path)}
    texts = {key: item.text for key, item in found.items() if isinstance(item, Clip)}
    assert texts == {"animals/bee_desc": "A bee.", "animals/bee_desc_fr": "Une abeille.", "animals/bee_desc_pt_BR": "Uma abelha."}
    assert {k for k, i in found.items() if isinstance(i, Refused)} == {"animals/ant_desc", "animals/bee_desc_xx"}
    assert found["animals/bee_desc"].language == "en" and found["animals/bee_desc_fr"].speaker == "tuxpaint_fr"


def test_fillets_dialogues(tmp_path):
    game = tmp_path / "usr/share/games/fillets-ng"
    put(game / "script/city/dialogs_cs.lua",
        'dialogId("a-m", "font_small", "Hello \\"you\\".")\ndialogStr("Ahoj \\"ty\\".")\n\n'
        'dialogId("b-v", "font_big", "Yes.")\ndialogStr(\n"Ano.")\ndialogId("c", "", "")\ndialogStr("")\n')
    for name in ("a-m", "b-v", "c", "d"):
        put(game / f"sound/city/cs/{name}.ogg", b"-")
    found = list(corpora.fillets_dialogues(tmp_path, "cs"))
    assert found[0] == Clip("city/cs/a-m", game / "sound/city/cs/a-m.ogg", 'Ahoj "ty".', "fillets_cs_small", "cs")
    assert isinstance(found[1], Clip) and (found[1].text, found[1].speaker) == ("Ano.", "fillets_cs_big")
    assert [item.reason for item in found[2:]] == ["no transcript", "no transcript"]


def test_nothing_to_take(tmp_path):
    with pytest.raises(DataError, match=r"no \*\.trans\.txt"):
        list(corpora.librispeech(tmp_path))
    empty = write_manifest(tmp_path / "m.jsonl", [{"file": "none.wav"}])
    with pytest.raises(DataError, match="no clip could be taken"):
        prepare(corpora.listed_clips(empty), tmp_path / "out", Limits())
    with pytest.raises(DataError, match="not empty"):
        prepare([], tmp_path / "out", Limits())


def test_limits(tmp_path):
    clips = [Clip("short", wave(0.5), "a"), Clip("mute", wave(1.0)), Clip("long", wave(3.0), "b"), Clip("good", wave(1.0), "c")]
    prepare(clips, tmp_path / "out", Limits(min_seconds=0.8, max_seconds=2, need_text=True))
    assert reasons(tmp_path / "out") == {"short": "too short: 0.50 s", "mute": "no transcript", "long": "too long: 3.0 s"}
