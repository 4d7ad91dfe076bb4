"""XY-Tokenizer's network: official weights, windows over long audio, padded batches, the masked quantizer, Whisper's weights."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tokenizers_lab.chunks import decode_pieces, encode_pieces
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError
from tokenizers_lab.models.xy_tokenizer import convert
from tokenizers_lab.models.xy_tokenizer.config import (
    AdapterConfig,
    ModelConfig,
    QuantizerConfig,
    StackConfig,
    VocoderConfig,
    check_model,
)
from tokenizers_lab.models.xy_tokenizer.model import XYTokenizer
from tokenizers_lab.models.xy_tokenizer.parity import compute
from tokenizers_lab.nn.mel import whisper_log_mel
from tokenizers_lab.nn.whisper import WhisperEncoder, WhisperStack, encoder_state, sinusoids
from tokenizers_lab.nn.windows import PlannedStream, WindowPlan, both_sides, in_windows, look_ahead
from tokenizers_lab.parity import read_rules, read_tensors
from tokenizers_lab.quantizers.masked import MaskedResidualVQ
from tokenizers_lab.teachers.ssl import build_ssl_teacher

PARITY = Path(__file__).parents[1] / "parity" / "xy_tokenizer"
MANIFEST = json.loads((PARITY / "official_full_manifest.json").read_text())
STACK, ADAPTER = {"width": 16, "layers": 1, "heads": 2, "hidden": 24}, {"width": 12, "layers": 1, "heads": 3, "hidden": 16}
SMALL = ModelConfig(
    window_seconds=2.0, overlap_seconds=0.72, semantic=StackConfig(**STACK), semantic_adapter=AdapterConfig(**ADAPTER),
    acoustic=StackConfig(**STACK), pre_adapter=AdapterConfig(**ADAPTER), post_adapter=AdapterConfig(**ADAPTER),
    decoder=StackConfig(**STACK), decoder_bands=10, quantizer=QuantizerConfig(3, 32, 8),
    vocoder=VocoderConfig(width=16, hidden=24, layers=2))
HOP, SIZE, STEP, LEAD = 1280, 25, 16, 4      # of SMALL: samples of a frame; frames of a window, from one to the next, of context


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def speech(items=1, samples=20_000, seed=0) -> torch.Tensor:
    """Noise of changing loudness in [−1, 1]."""
    made = torch.randn(items, 1, samples, generator=torch.Generator().manual_seed(seed))
    return (made * (0.05 + 0.2 * (torch.arange(samples) / 3000).sin().square())).clamp(-1, 1)


def codec(cfg: ModelConfig = SMALL) -> XYTokenizer:
    """A codec in eval mode whose codebooks have started on its own features, so that all entries matter."""
    torch.manual_seed(0)
    made = XYTokenizer(cfg).train()
    with torch.no_grad():
        made(speech(8, int(cfg.window_seconds * 16_000)), draw=Draw(0))
    return made.eval()


def quantizer(**options) -> MaskedResidualVQ:
    torch.manual_seed(0)
    return MaskedResidualVQ(6, 5, 3, 8, 4, **options)


# --- official weights -----------------------------------------------------------------------------------------------------

def meta_release() -> dict[str, torch.Tensor]:
    return {k: torch.empty(v["shape"], dtype=getattr(torch, v["dtype"]), device="meta") for k, v in MANIFEST["tensors"].items()}


def test_the_release_has_our_keys_and_sizes():
    state = meta_release()
    made = convert.from_official({"generator": state, "step": 3}, MANIFEST["release_config"])
    assert made.model == ModelConfig() == convert.from_official(state).model
    back = convert.to_official(made.tokenizer)
    assert len(back) == 1079 and {k: (v.shape, v.dtype) for k, v in back.items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()}
    with torch.device("meta"):
        whole = XYTokenizer(ModelConfig())
    assert sum(p.numel() for p in whole.parameters()) == MANIFEST["total_parameters"] == 519_621_074
    for part, millions in MANIFEST["parameters_by_part_millions"].items():
        own = whole.get_submodule(part.replace("vocos", "vocoder"))
        assert round(sum(p.numel() for p in own.parameters()) / 1e6, 2) == millions


def test_official_weights_return_bit_by_bit_and_so_do_the_names_of_the_siblings():
    state, config = load_file(PARITY / "weights.safetensors"), json.loads((PARITY / "config.json").read_text())
    made = convert.from_official(state, config)
    back = convert.to_official(made.tokenizer)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)
    sibling = {convert.rename(k, [
        (r"^vocos\.", "enhanced_vocos."), (r"\.(fc[12])\.", r".mlp.\1."), ("weight_g$", "parametrizations.weight.original0"),
        ("weight_v$", "parametrizations.weight.original1")]): v for k, v in state.items()}
    assert len(sibling.keys() - state.keys()) > 50
    again = convert.from_official(sibling, config).tokenizer
    assert all(torch.equal(again[k], v) for k, v in made.tokenizer.items())


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("downsample.gate_proj.weight"), "misses downsample.gate_proj.weight"),
    (lambda s: s.update(more=torch.zeros(2)), "left over more"),
    (lambda s: s.update({"quantizer.quantizers.2.codebook": torch.zeros(3, 16)}), "another shape quantizer.quantizers.2.codeb"),
    (lambda s: s.update({"vocos.head.istft.window": torch.ones(640)}), "another window"),
    (lambda s: s.update(step=3), "no XY-Tokenizer checkpoint"),
])
def test_official_weights_that_do_not_fit_are_refused(change, message):
    state = load_file(PARITY / "weights.safetensors")
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert.from_official(state, json.loads((PARITY / "config.json").read_text()))


@pytest.mark.parametrize(("part", "option", "value", "message"), [
    ("quantizer", "codebook_dim", 8, "codebook_dim must be 16"), ("vocos", "padding", "center", "padding must be same"),
    ("semantic_encoder", "stride_size", 4, "stride_size must be 2"), ("upsample", "stride", 2, "stride must be 4"),
    ("feature_extractor", "feature_size", 128, "feature_size must be 80"),
    ("pre_rvq_adapter", "input_dim", 9, "input_dim must be 56"),
    ("acoustic_encoder", "max_audio_seconds", 20, "positions must be at least 1500"),
    ("acoustic_encoder", "activation_function", "tanh", "activation must be one of"),
    ("downsample", "avg_pooler", None, "has no 'avg_pooler'"),
])
def test_official_options_that_we_do_not_have_are_refused(part, option, value, message):
    config = copy.deepcopy(MANIFEST["release_config"] | json.loads((PARITY / "config.json").read_text())["generator_params"])
    if value is None:
        del config[f"{part}_kwargs"][option]
    else:
        config[f"{part}_kwargs"][option] = value
    with pytest.raises(ConfigError, match=message):
        convert.official_config(config)


def test_commitments_and_gradients_agree_relative_to_their_own_size():
    rules = read_rules(PARITY / "tolerance.json")
    given, wanted = (read_tensors(PARITY / "io.safetensors", rules, inputs=inputs) for inputs in (True, False))
    made = compute(PARITY, given)
    small = [name for name in wanted if "commit" in name or "grad" in name or "rms" in name]
    assert len(small) >= 20
    for name in small:
        assert (made[name] - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name
    assert wanted["vq_grad.commit_grad_norms"][0] > 0 and not made["vq_grad.commit_grad_norms"][1:].any()


# --- windows --------------------------------------------------------------------------------------------------------------

def ports_windows(frames: int, size: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """(first frame, end, first kept, end of what is kept) of each window, as the implementation notes have them."""
    step, lead = size - overlap, overlap // 2
    count = max(0, -(-(frames - size) // step)) + 1
    windows = []
    for k in range(count):
        start, last = k * step, k == count - 1
        windows.append((start, min(start + size, frames), start + (lead if k else 0), frames if last else start + step + lead))
    return windows


@pytest.mark.parametrize("frames", [1, 24, 25, 26, 40, 41, 42, 57, 58, 100])
def test_windows_are_those_of_the_notes(frames):
    plan, seen = both_sides(SIZE, SIZE - STEP), []

    def function(x, lengths):
        seen.append((int(x[0, 0, 0]), int(x[0, 0, -1]) + 1))
        return torch.full_like(x, len(seen) - 1)

    made = in_windows(function, torch.arange(frames)[None, None].float(), None, plan, 1, 1)[0, 0]
    wanted = ports_windows(frames, SIZE, SIZE - STEP)
    assert seen == [window[:2] for window in wanted]
    for k, (_, _, begin, end) in enumerate(wanted):
        assert (made[begin:end] == k).all()


def test_the_authors_windows_look_ahead_only():
    plan = look_ahead(375, 125)
    assert list(plan.starts(250)) == [0] and list(plan.starts(251)) == [0, 250] and list(plan.starts(501)) == [0, 250, 500]
    assert list(both_sides(375, 125).starts(375)) == [0] and list(both_sides(375, 125).starts(376)) == [0, 250]
    for bad in ((5, 0, 0, 0), (5, 6, 0, 0), (5, 3, 3, 0), (5, 3, 0, 3)):
        with pytest.raises(ValueError, match="leaves gaps"):
            WindowPlan(*bad)


@pytest.mark.parametrize("plan", [both_sides(7, 3), both_sides(6, 0), look_ahead(7, 3)])
def test_a_stream_of_windows_is_the_whole_whatever_the_pieces(plan):
    x = torch.arange(120.0)[None, None]

    def function(window, lengths):      # depends on the whole window
        return window[..., ::3] + window.sum()

    for samples in (1, 18, 21, 22, 36, 61, 120):
        whole = in_windows(function, x[..., :samples], None, plan, 3, 1)
        for pieces in ([samples], [1] * samples, [samples // 2, samples - samples // 2]):
            stream = PlannedStream(function, plan, 3, 1)
            parts = [part for part in x[..., :samples].split(pieces, -1) if part.shape[-1]]
            made = [stream.push(part) for part in parts[:-1]] + [stream.finish(parts[-1])]
            assert torch.equal(torch.cat([m for m in made if m.shape[-1]], -1), whole)


# --- long audio, padded batches -------------------------------------------------------------------------------------------

@torch.inference_mode()
def test_pieces_of_long_audio_are_the_whole_bit_by_bit():
    tokenizer, audio = codec(), speech(samples=7 * 16_000 + 77)
    codes = tokenizer.encode(audio).codes
    assert codes.shape == (1, 3, 88) and len(codes.unique()) > 15
    pieces = list(encode_pieces(tokenizer, audio.split(30_001, -1), 0.9))
    assert len(pieces) > 3 and torch.equal(torch.cat(pieces, -1), codes)
    whole = tokenizer.decode(codes)
    made = list(decode_pieces(tokenizer, codes.split(11, -1), 0.5))
    assert whole.shape == (1, 1, 88 * HOP) and len(made) > 3 and torch.equal(torch.cat(made, -1), whole)
    # a window is coded as if it were alone, and its context counts
    second = tokenizer.encode(audio[..., STEP * HOP : (STEP + SIZE) * HOP]).codes
    assert torch.equal(codes[..., STEP + LEAD : 2 * STEP + LEAD], second[..., LEAD : STEP + LEAD])
    assert not torch.equal(codes[..., STEP : STEP + LEAD], second[..., :LEAD])


@torch.inference_mode()
@pytest.mark.parametrize(("context", "pad"), [("both", True), ("ahead", False)])
def test_long_items_of_a_padded_batch_are_single_files(context, pad):
    tokenizer = codec().double()
    ends = [SIZE * HOP, SIZE * HOP + 1, (SIZE + STEP) * HOP, 3 * SIZE * HOP + 5000, STEP * HOP + 100, HOP, 5 * HOP - 1]
    lengths, audio = torch.tensor(ends), speech(len(ends), max(ends)).double()
    together = tokenizer.encode(audio, lengths, context=context, pad=pad)
    made = tokenizer.decode(together.codes, together.lengths, context=context)
    for i, length in enumerate(ends):
        alone = tokenizer.encode(audio[i : i + 1, :, :length], context=context, pad=pad).codes
        frames = -(-length // HOP) if pad else length // HOP
        assert together.lengths[i] == frames == alone.shape[2] and torch.equal(together.codes[i, :, :frames], alone[0])
        torch.testing.assert_close(
            made[i, :, : frames * HOP], tokenizer.decode(alone, context=context)[0], atol=1e-6, rtol=0)
        assert not made[i, :, frames * HOP :].any() and not together.codes[i, :, frames:].any()


@torch.inference_mode()
def test_a_short_clip_is_heard_as_in_a_whole_window():
    tokenizer, audio = codec(), speech(samples=9_000)
    latents, frames = tokenizer.latents(audio)
    assert frames is None and latents.shape == (1, 48, 8)
    mel = whisper_log_mel(audio[:, 0], 80, SIZE * HOP)                       # as in Whisper: silence up to the window's end
    tokens = tokenizer.tokens(mel, torch.tensor([32]), 4 * SIZE)
    torch.testing.assert_close(tokenizer.downsample(tokens)[:, :8].transpose(1, 2), latents, atol=2e-5, rtol=1e-4)
    cut = tokenizer.tokens(mel[..., :64], None, 32)                          # without the frame of silence behind it
    assert (tokenizer.downsample(cut).transpose(1, 2) - latents).abs().max() > 1e-3


@torch.inference_mode()
def test_lengths_and_rates():
    tokenizer, audio = codec(replace(SMALL, output_rate=24_000)), speech(2, 5 * HOP + 1)
    assert tokenizer.output_rate() == 24_000 and tokenizer.frame_samples() == 1920 and not tokenizer.local
    lengths = torch.tensor([5 * HOP + 1, 3 * HOP])
    made = tokenizer.reconstruct(audio, lengths)
    assert tokenizer.encode(audio).codes.shape == (2, 3, 6) and made.shape == (2, 1, 5 * 1920 + 1)
    assert made[1, 0, : 3 * 1920].any() and not made[1, 0, 3 * 1920 :].any()
    fewer = tokenizer.decode(tokenizer.encode(audio).codes[:, :1])
    assert fewer.shape == (2, 1, 6 * 1920) and fewer.abs().max() <= 1


def test_bad_input_gets_its_error():
    tokenizer, audio = codec(), speech(samples=4000)
    for options, message in (({"overlap_seconds": 2.0}, "cannot overlap by 2"), ({"overlap_seconds": -1.0}, "cannot overlap"),
                             ({"overlap_seconds": 0.1, "context": "ahead"}, "multiple of 0.08"), ({"context": "left"}, "one of")):
        with pytest.raises(InputError, match=message):
            tokenizer.encode(audio, **options)
    with pytest.raises(InputError, match="at least 1280 samples"):
        tokenizer.encode(audio[..., :1279], pad=False)
    with pytest.raises(InputError, match="at least 1280 samples"):
        tokenizer.encode(audio.expand(2, -1, -1), torch.tensor([4000, 1279]), pad=False)
    with pytest.raises(InputError, match="more than a window of 32000"):
        tokenizer(speech(samples=32_001))


@pytest.mark.parametrize(("change", "message"), [
    ({"window_seconds": 2.01}, "multiple of 0.08"), ({"overlap_seconds": 2.0}, "below window_seconds"),
    ({"output_rate": 16_050}, "multiple of 100 Hz"), ({"sample_rate": 24_000}, "must be 16000"), ({"pool": 0}, "at least 1"),
    ({"vocoder": VocoderConfig(n_fft=160)}, "n_fft must be above"), ({"semantic": StackConfig(heads=5)}, "multiple of 5 heads"),
    ({"decoder": StackConfig(positions=99)}, "at least 100"), ({"post_adapter": AdapterConfig(out=63)}, "decoder.width, 64"),
    ({"quantizer": QuantizerConfig(dropout=1.5)}, "dropout"), ({"quantizer": QuantizerConfig(codebooks=0)}, "at least 1"),
])
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        check_model(replace(SMALL, **change))


# --- training pass --------------------------------------------------------------------------------------------------------

def test_the_training_pass_is_that_of_inference_and_does_not_hear_padding():
    tokenizer, audio = codec().double(), speech(2, 20_000).double()
    lengths = torch.tensor([20_000, 7_000])
    made = tokenizer(audio, lengths)
    assert made.lengths.tolist() == [16, 6] and made.features.shape == (2, 64, 16) and made.reconstruction.shape == (2, 1, 20_000)
    encoded = tokenizer.encode(audio, lengths)
    assert torch.equal(made.quantized.codes, encoded.codes)
    decoded = tokenizer.synthesise(encoded.codes, encoded.lengths)[..., :20_000]
    torch.testing.assert_close(made.reconstruction, decoded, atol=1e-6, rtol=0)
    louder = audio.clone()
    louder[1, :, 7_000:] = 0.9
    again = tokenizer(louder, lengths)
    assert torch.equal(again.reconstruction, made.reconstruction)
    assert torch.equal(again.quantized.losses["commitment"], made.quantized.losses["commitment"])


def test_a_frozen_semantic_encoder_costs_no_gradient_and_the_rest_gets_one():
    tokenizer, audio = codec(), speech(2, 9_000)
    for frozen in (True, False):
        tokenizer.semantic_encoder.requires_grad_(not frozen)
        tokenizer.zero_grad()
        made = tokenizer.train()(audio, draw=Draw(1))
        (made.reconstruction.square().mean() + made.quantized.losses["commitment"] + made.features.mean()).backward()
        for name, parameter in tokenizer.named_parameters():
            if name.startswith("semantic_encoder.") and frozen:
                assert parameter.grad is None
            else:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with pytest.raises(ValueError, match="needs a draw"):
        tokenizer(audio)


# --- quantizer ------------------------------------------------------------------------------------------------------------

def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def test_padding_moves_no_codebook_unless_it_shall_count():
    lengths, x = torch.tensor([20, 7]), torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1))
    louder = x.clone()
    louder[1, :, 7:] = 50.0
    trained = []
    for given in (x, louder):
        own = quantizer(dead_threshold=1.0).train()
        made = own(given, Draw(0), lengths=lengths)
        trained.append((buffers(own), made))
        assert not made.codes[1, :, 7:].any()
    assert all(torch.equal(value, trained[1][0][name]) for name, value in trained[0][0].items())
    assert torch.equal(trained[0][1].losses["commitment"], trained[1][1].losses["commitment"])
    assert torch.equal(trained[0][1].quantized[:, :, :7], trained[1][1].quantized[:, :, :7])
    own = quantizer(released_start=True, dead_threshold=0.0).train()
    own(x, Draw(0), lengths=lengths)
    assert own.book(0).cluster_size.sum() == 27
    counting = quantizer(released_start=True, dead_threshold=0.0).train()
    counting(x, Draw(0), lengths=lengths, padding_counts=True)
    assert counting.book(0).cluster_size.sum() == 40


def test_the_loss_is_a_sum_over_codebooks_of_means_over_what_counts():
    own = quantizer(commitment=3.0).train()
    lengths, x = torch.tensor([20, 7]), torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(2))
    own(x, Draw(0), lengths=lengths)
    made = own.eval()(x, lengths=lengths)
    left, loss = own.input_proj(x), 0.0
    valid = torch.arange(20) < lengths[:, None]
    for i in range(3):
        value = own.book(i).decode(made.codes[:, i]).transpose(1, 2)
        loss += 3.0 * (left - value).square().transpose(1, 2)[valid].mean()
        left = left - value
    torch.testing.assert_close(made.losses["commitment"], loss)
    assert made.layer_losses["commitment"].shape == (3,)
    values = own.decode(made.codes)
    torch.testing.assert_close(values[0], made.quantized[0])
    assert torch.equal(own.encode(x)[0], made.codes[0])
    two = own(x, last=2, lengths=lengths)
    assert torch.equal(two.codes, made.codes[:, :2]) and len(two.layers) == 2
    state = buffers(own)
    own(x, Draw(0), lengths=lengths)                     # in eval mode nothing moves
    assert all(torch.equal(value, state[name]) for name, value in buffers(own).items())


def test_dropped_codebooks_add_nothing_and_count_in_no_loss():
    x = torch.randn(4, 6, 20, generator=torch.Generator().manual_seed(3))
    own = quantizer(dropout=0.5).train()
    own(x, Draw(0))
    start = copy.deepcopy(own)
    used = own.draw_used(4, Draw(5))
    assert (used[2:] == 3).all() and 1 <= int(used.min()) <= 3
    seeds = [seed for seed in range(20) if own.draw_used(4, Draw(seed))[:2].tolist() == [1, 2]]
    made = own(x, Draw(seeds[0]))
    assert not made.layers[1][0].any() and made.layers[1][1].any() and not made.layers[2][:2].any() and made.layers[2][2:].all()
    alone = start.eval()(x[2:])                          # the third codebook is used by the last two items
    torch.testing.assert_close(made.layer_losses["commitment"][2], alone.layer_losses["commitment"][2])


def test_a_replaced_entry_stays_unless_as_released():
    x = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(4))
    for released in (False, True):
        own = quantizer(dead_threshold=1e9, released_replacement=released, decay=0.999).train()     # all are dead, always
        own(x, Draw(0))
        book = own.book(0)
        rows = own.input_proj(x).transpose(1, 2).reshape(-1, 4)
        apart = (book.embed[:, None] - rows).square().sum(-1)
        assert apart.min(1).values.max() < 1e-10                             # each is a vector of the batch
        kept = (book.embed_sum / book.cluster_size[:, None].clamp_min(1e-9) - book.embed).abs().max()
        assert (kept > 1e-2) == released


# --- Whisper's weights ----------------------------------------------------------------------------------------------------

def whisper(**options):
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(1)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 50, "max_source_positions": 150, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperModel(WhisperConfig(**(sizes | options))).eval()


@torch.no_grad()
def test_our_encoder_is_transformers():
    other = whisper(encoder_layers=2).encoder
    for name, parameter in other.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1)
    ours = WhisperEncoder(80, 16, 2, 2, 24, 150)
    ours.load_state_dict(encoder_state(other, 150))
    mel = torch.randn(2, 80, 300, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(mel), other(mel).last_hidden_state, atol=2e-6, rtol=0)
    torch.testing.assert_close(other.embed_positions.weight, sinusoids(150, 16), atol=1e-6, rtol=0)


def test_encoders_start_from_a_whisper(tmp_path):
    other = whisper()
    other.save_pretrained(tmp_path / "whisper")
    tokenizer = codec()
    table = tokenizer.semantic_encoder.positional_embedding.clone()
    for part in ("semantic_encoder", "acoustic_encoder"):
        assert tokenizer.start_part(part, str(tmp_path / "whisper")) == f"{tmp_path / 'whisper'} (transformers)"
        own = tokenizer.get_submodule(part)
        assert torch.equal(own.layers[0].fc1.weight, other.encoder.layers[0].fc1.weight)
        torch.testing.assert_close(own.positional_embedding, table, atol=1e-6, rtol=0)      # 150 positions, of which 100 are kept
    for name, options, message in (
        ("heads", {"encoder_attention_heads": 4}, "4 heads"), ("short", {"max_source_positions": 99}, "99 positions"),
        ("wide", {"encoder_ffn_dim": 32}, "fc1"), ("deep", {"encoder_layers": 2}, "left over layers.1"),
        ("bands", {"num_mel_bins": 128}, "conv1.weight"),
    ):
        whisper(**options).save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            tokenizer.start_part("semantic_encoder", str(tmp_path / name))


@torch.no_grad()
def test_an_encoder_starts_from_the_real_whisper_of_the_assets():
    real = StackConfig(width=384, layers=4, heads=6, hidden=1536)
    tokenizer = XYTokenizer(replace(SMALL, semantic=real))
    assert tokenizer.start_part("semantic_encoder", "whisper-tiny.en").startswith("whisper-tiny.en, ")
    audio = speech(samples=SIZE * HOP)
    mel, _ = tokenizer.log_mel(audio)
    wanted = build_ssl_teacher("whisper-tiny.en", layer=4).features(audio[:, 0])
    torch.testing.assert_close(tokenizer.semantic_encoder(mel), wanted, atol=1e-3, rtol=1e-3)
    with pytest.raises(CheckpointError, match="8 heads"):
        tokenizer.start_part("semantic_encoder", "whisper-base")


def test_any_part_starts_from_another_run(tmp_path):
    source, tokenizer = codec(), XYTokenizer(SMALL)
    source.save_pretrained(tmp_path / "saved")
    for part in ("semantic_encoder", "vocoder", "quantizer"):
        assert part in tokenizer.start_part(part, str(tmp_path / "saved"))
        own, other = tokenizer.get_submodule(part).state_dict(), source.get_submodule(part).state_dict()
        assert all(torch.equal(own[key], other[key]) for key in other)


@torch.no_grad()
def test_a_stack_with_an_empty_item_makes_no_nan_and_too_many_tokens_are_refused():
    stack = WhisperStack(8, 2, 2, 12, 10).eval()
    x = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(0))
    made = stack.attend(x, torch.tensor([10, 4, 0]))
    assert made.isfinite().all() and not made[2].any() and not made[1, 4:].any()
    torch.testing.assert_close(made[1:2, :4], stack.attend(x[1:2, :4]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="11 tokens"):
        stack.attend(F.pad(x, (0, 0, 0, 1)))
