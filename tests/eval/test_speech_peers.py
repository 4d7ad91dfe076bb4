"""Peers' speech codecs by our convention: their own computation, every item as if alone, sizes from which a bitrate follows."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import CheckpointError, InputError, WeightsMissing
from tokenizers_lab.eval.candidates import untrained_copy
from tokenizers_lab.eval.speech_peers import PEERS, SEED, SpeechPeerConfig, is_speech_peer, load_speech_peer
from tokenizers_lab.settings import SpeechDataConfig

TINY = ["mimi:random-tiny", "encodec:random-tiny", "dac:random-tiny"]
needs_package = pytest.mark.skipif(importlib.util.find_spec("encodec") is None, reason="pip install encodec")


def speech(rate: int, seconds: float = 1.0) -> torch.Tensor:
    """(3, 1, samples) of sample speech."""
    cfg = SpeechDataConfig(
        train="sample:speech", val="sample:speech", val_limit=3, val_seconds=seconds, sample_rate=rate, workers=0)
    return next(iter(validation_batches(cfg, 3))).audio


@pytest.mark.parametrize("name", TINY)
def test_every_item_of_a_padded_batch_is_as_if_alone(name):
    peer = load_speech_peer(name).double()      # so that sums in another order do not count
    audio = speech(peer.sample_rate)
    lengths = torch.tensor([audio.shape[2], 7_003, 1])
    together = peer.encode(audio, lengths)
    assert together.codes.shape == (3, peer.codebooks, math.ceil(audio.shape[2] / peer.hop)) and len(together.codes.unique()) > 4
    decoded, restored = peer.decode(together.codes, together.lengths), peer.reconstruct(audio, lengths)
    assert decoded.shape == (3, 1, together.codes.shape[2] * peer.hop) and restored.shape == audio.shape
    for i, length in enumerate(lengths.tolist()):
        alone = peer.encode(audio[i : i + 1, :, :length])
        frames = math.ceil(length / peer.hop)
        assert int(together.lengths[i]) == frames == alone.codes.shape[2]
        assert torch.equal(together.codes[i, :, :frames], alone.codes[0]) and not together.codes[i, :, frames:].any()
        torch.testing.assert_close(decoded[i, :, : frames * peer.hop], peer.decode(alone.codes)[0], atol=1e-6, rtol=0)
        assert not decoded[i, :, frames * peer.hop :].any() and not restored[i, :, length:].any()


@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_codes_and_audio_are_those_of_transformers(name):
    peer = load_speech_peer(name)
    network, audio = peer.network, speech(peer.sample_rate, 0.8)
    whole = audio[..., : audio.shape[2] // peer.hop * peer.hop]
    if peer.system == "encodec":
        found = network.encode(whole, bandwidth=network.config.target_bandwidths[-1])
        codes, made = found.audio_codes[0], network.decode(found.audio_codes, found.audio_scales).audio_values
    elif peer.system == "mimi":
        codes = network.encode(whole).audio_codes
        made = network.decode(codes).audio_values
    else:
        codes = network.encode(whole).audio_codes
        made = network(whole).audio_values[:, None]
    assert torch.equal(peer.encode(whole).codes, codes) and len(codes[:, 0].unique()) > 1
    torch.testing.assert_close(peer.decode(codes), made.clamp(-1, 1), atol=1e-5, rtol=0)
    short = load_speech_peer(f"{name}@2")
    assert torch.equal(short.encode(whole).codes, codes[:, :2]) and short.codebooks == 2
    assert torch.equal(short.decode(codes[:, :2]), peer.decode(codes[:, :2]))


@pytest.mark.parametrize(("name", "bits"), [
    ("mimi", 12.5 * 32 * 11), ("mimi@8", 1100), ("encodec", 24_000), ("encodec@8", 6_000), ("dac", 50 * 12 * 10),
])
def test_bitrate_of_the_published_sizes(name, bits):
    codec, _, books = name.partition("@")
    with torch.device("meta"):
        peer = _unfilled(PEERS[codec])(SpeechPeerConfig(PEERS[codec].published, int(books or 0)))
    assert peer.codebooks * math.log2(peer.codebook_size) * peer.sample_rate / peer.hop == pytest.approx(bits, rel=1e-9)


def _unfilled(kind):
    """Without its codebooks' start, which computes values."""
    return type("Unfilled", (kind,), {"start_codebooks": lambda self: None})


