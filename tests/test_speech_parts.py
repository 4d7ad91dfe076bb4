"""Parts that speech codecs share: DAC's convolutions, factorised and finite scalar quantization, Whisper, resampling."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tokenizers_lab.data.resample import resample
from tokenizers_lab.discriminators.dac import level_peak
from tokenizers_lab.discriminators.mrd import ResolutionDiscriminator
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError, InputError
from tokenizers_lab.nn.dac import Decoder, Encoder
from tokenizers_lab.nn.mel import whisper_log_mel
from tokenizers_lab.nn.resample import resample_julius
from tokenizers_lab.quantizers.dual import DualRVQ
from tokenizers_lab.quantizers.factorised import FactorisedRVQ, FactorisedVQ, dropout_levels
from tokenizers_lab.quantizers.fsq import ProjectedFSQ
from tokenizers_lab.teachers.speech import WhisperTeacher, build_speech_teacher


class Described:
    """A teacher config."""

    def __init__(self, backend="random", source="", **config):
        self.backend, self.source = backend, source
        self.config = {"d_model": "8", "encoder_layers": "1", "encoder_attention_heads": "2", "encoder_ffn_dim": "16"} | config


# --- convolutions -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_encoders_and_decoders(causal):
    encoder = Encoder(2, [4, 5, 2], 6, causal=causal)
    decoder = Decoder(6, 16, [2, 5, 4], causal=causal)
    for samples in (40, 41, 79, 400):
        latents = encoder(torch.zeros(1, 1, samples))
        assert latents.shape == (1, 6, encoder.out_length(samples))
        assert encoder.out_length(torch.tensor([samples])).item() == latents.shape[2] == (-(-samples // 40) if causal else
                                                                                        ((samples // 4 + 1) // 5) // 2)
    audio = decoder(latents)
    assert audio.shape == (1, 1, decoder.out_length(10)) == (1, 1, 400 if causal else 396) and audio.abs().max() < 1


# --- quantizers ---------------------------------------------------------------------------------------------------------

def test_the_look_up_is_the_nearest_direction_and_the_value_is_not_normalised():
    torch.manual_seed(0)
    vq, latents = FactorisedVQ(6, 40, 3), torch.randn(2, 6, 50)
    made = vq(latents)
    projected = vq.in_proj(latents).transpose(1, 2).reshape(-1, 3)
    distances = torch.cdist(F.normalize(projected, dim=1), F.normalize(vq.codebook.weight, dim=1))
    assert torch.equal(made.codes.flatten(), distances.argmin(1)) and len(made.codes.unique()) > 20
    rows = vq.codebook.weight[made.codes.flatten()]
    torch.testing.assert_close(made.quantized, vq.decode(made.codes))
    squared = (projected - rows).square().reshape(2, -1).mean(1)
    torch.testing.assert_close(made.commitment, squared)
    torch.testing.assert_close(made.codebook, squared)


def test_the_gradient_passes_straight_through():
    torch.manual_seed(0)
    vq, latents = FactorisedVQ(6, 40, 3), torch.randn(2, 6, 5, requires_grad=True)
    made = vq(latents)
    weights = torch.randn_like(made.quantized)
    straight = torch.autograd.grad((vq.out_proj(vq.in_proj(latents)) * weights).sum(), latents)[0]
    torch.testing.assert_close(torch.autograd.grad((made.quantized * weights).sum(), latents, retain_graph=True)[0], straight)
    assert torch.autograd.grad(made.codebook.sum(), latents, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(made.commitment.sum(), vq.codebook.weight, allow_unused=True)[0] is None


def test_residual_codebooks_decode_what_they_encoded_and_dropout_counts():
    torch.manual_seed(0)
    rvq, latents = FactorisedRVQ(6, 4, 40, 3), torch.randn(3, 6, 5)
    whole = rvq(latents)
    assert torch.equal(rvq.encode(latents), whole.codes)
    torch.testing.assert_close(rvq.decode(whole.codes), whole.quantized)
    used = torch.tensor([1, 4, 2])
    some = rvq(latents, used)
    assert torch.equal(some.codes, whole.codes)
    for i, k in enumerate(used.tolist()):
        torch.testing.assert_close(some.quantized[i : i + 1], rvq.decode(whole.codes[i : i + 1, :k]))
    counts = torch.stack([(level < used).float() for level in range(4)])                   # (levels, B)
    levels = torch.stack([level.commitment for level in rvq.chain(latents)])
    torch.testing.assert_close(some.losses["commitment"], (levels * counts).mean(1).sum())
    torch.testing.assert_close(sum(whole.layers), whole.quantized)


def test_dropout_draws():
    used = dropout_levels(Draw(0), "x", 1000, 7, 0.3)
    assert (used[300:] == 7).all() and set(used[:300].tolist()) == {1, 2, 3, 4, 5, 6, 7}
    assert (dropout_levels(Draw(0), "x", 5, 7, 0.0) == 7).all()
    assert (dropout_levels(Draw(0), "x", 3, 7, 0.3) == 7).all()                            # int(0.9) items


def test_fsq_is_that_of_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    levels = [8, 5, 4, 3]
    ours, theirs = ProjectedFSQ(6, levels), library.FSQ(levels)
    latents = torch.randn(4, 6, 100) * 3
    projected = ours.in_proj(latents)
    values, codes = theirs(projected.transpose(1, 2))
    made = ours(latents)
    assert torch.equal(made.codes, codes.long()) and torch.equal(ours.encode(latents), made.codes) and len(codes.unique()) > 100
    torch.testing.assert_close(made.quantized, ours.out_proj(values.transpose(1, 2)))
    torch.testing.assert_close(ours.decode(made.codes), made.quantized)
    assert ours.decode(torch.arange(480)[None]).shape == (1, 6, 480) and ours.size == 480
    with pytest.raises(ValueError, match="2 values or more"):
        ProjectedFSQ(6, [3, 1])


def test_one_frame_and_one_codebook_decode():
    for levels in ((), (5, 3)):
        dual = DualRVQ(6, 3, 20, 4, 10, 4, fsq_levels=levels)
        latents = torch.randn(2, 6, 1)
        codes = dual.encode(latents, latents)
        assert codes.shape == (2, 3, 1) and torch.equal(codes, dual.eval()(latents, latents).codes)
        torch.testing.assert_close(dual.decode(codes), dual.decode_semantic(codes) + dual.decode_acoustic(codes))
        assert torch.equal(dual.decode(codes[:, :1]), dual.decode_semantic(codes))


def test_usage_moves_in_training_only_and_is_saved():
    torch.manual_seed(0)
    dual = DualRVQ(6, 3, 20, 4, 10, 4)
    latents = torch.randn(2, 6, 8)
    dual.eval()(latents, latents)
    assert dual.usage_updates == 0 and not dual.semantic_usage.any()
    codes = dual.train()(latents, latents).codes
    counts = torch.bincount(codes[:, 0].flatten(), minlength=20) / 16
    assert torch.equal(dual.semantic_usage[0], counts) and dual.acoustic_usage.sum() == 1
    dual(latents[:1], latents[:1])
    fewer = torch.bincount(codes[0, 0], minlength=20) / 8
    torch.testing.assert_close(dual.semantic_usage[0], 0.9 * counts + 0.1 * fewer)
    dual.usage_updates.fill_(100)
    before = dual.semantic_usage.clone()
    dual(latents[:1], latents[:1])
    torch.testing.assert_close(dual.semantic_usage[0], 0.99 * before[0] + 0.01 * fewer)
    assert dual.usage()["semantic_usage"] == (counts > 0).float().mean()
    assert {"semantic_usage", "acoustic_usage", "usage_updates"} <= dual.state_dict().keys()


def count_in_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    dual, latents = DualRVQ(6, 3, 20, 4, 10, 4), torch.randn(4, 6, 8)
    for _ in range(2):
        dual(latents[2 * rank : 2 * rank + 2], latents[2 * rank : 2 * rank + 2])
    torch.save(dual.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_usage_counts_all_processes(tmp_path):
    torch.multiprocessing.spawn(count_in_process, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[k], other[k]) for k in one)
    torch.manual_seed(0)
    dual, latents = DualRVQ(6, 3, 20, 4, 10, 4), torch.randn(4, 6, 8)
    for _ in range(2):
        dual(latents, latents)
    torch.testing.assert_close(one["semantic_usage"], dual.semantic_usage)
    torch.testing.assert_close(one["acoustic_usage"], dual.acoustic_usage)


def test_codes_are_those_of_float32_under_autocast():
    torch.manual_seed(0)
    vq, projected = FactorisedVQ(6, 500, 8), torch.randn(4, 8, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vq.lookup(projected), vq.lookup(projected.clone()))
        rounded = (F.normalize(projected.transpose(1, 2), dim=2) @ F.normalize(vq.codebook.weight, dim=1).T).argmax(-1)
        under = vq.lookup(projected)
    assert torch.equal(under, vq.lookup(projected)) and not torch.equal(under, rounded)


# --- Whisper ------------------------------------------------------------------------------------------------------------

def test_the_log_mel_is_that_of_transformers():
    from transformers import WhisperFeatureExtractor

    audio = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.3], [0.01]])
    extractor = WhisperFeatureExtractor(feature_size=80)
    expected = torch.from_numpy(np.stack(extractor(list(audio.numpy()), sampling_rate=16_000)["input_features"]))
    torch.testing.assert_close(whisper_log_mel(audio, 80, 480_000), expected, atol=1e-4, rtol=1e-4)
    together = whisper_log_mel(audio, 80, 480_000, floor_over_batch=True)
    torch.testing.assert_close(together[0], expected[0], atol=1e-4, rtol=1e-4)
    assert together[1].min() > expected[1].min() + 0.2      # the louder clip lifts the floor of the quieter one
    assert whisper_log_mel(audio, 80, 3200).shape == (2, 80, 20)


def test_the_teacher_hears_a_window_and_gives_gradient_to_the_audio():
    teacher = build_speech_teacher(Described(), seconds=1.0).train()
    assert not teacher.network.training and teacher.width == 8 and "random" in teacher.provenance
    audio = (torch.randn(2, 9000) * 0.1).requires_grad_()
    features = teacher.features(audio)
    assert features.shape == (2, 50, 8)
    gradient = torch.autograd.grad(features.square().sum(), audio)[0]
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.9
    assert all(not p.requires_grad for p in teacher.parameters())
    full = build_speech_teacher(Described())
    assert full.tokens == 1500
    assert torch.equal(full.network.embed_positions.weight[:50], teacher.network.embed_positions.weight)


def test_teachers_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="known: transformers, asset, random"):
        build_speech_teacher(Described(backend="timm"))
    with pytest.raises(ConfigError, match="at most 30 s"):
        build_speech_teacher(Described(), seconds=31)
    with pytest.raises(ConfigError, match="model_type whisper"):
        build_speech_teacher(Described(model_type="hubert"))
    with pytest.raises(InputError, match="float"):
        build_speech_teacher(Described(), seconds=1).features(torch.zeros(1, 1, 100))


def test_a_saved_whisper_is_found(tmp_path):
    from transformers import WhisperConfig, WhisperModel

    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 60, "pad_token_id": 0, "decoder_start_token_id": 1}
    model = WhisperModel(WhisperConfig(**sizes, max_source_positions=50)).eval()
    model.save_pretrained(tmp_path)
    teacher = build_speech_teacher(Described("transformers", str(tmp_path)), seconds=1.0)
    log_mel = torch.randn(1, 80, 100)
    torch.testing.assert_close(teacher.encode(log_mel), model.encoder(log_mel).last_hidden_state)
    assert isinstance(teacher, WhisperTeacher) and str(tmp_path) in teacher.provenance


# --- audio --------------------------------------------------------------------------------------------------------------

def test_resampling_keeps_a_tone_and_its_gradient():
    rate, new = 24_000, 16_000
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(2400) / rate)[None, None]
    for function in (resample_julius, resample):
        x = tone.clone().requires_grad_()
        with torch.inference_mode():
            function(tone, rate, new)      # must not spoil what is kept for training
        y = function(x, rate, new)
        expected = torch.sin(2 * torch.pi * 440 * torch.arange(1600) / new)
        torch.testing.assert_close(y[0, 0, 100:-100], expected[100:-100], atol=2e-3, rtol=0)
        assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0
    assert resample_julius(torch.ones(1, 1, 1001), 3, 2).shape == (1, 1, 667)
    torch.testing.assert_close(resample_julius(torch.ones(1, 1, 1000), 3, 2), torch.ones(1, 1, 666))
    with pytest.raises(ValueError, match="positive"):
        resample_julius(tone, 0, 2)


def test_discriminators_hear_the_shape_and_not_the_level():
    audio = torch.randn(3, 1, 500)
    levelled = level_peak(audio)
    torch.testing.assert_close(level_peak(3 * audio + 0.2), levelled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(levelled.abs().amax(-1), torch.full((3, 1), 0.8))
    assert not level_peak(torch.zeros(1, 1, 9)).any()


def test_the_spectrogram_of_a_resolution_has_a_frame_for_each_hop():
    judge = ResolutionDiscriminator(64, 2)
    for samples, frames in ((160, 10), (161, 11), (176, 11)):
        assert judge.spectrogram(torch.randn(2, 1, samples)).shape == (2, 2, frames, 33)
    judged = judge(torch.randn(2, 1, 160))
    assert len(judged.features) == 26 and torch.equal(judged.logits, judged.features[-1].flatten(1))
