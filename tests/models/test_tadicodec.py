"""TaDiCodec: its codes, its decoder's options, items of a padded batch, the authors' weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tokenizers_lab.config import load_config
from tokenizers_lab.diffusion.mel_flow import FlowDecoder, MelEncoder
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError
from tokenizers_lab.hub import convert_official
from tokenizers_lab.models.tadicodec.config import ModelConfig, VocoderConfig, check_model
from tokenizers_lab.models.tadicodec.convert import VOCODER, from_official, to_official
from tokenizers_lab.models.tadicodec.model import TaDiCodec, resized
from tokenizers_lab.nn.mel import MelConfig, griffin_lim, reflect_ends, vocoder_mel
from tokenizers_lab.nn.transformer import set_activation_checkpointing
from tokenizers_lab.quantizers.bsq import BinaryQuantizer
from tokenizers_lab.text import TextConfig
from tokenizers_lab.tokenizer import SpeechPrompt

PARITY = Path(__file__).parents[1] / "parity" / "tadicodec"
RATE = 6000
SMALL = ModelConfig(
    sample_rate=RATE, mel=MelConfig(bands=20, n_fft=480, hop=120, high=3000.0), width=16, encoder_layers=1, decoder_layers=2,
    heads=2, downsample=8, bits=6, text=TextConfig(), steps=2, vocoder=VocoderConfig("vocos", 8, 16, 2))
HOP = 960


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(cfg=SMALL, seed=0):
    """With weights so large that everything has an effect."""
    torch.manual_seed(seed)
    tokenizer = TaDiCodec(cfg).eval()
    if cfg.codec:
        for part in (tokenizer.encoder, tokenizer.to_code, tokenizer.from_code, tokenizer.decoder):
            for p in part.parameters():
                nn.init.normal_(p, std=0.3)
    return tokenizer


def sound(samples, items=1, seed=1):
    return 0.5 * torch.rand(items, 1, samples, generator=torch.Generator().manual_seed(seed)) - 0.25


@pytest.fixture(scope="module")
def tokenizer():
    return build()


# --- codes ------------------------------------------------------------------------------------------------------------------

def test_the_released_network_has_the_published_rate():
    with torch.device("meta"):      # few layers: the whole network is in tests/test_recipes.py
        made = TaDiCodec(ModelConfig(encoder_layers=1, decoder_layers=1, vocoder=VocoderConfig(layers=1)))
    assert (made.sample_rate / made.hop, made.codebooks, made.codebook_size) == (6.25, 1, 16_384)
    assert made.sample_rate / made.hop * made.cfg.bits == 87.5
    assert (made.takes_texts, "texts" in made.decode_options) == (True, True)


def test_every_code_is_its_bits_and_comes_back():
    quantizer = BinaryQuantizer(14)
    codes = torch.arange(2**14)[None, None]
    vectors = quantizer.decode(codes)
    assert torch.equal(vectors.abs(), torch.full_like(vectors, 14**-0.5))
    assert torch.equal(vectors[0, 0] > 0, codes[0, 0] >= 2**13)                 # dimension 0 is the most significant
    assert torch.equal(quantizer.encode(vectors), codes)


def test_a_last_frame_that_is_not_full_has_a_code(tokenizer):
    for samples, frames in ((1, 1), (HOP, 1), (HOP + 1, 2), (5 * HOP, 5)):
        codes = tokenizer.encode(sound(samples)).codes
        assert codes.shape == (1, 1, frames)
        assert tokenizer.decode(codes).shape == (1, 1, frames * HOP)


def test_the_encoder_sees_the_two_middle_frames_of_each_code():
    frames = torch.arange(16.0)[None, :, None]
    assert resized(frames, 2).flatten().tolist() == [3.5, 11.5]


# --- a padded batch ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["vocos", "griffin_lim"])
def test_an_item_of_a_padded_batch_is_as_if_alone(kind):
    tokenizer = build(replace(SMALL, vocoder=replace(SMALL.vocoder, kind=kind, iterations=4)))
    samples, texts = [5 * HOP, 3 * HOP - 100, HOP + 7], ["a long text of many bytes", None, "short"]
    items = [sound(n, seed=n) for n in samples]
    batch = torch.cat([nn.functional.pad(item, (0, samples[0] - n), value=0.2) for item, n in zip(items, samples)])
    together = tokenizer.encode(batch, torch.tensor(samples))
    assert together.lengths.tolist() == [5, 3, 2]
    prompt = SpeechPrompt(sound(2 * HOP, seed=9), ["before "])
    for option in (None, prompt):
        audio = tokenizer.decode(together.codes, together.lengths, texts=texts, prompt=option)
        mel = tokenizer.decode_mel(together.codes, together.lengths, texts, option)
        for i, item in enumerate(items):
            alone, frames = tokenizer.encode(item), int(together.lengths[i])
            assert torch.equal(together.codes[i, :, :frames], alone.codes[0]) and not together.codes[i, :, frames:].any()
            expected = tokenizer.decode_mel(alone.codes, texts=[texts[i]], prompt=option)[0]
            torch.testing.assert_close(mel[i, : 8 * frames], expected, atol=5e-4, rtol=1e-3)      # the flow amplifies rounding
            assert not mel[i, 8 * frames :].any() and not audio[i, :, frames * HOP :].any()
            if kind == "vocos":      # phases from zero amplify rounding
                made = tokenizer.decode(alone.codes, texts=[texts[i]], prompt=option)[0]
                torch.testing.assert_close(audio[i, :, : frames * HOP], made, atol=1e-4, rtol=1e-3)


def test_items_depend_on_their_batch_in_the_authors_way(tokenizer):
    condition, noise = torch.randn(2, 16, 16), torch.randn(2, 16, 20)
    text = tokenizer.read(["a long text", "short"])
    alone = tokenizer.read(["short"])
    for official in (False, True):
        both = tokenizer.sample(condition, noise, text=text, batch_as_released=official)[1:]
        one = tokenizer.sample(condition[1:], noise[1:], text=alone, batch_as_released=official)
        assert torch.allclose(both, one, atol=1e-4) != official


def test_mel_frames_reflect_each_items_own_end():
    samples = torch.tensor([900, 480])
    audio = sound(900, 2)[:, 0]
    made = vocoder_mel(audio, SMALL.mel, RATE, samples)
    for i, n in enumerate(samples.tolist()):
        torch.testing.assert_close(made[i, :, : n // 120], vocoder_mel(audio[i : i + 1, :n], SMALL.mel, RATE)[0])
    assert not torch.allclose(made[1, :, 3], vocoder_mel(audio, SMALL.mel, RATE)[1, :, 3], atol=1e-3)
    padded = nn.functional.pad(audio, (180, 180), mode="reflect")
    assert torch.equal(reflect_ends(audio, torch.tensor([900, 900]), 180), padded)
    assert reflect_ends(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([2]), 3).tolist() == [[2, 1, 2, 1, 2, 1, 2, 1, 0]]


def test_griffin_and_lim_give_the_mel_frames_back():
    mel = MelConfig()
    audio = 0.1 * torch.randn(24_000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 1, 24_000)
    frames = vocoder_mel(audio[None], mel, 24_000)
    made = griffin_lim(frames, mel, 24_000)
    assert made.shape == (1, 1, 24_000) and torch.equal(made, griffin_lim(frames, mel, 24_000))
    difference = vocoder_mel(made[:, 0], mel, 24_000) - frames
    assert difference.abs().mean() < 0.12 and difference.mean().abs() < 0.1      # a factor of 2 would be 0.24
    assert griffin_lim(frames[..., :1], mel, 24_000).shape == (1, 1, 480)


def test_griffin_and_lim_keep_the_time():
    mel, click = MelConfig(), torch.zeros(1, 9600)
    click[0, 4800 : 4820] = 0.9
    made = griffin_lim(vocoder_mel(click, mel, 24_000), mel, 24_000)
    centre = (made[0, 0].square() * torch.arange(9600)).sum() / made.square().sum()
    assert abs(float(centre) - 4810) < 240      # half a hop


# --- the decoder's options --------------------------------------------------------------------------------------------------

def passes(tokenizer, **options):
    calls = []
    hook = tokenizer.decoder.register_forward_hook(lambda *_: calls.append(1))
    made = tokenizer.decode_mel(torch.tensor([[[5, 17]]]), texts=["hello"], **options)
    hook.remove()
    return len(calls), made


def test_without_guidance_there_is_one_pass_a_step(tokenizer):
    two, guided = passes(tokenizer, steps=3)
    assert two == 6
    for scale in (0, 1):
        one, plain = passes(tokenizer, steps=3, guidance=scale)
        assert one == 3
    torch.testing.assert_close(plain, passes(tokenizer, steps=3, guidance=1 + 1e-7)[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, guided, atol=1e-3)
    assert not torch.allclose(guided, passes(tokenizer, steps=3, rescale=0.0)[1], atol=1e-3)
    silent = build(replace(SMALL, text_condition=False))
    assert passes(silent, steps=3)[0] == 3 and not silent.takes_texts


def test_text_is_read_in_its_order(tokenizer):
    codes = torch.tensor([[[5, 17]]])
    made = {text: tokenizer.decode_mel(codes, texts=[text]) for text in ("ab", "ba", None, "")}
    assert not torch.allclose(made["ab"], made["ba"], atol=1e-4) and not torch.allclose(made["ab"], made[None], atol=1e-4)
    assert torch.equal(made[None], made[""]) and torch.equal(made[None], tokenizer.decode_mel(codes))


def test_a_prompt_comes_before_and_is_left_out(tokenizer, monkeypatch):
    codes, heard = torch.tensor([[[5, 17]], [[40, 3]]]), []
    monkeypatch.setattr(tokenizer, "read", lambda texts: heard.append(texts) or {})
    calls = []
    hook = tokenizer.decoder.register_forward_hook(lambda _, given, out: calls.append((given[0], given[2])))
    prompt = SpeechPrompt(sound(3 * HOP - 5), ["One."])
    made = tokenizer.decode_mel(codes, texts=["two", None], prompt=prompt, guidance=2.0)
    hook.remove()
    assert made.shape == (2, 16, 20) and heard == [["One.two", None]]
    clean = tokenizer.mel(prompt.audio).transpose(1, 2)
    lead = tokenizer.encode(prompt.audio).codes.expand(2, -1, -1)
    expected = tokenizer.condition(tokenizer.quantizer.decode(torch.cat([lead, codes], 2)))
    for number, (x, condition) in enumerate(calls):      # also without condition
        assert torch.equal(x[:, :24], clean.expand(2, -1, -1)) and x.shape[1] == 40
        torch.testing.assert_close(condition, torch.zeros_like(expected) if number % 2 else expected)
    assert tokenizer.decode(codes, prompt=prompt).shape == (2, 1, 2 * HOP)


def test_one_prompt_for_all_is_one_for_each(tokenizer):
    codes, audio = torch.tensor([[[5, 17]], [[40, 3]]]), sound(2 * HOP)
    texts = ["x", "yz"]
    for_all = tokenizer.decode_mel(codes, texts=texts, prompt=SpeechPrompt(audio, ["a "]))
    each = tokenizer.decode_mel(codes, texts=texts, prompt=SpeechPrompt(audio.expand(2, -1, -1), ["a ", "a "]))
    assert torch.equal(for_all, each)
    assert not torch.allclose(for_all, tokenizer.decode_mel(codes, texts=texts), atol=1e-3)


def test_noise_is_the_same_unless_a_generator_gives_it(tokenizer):
    codes = torch.tensor([[[5, 17]]])
    first, again = (tokenizer.decode(codes) for _ in range(2))
    drawn = [tokenizer.decode(codes, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(first, again) and torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3) and not torch.allclose(first, drawn[0], atol=1e-3)


def test_what_does_not_fit_is_an_input_error(tokenizer):
    codes, good = torch.tensor([[[5, 17]]]), sound(HOP)
    wrong = [
        {"texts": ["a", "b"]}, {"texts": "a"}, {"steps": 0}, {"guidance": -1.0}, {"rescale": 1.5},
        {"prompt": SpeechPrompt(good.expand(2, -1, -1))}, {"prompt": SpeechPrompt(good, ["a", "b"])},
        {"prompt": SpeechPrompt(good * 9)}, {"prompt": SpeechPrompt(good[..., :0])},
    ]
    for options in wrong:
        with pytest.raises(InputError):
            tokenizer.decode(codes, **options)
    with pytest.raises(InputError, match="in \\[0, 64\\)"):
        tokenizer.decode(codes + 64)


# --- the vocoder alone ------------------------------------------------------------------------------------------------------

def test_a_vocoder_alone_has_mel_latents():
    vocoder = build(replace(SMALL, codec=False))
    assert {name for name, _ in vocoder.named_children()} == {"vocoder"}
    assert (vocoder.hop, vocoder.takes_texts, vocoder.decode_options) == (120, False, ())
    audio, lengths = sound(1000, 2), torch.tensor([1000, 500])
    encoding = vocoder.encode(audio, lengths)
    assert encoding.codes is None and encoding.lengths.tolist() == [9, 5]
    filled = nn.functional.pad(audio[1, :, :500], (0, 100))
    torch.testing.assert_close(encoding.latents[1, :, :5], vocoder_mel(filled, SMALL.mel, RATE)[0])
    made = vocoder.decode(encoding.latents, encoding.lengths)
    assert made.shape == (2, 1, 1080) and not made[1, :, 600:].any()
    torch.testing.assert_close(made[1:, :, :600], vocoder.decode(encoding.latents[1:, :, :5]))
    for bad in ({"latents": encoding.latents[:, :3]}, {"latents": encoding.latents.long()}):
        with pytest.raises(InputError, match=r"float \(B, 20, T\)"):
            vocoder.decode(bad["latents"])
    with pytest.raises(InputError, match="takes no texts"):
        vocoder.decode(encoding.latents, texts=["a", "b"])


def test_a_codec_takes_its_vocoder_from_a_run_of_the_vocoder(tmp_path):
    vocoder, codec = build(replace(SMALL, codec=False), seed=5), build()
    vocoder.save_pretrained(tmp_path)
    codec.start_part("vocoder", str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(codec.vocoder.state_dict().values(), vocoder.vocoder.state_dict().values()))


# --- networks ---------------------------------------------------------------------------------------------------------------

def test_the_norms_start_as_the_config_says():
    torch.manual_seed(0)
    for identity, weight, bias in ((False, 0.02, 0.0), (True, 0.0, 1.0)):
        scale = FlowDecoder(8, 64, 1, 2, identity_norms=identity).tower.layers[0].mlp_norm.to_scale
        assert float(scale.weight.detach().std()) == pytest.approx(weight, rel=0.1) and bool((scale.bias == bias).all())
    assert not list(MelEncoder(8, 16, 1, 2).tower.norm.parameters())


def test_recomputed_activations_give_the_same_gradients(tokenizer):
    decoder, x = tokenizer.decoder, torch.randn(2, 16, 20)
    given = (x, torch.tensor([0.2, 0.8]), torch.randn(2, 16, 16))
    found = []
    for on in (False, True):
        assert set_activation_checkpointing(tokenizer, on) == 2
        decoder.zero_grad()
        decoder(*given, **tokenizer.read(["abc", "d"])).square().sum().backward()
        found.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
    set_activation_checkpointing(tokenizer, False)
    tokenizer.zero_grad()
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) > 30


def test_half_precision_weights_encode_and_decode():
    tokenizer = build().to(torch.bfloat16)
    codes = tokenizer.encode(sound(2 * HOP)).codes
    made = tokenizer.decode(codes, texts=["a"])
    assert made.dtype == torch.float32 and made.isfinite().all()


@pytest.mark.parametrize(("change", "message"), [
    ({"heads": 3}, "model.width"), ({"bits": 21}, "model.bits"), ({"norm_init": "zero"}, "norm_init must be"),
    ({"rescale": 2.0}, "rescale"), ({"steps": 0}, "model.steps"), ({"text": TextConfig(pad=999)}, "model.text.pad"),
    ({"vocoder": VocoderConfig("wave")}, "vocoder.kind must be"),
    ({"codec": False, "vocoder": VocoderConfig("griffin_lim")}, "must be vocos"),
    ({"mel": MelConfig(hop=4000)}, "model.mel"),
])
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        check_model(replace(SMALL, **change))


# --- the authors' weights ---------------------------------------------------------------------------------------------------

def released(parts=("tadicodec", "vocoder")):
    """The release without memory, by its manifest."""
    manifest = json.loads((PARITY / "official_full_manifest.json").read_text())
    prefixes = {"tadicodec": "", "vocoder": VOCODER}
    return {prefixes[part] + key: torch.empty(v["shape"], dtype=getattr(torch, v["dtype"]), device="meta")
            for part in parts for key, v in manifest[part].items()}


def test_the_release_is_covered_key_by_key_both_ways():
    official = released()
    assert len(official) == 259 + 279
    converted = from_official(official)
    with torch.device("meta"):
        own = TaDiCodec(ModelConfig()).state_dict()
    assert converted.model == ModelConfig() and converted.tokenizer.keys() == own.keys()
    back = to_official(own)
    assert {k: (v.shape, v.dtype) for k, v in back.items()} == {k: (v.shape, v.dtype) for k, v in official.items()}
    assert from_official(released(("tadicodec",))).model.vocoder.kind == "griffin_lim"


def official_set():
    """(The parity folder's weights, codec and vocoder; their config.)"""
    voice = {VOCODER + k: v for k, v in load_file(PARITY / "vocoder.safetensors").items()}
    return load_file(PARITY / "weights.safetensors") | voice, json.loads((PARITY / "config.json").read_text())


def test_other_keys_and_shapes_are_refused():
    official, config = official_set()
    for key in ("text_emb.weight", "vocoder.head.istft.window", "bsq.group_basis", "decoder.norm.to_weight.bias"):
        with pytest.raises(CheckpointError, match=f"misses {key.removeprefix(VOCODER)}"):
            from_official({k: v for k, v in official.items() if k != key}, config)
    with pytest.raises(CheckpointError, match="left over extra"):
        from_official(official | {"extra": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match=r"another shape vq_in_linear\.bias"):
        from_official(official | {"vq_in_linear.bias": torch.zeros(13)}, config)
    with pytest.raises(CheckpointError, match="counts its bits"):
        from_official(official | {"bsq.basis": torch.arange(10)}, config)
    with pytest.raises(CheckpointError, match="bare state dict"):
        from_official({"model": {}})


def test_converted_weights_come_back_as_they_were():
    official, config = official_set()
    back = to_official(from_official(official, config).tokenizer)
    assert back.keys() == official.keys()
    assert all(torch.allclose(back[k], v, atol=1e-6) for k, v in official.items())
    for option, value in (("vq_type", "fsq"), ("use_repa_loss", True), ("mel_dim", 80)):
        with pytest.raises(ConfigError):
            from_official(official, {**config, "tadicodec": {**config["tadicodec"], option: value}})
    with pytest.raises(ConfigError, match="no 'preprocess'"):
        from_official(official, {"tadicodec": {}})


def test_the_vocoders_file_is_read_from_beside_the_codecs(tmp_path):
    config = json.loads((PARITY / "config.json").read_text())
    save_file(load_file(PARITY / "weights.safetensors"), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="converted without it"):
        alone = convert_official("tadicodec", tmp_path / "model.safetensors", config).tokenizer
    (tmp_path / "vocoder").mkdir()
    save_file(load_file(PARITY / "vocoder.safetensors"), tmp_path / "vocoder" / "model.safetensors")
    both = convert_official("tadicodec", tmp_path / "model.safetensors", config).tokenizer
    assert (alone.cfg.vocoder.kind, both.cfg.vocoder.kind) == ("griffin_lim", "vocos")
    assert "vocoder.file_sha256" in both.provenance and "vocoder.file_sha256" not in alone.provenance


def test_a_text_that_the_table_has_no_row_for_is_refused():
    tokenizer = build(replace(SMALL, text=TextConfig(vocabulary=100, pad=0)))
    with pytest.raises(ConfigError, match="100 rows"):
        tokenizer.decode(torch.tensor([[[1]]]), texts=["z"])


def test_the_tiny_recipe_says_that_its_audio_is_a_quick_look():
    model = load_config("tadicodec/tiny").model
    assert (model.vocoder.kind, model.steps, model.bits) == ("griffin_lim", 4, 14)
    vocoder = load_config("tadicodec/vocoder-24k-tiny").model
    same = [getattr(model.vocoder, name) == getattr(vocoder.vocoder, name) for name in ("width", "hidden", "layers")]
    assert all(same) and model.mel == vocoder.mel      # so that init_parts fits


def test_the_condition_can_begin_as_large_as_the_frames():
    torch.manual_seed(0)
    plain, scaled = (TaDiCodec(replace(SMALL, width=64, condition_gain=gain)) for gain in (0.0, 1.0))
    codes = torch.arange(32)[None, None]
    sizes = [t.decoder.condition_mlp(t.condition(t.quantizer.decode(codes))).std().item() for t in (plain, scaled)]
    frames = plain.decoder.inward(torch.randn(1, 32, 20)).std().item()
    assert sizes[0] < frames / 100 and sizes[1] > frames
    with pytest.raises(ConfigError, match="condition_gain"):
        check_model(replace(SMALL, condition_gain=-1.0))
