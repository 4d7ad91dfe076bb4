"""The VFM-VAE tokenizer, its foundation models and its conversion; its losses are in test_vfm_vae_objective.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tokenizers_lab
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError, WeightsMissing
from tokenizers_lab.hub import convert_official
from tokenizers_lab.models.vfm_vae.config import ModelConfig, QuantizerConfig, VFMConfig
from tokenizers_lab.models.vfm_vae.convert import (
    HEAD,
    OFFICIAL,
    RELEASED,
    VFM_NETWORK,
    from_official,
    model_config,
    official_shapes,
    to_official,
)
from tokenizers_lab.models.vfm_vae.model import VFMVAE
from tokenizers_lab.models.vfm_vae.vfm import FoundationModel, resize_by
from tokenizers_lab.network import read_weights
from tokenizers_lab.nn.attn_projection import AttnProjection, ProjectionAttention
from tokenizers_lab.nn.local_norm import LocalBatchNorm
from tokenizers_lab.nn.modulated import EqualisedLinear, MappingNetwork, ModulatedPointwise, Upsample
from tokenizers_lab.quantizers.grouped import GroupedVQ
from tokenizers_lab.teachers.layers import blocks_of, hidden_layers

SET = Path(__file__).parent.parent / "parity" / "vfm_vae"
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8, **TINY}
SMALL = ModelConfig(
    image_size=64, downsample=8, latent_channels=8, vfm=VFMConfig(config=SIGLIP, scale=2.0, layers=[0, 2, -1]), widths=[8, 8, 8],
    expansion=4, code=24, blocks=5, channel_base=1536, channel_max=24, res_blocks=1, latent_widths=[64, 16, 16, 8],
    attention_blocks=[0, 1], attention_depths=[1, 1],
)


def small(**changes):
    torch.manual_seed(0)
    tokenizer = VFMVAE(replace(SMALL, **changes)).eval()
    with torch.no_grad():      # away from the initialisation, where half of the layers do nothing
        for name, parameter in tokenizer.named_parameters():
            parameter += (0.3 if name.endswith(("gamma", "to_out.weight", "ff.3.weight")) else 0.02) * torch.randn_like(parameter)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# --- tokenizer ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(64, 64), (32, 96), (16, 40), (8, 8), (72, 56)])
def test_any_multiple_of_the_downsampling_works(tokenizer, size):
    images = torch.rand(1, 3, *size)
    encoding = tokenizer.encode(images)
    assert encoding.latents.shape == (1, 8, size[0] // 8, size[1] // 8)
    assert encoding.posterior.mean.shape == encoding.posterior.std.shape == encoding.latents.shape
    decoded = tokenizer.decode(encoding.latents)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    scales = tokenizer.images(encoding.latents)
    assert [tuple(s.shape[2:]) for s in scales] == [(-(-size[0] // 2**i), -(-size[1] // 2**i)) for i in range(5)]


def test_a_grid_that_the_blocks_cannot_fold_is_continued_at_its_edge(tokenizer):
    latents = torch.randn(1, 8, 4, 6)
    decoder = tokenizer.decoder
    wide = decoder.decompress(latents)
    continued = F.pad(wide, (0, 2, 0, 0), mode="replicate")
    wanted = decoder.synthesis(continued, decoder.code(wide))[0][..., :48]
    torch.testing.assert_close(tokenizer.images(latents)[0], wanted)


def test_one_image_of_the_smallest_size_has_one_value_in_a_group():
    tokenizer = small(latent_widths=[16, 16, 16, 8])
    images = torch.rand(2, 3, 16, 16)      # enters the first block, whose branch has 16 groups, as 1 × 1 position
    alone = tokenizer.decode(tokenizer.encode(images[:1]).latents)
    torch.testing.assert_close(alone, tokenizer.decode(tokenizer.encode(images).latents)[:1], atol=2e-3, rtol=0)


def test_an_image_alone_is_as_in_a_batch(tokenizer, images):
    together = tokenizer.encode(images).latents
    torch.testing.assert_close(torch.cat([tokenizer.encode(x[None]).latents for x in images]), together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.cat([tokenizer.decode(z[None]) for z in together]), tokenizer.decode(together), atol=1e-5, rtol=1e-5)


def test_latent_statistics_normalise_and_are_saved(images):
    tokenizer = small()
    plain = tokenizer.encode(images).latents
    decoded = tokenizer.decode(plain)
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    tokenizer.set_latent_statistics(mean, std)
    normalised = tokenizer.encode(images).latents
    torch.testing.assert_close(normalised, (plain - mean.view(1, 8, 1, 1)) / std.view(1, 8, 1, 1))
    torch.testing.assert_close(tokenizer.decode(normalised), decoded, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="above 0"):
        tokenizer.set_latent_statistics(mean, std * 0)


def test_sampling_draws_from_the_posterior(tokenizer, images):
    def sample(seed):
        return tokenizer.encode(images, sample=True, generator=torch.Generator().manual_seed(seed)).latents

    posterior = tokenizer.encode(images).posterior
    assert torch.equal(sample(3), sample(3)) and not torch.equal(sample(3), sample(4))
    z = torch.stack([(sample(s) - posterior.mean) / posterior.std for s in range(30)])
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_unusable_input_is_refused(tokenizer):
    for bad in (torch.rand(2, 3, 60, 64), torch.rand(3, 64, 64), torch.full((1, 3, 64, 64), float("nan"))):
        with pytest.raises(InputError):
            tokenizer.encode(bad)
    for bad in (torch.rand(2, 5, 8, 8), torch.rand(2, 64, 8), torch.zeros(1, 8, 4, 4, dtype=torch.int64), torch.rand(0, 8, 4, 4)):
        with pytest.raises(InputError, match=r"latents must be float \(B, 8, h, w\)"):
            tokenizer.decode(bad)


def test_outputs_are_float32_under_autocast(tokenizer, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = tokenizer.encode(images)
        decoded = tokenizer.decode(encoding.latents)
    assert {t.dtype for t in (encoding.latents, encoding.posterior.kl(), decoded)} == {torch.float32}
    torch.testing.assert_close(encoding.latents, tokenizer.encode(images).latents, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("latent", ["vq", "fsq"])
def test_discrete_latents_are_codes(latent, images):
    tokenizer = small(latent=latent, quantizer=QuantizerConfig(codebooks=4, size=64, levels=[4, 3]))
    codes = tokenizer.encode(images).codes
    books, size = (4, 16) if latent == "vq" else (1, 12)
    assert codes.shape == (2, books, 8, 8) and codes.dtype == torch.int64 and codes.max() < size and len(codes.unique()) > 1
    quantized = tokenizer.quantize(tokenizer.moments(images)[0])
    torch.testing.assert_close(tokenizer.dequantize(codes), quantized.quantized, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokenizer.decode(codes), tokenizer.reconstruct(images))
    for bad in (codes + size, codes.float(), codes[:, :, 0], torch.cat([codes, codes], dim=1)):
        with pytest.raises(InputError, match="codes must be"):
            tokenizer.decode(bad)
    with pytest.raises(InputError, match="statistics"):
        tokenizer.set_latent_statistics(torch.zeros(8), torch.ones(8))


@pytest.mark.parametrize(("changes", "message"), [
    ({"downsample": 7}, "multiple of"), ({"latent": "rvq"}, "must be one of"), ({"widths": [8, 8]}, "widths must give"),
    ({"latent_blocks": [1, 2]}, "must contain 0"), ({"latent_blocks": [0, 7]}, "different numbers"),
    ({"blocks": 7}, "multiple of 128"), ({"latent_widths": [64]}, "must go up to"),
    ({"attention_depths": [1]}, "a depth for each"), ({"channel_base": 64}, "channels"),
    ({"vfm": replace(SMALL.vfm, scale=0.3)}, "must be whole"), ({"vfm": replace(SMALL.vfm, layers=[0, 9, -1])}, "no layer 9"),
    ({"vfm": VFMConfig(backend="timm", name="vit_smal", layers=[0, 1, 2])}, "nearest"),
    ({"vfm": VFMConfig(config={"model_type": "resnet"}, layers=[0, 1, 2])}, "not known"),
    ({"latent": "vq", "quantizer": QuantizerConfig(codebooks=3)}, "must divide"),
])
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        VFMVAE(replace(SMALL, **changes))


# --- foundation model ---------------------------------------------------------------------------------------------------

def test_the_foundation_model_never_trains(images):
    tokenizer = small().train()
    tokenizer.requires_grad_(True)
    assert not tokenizer.vfm.training and not any(p.requires_grad for p in tokenizer.vfm.parameters())
    tokenizer.vfm.requires_grad_(True)
    assert not any(p.requires_grad for p in tokenizer.vfm.parameters())
    assert all(p.requires_grad for part in (tokenizer.encoder, tokenizer.decoder) for p in part.parameters())
    tokenizer.images(tokenizer.posterior(tokenizer.moments(images)[0]).mean)[0].mean().backward()
    lacking = [name for name, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None]
    assert all("to_image" in name for name in lacking) and tokenizer.encoder.layers[0].blocks[0].proj.weight.grad.any()


def build(name: str) -> VFMConfig:
    """A tiny foundation model of each kind."""
    configs = {
        "siglip": SIGLIP,
        "dinov2": {"model_type": "dinov2", "image_size": 56, "patch_size": 8, "mlp_ratio": 2, **TINY},
        "dinov3": {"model_type": "dinov3_vit", "patch_size": 8, "num_register_tokens": 4, **TINY},
        "mae": {"model_type": "vit_mae", "image_size": 64, "patch_size": 8, "decoder_num_hidden_layers": 1, **TINY},
        "clip": {"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8, **TINY},
    }
    if name in configs:
        return VFMConfig(config=configs[name], scale=1.0, layers=[0, 2, -2, -1])
    return VFMConfig(backend="timm", name={"eva": "eva02_tiny_patch14_224", "vit": "test_vit"}[name], kind="clip", scale=1.0,
                     layers=[0, 2, -2, -1])


@pytest.mark.parametrize("name", ["siglip", "dinov2", "dinov3", "mae", "clip", "vit"])
def test_layers_are_what_their_numbers_say(name):
    torch.manual_seed(0)
    vfm = FoundationModel(build(name))
    side = 4 * vfm.patch
    pixels = torch.rand(2, 3, side, side)
    found = vfm(pixels).layers
    assert [tuple(m.shape) for m in found] == [(2, vfm.widths[0], 4, 4)] * 4 and not found[0].requires_grad
    values = vfm.preprocess(pixels)
    one, output = hidden_layers(vfm.network, values, [1, 2, len(blocks_of(vfm.network)), -1])
    last = getattr(output, "last_hidden_state", output)
    blocks = vfm.network.blocks if name == "vit" else None
    if blocks is not None:      # block 2 on what leaves block 1
        torch.testing.assert_close(blocks[1](one[0]), one[1])
    torch.testing.assert_close(found[1], one[1][:, vfm.prefix :].transpose(1, 2).unflatten(2, (4, 4)))
    torch.testing.assert_close(found[2], one[2][:, vfm.prefix :].transpose(1, 2).unflatten(2, (4, 4)))
    normed = one[3] if vfm.sight.final_norm else one[2]      # of CLIP the tokens before the norm count
    torch.testing.assert_close(found[3], normed[:, vfm.prefix :].transpose(1, 2).unflatten(2, (4, 4)))
    torch.testing.assert_close(last, one[3])
    assert len(vfm.network._forward_hooks) == 0 and all(not m._forward_hooks for m in vfm.network.modules())


def test_the_patches_of_a_masked_autoencoder_are_all_there_in_their_order():
    torch.manual_seed(0)
    vfm = FoundationModel(build("mae"))
    images = torch.rand(1, 3, 64, 64)
    shifted = images.clone()
    shifted[:, :, :8, 56:] = 0      # patch 7
    changed = (vfm(images).layers[0] - vfm(shifted).layers[0]).abs().sum(1).flatten().nonzero().flatten()
    assert changed.tolist() == [7]


def test_images_are_resized_and_normalised_as_each_kind_wants():
    images = torch.rand(1, 3, 32, 32)
    siglip, clip = FoundationModel(replace(SMALL.vfm, scale=2.0)), FoundationModel(replace(build("clip"), scale=0.5))
    wanted = F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False) * 2 - 1
    torch.testing.assert_close(siglip.preprocess(images), wanted)
    smaller = F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(siglip.preprocess(images, 0.5), F.interpolate(smaller, scale_factor=2.0, mode="bilinear") * 2 - 1)
    plain = resize_by(resize_by(images, 0.5, "bilinear", False), 0.5, "bilinear", True)
    torch.testing.assert_close(clip.preprocess(images, 0.5)[0, 0], (plain[0, 0] - 0.48145466) / 0.26862954)


def test_stages_of_a_cnn_are_layers_and_it_starts_from_the_asset(images):
    cfg = replace(SMALL, vfm=VFMConfig(backend="timm", name="tf_efficientnet_lite0", scale=2.0, layers=[2, 3]), widths=[10, 56])
    tokenizer = VFMVAE(cfg).eval()
    assert tokenizer.vfm.widths == [40, 112] and tokenizer.vfm.strides == [4, 8]
    assert tokenizer.encode(images).latents.shape == (2, 8, 8, 8)
    before = tokenizer.encode(images).latents
    try:
        assert "efficientnet" in tokenizer.start_part("vfm", "efficientnet-lite0")
    except WeightsMissing as missing:
        pytest.skip(str(missing))
    assert not torch.equal(tokenizer.encode(images).latents, before)


def test_a_saved_folder_is_whole_and_another_networks_weights_start_it(tmp_path, images):
    from transformers import AutoConfig, AutoModel

    tokenizer = small()
    options = dict(SIGLIP)
    network = AutoModel.from_config(AutoConfig.for_model(**options))
    network.save_pretrained(tmp_path / "siglip")
    assert "siglip" in tokenizer.start_part("vfm", str(tmp_path / "siglip"))
    own = tokenizer.vfm.network.state_dict()
    assert all(torch.equal(own[k], v) for k, v in network.state_dict().items())
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = tokenizers_lab.load(str(tmp_path / "saved"))
    assert loaded.cfg == tokenizer.cfg and torch.equal(loaded.encode(images).latents, tokenizer.encode(images).latents)
    other = AutoModel.from_config(AutoConfig.for_model(**{**options, "intermediate_size": 24}))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError):
        small().start_part("vfm", str(tmp_path / "other"))
    with pytest.raises(WeightsMissing):
        small().start_part("vfm", str(tmp_path / "nowhere"))


# --- parts --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("width", "out", "layers"), [(24, 8, 2), (8, 24, 2), (20, 8, 1), (8, 8, 1)])
def test_an_attention_projection_is_its_definition(width, out, layers):
    torch.manual_seed(0)
    projection = AttnProjection(width, out, layers).double()
    assert len(projection.blocks) == layers and projection(torch.rand(2, 5, width).double()).shape == (2, 5, out)
    attention: ProjectionAttention = projection.blocks[-1 if width > out else 0].attn
    for parameter in attention.parameters():
        parameter.data = torch.randn_like(parameter)
    x = torch.randn(2, 5, width).double()
    heads, inner = max(width, out) // min(width, out), max(width, out)
    bias = torch.cat([attention.q_bias, torch.zeros(inner).double(), attention.v_bias])
    q, k, v = (x @ attention.qkv.weight.T + bias).view(2, 5, 3, heads, -1).unbind(2)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * (inner // heads) ** -0.5).softmax(-1)
    mixed = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    mixed = mixed.mean(2) if width > out else mixed.flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(F.adaptive_avg_pool1d(mixed, out)))


def test_an_attention_projection_needs_heads_that_divide():
    with pytest.raises(ValueError, match="heads"):
        AttnProjection(23, 8)


def test_a_modulated_convolution_normalises_its_weights():
    torch.manual_seed(0)
    conv = ModulatedPointwise(6, 10).double()
    x, style = torch.randn(3, 6, 4, 5).double(), torch.randn(3, 6).double()
    weight = conv.weight[None, :, :, 0, 0] * style[:, None]                               # (B, out, in)
    weight = weight / (weight.square().sum(2, keepdim=True) + 1e-8).sqrt()
    torch.testing.assert_close(conv(x, style), torch.einsum("boc,bchw->bohw", weight, x))


def test_upsampling_keeps_a_flat_map_flat():
    """The blur's taps sum to 1, at the edges too."""
    up = Upsample(8, 4, blur=5)
    up.norm, up.depthwise = torch.nn.Identity(), torch.nn.Identity()
    y = up(torch.ones(1, 8, 3, 3))
    per_channel = y.flatten(2)
    shuffled = F.pixel_shuffle(up.pointwise(torch.ones(1, 8, 3, 3)), 2)
    torch.testing.assert_close(per_channel.mean(), shuffled.mean())
    up.blur = 0
    torch.testing.assert_close(up(torch.ones(1, 8, 3, 3)), shuffled)


