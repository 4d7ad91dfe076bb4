"""VTP's network and its conversion; its losses are in test_vtp_objective.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tokenizers_lab import parity
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError
from tokenizers_lab.models.vtp.config import RELEASED_ROTARY, ModelConfig, TextEncoderConfig
from tokenizers_lab.models.vtp.convert import OFFICIAL, from_official, to_official
from tokenizers_lab.models.vtp.model import VTP
from tokenizers_lab.network import read_weights
from tokenizers_lab.nn import dinov3_vit
from tokenizers_lab.nn.dinov3_vit import BlocksConfig, RotaryConfig, add_branch, ffn_hidden
from tokenizers_lab.nn.rope import apply_by_halves, centred_table
from tokenizers_lab.nn.transformer import set_activation_checkpointing
from tokenizers_lab.self_distillation import kept_samples
from tokenizers_lab.text import TextConfig

SET = Path(__file__).parent.parent / "parity" / "vtp"
TEXT = TextEncoderConfig(24, 2, 3, text=TextConfig(context=10))      # bytes; the padding id ends a text
SMALL = ModelConfig(image_size=32, patch=8, latent_channels=6, trunk=BlocksConfig(48, 2, 4),
                    decoder=BlocksConfig(48, 2, 4, norm="layer_norm"), text=TEXT)


def small(**changes):
    torch.manual_seed(0)
    tokenizer = VTP(replace(SMALL, **changes)).eval()
    with torch.no_grad():      # away from the initialisation
        for parameter in tokenizer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- tokenizer ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(32, 32), (64, 64), (16, 40), (8, 8)])
def test_any_multiple_of_the_patch_works(tokenizer, size):
    images = torch.rand(2, 3, *size)
    latents = tokenizer.encode(images).latents
    assert latents.shape == (2, 6, size[0] // 8, size[1] // 8)
    decoded = tokenizer.decode(latents)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    assert torch.equal(tokenizer.reconstruct(images), decoded)


def test_an_image_alone_is_as_in_a_batch(tokenizer, images):
    together = tokenizer.encode(images).latents
    alone = torch.cat([tokenizer.encode(image[None]).latents for image in images])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_latent_statistics_normalise(images):
    tokenizer = small()
    plain = tokenizer.encode(images).latents
    decoded = tokenizer.decode(plain)
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    tokenizer.set_latent_statistics(mean, std)
    normalised = tokenizer.encode(images).latents
    torch.testing.assert_close(normalised, (plain - mean.view(1, 6, 1, 1)) / std.view(1, 6, 1, 1))
    torch.testing.assert_close(tokenizer.decode(normalised), decoded, atol=1e-5, rtol=1e-5)
    for wrong in (std * 0, std[:3], std * float("nan")):
        with pytest.raises(InputError, match="above 0"):
            tokenizer.set_latent_statistics(mean, wrong)


def test_unusable_input_is_refused(tokenizer, images):
    for bad in (images[:, :2], images + 1, images[..., :30], images[0]):
        for use in (tokenizer.encode, tokenizer.features, tokenizer.image_embedding):
            with pytest.raises(InputError):
                use(bad)
    for bad in (torch.rand(2, 5, 4, 4), torch.rand(2, 16, 6), torch.zeros(1, 6, 4, 4, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"latents must be float \(B, 6, h, w\)"):
            tokenizer.decode(bad)


def test_pixel_shuffle_puts_colour_slowest():
    tokenizer = small()
    with torch.no_grad():
        tokenizer.decoder.pixels.weight.zero_()
        tokenizer.decoder.pixels.bias.copy_(torch.arange(192.0))
        pixels = tokenizer.decoder(torch.zeros(1, 4, 6), (2, 2))
    assert pixels[0, :, 9, 10].tolist() == [8 + 2, 64 + 10, 128 + 10]      # second row, third column of the last patch


def test_half_precision_keeps_latents_and_images_float32(tokenizer, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = tokenizer.encode(images)
        decoded, embedded = tokenizer.decode(encoding.latents), tokenizer.trunk.tokens(images)
    assert {t.dtype for t in (encoding.latents, decoded, embedded)} == {torch.float32}
    torch.testing.assert_close(encoding.latents, tokenizer.encode(images).latents, atol=0.2, rtol=0.2)
    whole = small().to(torch.bfloat16)
    assert whole.reconstruct(images).dtype == torch.float32 and whole.image_embedding(images).isfinite().all()


@pytest.mark.parametrize("changes", [
    {"patch": 7}, {"latent_channels": 0}, {"trunk": BlocksConfig(30, 2, 4)}, {"decoder": BlocksConfig(32, 2, 4, norm="batch")},
    {"trunk": BlocksConfig(32, 2, 4, rotary=RotaryConfig("float16"))}, {"image_feature": "mean"}, {"temperature": 0.0},
    {"text": replace(TEXT, heads=5)}, {"text": replace(TEXT, text=TextConfig())},
    {"text": replace(TEXT, text=TextConfig("clip", vocabulary=257, context=10))},
])
def test_options_that_do_not_fit_are_refused(changes):
    with pytest.raises(ConfigError):
        VTP(replace(SMALL, **changes))


# --- features, texts ----------------------------------------------------------------------------------------------------

def test_features_are_normed_tokens_before_the_bottleneck(tokenizer, images):
    first, last, again = tokenizer.features(images, (0, -1, 1))
    assert torch.equal(last.patch_tokens, again.patch_tokens) and not torch.equal(first.patch_tokens, last.patch_tokens)
    assert last.class_token.shape == (3, 48) and last.patch_tokens.shape == (3, 16, 48)
    latents = tokenizer.encode(images).latents.flatten(2).transpose(1, 2)
    torch.testing.assert_close(last.patch_tokens @ tokenizer.trunk.bottleneck.weight.T, latents)
    state = tokenizer.trunk.tokens(tokenizer.normalise(images))
    by_hand = tokenizer.trunk.norm(tokenizer.trunk.blocks[0](state, tokenizer.trunk.table(4, 4)))
    torch.testing.assert_close(first.patch_tokens, by_hand[:, 1:])
    for wrong in (2, -3):
        with pytest.raises(InputError, match=f"0 to 1, but {wrong}"):
            tokenizer.features(images, (0, wrong))


def test_images_and_texts_meet_on_the_unit_sphere(tokenizer, images):
    texts = tokenizer.text_embedding(["a cat", "a dog", "a very long text"])
    pictures = tokenizer.image_embedding(images)
    for found in (texts, pictures):
        assert found.shape == (3, 24)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    logits = tokenizer.contrast(pictures, texts)
    torch.testing.assert_close(logits, tokenizer.contrast.logit_scale.exp() * pictures @ texts.T)
    assert VTP(SMALL).contrast.logit_scale.item() == pytest.approx(2.6592600)


def test_a_text_is_read_up_to_its_end(tokenizer):
    ids = tokenizer.text_ids(["ab", "abcdefghijkl", None])
    assert ids.tolist() == [[97, 98] + [256] * 8, [*range(97, 106), 256], [256] * 10]
    changed = ids.clone()
    changed[0, 3:] = 7                                     # behind the first end
    torch.testing.assert_close(tokenizer.embed_texts(changed)[0], tokenizer.embed_texts(ids)[0])
    torch.testing.assert_close(tokenizer.embed_texts(ids[:1, :3])[0], tokenizer.embed_texts(ids)[0], atol=1e-5, rtol=1e-5)
    changed[0, 0] = 99
    assert not torch.allclose(tokenizer.embed_texts(changed)[0], tokenizer.embed_texts(ids)[0], atol=1e-3)


def test_without_texts_there_is_no_text_encoder(images):
    tokenizer = small(text=None)
    assert not [k for k in tokenizer.state_dict() if k.startswith(("text", "contrast"))]
    assert tokenizer.reconstruct(images).shape == images.shape and len(tokenizer.features(images)) == 1
    for use in (lambda: tokenizer.image_embedding(images), lambda: tokenizer.text_embedding(["a"])):
        with pytest.raises(ConfigError, match="no text encoder"):
            use()


def test_the_bottleneck_may_serve_all_branches_and_the_class_token_need_not_speak(images):
    narrow = small(bottleneck_ae_only=False)
    assert narrow.contrast.projection.weight.shape == (24, 6)
    found = narrow.trunk.semantic(narrow.normalise(images))
    torch.testing.assert_close(found.patch_tokens.flatten(1), narrow.encode(images).latents.flatten(2).transpose(1, 2).flatten(1))
    pooled = small(image_feature="pooled")
    expected = pooled.contrast.projection(pooled.features(images)[0].patch_tokens.mean(1))
    torch.testing.assert_close(pooled.image_embedding(images), F.normalize(expected, dim=-1))


# --- rotary positions, masks, stochastic depth --------------------------------------------------------------------------

def test_the_rotary_table_follows_its_formula():
    cos, sin = centred_table(12, 3, 2, prefix=1).double().chunk(2, dim=-1)
    assert cos[0].tolist() == [1] * 12 and sin[0].tolist() == [0] * 12
    periods = 100.0 ** (torch.arange(3, dtype=torch.float64) / 3)
    for token, (row, col) in enumerate([(-2 / 3, -0.5), (-2 / 3, 0.5), (0, -0.5), (0, 0.5), (2 / 3, -0.5), (2 / 3, 0.5)]):
        angles = 2 * torch.pi * torch.cat([row / periods, col / periods]).repeat(2)
        torch.testing.assert_close(cos[token + 1], angles.cos(), atol=2e-6, rtol=0)
        torch.testing.assert_close(sin[token + 1], angles.sin(), atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match="multiple of 4"):
        centred_table(6, 2, 2)


def test_turning_keeps_lengths_and_only_relative_places_count():
    table = centred_table(8, 4, 4)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turned_q, turned_k = (apply_by_halves(t.expand(1, 1, 16, 8), table)[0, 0] for t in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(16))
    products = (turned_q @ turned_k.T).view(4, 4, 4, 4)                    # by row, column of both
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3], atol=1e-5, rtol=0)
    assert (products[0, 0, 1, 2] - products[0, 0, 2, 2]).abs() > 1e-3


def test_precision_of_the_rotary_table_reaches_the_class_token_too(images):
    exact, rounded = small(), small(trunk=replace(SMALL.trunk, rotary=RELEASED_ROTARY))
    assert [t.trunk.table(4, 4).dtype for t in (exact, rounded)] == [torch.float32, torch.bfloat16]
    mixed = small(trunk=replace(SMALL.trunk, rotary=RotaryConfig("float32", "bfloat16"))).trunk.table(4, 4)
    assert mixed.dtype == torch.float32 and 1e-4 < (mixed - exact.trunk.table(4, 4)).abs().max() < 0.05
    a, b = (t.features(images)[0].patch_tokens for t in (exact, rounded))
    assert 1e-5 < (a - b).abs().max() < 0.05
    q = torch.randn(1, 1, 17, 12)
    turned = apply_by_halves(q.bfloat16(), rounded.trunk.table(4, 4))
    assert torch.equal(turned[:, :, 0], q[:, :, 0].bfloat16())      # the class token is rounded, not turned


def test_what_is_masked_cannot_be_seen(tokenizer, images):
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 8:] = True                                    # the lower half
    changed = images.clone()
    changed[:, :, 16:] = 0
    assert torch.equal(tokenizer.trunk(changed, mask).class_token, tokenizer.trunk(images, mask).class_token)
    assert not torch.equal(tokenizer.trunk(changed).class_token, tokenizer.trunk(images).class_token)
    assert not torch.equal(tokenizer.trunk(images, mask).class_token, tokenizer.trunk(images).class_token)


def test_every_parameter_of_the_trunk_has_a_gradient_without_a_mask(images):
    tokenizer = small()
    tokenizer.trunk.latents(images).square().mean().backward()
    assert [k for k, p in tokenizer.trunk.named_parameters() if p.grad is None] == []


def test_stochastic_depth_runs_on_chosen_samples_only(tokenizer, images):
    trunk = tokenizer.trunk
    kept = torch.tensor([[[1], [1]], [[1], [1]]])         # (depth, 2, 1)
    found = trunk(images, None, kept)
    untouched = trunk.norm(trunk.tokens(images))[:, 0]
    torch.testing.assert_close(found.class_token[[0, 2]], untouched[[0, 2]])
    assert not torch.allclose(found.class_token[1], untouched[1], atol=1e-2)
    everyone = torch.stack([torch.randperm(3) for _ in range(4)]).view(2, 2, 3)
    torch.testing.assert_close(trunk(images, None, everyone).patch_tokens, trunk(images).patch_tokens, atol=1e-5, rtol=1e-5)


def test_stochastic_depth_is_right_on_average():
    x = torch.randn(4, 5, 3)
    choices = [torch.tensor(pair) for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    mean = torch.stack([add_branch(x, torch.sin, kept) for kept in choices]).mean(0)
    torch.testing.assert_close(mean, x + x.sin())


def test_the_choice_of_samples_is_drawn_by_purpose():
    draw = Draw(0, step=3)
    kept = kept_samples(draw, "drop/ssl", 12, 10, 0.3)
    assert kept.shape == (12, 2, 7) and torch.equal(kept, kept_samples(Draw(0, step=3), "drop/ssl", 12, 10, 0.3))
    assert all(len(set(row.tolist())) == 7 for row in kept.flatten(0, 1))
    assert len({tuple(row.tolist()) for row in kept.flatten(0, 1)}) == 24
    assert not torch.equal(kept, kept_samples(draw, "drop/rec", 12, 10, 0.3))
    assert kept_samples(draw, "a", 2, 10, 0.0) is None and kept_samples(draw, "a", 2, 1, 0.9).shape == (2, 2, 1)


def test_activation_checkpointing_changes_no_gradient(images):
    gradients = []
    for on in (False, True):
        tokenizer = small().train()
        assert set_activation_checkpointing(tokenizer, on) == 3
        latents = tokenizer.trunk.latents(images, torch.tensor([[[0, 2], [1, 2]]] * 2))
        pictures, texts = tokenizer.decoder(latents, (4, 4)), tokenizer.embed_texts(tokenizer.text_ids(["a", "bc"]))
        (pictures.square().mean() + texts.square().mean()).backward()
        gradients.append([p.grad for p in tokenizer.parameters() if p.grad is not None])
    assert len(gradients[0]) > 70 and all(torch.equal(a, b) for a, b in zip(*gradients))


def test_hidden_sizes_are_those_of_released_weights():
    assert [ffn_hidden(BlocksConfig(w)) for w in (1024, 768, 384, 40)] == [2736, 2048, 1024, 112]
    assert ffn_hidden(BlocksConfig(40, ffn="mlp")) == 160


# --- official weights ---------------------------------------------------------------------------------------------------

def manifest():
    return json.loads((SET / "official_full_manifest.json").read_text())


@pytest.mark.parametrize(("variant", "keys", "size"), [
    ("Large", 789, (1024, 24, 16)), ("Base", 477, (768, 12, 12)), ("Small", 477, (384, 12, 6)),
])
def test_the_official_key_tree_is_covered_both_ways(variant, keys, size):
    whole = manifest()
    shapes = whole["tensors"] if variant == "Large" else whole["other_variants"][f"VTP-{variant}-f16d64"]
    converted = from_official({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    back = to_official(converted.tokenizer, converted.model)
    assert len(back) == keys and {k: list(v.shape) for k, v in back.items()} == shapes
    trunk, decoder = converted.model.trunk, converted.model.decoder
    assert (trunk.width, trunk.depth, trunk.heads) == (decoder.width, decoder.depth, decoder.heads) == size
    assert trunk.rotary == decoder.rotary == RELEASED_ROTARY and converted.heads == {} and converted.skipped == []
    if variant == "Large":
        parts = {"trunk": replace(trunk, rotary=RotaryConfig()), "decoder": replace(decoder, rotary=RotaryConfig())}
        assert replace(converted.model, **parts) == ModelConfig()      # the default is the released model


def official_weights():
    return read_weights(SET / "weights.safetensors"), json.loads((SET / "config.json").read_text())


def test_conversion_there_and_back_keeps_every_number():
    state, config = official_weights()
    converted = from_official(state, config)
    back = to_official(converted.tokenizer, converted.model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)


OPTIONS = {
    "plain": {},
    "kinds": {"trunk": BlocksConfig(48, 2, 4, ffn="mlp", norm="layer_norm"), "decoder": BlocksConfig(48, 2, 4, norm="rms_norm")},
    "extras": {"trunk": BlocksConfig(48, 2, 4, qk_norm=True, layer_scale=1e-5), "decoder": BlocksConfig(48, 3, 2, qk_norm=True)},
    "all": {"bottleneck_ae_only": False},
    "wide": {"latent_channels": 48},
    "bias": {"text": replace(TEXT, projection_bias=True), "logit_bias": 0.0, "nonscalar_logit_scale": True},
    "silent": {"text": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_other_options_are_seen_in_the_weights(options):
    tokenizer = small(**options)
    cfg, size = tokenizer.cfg, {}
    for name, part in (("vision", cfg.trunk), ("decoder", cfg.decoder)):
        size[f"{name}_depth"] = part.depth
    arguments = {"image_size": 32, **size, "text_depth": 2, "text_num_heads": 3}
    state = to_official(tokenizer.state_dict(), cfg)
    converted = from_official(state, arguments)
    expected = cfg if cfg.text is None else replace(
        cfg, text=replace(cfg.text, text=TextConfig(vocabulary=257, pad=0, context=10)))      # the padding is not in the weights
    assert converted.model == expected
    assert all(torch.equal(converted.tokenizer[k], v) for k, v in tokenizer.state_dict().items())


def test_a_longer_float_is_not_taken_for_the_exact_table():
    state, config = official_weights()
    stored = {k: v.float() for k, v in state.items()}
    assert from_official(stored, config).model.trunk.rotary == RELEASED_ROTARY
    exact = dict(state, **{"trunk.rope_embed.periods": 100.0 ** (torch.arange(3) / 3)})
    assert from_official(exact, config).model.trunk.rotary == RotaryConfig()


def test_names_of_the_training_class_are_understood():
    state, config = official_weights()
    heads = read_weights(SET / "ssl_heads.safetensors")
    renamed = {k.replace("text_transformer.", "transformer.").replace("visual_proj.", "proj."): v for k, v in state.items()}
    teacher = {f"teacher_{k}": v for k, v in state.items() if k.startswith("trunk.")}
    converted, plain = from_official({"state_dict": {**renamed, **heads, **teacher}}, config), from_official(state, config)
    assert all(torch.equal(converted.tokenizer[k], v) for k, v in plain.tokenizer.items())
    student = {k: v for k, v in heads.items() if k.startswith("dino_head.")}
    assert len(converted.skipped) == len(teacher) + len(student) and len(converted.heads) == len(student) == 8
    back = to_official(converted.tokenizer, converted.model, converted.heads)
    assert all(torch.equal(back[k], v) for k, v in {**state, **student}.items()) and len(back) == len(state) + 8


@pytest.mark.parametrize(("damage", "message"), [
    (lambda s: s.pop("trunk.norm.weight"), "misses trunk.norm.weight"),
    (lambda s: s.pop("trunk.patch_embed.proj.weight"), "misses trunk.patch_embed.proj.weight"),
    (lambda s: s.pop("pixel_decoder.blocks.1.mlp.w2.bias"), "misses pixel_decoder.blocks.1.mlp.w2.bias"),
    (lambda s: [s.pop(k) for k in list(s) if "trunk.blocks.1." in k], "misses trunk.blocks.1.attn.proj.bias and 11"),
    (lambda s: s.pop("text_projection"), "misses text_projection"),
    (lambda s: s.update({"trunk.extra": torch.zeros(1)}), "left over trunk.extra"),
    (lambda s: s.update({"trunk.cls_token": torch.zeros(1, 1, 47)}), "another shape trunk.cls_token"),
    (lambda s: s.update({"trunk.rope_embed.periods": torch.tensor([1.0, 10.0, 100.0])}), "other rotary periods"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(damage, message):
    state, config = official_weights()
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        from_official(state, config)


def test_sizes_outside_the_authors_table_and_options_that_we_lack_are_refused():
    state, config = official_weights()
    with pytest.raises(ConfigError, match="trunk is 48 wide"):
        from_official(state, {"decoder_depth": 2, "text_depth": 2, "text_num_heads": 4})
    with pytest.raises(ConfigError, match="text encoder is 32 wide"):
        from_official(state, {"vision_depth": 2, "decoder_depth": 2})
    config["constructor_args"]["text_pool_type"] = "last"
    with pytest.raises(ConfigError, match="text_pool_type must be argmax here, not last"):
        from_official(state, config)
    with pytest.raises(CheckpointError, match="no VTP checkpoint"):
        from_official({"epoch": 3})


def test_the_release_is_named():
    assert OFFICIAL["hub_id"] == "MiniMaxAI/VTP-Large-f16d64" and OFFICIAL["files"] == ["model.safetensors"]


def test_a_wrong_rotation_is_found(monkeypatch):
    def neighbours(x, table):      # the pairing of other networks
        cos, sin = table.unsqueeze(-3).chunk(2, dim=-1)
        pairs = x.unflatten(-1, (-1, 2))
        return (x * cos + torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2) * sin).to(x.dtype)

    monkeypatch.setattr(dinov3_vit, "apply_by_halves", neighbours)
    failed = {c.name for c in parity.verify("vtp", SET) if c.failed}
    assert {"feature.cls_token", "rec.latent@rope_fp32", "clip.image_features@rope_mixed", "rec.image_from_latent"} <= failed
    assert not {"rope.trunk_cos", "clip.text_features", "dino_head.out"} & failed
