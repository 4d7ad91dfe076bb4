"""Real speech and language networks out of the assets table: they load strictly, and their features mean something."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import tokenizers_lab
from tokenizers_lab.asset_readers import read_ctranslate2
from tokenizers_lab.assets import find, find_state_dict
from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.teachers.language import build_language_teacher
from tokenizers_lab.teachers.speech import build_speech_teacher
from tokenizers_lab.teachers.ssl import build_ssl_teacher
from tokenizers_lab.teachers.whisper import build_whisper, whisper_from_asset

VAL = Path(tokenizers_lab.__file__).parent / "data" / "samples" / "speech" / "val"
SENTENCES = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply on Tuesday."]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip():
    """The first held-out clip with speech, (1, samples) at 16 kHz."""
    first = json.loads((VAL / "manifest.jsonl").read_text().splitlines()[0])
    return torch.from_numpy(read_samples(VAL / first["file"]))[None]


def read_samples(file):
    import soundfile

    return soundfile.read(file, dtype="float32")[0]


# --- Whisper ------------------------------------------------------------------------------------------------------------

def test_every_array_of_whisper_has_a_place(tmp_path):
    """Loading is strict; that the right array is at the right place is what the transcripts in test_asr.py show."""
    folder = find("whisper-tiny.en").path
    arrays = read_ctranslate2(folder / "model.bin")
    assert arrays["encoder/conv1/weight"].dtype == np.float16 and arrays["encoder/num_heads"] == 6
    whisper = whisper_from_asset("whisper-tiny.en")
    assert sum(p.numel() for p in whisper.network.parameters()) == 37_760_256 and not whisper.network.training
    assert whisper.network.proj_out.weight is whisper.network.model.decoder.embed_tokens.weight
    queries = whisper.network.model.decoder.layers[2].encoder_attn
    stacked = arrays["decoder/layer_2/attention/linear_1/weight"]
    assert np.array_equal(queries.v_proj.weight.detach().numpy(), stacked[384:].astype(np.float32))
    settings = whisper.network.generation_config
    assert (settings.decoder_start_token_id, settings.eos_token_id, settings.no_timestamps_token_id) == (50257, 50256, 50362)
    del arrays["encoder/layer_3/ffn/linear_1/bias"]
    with pytest.raises(CheckpointError, match=r"no whole Whisper: .*"):
        build_whisper(arrays, "this")


def test_files_that_are_no_model_of_ctranslate2_are_refused(tmp_path):
    whole = (find("dnsmos").path / "model_v8.onnx").read_bytes()
    version_5 = b"\x05\0\0\0"
    cut = b"\x06\0\0\0\x02\0w\0\x03\0\0\0\x01\0\0\0\x02\0w\0\x01\x04\0\0\0\0\x10\0\0\0abc"
    for content, reason in ((whole, "version"), (version_5, "version is 5"), (cut, "ends early"), (b"", "ends early")):
        (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            read_ctranslate2(tmp_path / "model.bin")


def test_whisper_of_the_table_is_lm_spts_teacher(clip):
    described = SimpleNamespace(backend="asset", source="whisper-tiny.en", config={})
    teacher = build_speech_teacher(described, seconds=3.0)
    assert "stands in for openai/whisper-large-v3" in teacher.provenance and "SHA-256 1a5afae06a4d" in teacher.provenance
    audio = clip.clone().requires_grad_()
    features = teacher.features(audio)
    assert features.shape == (1, 150, 384)
    features.square().mean().backward()
    assert audio.grad.abs().max() > 0
    described.source = "minilm-l6"
    with pytest.raises(ConfigError, match=r"no Whisper; use whisper-tiny\.en or whisper-base"):
        build_speech_teacher(described)


def test_whisper_in_the_place_of_hubert_hears_the_clip_alone(clip):
    described = SimpleNamespace(backend="asset", source="whisper-tiny.en", config={})
    teacher = build_ssl_teacher("whisper-tiny.en", layer=4)
    assert "stands in for HuBERT" in teacher.provenance and teacher.width == 384
    short, long = clip[:, :16_000], clip[:, :44_000]
    features = teacher.features(short)
    assert features.shape == (1, 50, 384) and not features.requires_grad
    same = build_speech_teacher(described, seconds=1.0).features(short)                # LM-SPT's way to the last layer
    torch.testing.assert_close(features, same)
    heard = teacher.features(long)
    assert heard.shape == (1, 138, 384)
    assert torch.equal(teacher.features(short), features)                              # a clip does not see the one before
    # What the network says of the speech is nearly the same as in 30 s of silence.
    full = build_speech_teacher(described).features(long)[:, :138]
    assert F.cosine_similarity(full, heard, dim=-1).mean() > 0.9
    states = teacher.hidden_states(short)
    assert states.shape == (5, 1, 50, 384)
    teacher.layer = -1
    torch.testing.assert_close(teacher.features(short), states.mean(0))
    teacher.positions = teacher.positions[:50]                                         # as if its window were a second
    windows = teacher.features(long)
    assert windows.shape == (1, 138, 384)
    torch.testing.assert_close(windows[:, :50], states.mean(0))
    torch.testing.assert_close(windows[:, 100:], teacher.features(long[:, 32_000:]))
    with pytest.raises(ConfigError, match="0 to 4"):
        build_ssl_teacher("whisper-tiny.en", layer=5)


# --- language models ----------------------------------------------------------------------------------------------------

def sentence_cosines(teacher) -> torch.Tensor:
    """Cosines of the three sentences' mean last hidden states: how both networks were trained to be compared."""
    tokens = teacher.tokens(SENTENCES, 16)
    mask = tokens["attention_mask"][..., None]
    means = (teacher.hidden_states(tokens)[-1] * mask).sum(1) / mask.sum(1)
    return F.cosine_similarity(means[:, None], means[None], dim=-1)