def test_half_of_the_decoder_trains_alone():
    """Group norms with weights that train on maps that do not, channels last in memory, crash in torch's CPU kernel."""
    tokenizer = small().train().requires_grad_(False)
    parts = [tokenizer.get_submodule(f"decoder.synthesis.{p}") for p in ("blocks.3", "blocks.4", "branches.3")]
    for part in parts:
        part.requires_grad_(True)
    tokenizer.images(torch.randn(2, 8, 8, 8))[0].square().mean().backward()
    assert parts[1].upsample_sum.norm.weight.grad.any() and parts[2].norm.weight.grad.any()
    assert tokenizer.encoder.fuse.blocks[0].proj.weight.grad is None


def test_the_mapping_network_starts_at_unit_scale_and_follows_its_codes():
    torch.manual_seed(0)
    linear = EqualisedLinear(400, 300, rate=0.01)
    assert linear.weight.std().item() == pytest.approx(100, rel=0.02)
    assert linear(torch.randn(200, 400)).std().item() == pytest.approx(1, rel=0.05)
    mapping = MappingNetwork(16, 8)
    x = torch.randn(4, 16)
    torch.testing.assert_close(mapping.eval()(x), mapping(5 * x))
    assert not mapping.average.any()
    code = mapping.train()(x)
    torch.testing.assert_close(mapping.average, 0.005 * code.mean(0))


