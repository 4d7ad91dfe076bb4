"""The RecTok tokenizer and its conversion; its losses are in test_rectok_objective.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tokenizers_lab.errors import CheckpointError, ConfigError, InputError
from tokenizers_lab.models.rectok.config import ModelConfig, ViTConfig
from tokenizers_lab.models.rectok.convert import OFFICIAL, from_official, official_name, to_official
from tokenizers_lab.models.rectok.model import RecTok
from tokenizers_lab.network import read_weights
from tokenizers_lab.nn.masking import gather_tokens, random_mask
from tokenizers_lab.nn.patch import depth_to_space, resize_positions
from tokenizers_lab.nn.rope import axial_table
from tokenizers_lab.nn.transformer import set_activation_checkpointing, swiglu_hidden
from tokenizers_lab.quantizers.gaussian import DiagonalGaussian

SETS = Path(__file__).parent.parent / "parity"
SMALL = ModelConfig(image_size=32, patch=8, latent_channels=6, encoder=ViTConfig(32, 2, 4), decoder=ViTConfig(48, 2, 4))


def small(**changes):
    torch.manual_seed(0)
    tokenizer = RecTok(replace(SMALL, **changes)).eval()
    with torch.no_grad():      # away from the initialisation, where every output is about 0.5
        for parameter in tokenizer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- tokenizer ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(32, 32), (64, 64), (16, 40), (8, 8)])
def test_any_multiple_of_the_patch_works(tokenizer, size):
    images = torch.rand(2, 3, *size)
    encoding = tokenizer.encode(images)
    assert encoding.latents.shape == (2, 6, size[0] // 8, size[1] // 8)
    assert encoding.posterior.mean.shape == encoding.posterior.std.shape == encoding.latents.shape
    decoded = tokenizer.decode(encoding.latents)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    assert torch.equal(tokenizer.reconstruct(images), decoded)


def test_an_image_alone_is_as_in_a_batch(tokenizer, images):
    together = tokenizer.encode(images).latents
    alone = torch.cat([tokenizer.encode(image[None]).latents for image in images])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_latent_statistics_normalise_and_are_saved(images):
    tokenizer = small()
    plain = tokenizer.encode(images).latents
    decoded = tokenizer.decode(plain)
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    tokenizer.set_latent_statistics(mean, std)
    normalised = tokenizer.encode(images).latents
    torch.testing.assert_close(normalised, (plain - mean.view(1, 6, 1, 1)) / std.view(1, 6, 1, 1))
    torch.testing.assert_close(tokenizer.decode(normalised), decoded, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokenizer.state_dict()["latent_std"], std)
    with pytest.raises(InputError, match="above 0"):
        tokenizer.set_latent_statistics(mean, std * 0)


def test_sampling_draws_from_the_posterior(tokenizer, images):
    def sample(seed):
        return tokenizer.encode(images, sample=True, generator=torch.Generator().manual_seed(seed)).latents

    posterior = tokenizer.encode(images).posterior
    assert torch.equal(sample(3), sample(3)) and not torch.equal(sample(3), sample(4))
    z = torch.stack([(sample(s) - posterior.mean) / posterior.std for s in range(200)])
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


@pytest.mark.parametrize("bad", [
    torch.rand(2, 3, 30, 32), torch.rand(3, 32, 32), torch.rand(2, 1, 32, 32), torch.rand(2, 3, 32, 32) * 2,
    torch.full((1, 3, 32, 32), float("nan")), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.rand(0, 3, 32, 32),
])
def test_unusable_images_are_refused(tokenizer, bad):
    with pytest.raises(InputError):
        tokenizer.encode(bad)


def test_unusable_latents_are_refused(tokenizer):
    for bad in (torch.rand(2, 5, 4, 4), torch.rand(2, 16, 6), torch.zeros(1, 6, 4, 4, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"latents must be float \(B, 6, h, w\)"):
            tokenizer.decode(bad)


def test_posterior_and_images_are_float32_under_autocast(tokenizer, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = tokenizer.encode(images)
        assert tokenizer.encoder(images).dtype == torch.bfloat16
        decoded = tokenizer.decode(encoding.latents)
    tensors = (encoding.latents, encoding.posterior.logvar, encoding.posterior.kl(), decoded)
    assert {t.dtype for t in tensors} == {torch.float32}
    torch.testing.assert_close(encoding.latents, tokenizer.encode(images).latents, atol=0.1, rtol=0.1)


def test_a_bfloat16_copy_works(images):
    tokenizer = small().to(torch.bfloat16)
    assert tokenizer.reconstruct(images).shape == images.shape


def test_a_plain_autoencoder_has_a_point_for_a_posterior(images):
    tokenizer = small(variational=False)
    encoding = tokenizer.encode(images, sample=True)
    assert torch.equal(encoding.latents, tokenizer.encode(images).latents)
    assert encoding.posterior.kl().tolist() == [0, 0] and not encoding.posterior.std.any()


def test_logvar_bias_is_the_initial_log_variance(images):
    torch.manual_seed(0)
    posterior = RecTok(replace(SMALL, logvar_bias=-5.0)).encode(images).posterior
    assert abs(posterior.logvar.mean() + 5) < 0.1 and abs(posterior.mean.mean()) < 0.1


@pytest.mark.parametrize("changes", [
    {"patch": 7}, {"latent_channels": 0}, {"encoder": ViTConfig(30, 2, 4)}, {"decoder": ViTConfig(32, 2, 5)},
])
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ConfigError):
        RecTok(replace(SMALL, **changes))


def test_activation_checkpointing_changes_no_gradient(images):
    gradients = []
    for on in (False, True):
        tokenizer = small().train()
        assert set_activation_checkpointing(tokenizer, on) == 2
        tokenizer.decoder(tokenizer.encoder(images)[..., :6], (4, 4)).square().mean().backward()
        gradients.append([p.grad for p in tokenizer.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40 and all(torch.equal(a, b) for a, b in zip(*gradients))


# --- its parts ----------------------------------------------------------------------------------------------------------

def test_a_mask_parts_the_tokens_and_is_undone():
    noise = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    for ratio, visible in ((0.0, 20), (0.26, 15), (0.4, 12), (0.99, 1)):
        mask = random_mask(noise, ratio)
        assert mask.keep.shape == (3, visible) and mask.masked.shape == (3, 20 - visible)
        order = torch.cat([mask.keep, mask.masked], 1)
        assert torch.equal(order.sort(1).values, torch.arange(20).expand(3, -1))
        assert torch.equal(order.gather(1, mask.restore), torch.arange(20).expand(3, -1))
    hidden = noise.gather(1, random_mask(noise, 0.5).masked).min(1).values
    assert (hidden > noise.gather(1, random_mask(noise, 0.5).keep).max(1).values).all()


def test_a_mask_that_hides_nothing_only_shuffles(tokenizer, images):
    mask = random_mask(torch.rand(2, 16), 0.0)
    shuffled, ordered = tokenizer.encoder(images, mask), tokenizer.encoder(images)
    torch.testing.assert_close(shuffled, gather_tokens(ordered, mask.keep), atol=1e-5, rtol=1e-5)
    a = tokenizer.decoder(shuffled[..., :6], (4, 4), mask)
    torch.testing.assert_close(a, tokenizer.decoder(ordered[..., :6], (4, 4)), atol=1e-5, rtol=1e-5)


def test_hidden_patches_cannot_be_seen(tokenizer, images):
    mask = random_mask(torch.arange(16.0).expand(2, -1), 0.5)      # the lower half of the image is hidden
    changed = images.clone()
    changed[:, :, 16:] = 0
    assert torch.equal(tokenizer.encoder(changed, mask), tokenizer.encoder(images, mask))
    assert not torch.equal(tokenizer.encoder(changed), tokenizer.encoder(images))


def test_kl_and_samples_agree_with_torch_distributions():
    torch.manual_seed(0)
    posterior = DiagonalGaussian.from_moments(torch.randn(3, 5, 8))
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
    torch.testing.assert_close(posterior.kl(), expected)
    assert DiagonalGaussian.from_moments(torch.full((1, 1, 2), 1e4)).logvar.item() == 20
    assert DiagonalGaussian.from_moments(torch.full((1, 1, 2), -1e4)).logvar.item() == -30
    noise = torch.randn(3, 5, 4)
    torch.testing.assert_close(posterior.sample(noise), normal.mean + normal.stddev * noise)


def test_depth_to_space_puts_colour_last():
    tokens = torch.arange(2 * 12.0).view(1, 2, 12)      # two tokens side by side, 2 × 2 pixels of 3 colours
    image = depth_to_space(tokens, 1, 2, 2)
    assert image.shape == (1, 3, 2, 4)
    assert image[0, :, 1, 0].tolist() == [6, 7, 8]       # second row, first column of the first token
    assert image[0, :, 0, 3].tolist() == [15, 16, 17]    # first row, second column of the second token


def test_positions_are_kept_at_home_and_resized_elsewhere():
    positions = torch.randn(1, 16, 5)
    assert resize_positions(positions, 4, 4) is positions
    ramp = torch.linspace(0, 1, 4).view(4, 1).expand(4, 4).reshape(1, 16, 1)
    resized = resize_positions(ramp, 8, 2).view(8, 2)
    assert resize_positions(positions, 2, 8).shape == (1, 16, 5)
    assert (resized.diff(dim=0) > 0).all() and torch.allclose(resized[:, 0], resized[:, 1])


def test_rotary_table_of_one_row_and_of_bad_widths():
    assert axial_table(8, 1, 1).tolist() == [[1.0] * 8 + [0.0] * 8]
    assert axial_table(4, 2, 3).shape == (6, 8)
    with pytest.raises(ValueError, match="multiple of 4"):
        axial_table(6, 2, 2)
    with torch.inference_mode():
        axial_table(12, 5, 5)
    assert not axial_table(12, 5, 5).is_inference()


def test_hidden_sizes_are_those_of_released_weights():
    assert [swiglu_hidden(w) for w in (768, 192, 40)] == [2048, 512, 106]


# --- official weights ---------------------------------------------------------------------------------------------------

def manifest():
    return json.loads((SETS / "rectok" / "official_full_manifest.json").read_text())["tensors"]


def official_weights():
    return read_weights(SETS / "rectok" / "weights.safetensors"), json.loads((SETS / "rectok" / "config.json").read_text())


def test_the_official_key_tree_is_covered_both_ways():
    state = {name: torch.empty(shape, device="meta") for name, shape in manifest().items()}
    converted = from_official(state)
    assert converted.model == ModelConfig() and converted.semantic.widths == {"dinov3": 1024}
    back = to_official(converted.tokenizer, converted.heads)
    assert {k: list(v.shape) for k, v in back.items()} == manifest()
    with torch.device("meta"):
        own = RecTok(converted.model).state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in converted.tokenizer.items()}


@pytest.mark.parametrize("folder", ["rectok", "rectok-options", "rectok-plain"])
def test_conversion_there_and_back_keeps_every_number(folder):
    state = read_weights(SETS / folder / "weights.safetensors")
    converted = from_official(state, json.loads((SETS / folder / "config.json").read_text()))
    back = to_official(converted.tokenizer, converted.heads)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    ours = [*converted.tokenizer, *converted.heads]
    assert len({official_name(k) for k in ours}) == len(ours)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda s: s.pop("encoder.ln_pre.weight"), "misses encoder.ln_pre.weight"),
    (lambda s: s.pop("decoder.transformer.1.mlp.w3.bias"), "misses decoder.transformer.1.mlp.w3.bias"),
    (lambda s: [s.pop(k) for k in list(s) if "encoder.transformer.1." in k], "misses encoder.transformer.1.attn.proj.bias and 9"),
    (lambda s: s.pop("sem_decoders.dinov3.mask_embedding"), "misses sem_decoders.dinov3.mask_embedding"),
    (lambda s: s.update({"encoder.extra": torch.zeros(1)}), "left over encoder.extra"),
    (lambda s: s.update({"decoder.conv_out.bias": torch.zeros(4)}), "another shape decoder.conv_out.bias"),
    (lambda s: s.update({"encoder.positional_embedding": torch.zeros(1, 15, 48)}), "another shape encoder.positional_embedding"),
    (lambda s: s.update({"encoder.sem_cls_token_embedding": torch.zeros(1, 1, 48)}), "class token"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(damage, message):
    state, config = official_weights()
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        from_official(state, config)


def test_whole_checkpoints_teachers_and_finetuned_decoders_are_understood():
    state, config = official_weights()
    averaged = {k: v + 1 for k, v in state.items()}
    teacher = {"sem_foundation_models.dinov3.layer.0.norm.weight": torch.zeros(3)}
    converted = from_official({"model": state, "model_ema": {**averaged, **teacher}, "epoch": 7, "optimizer": {}}, config)
    assert torch.equal(converted.tokenizer["encoder.head.bias"], averaged["encoder.latent_head.bias"])
    assert converted.skipped == list(teacher)
    assert torch.equal(from_official({"model": state}, config).tokenizer["encoder.head.bias"], state["encoder.latent_head.bias"])
    finetuned = from_official({k: v for k, v in state.items() if not k.startswith("sem_")}, config)
    assert finetuned.heads == {} and finetuned.semantic.widths == {}
    old = {k.replace("sem_", "aux_"): v for k, v in state.items()}
    assert from_official(old, config).heads.keys() == converted.heads.keys()
    with pytest.raises(CheckpointError, match="no RecTok checkpoint"):
        from_official({"epoch": 3})


def test_sizes_outside_the_authors_table_need_their_config():
    state, _ = official_weights()
    with pytest.raises(ConfigError, match="encoder is 48 wide"):
        from_official(state)


def test_the_release_is_named():
    assert OFFICIAL["hub_id"] == "QingyuShi/RecTok" and OFFICIAL["files"] == ["RecTok.pth", "RecTok_decft.pth"]
