"""WAV files written in pieces: what was given comes back, exactly so long, and no half of a file is left behind."""

import numpy as np
import pytest
import soundfile
import torch
from data_audio import encoded, sound

from tokenizers_lab.data import audio as module
from tokenizers_lab.data.audio import read_audio, read_blocks, write_blocks
from tokenizers_lab.errors import DataError


def pieces(values: torch.Tensor, *sizes: int):
    """values (channels, T) in pieces of these sizes, then the rest."""
    yield from values.split([*sizes, values.shape[1] - sum(sizes)], dim=1)


@pytest.mark.parametrize("subtype, step", [("PCM_16", 2**-15), ("FLOAT", 0)])
@pytest.mark.parametrize("samples", [1, 999, 5000])
def test_the_first_samples_of_the_pieces_are_written(tmp_path, subtype, step, samples):
    values = torch.from_numpy(sound(5000, 2).T.copy())
    write_blocks(tmp_path / "a.wav", pieces(values, 1000, 0, 17), samples, 2, 22_050, subtype)
    found, rate = read_audio(tmp_path / "a.wav")
    assert rate == 22_050 and found.shape == (2, samples) and (found - values[:, :samples]).abs().max() <= step
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_what_is_beyond_1_is_clipped_in_integers_and_kept_in_floats(tmp_path):
    loud = torch.tensor([[1.7, -1.7, 0.5]])
    write_blocks(tmp_path / "i.wav", [loud], 3, 1, 16_000)
    write_blocks(tmp_path / "f.wav", [loud], 3, 1, 16_000, "FLOAT")
    assert read_audio(tmp_path / "i.wav")[0][0].tolist() == pytest.approx([1, -1, 0.5], abs=2**-14)
    assert torch.equal(read_audio(tmp_path / "f.wav")[0], loud)


def test_more_than_a_wav_can_hold_becomes_rf64(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAV_BYTES", 1000)
    values = torch.from_numpy(sound(600, 1).T.copy())
    for samples, kind in ((499, "WAV"), (500, "RF64")):
        write_blocks(tmp_path / "a.wav", [values], samples, 1, 16_000)
        assert soundfile.info(tmp_path / "a.wav").format == kind
        assert read_audio(tmp_path / "a.wav")[0].shape == (1, samples)


def failing(values: torch.Tensor):
    yield values
    raise DataError("x.wav: truncated")


@pytest.mark.parametrize("blocks, message", [
    (failing(torch.zeros(1, 100)), "x.wav: truncated"), ([torch.zeros(1, 100)], "only 100 of 200 samples came"),
    ([torch.full((1, 200), torch.nan)], "NaN or infinity"),
])  # fmt: skip
def test_a_failure_leaves_what_was_there(tmp_path, blocks, message):
    (tmp_path / "a.wav").write_bytes(b"before")
    with pytest.raises(DataError, match=message):
        write_blocks(tmp_path / "a.wav", blocks, 200, 1, 16_000)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.wav", b"before")]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be written") as error:
        write_blocks(tmp_path / "none" / "a.wav", [torch.zeros(1, 10)], 10, 1, 16_000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pick", [0, 4])
def test_one_channel_is_picked(pick):
    values = sound(30_000, 5, rate=44_100)
    data = encoded(values, 44_100, subtype="FLOAT")
    found = torch.cat(list(read_blocks(data, 16_000, 1, 7_000, pick=pick)), dim=1)
    alone = read_audio(encoded(np.ascontiguousarray(values[:, pick : pick + 1]), 44_100, subtype="FLOAT"), 16_000)[0]
    assert found.shape == alone.shape and (found - alone).abs().max() < 1e-6
