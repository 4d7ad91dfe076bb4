"""The LM-SPT tokenizer and its conversion; its losses are in test_lm_spt_objective.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokenizers_lab.cli.main import call
from tokenizers_lab.discriminators.dac import DacDiscriminator
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError
from tokenizers_lab.hub import load
from tokenizers_lab.models.lm_spt.config import AuxiliaryConfig, ModelConfig
from tokenizers_lab.models.lm_spt.convert import discriminator_from_official, from_official, to_official
from tokenizers_lab.models.lm_spt.model import LMSPT
from tokenizers_lab.network import read_weights

SET = Path(__file__).parent.parent / "parity" / "lm_spt"
STRIDES = {      # encoder, main and auxiliary decoder, by frame rate
    25.0: ([4, 5, 6, 8], [8, 6, 5, 4], [8, 5, 4, 4]),
    12.5: ([4, 5, 6, 8, 2], [2, 8, 6, 5, 4], [8, 8, 5, 4]),
    6.25: ([4, 5, 6, 8, 4], [4, 8, 6, 5, 4], [8, 8, 5, 8]),
}
SMALL = ModelConfig(      # 8 samples a frame, 4 of the auxiliary decoder
    sample_rate=800, strides=[3, 2, 2], decoder_strides=[2, 2, 3], semantic_width=4, acoustic_width=4, decoder_width=32, latent=8,
    codebooks=4, semantic_size=32, semantic_dim=4, acoustic_size=16, acoustic_dim=4,
    auxiliary=AuxiliaryConfig(width=16, strides=[2, 3], sample_rate=400),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(cfg):
    """Weights whose codes vary: residual branches and latents of the order of 1."""
    torch.manual_seed(0)
    tokenizer = LMSPT(cfg).eval()
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif name.endswith("original0"):
                parameter.mul_(1.5)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build(SMALL)


def noise(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9


VARIANTS = {
    "plain": SMALL,
    "causal": replace(SMALL, causal=True, auxiliary=replace(SMALL.auxiliary, causal=True)),
    "shared encoder, FSQ": replace(SMALL, shared_encoder=True, fsq_levels=[5, 4], kernel=5, dilations=[1, 2]),
    "no subtraction": replace(SMALL, subtract=False),
}


# --- tokenizer ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", STRIDES)
def test_frame_rates(rate):
    encoder, decoder, auxiliary = STRIDES[rate]
    small = {
        "semantic_width": 2, "acoustic_width": 2, "decoder_width": 64, "latent": 6, "semantic_size": 32, "acoustic_size": 16}
    tokenizer = build(ModelConfig(
        strides=encoder, decoder_strides=decoder, auxiliary=AuxiliaryConfig(width=32, strides=auxiliary), **small))
    assert tokenizer.sample_rate / tokenizer.hop == rate
    audio = noise(1, 1, 9_000)
    codes = tokenizer.encode(audio).codes
    assert codes.shape == (1, 8, -(-9_000 // tokenizer.hop)) and codes.dtype == torch.int64
    assert tokenizer.decode(codes).shape == (1, 1, codes.shape[2] * tokenizer.hop)
    assert tokenizer.decode(codes, decoding="auxiliary").shape == (1, 1, codes.shape[2] * tokenizer.hop * 2 // 3)
    assert tokenizer.reconstruct(audio).shape == audio.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_item_is_as_if_it_were_alone(variant):
    tokenizer = build(VARIANTS[variant]).double()            # so that sums in another order do not count
    lengths = torch.tensor([500, 12, 1, 367])
    audio = noise(4, 1, 500)                                 # what lies behind an item's end is garbage
    together = tokenizer.encode(audio, lengths)
    assert together.lengths.tolist() == [42, 1, 1, 31] and together.codes.shape == (4, 4, 42)
    assert len(together.codes[0].unique()) > 15              # a constant code would prove nothing
    decoded = {way: tokenizer.decode(together.codes, together.lengths, way) for way in ("all", "auxiliary")}
    restored = tokenizer.reconstruct(audio, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = tokenizer.encode(audio[i : i + 1, :, :length])
        frames = alone.codes.shape[2]
        assert torch.equal(together.codes[i, :, :frames], alone.codes[0]) and not together.codes[i, :, frames:].any()
        for way, samples in (("all", 12), ("auxiliary", 6)):
            expected = tokenizer.decode(alone.codes, decoding=way)
            torch.testing.assert_close(decoded[way][i : i + 1, :, : frames * samples], expected, atol=1e-6, rtol=0)
            assert not decoded[way][i, :, frames * samples :].any()
        torch.testing.assert_close(
            restored[i : i + 1, :, :length], tokenizer.reconstruct(audio[i : i + 1, :, :length]), atol=1e-6, rtol=0)
        assert not restored[i, :, length:].any()


def test_without_padding_the_tail_is_dropped_as_in_the_authors_code(tokenizer):
    audio = noise(1, 1, 500)
    assert tokenizer.encode(audio).codes.shape[2] == 42
    bare = tokenizer.encode(audio, pad=False)
    assert bare.codes.shape[2] == 41 and bare.lengths is None
    whole = tokenizer.encode(audio[..., :492], pad=False).codes
    assert torch.equal(whole, tokenizer.encode(audio[..., :492]).codes)
    batch = tokenizer.encode(noise(2, 1, 500), torch.tensor([500, 100]), pad=False)
    assert batch.lengths.tolist() == [41, 8]
    with pytest.raises(InputError, match="at least 12 samples"):
        tokenizer.encode(audio[..., :5], pad=False)


def test_causal_prefixes_are_prefixes_and_others_are_not():
    audio = noise(1, 1, 600)
    for name, local in (("causal", True), ("plain", False)):
        tokenizer = build(VARIANTS[name]).double()
        codes = tokenizer.encode(audio).codes
        decoded = {way: tokenizer.decode(codes, decoding=way) for way in ("all", "auxiliary")}
        for frames in (1, 7, 30):
            prefix = tokenizer.encode(audio[..., : frames * 12]).codes
            assert torch.equal(prefix, codes[..., :frames]) or not local
            for way, samples in (("all", 12), ("auxiliary", 6)):
                part, whole = tokenizer.decode(codes[..., :frames], decoding=way), decoded[way][..., : frames * samples]
                assert torch.allclose(part, whole, atol=1e-6) == local


def test_ways_of_decoding(tokenizer):
    codes = tokenizer.encode(noise(2, 1, 120)).codes
    every = {way: tokenizer.decode(codes, decoding=way) for way in ("all", "semantic", "auxiliary", "acoustic")}
    assert {way: x.shape[-1] for way, x in every.items()} == {"all": 120, "semantic": 120, "auxiliary": 60, "acoustic": 120}
    assert (tokenizer.output_rate(), tokenizer.output_rate("auxiliary")) == (800, 400)
    assert torch.equal(every["semantic"], tokenizer.decode(codes[:, :1]))
    assert torch.equal(every["auxiliary"], tokenizer.decode(codes[:, :1], decoding="auxiliary"))
    changed = codes.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 32                 # the acoustic way hears no semantic code, and the other way round
    assert torch.equal(tokenizer.decode(changed, decoding="acoustic"), every["acoustic"])
    assert not torch.equal(tokenizer.decode(changed, decoding="semantic"), every["semantic"])
    changed = codes.clone()
    changed[:, 1:] = (changed[:, 1:] + 1) % 16
    assert torch.equal(tokenizer.decode(changed, decoding="auxiliary"), every["auxiliary"])
    assert not torch.equal(tokenizer.decode(codes[:, :2]), tokenizer.decode(codes[:, :3]))
    auxiliary = build(replace(SMALL, decoding="auxiliary"))
    assert torch.equal(auxiliary.decode(codes), every["auxiliary"])
    assert auxiliary.reconstruct(noise(1, 1, 100)).shape == (1, 1, 50)


def test_the_acoustic_part_quantizes_what_the_semantic_part_left():
    audio = noise(1, 1, 240)
    one, other = (build(replace(SMALL, subtract=subtract)) for subtract in (True, False))
    assert one.state_dict().keys() == other.state_dict().keys()
    a, b = one.encode(audio).codes, other.encode(audio).codes
    assert torch.equal(a[:, 0], b[:, 0]) and not torch.equal(a[:, 1:], b[:, 1:])


@pytest.mark.parametrize("bad", [
    torch.zeros(1, 1, 0), torch.zeros(1, 2, 100), torch.zeros(1, 100), torch.full((1, 1, 50), float("nan")),
    torch.full((1, 1, 50), 3.0), torch.zeros(1, 1, 50, dtype=torch.int16),
])
def test_unusable_audio_is_refused(tokenizer, bad):
    with pytest.raises(InputError):
        tokenizer.encode(bad)


@pytest.mark.parametrize(("codes", "message"), [
    (torch.zeros(1, 5, 3, dtype=torch.int64), "1 to 4"),
    (torch.zeros(1, 4, 3), "int64"),
    (torch.full((1, 4, 3), 32), r"\[0, 32\)"),
    (torch.full((1, 4, 3), 20), "acoustic codes must be below 16, not 20"),
    (torch.full((1, 4, 3), -1), r"\[0, 32\)"),
])
def test_unusable_codes_are_refused(tokenizer, codes, message):
    with pytest.raises(InputError, match=message):
        tokenizer.decode(codes)


def test_unusable_lengths_and_ways_are_refused(tokenizer):
    audio = noise(2, 1, 100)
    for lengths in (torch.tensor([100, 101]), torch.tensor([0, 5]), torch.tensor([5]), torch.tensor([5.0, 6.0])):
        with pytest.raises(InputError, match="lengths"):
            tokenizer.encode(audio, lengths)
    codes = tokenizer.encode(audio).codes
    with pytest.raises(InputError, match="decoding must be one of all, semantic"):
        tokenizer.decode(codes, decoding="semantics")
    with pytest.raises(InputError, match="no acoustic codes"):
        tokenizer.decode(codes[:, :1], decoding="acoustic")


@pytest.mark.parametrize(("changes", "message"), [
    ({"decoder_strides": [2, 2, 2]}, "make 8 samples of a frame at 800 Hz, but a frame of the encoder is 12"),
    ({"auxiliary": AuxiliaryConfig(16, [4, 3], 400)}, "model.auxiliary.strides"),
    ({"kernel": 4}, "must be odd"),
    ({"codebooks": 1}, "at least 2"),
    ({"decoding": "most"}, "decoding must be one of"),
    ({"fsq_levels": [1, 3]}, "2 or more"),
    ({"decoder_width": 4}, "no channels left"),
    ({"shared_encoder": True, "acoustic_width": 5}, "to be equal"),
    ({"latent": 0}, "model.latent must be at least 1"),
])
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LMSPT(replace(SMALL, **changes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_it_is_the_same(variant, tmp_path):
    tokenizer = build(VARIANTS[variant])
    tokenizer.save_pretrained(tmp_path / "one")
    loaded = load(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert loaded.cfg == tokenizer.cfg
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    audio = noise(1, 1, 100)
    assert torch.equal(loaded.encode(audio).codes, tokenizer.encode(audio).codes)


def test_a_bfloat16_copy_works(tokenizer):
    assert build(SMALL).to(torch.bfloat16).reconstruct(noise(1, 1, 100)).dtype == torch.float32


# --- the authors' weights -----------------------------------------------------------------------------------------------

def manifest():
    return json.loads((SET / "official_full_manifest.json").read_text())


def official(name="weights"):
    config = json.loads((SET / "config.json").read_text())
    return read_weights(SET / f"{name}.safetensors"), config["causal_variant"] if name == "weights_causal" else config


def test_the_official_key_tree_is_covered_both_ways():
    told = manifest()
    state = {name: torch.empty(shape, device="meta") for name, shape in told["tensors"].items()}
    assert from_official(state).model == from_official(state, told["release_config"]).model == ModelConfig()
    back = to_official(from_official(state).tokenizer)
    assert {k: list(v.shape) for k, v in back.items()} == told["tensors"]
    with torch.device("meta"):
        tokenizer = LMSPT(ModelConfig())
        judge = DacDiscriminator(24_000).state_dict()
    assert sum(p.numel() for p in tokenizer.parameters()) == told["total_parameters"] == 74_652_220
    state = {name: torch.empty(shape, device="meta") for name, shape in told["discriminator_tensors"].items()}
    assert discriminator_from_official(state, judge, 5, 0).keys() == judge.keys()


@pytest.mark.parametrize("name", ["weights", "weights_causal"])
def test_conversion_there_and_back_keeps_every_number(name):
    state, config = official(name)
    converted = from_official(state, config)
    tokenizer = LMSPT(converted.model)
    tokenizer.load_state_dict(converted.tokenizer)
    back = to_official(tokenizer.state_dict(), converted.model)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_found_from_our_own_weights_in_official_names(variant):
    tokenizer = build(VARIANTS[variant])
    cfg = tokenizer.cfg
    config = {
        "sample_rate": 800, "dilation": cfg.dilations, "use_shared_encoder": cfg.shared_encoder,
        "semantic_subtraction": cfg.subtract, "semantic_quantizer_kwargs": {"levels": cfg.fsq_levels},
        "aux_decoder": {"sample_rate": 400, "dilation": cfg.auxiliary.dilations},
    }
    state = to_official(tokenizer.state_dict(), cfg)
    converted = from_official(state, config)
    seen = replace(converted.model, semantic_size=cfg.semantic_size, semantic_dim=cfg.semantic_dim)      # FSQ has neither
    assert seen == cfg and all(torch.equal(v, tokenizer.state_dict()[k]) for k, v in converted.tokenizer.items())


@pytest.mark.parametrize(("damage", "message"), [
    (lambda s: s.pop("decoder.model.7.bias"), "misses decoder.model.7.bias"),
    (lambda s: s.pop("quantizer.semantic_vocab_usage"), "misses quantizer.semantic_vocab_usage"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("aux_decoder.")], "misses aux_decoder"),
    (lambda s: s.update({"decoder.extra": torch.zeros(1)}), "left over decoder.extra"),
    (lambda s: s.update({"decoder.model.7.bias": torch.zeros(2)}), "another shape decoder.model.7.bias"),
    (lambda s: s.update({"epoch": 3}), "bare state dict"),
    (lambda s: s.clear(), "bare state dict"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(damage, message):
    state, config = official()
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        from_official(state, config)


def test_a_config_that_contradicts_the_weights_is_refused():
    state, config = official()
    config["constructor_args"]["encoder_rates"] = [4, 5, 6, 2, 8]
    with pytest.raises(ConfigError, match=r"encoder_rates \[4, 5, 6, 2, 8\], but the weights have \[4, 5, 6, 8, 2\]"):
        from_official(state, config)
    state, config = official()
    config["constructor_args"]["use_shared_encoder"] = True
    with pytest.raises(CheckpointError, match="said to be shared"):
        from_official(state, config)


def test_toklab_converts_the_authors_file(tmp_path, capsys):
    tokenizer = build(VARIANTS["plain"])
    save_file({k: v.contiguous() for k, v in to_official(tokenizer.state_dict(), SMALL).items()}, tmp_path / "lmspt.safetensors")
    config = {"sample_rate": 800, "aux_decoder": {"sample_rate": 400}}
    (tmp_path / "official.json").write_text(json.dumps(config))
    arguments = ["convert", "lm_spt", str(tmp_path / "lmspt.safetensors"), str(tmp_path / "out")]
    assert call([*arguments, "--official-config", str(tmp_path / "official.json")]) == 0
    assert "Apache-2.0" in capsys.readouterr().out
    loaded, audio = load(tmp_path / "out"), noise(1, 1, 200)
    assert loaded.provenance["converted_from"] == "kakaocorp/lmspt"
    assert torch.equal(loaded.encode(audio).codes, tokenizer.encode(audio).codes)


def test_the_first_weights_of_the_encoders_alone_are_scaled_by_the_gain():
    made = []
    for gain in (1.0, 1.5):
        torch.manual_seed(0)
        made.append(LMSPT(replace(SMALL, init_gain=gain)))
    for part, factor in (("semantic_encoder", 1.5), ("acoustic_encoder", 1.5), ("decoder", 1.0), ("aux_decoder", 1.0)):
        plain, scaled = (next(m.weight for m in model.get_submodule(part).modules() if hasattr(m, "weight")) for model in made)
        torch.testing.assert_close(scaled, factor * plain)
