"""Every way to store sound gives the same samples; every way to damage it gives a DataError of one line."""

import resource
import struct

import numpy as np
import pytest
import soundfile
import torch
from data_audio import encoded, sound

from tokenizers_lab.data.audio import (
    audio_info,
    encode_audio,
    open_audio,
    read_audio,
    read_blocks,
    read_segment,
    to_channels,
)
from tokenizers_lab.errors import DataError

VALUES = sound(12_000, 2)                  # (T, 2)


def samples(data: bytes, **options: object) -> np.ndarray:
    """(T, channels)"""
    audio, _ = read_audio(data, **options)   # type: ignore[arg-type]
    assert audio.dtype == torch.float32
    return audio.T.numpy()


@pytest.mark.parametrize("kind, subtype, step", [
    ("WAV", "PCM_U8", 2**-7), ("WAV", "PCM_16", 2**-15), ("WAV", "PCM_24", 2**-23), ("WAV", "PCM_32", 2**-23),
    ("WAV", "FLOAT", 0), ("WAV", "DOUBLE", 0), ("WAVEX", "PCM_16", 2**-15), ("FLAC", "PCM_S8", 2**-7), ("FLAC", "PCM_16", 2**-15),
    ("FLAC", "PCM_24", 2**-23), ("AIFF", "PCM_16", 2**-15), ("W64", "PCM_16", 2**-15), ("RF64", "PCM_16", 2**-15),
])  # fmt: skip
def test_any_bit_depth_is_scaled_to_unit_range(kind, subtype, step):
    assert np.abs(samples(encoded(VALUES, kind=kind, subtype=subtype)) - VALUES).max() <= step


@pytest.mark.parametrize("kind, subtype", [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_lossy_formats_come_close(kind, subtype):
    found = samples(encoded(sound(48_000), kind=kind, subtype=subtype))[:, 0]
    assert np.corrcoef(found[:48_000], sound(48_000)[:, 0])[0, 1] > 0.98 and abs(len(found) - 48_000) <= 1


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 192_000])
def test_any_rate_is_resampled(rate):
    """A tone keeps its pitch and its amplitude."""
    t = np.arange(rate) / rate
    data = encoded((0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32), rate, subtype="FLOAT")
    audio, got = read_audio(data, sample_rate=16_000)
    assert got == 16_000 and audio.shape == (1, 16_000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(audio[0].numpy() - expected)[200:-200].max() < 2e-3


def test_channels_are_mixed_down_kept_or_repeated():
    six = sound(500, 6)
    data = encoded(six, subtype="FLOAT")
    assert np.allclose(samples(data, channels=1)[:, 0], six.mean(1), atol=1e-6)
    assert np.array_equal(samples(data), six)
    assert np.array_equal(samples(encoded(six[:, :1], subtype="FLOAT"), channels=2), six[:, [0, 0]])
    with pytest.raises(DataError, match="6 channels"):
        read_audio(data, channels=2)
    assert to_channels(torch.ones(2, 5), 2).shape == (2, 5)


def test_one_sample_and_clipped_sound_are_read():
    assert samples(encoded(np.array([0.5], np.float32))).tolist() == [[0.5]]
    assert read_audio(encoded(np.array([0.5], np.float32), 48_000), sample_rate=16_000)[0].shape == (1, 1)
    clipped = np.clip(3 * VALUES, -1, 1)
    assert np.abs(samples(encoded(clipped)) - clipped).max() <= 2**-15
    loud = (1.5 * np.sign(VALUES)).astype(np.float32)
    assert np.array_equal(samples(encoded(loud, subtype="FLOAT")), loud)      # floats are taken as they are


@pytest.mark.parametrize("value, reason", [(np.nan, "NaN"), (np.inf, "NaN or infinity"), (-np.inf, "NaN or inf"), (3e4, "30000")])
def test_what_is_no_sound_is_refused(value, reason):
    values = VALUES.copy()
    values[700, 1] = value
    with pytest.raises(DataError, match=reason) as error:
        read_audio(encoded(values, subtype="FLOAT"), name="a.wav")
    assert str(error.value).startswith("a.wav: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("data, reason", [
    (b"", "empty file"), (b"just text\n", "not a sound file"), (encoded(VALUES[:0]), "no samples"),
    (b"OggS" + b"\0" * 40, "not a sound"),
])  # fmt: skip
def test_what_holds_no_sound(tmp_path, data, reason):
    path = tmp_path / "fake.wav"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"fake.wav: .*{reason}") as error:
        read_audio(path)
    assert "\n" not in str(error.value)