@pytest.mark.parametrize("name", TINY)
def test_a_saved_folder_and_its_faults(name, tmp_path):
    peer = load_speech_peer(name)
    with torch.no_grad():      # other weights than the seeded ones
        for parameter in peer.network.parameters():
            parameter.mul_(1.1)
    codec = name.split(":")[0]
    peer.network.save_pretrained(tmp_path)
    loaded = load_speech_peer(f"{codec}:{tmp_path}@3")
    audio = speech(peer.sample_rate, 0.5)
    assert torch.equal(loaded.encode(audio).codes, peer.encode(audio).codes[:, :3])
    said = loaded.provenance
    assert said["source"] == f"folder {tmp_path.name}" and "model.safetensors" in said["files"] and "3" in said["codebooks"]
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    gone = next(key for key in sorted(state) if "decoder" in key)
    save_file({k: v for k, v in state.items() if k != gone}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing keys in its weights, such as decoder"):
        load_speech_peer(f"{codec}:{tmp_path}")
    weights.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_speech_peer(f"{codec}:{tmp_path}")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_speech_peer(f"{codec}:{tmp_path}")


def test_random_weights_are_seeded_named_and_not_those_of_the_untrained_row():
    first, second = load_speech_peer("dac:random-tiny"), load_speech_peer("dac:random-tiny")
    assert first.provenance["source"] == f"random weights (seed {SEED})"
    state = first.state_dict()
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in state.items())
    other = untrained_copy(first).state_dict()
    assert not torch.equal(state["encoder.conv1.weight"], other["encoder.conv1.weight"])


def test_refusals(tmp_path, monkeypatch):
    assert is_speech_peer("mimi:kyutai/mimi") and not is_speech_peer("runs/mimi") and not is_speech_peer("diffusers:x")
    with pytest.raises(InputError, match="names no peer: they are mimi:, encodec:, dac:, encodec-package:"):
        load_speech_peer("opus:random")
    with pytest.raises(InputError, match="has 4 codebooks, of which 5 cannot be used"):
        load_speech_peer("mimi:random-tiny@5")
    with pytest.raises(InputError, match="at least one codebook"):
        load_speech_peer("mimi:random-tiny@0")
    with pytest.raises(CheckpointError, match="is no folder and no hub id"):
        load_speech_peer("mimi:nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mimi"}))
    with pytest.raises(CheckpointError, match="holds transformers' mimi, not dac"):
        load_speech_peer(f"dac:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "encodec", "normalize": True, "chunk_length_s": 1.0}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="normalises or cuts its input"):
        load_speech_peer(f"encodec:{tmp_path}")
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match="hf download kyutai/mimi"):
        load_speech_peer("mimi:kyutai/mimi")


@needs_package
@torch.inference_mode()
def test_the_package(tmp_path, monkeypatch):
    peer = load_speech_peer("encodec-package:random@4")
    audio = speech(24_000, 0.5)
    peer.network.set_target_bandwidth(3.0)
    ((codes, scale),) = peer.network.encode(audio)
    assert scale is None and torch.equal(peer.encode(audio).codes, codes) and codes.shape[1] == 4
    torch.testing.assert_close(peer.decode(codes), peer.network.decode([(codes, None)]).clamp(-1, 1), atol=1e-5, rtol=0)
    assert (peer.sample_rate, peer.hop, peer.codebook_size) == (24_000, 320, 1024)
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"put https://.*encodec_24khz-d7cc33bc\.th into"):
        load_speech_peer("encodec-package:24khz")
    with pytest.raises(CheckpointError, match="has no encodec_24khz"):
        load_speech_peer(f"encodec-package:{tmp_path}")
    Path(tmp_path, "encodec_24khz-d7cc33bc.th").write_bytes(b"another file")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_speech_peer(f"encodec-package:{tmp_path}")