def test_local_batch_norm_shares_statistics_in_groups_of_eight():
    norm = LocalBatchNorm(3)
    x = torch.randn(16, 3, 7)
    wanted = torch.cat([F.batch_norm(part, None, None, training=True) for part in x.split(8)])
    torch.testing.assert_close(norm(x), wanted)
    torch.testing.assert_close(norm(x[:9]), torch.cat([F.batch_norm(p, None, None, training=True) for p in x[:9].split(3)]))


def test_grouped_codes_are_the_nearest_directions():
    torch.manual_seed(0)
    quantizer = GroupedVQ(8, 4, 32)
    x = torch.randn(2, 8, 5, requires_grad=True)
    result = quantizer(x, entropy=True)
    rows = F.normalize(quantizer.weight, dim=-1)
    split = F.normalize(x.view(2, 4, 2, 5), dim=2)
    assert torch.equal(result.codes, torch.einsum("bkdt,ksd->bkst", split, rows).argmax(2))
    best = torch.stack([rows[k][result.codes[:, k]] for k in range(4)], dim=1).transpose(2, 3)         # (B, K, d, T)
    torch.testing.assert_close(result.quantized, best.flatten(1, 2))
    torch.testing.assert_close(result.losses["quantizer"], 1.25 * (split - best).square().mean())
    assert torch.equal(quantizer.encode(x), result.codes)
    torch.testing.assert_close(quantizer.decode(result.codes), best.flatten(1, 2))
    result.losses["entropy"].backward()
    assert x.grad.any() and quantizer.weight.grad.any()