def test_missing_files_folders_and_raw_samples(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(DataError, match="cannot be read"):
        read_audio(tmp_path)
    (tmp_path / "a.raw").write_bytes(b"\1\2" * 1000)
    with pytest.raises(DataError, match="not a sound file"):
        read_audio(tmp_path / "a.raw")


@pytest.mark.parametrize("kind, subtype", [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None),
    ("AIFF", "PCM_16"),
])  # fmt: skip
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_truncated_files(tmp_path, kind, subtype, kept):
    data = encoded(sound(48_000), kind=kind, subtype=subtype)
    path = tmp_path / "half.audio"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(DataError, match="half") as error:
        read_audio(path)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="half"):
        list(read_blocks(path))


def test_a_wav_written_to_a_pipe_is_whole():
    """Its sizes were not known when the header was written."""
    data = bytearray(encoded(VALUES[:, :1], subtype="PCM_16"))
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    assert np.abs(samples(bytes(data)) - VALUES[:, :1]).max() <= 2**-15


def test_any_damage_is_a_data_error_or_sound():
    rng = np.random.default_rng(0)
    for kind in ("WAV", "FLAC", "OGG", "AIFF"):
        whole = np.frombuffer(encoded(VALUES, kind=kind), np.uint8)
        for _ in range(40):
            data = whole.copy()
            data[rng.integers(0, min(len(data), 400), 4)] = rng.integers(0, 256, 4)
            try:
                audio, rate = read_audio(data.tobytes(), max_seconds=100)
                assert audio.isfinite().all() and rate > 0
            except DataError as error:
                assert "\n" not in str(error)


def test_long_files_are_refused_by_their_header(monkeypatch):
    data = encoded(np.zeros((32_000, 1), np.float32), kind="FLAC")
    assert audio_info(data).seconds == 2
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **options: pytest.fail("decoded"))
    with pytest.raises(DataError, match="2 s are more than 1 s"):
        read_audio(data, max_seconds=1)


@pytest.mark.parametrize("rate, to", [(16_000, 16_000), (44_100, 16_000), (22_050, 24_000), (8_000, 44_100), (16_000, 15_999)])
@pytest.mark.parametrize("block", [997, 65_536])
def test_blocks_joined_equal_the_whole(rate, to, block):
    data = encoded(sound(70_001, 2, rate=rate), rate, subtype="FLOAT")
    whole, _ = read_audio(data, to, 1)
    pieces = list(read_blocks(data, to, 1, block))
    joined = torch.cat(pieces, dim=1)
    assert joined.shape == whole.shape and (joined - whole).abs().max() < 1e-6
    assert len(pieces) > 1 or block > 997


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("start, samples_", [(0, 16_000), (31_234, 16_000), (100_000, 500), (130_000, 10**6)])
def test_a_segment_equals_that_stretch_of_the_whole(kind, start, samples_):
    data = encoded(sound(400_000, 2, rate=44_100), 44_100, kind)
    whole, _ = read_audio(data, 16_000, 1)
    with open_audio(data) as file:
        segment = read_segment(file, start, samples_, 16_000, 1)
    assert segment.shape[1] == min(samples_, whole.shape[1] - start)
    assert (segment - whole[:, start : start + samples_]).abs().max() < 1e-5


def test_an_hour_is_read_in_the_memory_of_a_minute(tmp_path):
    def peak(minutes: int) -> float:
        path = tmp_path / f"{minutes}.flac"
        with soundfile.SoundFile(path, "w", 8_000, 1) as file:
            for _ in range(minutes):
                file.write(np.zeros(60 * 8_000, np.float32))
        count = sum(piece.shape[1] for piece in read_blocks(path, 16_000, 1))
        assert count == minutes * 60 * 16_000
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss     # KiB, a high-water mark

    first = peak(1)
    assert peak(60) < first + 20_000       # the hour itself takes 230,000


def test_encoded_sound_is_read_back():
    audio = torch.from_numpy(VALUES.T.copy())
    for kind, subtype, step in [("FLAC", "PCM_16", 2**-15), ("WAV", "FLOAT", 0), ("WAV", "PCM_24", 2**-23)]:
        found, rate = read_audio(encode_audio(audio, 22_050, kind, subtype))
        assert rate == 22_050 and (found - audio).abs().max() <= step
    assert read_audio(encode_audio(torch.full((1, 8), 1.7), 16_000))[0].min() > 0.999     # clipped, not wrapped around


def test_handles_are_closed(tmp_path):
    import os

    path = tmp_path / "a.wav"
    path.write_bytes(encoded(VALUES))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_audio(path)
        list(read_blocks(path))
    (tmp_path / "b.wav").write_text("none")
    for _ in range(5):
        with pytest.raises(DataError):
            read_audio(tmp_path / "b.wav")
    assert len(os.listdir("/proc/self/fd")) == before
