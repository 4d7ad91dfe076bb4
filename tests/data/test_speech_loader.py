"""Speech batches: segments and whole clips, every clip once an epoch, resumed exactly, bad clips listed, limits kept."""

import json

import numpy as np
import pytest
import torch
from data_audio import encoded, sound, speech_config, write_clips, write_manifest, write_shards

from tokenizers_lab.data import shards as shards_module
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.data.loader import build_loader, len_samples, sample_path, validation_batches
from tokenizers_lab.errors import CheckpointError, ConfigError, DataError
from tokenizers_lab.settings import SpeechDataConfig

SIZES = [5, 3, 6, 2]   # 16 clips


def take(loader, steps):
    return [next(loader) for _ in range(steps)]


def same(a, b):
    assert len(a) == len(b)
    for (x, x_state), (y, y_state) in zip(a, b):
        assert x_state == y_state and vars(x).keys() == vars(y).keys()
        for name, value in vars(x).items():
            other = getattr(y, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    return True


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"), 13, lengths=(8000, 2000, 12_345), rate=22_050)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("tars"), SIZES)


def test_a_segment_is_a_stretch_of_its_clip(clips):
    cfg = speech_config(clips, segment_seconds=0.2, sample_rate=16_000)
    for batch, state in take(build_loader(cfg, 4, 0), 4):
        assert batch.audio.shape == (4, 1, 3200) and batch.audio.dtype == torch.float32 and batch.audio.is_contiguous()
        assert batch.lengths.dtype == batch.starts.dtype == torch.int64 and len(batch) == 4
        assert json.loads(json.dumps(state)) == state
        for audio, length, start, key in zip(batch.audio, batch.lengths, batch.starts, batch.keys):
            whole = read_audio(clips / key, 16_000, 1)[0]
            assert length == min(3200, whole.shape[1]) and 0 <= start <= max(whole.shape[1] - 3200, 0)
            assert (audio[:, :length] - whole[:, start : start + length]).abs().max() < 1e-6
            assert (audio[:, length:] == 0).all()
    assert len_samples(cfg) == 13 and batch.texts == batch.speakers == [None] * 4


def test_crops(clips):
    def starts(crop, seed=0):
        found = {}
        for batch, _ in take(build_loader(speech_config(clips, crop=crop, segment_seconds=0.05), 13, seed), 3):   # 3 epochs
            for key, start in zip(batch.keys, batch.starts.tolist()):
                found.setdefault(key, []).append(start)
        return found

    assert all(len(set(places)) == 3 for places in starts("random").values())
    fixed = starts("fixed")
    assert all(len(set(places)) == 1 for places in fixed.values()) and len({p[0] for p in fixed.values()}) > 10
    assert starts("fixed", seed=1) == fixed                                    # of the clip, not of the run
    assert set(map(tuple, starts("start").values())) == {(0, 0, 0)}


def test_random_starts_reach_both_ends(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded(sound(13)))
    cfg = speech_config(tmp_path, segment_seconds=10 / 16_000)
    seen = {int(b.starts[0]) for b, _ in take(build_loader(cfg, 1, 0), 60)}
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("channels", [1, 2])
def test_channels(tmp_path, channels):
    stereo, mono = sound(4000, 2), sound(4000, 1, seed=1)
    (tmp_path / "0.wav").write_bytes(encoded(stereo, subtype="FLOAT"))
    (tmp_path / "1.wav").write_bytes(encoded(mono, subtype="FLOAT"))
    (batch,) = validation_batches(speech_config("none", val=str(tmp_path), channels=channels), 2)
    expected = [stereo.mean(1, keepdims=True), mono] if channels == 1 else [stereo, np.repeat(mono, 2, axis=1)]
    assert np.abs(batch.audio.numpy() - np.stack(expected).transpose(0, 2, 1)).max() < 1e-6


@pytest.mark.parametrize("world", [1, 2])
def test_every_clip_once_an_epoch_over_the_ranks(clips, world):
    loaders = [build_loader(speech_config(clips), 2, 0, rank, world) for rank in range(world)]
    keys = [key for _ in range(13 * 2 // world) for loader in loaders for key in next(loader)[0].keys]
    epochs = [keys[i : i + 13] for i in range(0, len(keys), 13)]
    assert all(sorted(epoch) == sorted(f"{i}.flac" for i in range(13)) for epoch in epochs)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_resumed_run_reads_what_it_would_have_read(tmp_path, workers, kind):
    if kind == "folder":
        source: object = write_clips(tmp_path, 11, bad=(3, 7))
    else:
        write_shards(tmp_path, SIZES, bad=(3, 10))
        source = tmp_path / "{0..3}.tar"
    cfg = speech_config(source, workers=workers, bad_fraction=1.0)
    for rank in range(2):
        whole = take(build_loader(cfg, 3, 7, rank, 2), 9)
        assert whole[-1][1]["bad"] > 0
        for stop in (1, 5):
            state = json.loads(json.dumps(whole[stop - 1][1]))
            resumed = build_loader(cfg, 3, 7, rank, 2, start_step=stop, state=state)
            assert same(take(resumed, 9 - stop), whole[stop:])


def test_no_global_randomness_is_read_or_moved(clips):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(build_loader(speech_config(clips), 4, 0), 2)
    list(validation_batches(speech_config("none", val=str(clips)), 4))
    assert torch.equal(before, torch.get_rng_state())


def test_unreadable_clips_are_replaced_counted_and_listed(tmp_path):
    folder = write_clips(tmp_path / "set", 12, bad=(2, 5))
    values = sound(8000)
    values[4000] = np.nan
    (folder / "7.wav").write_bytes(encoded(values, subtype="FLOAT"))
    (folder / "7.flac").unlink()
    listed = tmp_path / "quarantine.jsonl"
    loader = build_loader(speech_config(folder, bad_fraction=0.9, segment_seconds=1.0), 4, 0, quarantine=listed)
    keys = [key for batch, _ in take(loader, 3) for key in batch.keys]
    assert set(keys) == {f"{i}.flac" for i in range(12) if i not in (2, 5, 7)}
    reasons = {e["key"]: e["reason"] for e in map(json.loads, listed.read_text().splitlines())}
    assert set(reasons) == {"2.flac", "5.flac", "7.wav"} and "NaN" in reasons["7.wav"] and "not a sound" in reasons["2.flac"]
    with pytest.raises(DataError, match="bad_fraction"):
        take(build_loader(speech_config(folder, bad_fraction=0.0), 4, 0), 6)


def test_emilias_shards(tars):
    batch, _ = next(build_loader(speech_config(tars / "*.tar", sample_rate=24_000), 4, 0))
    assert batch.audio.shape == (4, 1, 6000)
    for key, text, speaker in zip(batch.keys, batch.texts, batch.speakers):
        number = int(key.split("_S")[1][:5])
        assert key.endswith(f".tar/EN_B00000_S{number:05d}_W000000")
        assert text == f"Clip {number}." and speaker == f"EN_B00000_S{number % 3:05d}"
    assert batch.languages == ["en"] * 4 and len_samples(speech_config(tars / "*.tar", samples=16)) == 16


def test_shards_with_text_files_and_without_any(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("x.wav", encoded(sound(9000))), ("x.txt", b"Hello.\n"), ("y.flac", encoded(sound(9000), kind="FLAC")),
                           ("z.json", b"{}"), ("w.mp3", encoded(sound(9000), kind="MP3")), ("w.json", b"{no json")]:   # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    listed = tmp_path / "q.jsonl"
    cfg = speech_config(tmp_path / "a.tar", bad_fraction=1.0, shuffle_buffer=1)
    batch, _ = take(build_loader(cfg, 2, 0, quarantine=listed), 2)[1]
    assert batch.keys == ["a.tar/x", "a.tar/y"] and batch.texts == ["Hello.", None]
    reasons = [json.loads(line)["reason"] for line in listed.read_text().splitlines()]
    assert "has no sound" in reasons[0] and "cannot be read" in reasons[1]


def test_limits_leave_clips_out(clips, tars, tmp_path, monkeypatch):
    """Lengths at 22.05 kHz in turn: 0.36, 0.09 and 0.56 s."""
    assert len_samples(speech_config(clips, min_seconds=0.1)) == 9
    assert len_samples(speech_config(clips, min_seconds=0.1, max_seconds=0.5)) == 5
    with pytest.raises(DataError, match=r"no clip between 5 and"):
        len_samples(speech_config(clips, min_seconds=5))
    listed = write_manifest(clips / "list.jsonl", [{"file": f"{i}.flac", "duration": 9 if i < 4 else 2} for i in range(13)])
    assert len_samples(speech_config(listed, min_seconds=3)) == 4       # what is listed is believed, no header is read
    keys = [k for b in validation_batches(speech_config("none", val=str(listed), min_seconds=3), 3) for k in b.keys]
    assert keys == ["0.flac", "1.flac", "2.flac", "3.flac"]
    monkeypatch.setattr(shards_module, "MAX_UNWANTED_RUN", 100)
    with pytest.raises(DataError, match="left out"):
        next(build_loader(speech_config(tars / "*.tar", min_seconds=2), 2, 0))
    write_shards(tmp_path, [3], kind="FLAC")
    assert [len(b) for b in validation_batches(speech_config("none", val=str(tmp_path / "0.tar"), max_seconds=0.6), 2)] == [2, 1]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_validation_gives_whole_clips_once_in_order(clips, tars, world, kind):
    source, n = (clips, 13) if kind == "folder" else (tars / "{0..3}.tar", 16)
    cfg = speech_config("none", val=str(source))
    ranks = [list(validation_batches(cfg, 3, rank, world)) for rank in range(world)]
    keys = [[k for batch in batches for k in batch.keys] for batches in ranks]
    order = [f"{i}.flac" for i in range(13)] if kind == "folder" else [f"{t}.tar/EN_B00000_S{i:05d}_W000000" for i, t in
                                                                       enumerate(np.repeat(range(4), SIZES))]
    assert len(order) == n and keys == [order[rank::world] for rank in range(world)]
    for batch in ranks[0]:
        assert batch.audio.shape[2] == batch.lengths.max() and (batch.starts == 0).all()
    if kind == "folder":
        first = ranks[0][0]
        whole = read_audio(clips / first.keys[1], 16_000, 1)[0]
        assert first.lengths[1] == whole.shape[1] and (first.audio[1, :, : whole.shape[1]] - whole).abs().max() < 1e-6
        assert (first.audio[1, :, whole.shape[1] :] == 0).all()


def test_validation_limits(clips):
    cfg = speech_config("none", val=str(clips), val_limit=4, val_seconds=0.2)
    (batch,) = validation_batches(cfg, 8)
    assert batch.keys == ["0.flac", "3.flac", "6.flac", "9.flac"] and batch.lengths.tolist() == [3200] * 4


def test_an_unreadable_validation_clip_is_an_error(tmp_path):
    batches = validation_batches(speech_config("none", val=str(write_clips(tmp_path, 5, bad=(3,)))), 2)
    assert next(batches).keys == ["0.flac", "1.flac"]
    with pytest.raises(DataError, match=r"3\.flac: not a sound file"):
        list(batches)


def test_the_sample_speech():
    cfg = speech_config("sample:speech", val="sample:speech", segment_seconds=1.0)
    assert len_samples(cfg) == 77
    batch, _ = next(build_loader(cfg, 8, 0))
    assert batch.audio.shape == (8, 1, 16_000) and all(batch.texts) and all(batch.speakers) and set(batch.languages) <= {
        "en", "cs", "nl", "it", "fr"}   # fmt: skip
    held = list(validation_batches(cfg, 6))
    assert [len(b) for b in held] == [6, 6, 6] and len({k for b in held for k in b.keys}) == 18


def test_changed_data_and_wrong_options(tmp_path):
    folder = write_clips(tmp_path, 3)
    _, state = next(build_loader(speech_config(folder), 2, 0))
    (folder / "new.wav").write_bytes(encoded(sound(4000)))
    with pytest.raises(CheckpointError, match="holds 4 clips, held 3"):
        build_loader(speech_config(folder), 2, 0, state=state)
    for options in ({"crop": "middle"}, {"segment_seconds": 0}, {"channels": 0}, {"min_seconds": 5, "max_seconds": 2},
                    {"val_seconds": 0}, {"workers": -1}):   # fmt: skip
        with pytest.raises(ConfigError):
            build_loader(speech_config(folder, **options), 2, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no sound files"):
        build_loader(speech_config(tmp_path / "empty"), 2, 0)
    with pytest.raises(DataError, match=r"a folder of clips, a manifest \(.jsonl.*sample:speech"):
        build_loader(speech_config(tmp_path / "nowhere"), 2, 0)


def test_the_teachers_copy_is_the_same_seconds_out_of_the_source():
    cfg = SpeechDataConfig(train="sample:speech", sample_rate=24_000, teacher_rate=16_000, segment_seconds=0.5, workers=0)
    batch, _ = next(build_loader(cfg, 3, seed=1))
    assert batch.audio.shape == (3, 1, 12_000) and batch.teacher_audio.shape == (3, 1, 8_000)
    folder = sample_path("speech", "train")
    for key, start, teacher in zip(batch.keys, batch.starts.tolist(), batch.teacher_audio):
        first = int(start * 16_000 / 24_000)
        expected = read_audio(folder / key, 16_000)[0][:, first : first + 8_000]      # as in the file, not over 24 kHz and back
        torch.testing.assert_close(teacher[:, : expected.shape[1]], expected, atol=1e-6, rtol=0)
    cfg.teacher_rate = None
    assert next(build_loader(cfg, 3, seed=1))[0].teacher_audio is None
