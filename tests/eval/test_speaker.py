"""Speaker similarity: the resemblyzer package's own embeddings, speakers told apart, prompts, x-vectors."""

import json
from pathlib import Path

import pytest
import torch

import tokenizers_lab
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.errors import WeightsMissing
from tokenizers_lab.eval.resemblyzer import partial_starts, raise_volume
from tokenizers_lab.eval.speaker import Similarity, against_prompts, random_x_vectors

SPEECH = Path(tokenizers_lab.__file__).parent / "data" / "samples" / "speech" / "val"
# The largest of the 256 values, and the sum of all, that resemblyzer 0.1.4 (librosa 0.11.0) gives for en_US_f_Allison_43.flac,
# its volume normalised, silences kept: the whole clip and its first 20,000 samples, which are fewer than a partial utterance.
STORED = {
    44_810: ({243: 0.259730, 2: 0.235193, 239: 0.227527, 173: 0.210943, 25: 0.188186, 195: 0.181321}, 8.85879),
    20_000: ({243: 0.323521, 78: 0.246610, 89: 0.212610, 239: 0.201873, 177: 0.177963, 210: 0.174611}, 7.68446),
}


@pytest.fixture(scope="module")
def clips():
    rows = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["file"]: (read_audio(SPEECH / row["file"])[0][0], row["speaker"]) for row in rows}


@pytest.fixture(scope="module")
def similarity():
    return Similarity()


def about(key, speaker):
    return {"key": key, "speaker": speaker, "text": None, "language": None}


@pytest.mark.parametrize("samples", STORED)
def test_embeddings_are_the_package_s(similarity, clips, samples):
    audio = clips["en_US_f_Allison_43.flac"][0][:samples]
    embedding = similarity.encoder.embed(audio)
    values, total = STORED[samples]
    for place, value in values.items():
        assert float(embedding[place]) == pytest.approx(value, abs=2e-6)
    assert float(embedding.sum()) == pytest.approx(total, abs=2e-5)
    assert embedding.argsort(descending=True)[: len(values)].tolist() == list(values)
    assert "resemblyzer 0.1.4" in similarity.provenance


def test_partial_utterances():
    """Every 0.77 s one of 1.6 s; the last needs 1.2 s of sound, the only one none."""
    assert partial_starts(1) == partial_starts(160 * 160) == [0]
    second = 77 * 160
    assert partial_starts(second + 19_199) == [0] and partial_starts(second + 19_200) == [0, 77]
    assert partial_starts(2 * second + 25_600) == [0, 77, 154]


def test_quiet_clips_are_raised_and_others_left():
    tone = torch.sin(torch.arange(16_000) / 10)
    assert torch.equal(raise_volume(tone), tone) and not raise_volume(torch.zeros(100)).any()
    for level in (0.01, 0.001):
        assert float(raise_volume(level * tone).square().mean().sqrt()) == pytest.approx(10 ** (-30 / 20), rel=1e-4)


def test_real_speakers_are_told_apart(similarity, clips):
    """A clip is closer to another of its speaker than to one of another's, and noise takes it away."""
    one, two, other = (clips[f"{name}.flac"][0] for name in ("en_US_f_Allison_43", "en_US_f_Allison_46", "it_IT_m_Carlo_06"))
    same, apart = (similarity(one, clip, about("a", "s"))["value"] for clip in (two, other))
    assert same > 0.75 > apart + 0.1
    draw = torch.randn(len(one), generator=torch.Generator().manual_seed(0)) * one.square().mean().sqrt()
    falling = [similarity(one, one + draw * 10 ** (-snr / 20), about("a", "s"))["value"] for snr in (200, 20, 10, 0)]
    assert falling[0] == pytest.approx(1, abs=1e-5) and falling == sorted(falling, reverse=True) and falling[-1] < 0.75


def cell(key, speaker, made, original):
    return {"value": 0.0, "_made": made, "_original": original, "_about": about(key, speaker)}


def test_prompts_are_the_speaker_s_next_clip():
    x, y, z = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
    values = [cell("c", "ann", z, x), cell("a", "ann", x, y), cell("b", "ann", y, z)]
    values += [cell("d", "bob", x, x), cell("e", None, x, x), cell("f", None, x, x)]
    found = against_prompts(values, 0)["prompt"]
    # a with b's original, b with c's, c with a's; bob has one clip, e and f no speaker
    assert found["n"] == 3 and found["value"] == pytest.approx((0.6 + 0 + 0.8) / 3)
    assert found["originals"] == pytest.approx((0.8 + 0.6 + 0) / 3)
    assert against_prompts(values[::-1], 0) == against_prompts(values, 0)
    by_channel = [{"value": 0.0, "channels": [value]} for value in values]
    assert against_prompts(by_channel, 0) == against_prompts(values, 0)
    assert against_prompts(values[3:], 0) == {}


def test_x_vectors_from_a_folder_are_the_same_network(clips, tmp_path, monkeypatch):
    from transformers import Wav2Vec2FeatureExtractor

    random_x_vectors().save_pretrained(tmp_path)
    with pytest.raises(WeightsMissing, match="whole network"):      # without its feature extractor
        Similarity(str(tmp_path))
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    audio = clips["en_US_f_Allison_43.flac"][0]
    random, saved = Similarity("random"), Similarity(str(tmp_path))
    assert torch.allclose(random.encoder.embed(audio), saved.encoder.embed(audio), atol=1e-5)     # weight norms are computed anew
    assert "random weights" in random.provenance
    assert tmp_path.name in saved.provenance and str(tmp_path.parent) not in saved.provenance
    assert random(audio, audio, about("a", None))["value"] == pytest.approx(1, abs=1e-5)
    assert random(audio[:100], audio[:100], about("a", None))["value"] == pytest.approx(1, abs=1e-5)      # shorter than a frame
    assert random(audio[:0], audio[:0], about("a", None))["value"] is None
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match="hf download microsoft/wavlm-base-plus-sv"):
        Similarity("microsoft/wavlm-base-plus-sv")