# --- official weights ---------------------------------------------------------------------------------------------------

def manifest():
    told = json.loads((SET / "official_full_manifest.json").read_text())
    items = told["tensors"].items() if isinstance(told["tensors"], dict) else [tuple(t) for t in told["tensors"]]
    return {name: torch.empty(shape, device="meta") for name, shape in items}, told["release_config"]


def parity_weights():
    vfm = {VFM_NETWORK + k: v for k, v in read_weights(SET / "vfm.safetensors").items()}
    return read_weights(SET / "weights.safetensors") | vfm, json.loads((SET / "config.json").read_text())


def test_every_tensor_of_the_release_is_ours_and_back():
    state, released = manifest()
    assert len(state) == 782
    ours = from_official(state, released, fetch=False)
    assert ours.model == model_config(RELEASED) and not ours.heads
    back = to_official(ours.tokenizer, ours.model)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    with torch.device("meta"):
        whole = VFMVAE(ours.model).state_dict()
    assert whole.keys() - ours.tokenizer.keys() == {k for k in whole if k.startswith("vfm.")}


def test_the_parity_weights_go_there_and_back_with_both_nestings_of_the_foundation_model():
    state, config = parity_weights()
    ours = from_official(state, config)
    back = to_official(ours.tokenizer, ours.model, ours.heads)
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())
    nested = {k.replace(VFM_NETWORK, VFM_NETWORK + "vision_model."): v for k, v in state.items()}
    again = from_official({"G_ema": nested}, config)
    assert all(torch.equal(again.tokenizer[k], v) for k, v in ours.tokenizer.items())


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("mapping.x_avg"), "misses mapping.x_avg"),
    (lambda s: s.update(extra=torch.zeros(1)), "left over extra"),
    (lambda s: s.update({"mapping.x_avg": torch.zeros(3)}), "another shape mapping.x_avg"),
    (lambda s: s.pop(VFM_NETWORK + "post_layernorm.bias"), "misses vfm_encoder"),
    (lambda s: s.pop(HEAD), "use_vf_loss"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(change, message):
    state, config = parity_weights()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        from_official(state, config)


def test_networks_that_were_not_released_are_refused():
    for name, value in (("conditional", True), ("use_convnext", False), ("use_cross_attn", True)):
        with pytest.raises(ConfigError, match=name):
            model_config(RELEASED | {name: value})
    with pytest.raises(ConfigError, match="describe it under 'vfm'"):
        model_config(RELEASED | {"vfm_name": "facebook/dinov2-large"})
    with pytest.raises(ConfigError, match="patch_in_dimensions"):
        model_config(RELEASED | {"patch_in_dimensions": [768] * 3})
    with pytest.raises(ConfigError, match="lack"):
        model_config({k: v for k, v in RELEASED.items() if k != "num_blocks"})


def test_other_options_have_their_official_names():
    options = RELEASED | {"compression_mode": "discrete", "vocab_size": 1024, "vocab_width": 64, "how_to_compress": "conv",
                          "how_to_decompress": "conv", "legacy": False, "use_gaussian_blur": False, "use_self_attn": False,
                          "vfm_name": "siglip2-base-patch16-512", "patch_in_dimensions": [768] * 3}
    model = model_config(options)
    with torch.device("meta"):
        ours = {k: v for k, v in VFMVAE(model).state_dict().items() if not k.startswith(("vfm", "latent"))}
    shapes = official_shapes(ours, model)
    assert shapes["ldm_adapter.patch_quants.1.0.weight"] == (64, 768, 1, 1)
    assert shapes["ldm_adapter.post_quant.weight"] == (1024, 64, 1, 1)
    assert shapes["ldm_adapter.quantizer.codebooks.7.codebook.weight"] == (128, 8)
    assert shapes["ldm_adapter.quantizer.codebooks.7.vocab_usage"] == (128,)
    assert not any("noise" in k or "blur" in k or "self_attns" in k for k in shapes)


def test_conversion_by_the_hub(tmp_path, images):
    state, config = parity_weights()
    torch.save({"G_ema": state}, tmp_path / OFFICIAL["files"][0])
    converted = convert_official("vfm_vae", tmp_path / OFFICIAL["files"][0], config)
    assert set(converted.heads) == {"vf.weight"} and "research" in converted.tokenizer.provenance["licence"]
    assert converted.tokenizer.reconstruct(images).shape == images.shape