@pytest.mark.parametrize(("name", "width"), [("minilm-l6", 384), pytest.param("mpnet-base", 768, marks=pytest.mark.slow)])
def test_paraphrases_are_nearer_than_other_sentences(name, width):
    teacher = build_language_teacher(name)
    assert teacher.width == width and "stands in for BERT" in teacher.provenance and name in teacher.provenance
    state, source = find_state_dict(name)
    assert source in teacher.provenance
    own = {name: value for name, value in teacher.network.state_dict().items() if "position_ids" not in name}
    assert own.keys() == {name for name in state if "position_ids" not in name}
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    cosines = sentence_cosines(teacher)
    assert cosines[0, 1] > 0.6 and cosines[0, 2] < 0.3 and cosines[1, 2] < 0.3
    features = teacher.features(SENTENCES, 150)
    assert features.shape == (3, 150, width)
    assert (features[0] - features[2]).abs().mean() > 0.01


# --- networks of metrics ------------------------------------------------------------------------------------------------

def test_networks_of_metrics_are_whole():
    speaker, source = find_state_dict("resemblyzer")
    lstm = torch.nn.LSTM(40, 256, 3)
    lstm.load_state_dict({k.removeprefix("lstm."): v for k, v in speaker.items() if k.startswith("lstm.")}, strict=True)
    assert speaker["linear.weight"].shape == (256, 256) and "package resemblyzer 0.1.4" in source
    quality, _ = find_state_dict("distillmos")
    assert len(quality) == 120 and all(value.isfinite().all() for value in quality.values() if value.is_floating_point())
    assert {file.name for file in find("dnsmos").path.iterdir()} == {"sig_bak_ovr.onnx", "model_v8.onnx"}


@pytest.mark.parametrize("kind", ["Hubert", "WavLM", "Wav2Vec2Bert"])
def test_self_supervised_teachers_of_a_folder_hear_50_frames_a_second(tmp_path, kind):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_dim=(8,) * 7, conv_depthwise_kernel_size=3, output_hidden_size=16)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    audio = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(1))
    teacher = build_ssl_teacher(str(tmp_path), layer=1)
    features = teacher.features(audio)
    assert features.shape == (2, 49, 16) and features.isfinite().all() and teacher.width == 16
    torch.testing.assert_close(teacher.features(audio[1:]), features[1:], atol=1e-5, rtol=1e-4)      # each clip as if alone
    assert (build_ssl_teacher(str(tmp_path), layer=-1).features(audio) - features).abs().max() > 1e-3
