"""The UniFlow tokenizer, its encoders and its conversion; its losses are in test_uniflow_objective.py."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokenizers_lab.diffusion.noise import start_noise
from tokenizers_lab.diffusion.pixel_flow import TIME_SCALE, PixelFlow, patchify, unpatchify
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError, WeightsMissing
from tokenizers_lab.hub import convert_official, load
from tokenizers_lab.models.uniflow.config import EncoderConfig, ModelConfig
from tokenizers_lab.models.uniflow.convert import OFFICIAL, RELEASED, from_official, official_name, to_official
from tokenizers_lab.models.uniflow.model import UniFlow, sincos_positions
from tokenizers_lab.network import read_weights
from tokenizers_lab.nn.transformer import set_activation_checkpointing
from tokenizers_lab.nn.vit import InternViT
from tokenizers_lab.teachers.preprocess import HALF, IMAGENET_MEAN, IMAGENET_STD

SET = Path(__file__).parent.parent / "parity" / "uniflow"
SMALL = ModelConfig(
    image_size=32, patch=8, latent_channels=6, encoder=EncoderConfig(width=32, depth=3, heads=4, hidden=48), width=32,
    global_blocks=2, global_heads=4, flow_blocks=2,
)
DINO = {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8,
        "image_size": 24, "mlp_ratio": 2}
TIMM = "test_vit"      # timm's network for tests: 3 blocks of width 64, patches of 16


def small(**changes):
    torch.manual_seed(0)
    tokenizer = UniFlow(replace(SMALL, **changes)).eval()
    with torch.no_grad():      # away from the initialisation, where the velocity is 0
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
    latents = tokenizer.encode(images).latents
    assert latents.shape == (2, 6, size[0] // 8, size[1] // 8)
    decoded = tokenizer.decode(latents)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    assert torch.equal(tokenizer.reconstruct(images), decoded) and decoded.std() > 0.01


def test_an_image_alone_is_as_in_a_batch(tokenizer, images):
    together = tokenizer.encode(images).latents
    alone = torch.cat([tokenizer.encode(image[None]).latents for image in images])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    decoded = torch.cat([tokenizer.decode(one[None], steps=3) for one in together])
    torch.testing.assert_close(decoded, tokenizer.decode(together, steps=3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_patches_in_chunks_are_those_of_the_whole(tokenizer, images, chunk):
    latents = tokenizer.encode(images).latents
    for options in ({}, {"steps": 3, "guidance": 1.5}):
        whole = tokenizer.decode(latents, generator=torch.Generator().manual_seed(4), **options)
        chunked = tokenizer.decode(latents, generator=torch.Generator().manual_seed(4), chunk=chunk, **options)
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_chunks_bound_the_rows_that_the_flow_network_sees(tokenizer, images):
    seen = []
    hook = tokenizer.flow.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    tokenizer.decode(tokenizer.encode(images).latents, steps=2, chunk=12)
    hook.remove()
    assert seen == [12, 12, 12, 12, 8, 8]      # 2 × 16 patches, 2 steps a chunk


def test_one_step_is_noise_plus_velocity_and_more_steps_go_on(tokenizer, images):
    latents = tokenizer.encode(images).latents
    condition = tokenizer.conditioner(latents.flatten(2).transpose(1, 2), (4, 4)).flatten(0, 1)
    noise = start_noise((2, 16, 192), "cpu").flatten(0, 1)
    x = noise + tokenizer.flow(noise, torch.zeros(32), condition)
    pixels = unpatchify(x.unflatten(0, (2, 16)), (4, 4), 8)
    expected = (pixels * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(latents), expected)
    half = noise + 0.5 * tokenizer.flow(noise, torch.zeros(32), condition)
    two = half + 0.5 * tokenizer.flow(half, torch.full((32,), 0.5 * TIME_SCALE), condition)
    torch.testing.assert_close(tokenizer.sample(condition, noise, steps=2), two)
    assert not torch.allclose(two, x, atol=1e-3)


def test_options_of_decoding(tokenizer, images):
    latents = tokenizer.encode(images).latents
    assert set(tokenizer.decode_options) == {"steps", "guidance"}
    plain, guided, finer = tokenizer.decode(latents), tokenizer.decode(latents, guidance=3.0), tokenizer.decode(latents, steps=4)
    assert not torch.allclose(plain, guided, atol=1e-3) and not torch.allclose(plain, finer, atol=1e-3)
    same = small(steps=4)
    torch.testing.assert_close(same.decode(latents), finer)
    powered = small(steps=4, schedule_power=0.25)
    assert not torch.allclose(powered.decode(latents), finer, atol=1e-4)

    def drawn(seed):
        return tokenizer.decode(latents, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    for bad in ({"steps": 0}, {"chunk": 0}):
        with pytest.raises(InputError):
            tokenizer.decode(latents, **bad)


def test_a_new_tokenizer_decodes_its_noise():
    torch.manual_seed(0)
    tokenizer = UniFlow(SMALL).eval()
    noise = torch.randn(5, 192)
    assert torch.equal(tokenizer.sample(torch.randn(5, 32), noise, steps=3), noise)


def test_latent_statistics_normalise_and_are_saved(images):
    tokenizer = small()
    plain = tokenizer.encode(images).latents
    decoded = tokenizer.decode(plain)
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    tokenizer.set_latent_statistics(mean, std)
    normalised = tokenizer.encode(images).latents
    torch.testing.assert_close(normalised, (plain - mean.view(1, 6, 1, 1)) / std.view(1, 6, 1, 1))
    torch.testing.assert_close(tokenizer.decode(normalised), decoded, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokenizer.state_dict()["latent_std"], std)
    with pytest.raises(InputError, match="above 0"):
        tokenizer.set_latent_statistics(mean, std * 0)


def test_unusable_images_and_latents_are_refused(tokenizer):
    for bad in (torch.rand(2, 3, 30, 32), torch.rand(2, 3, 32, 32) * 2, torch.rand(2, 1, 32, 32)):
        with pytest.raises(InputError):
            tokenizer.encode(bad)
    for bad in (torch.rand(2, 5, 4, 4), torch.rand(2, 16, 6), torch.zeros(1, 6, 4, 4, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"latents must be float \(B, 6, h, w\)"):
            tokenizer.decode(bad)


def test_half_precision_works_and_latents_stay_float32(tokenizer, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = tokenizer.encode(images)
        decoded = tokenizer.decode(encoding.latents)
    assert encoding.latents.dtype == decoded.dtype == torch.float32
    torch.testing.assert_close(encoding.latents, tokenizer.encode(images).latents, atol=0.1, rtol=0.1)
    assert small().to(torch.bfloat16).reconstruct(images).shape == images.shape


@pytest.mark.parametrize("changes", [
    {"patch": 7}, {"latent_channels": 0}, {"width": 30}, {"global_heads": 5}, {"steps": 0}, {"schedule_power": 0.0},
    {"encoder": EncoderConfig(width=30, heads=4)}, {"encoder": EncoderConfig("dino")}, {"encoder": EncoderConfig("timm")},
    {"encoder": EncoderConfig("transformers")}, {"encoder": EncoderConfig("timm", name="vit_tiny_patch16_223")},
    {"encoder": EncoderConfig("timm", name=TIMM)},                   # has patches of 16
    {"encoder": EncoderConfig("transformers", config={"model_type": "nothing"})}, {"encoder": EncoderConfig(norm="batch_norm")},
])
def test_a_model_that_cannot_be_built_is_refused(changes):
    with pytest.raises(ConfigError):
        UniFlow(replace(SMALL, **changes))


# --- its parts ----------------------------------------------------------------------------------------------------------

def test_patches_go_through_colours_rows_and_columns():
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    rows = patchify(images, 2)
    assert rows.shape == (2, 6, 12)
    assert torch.equal(rows[1, 4].view(3, 2, 2), images[1, :, 2:4, 2:4])      # second row of patches, second of three columns
    assert torch.equal(unpatchify(rows, (2, 3), 2), images)


def test_position_tables_start_as_sines_and_cosines_columns_first():
    table = sincos_positions(3, 8)[0].double()
    row, column, frequency = 1, 2, 10_000 ** -0.5
    angles = torch.tensor([column, column * frequency, row, row * frequency], dtype=torch.float64)
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(table[row * 3 + column], expected, atol=1e-6, rtol=1e-6)


def test_the_flow_network_sees_a_row_alone():
    torch.manual_seed(0)
    network = PixelFlow(12, 16, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    x, time, condition = torch.randn(5, 12), TIME_SCALE * torch.rand(5), torch.randn(5, 16)
    together = network(x, time, condition)
    alone = torch.cat([network(x[i : i + 1], time[i : i + 1], condition[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, together)
    assert not torch.allclose(network(x, 0 * time, condition), together, atol=1e-3)


def test_activation_checkpointing_changes_no_gradient(images):
    gradients = []
    for on in (False, True):
        tokenizer = small().train()
        assert set_activation_checkpointing(tokenizer, on) == 2
        torch.manual_seed(3)      # of dropped paths
        latents = tokenizer.project(tokenizer.encoder(images)[-1])
        tokenizer.conditioner(latents, (4, 4)).square().mean().backward()
        gradients.append([p.grad for p in tokenizer.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40 and all(torch.equal(a, b) for a, b in zip(*gradients))


def test_drop_path_grows_over_the_layers_and_rests_in_eval(images):
    vit = InternViT(32, 8, 32, 3, 4, 48, drop_path=0.4)
    assert [layer.drop_path.drop_prob for layer in vit.layers] == pytest.approx([0, 0.2, 0.4])
    assert not torch.equal(vit(images)[-1], vit(images)[-1])
    assert torch.equal(vit.eval()(images)[-1], vit(images)[-1])


def test_options_of_internvit_change_its_tensors_and_its_output(images):
    plain = dict(small().encoder.named_parameters())
    for changes, gone, new in (
        ({"norm": "rms_norm"}, {"layers.0.norm1.bias"}, set()), ({"qkv_bias": False}, {"layers.0.attn.qkv.bias"}, set()),
        ({"qk_norm": True}, set(), {"layers.0.attn.q_norm.weight"}),
    ):
        encoder = small(encoder=replace(SMALL.encoder, **changes)).encoder
        own = dict(encoder.named_parameters())
        assert gone <= plain.keys() - own.keys() and new <= own.keys() - plain.keys()
        assert encoder(images)[-1].isfinite().all()


# --- encoders -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "layers", "width"), [
    ({}, 3, 32),
    ({"encoder": EncoderConfig("transformers", config=DINO)}, 3, 24),
    ({"encoder": EncoderConfig("timm", name=TIMM), "patch": 16}, 6, 64),
])
def test_encoders_give_the_patch_tokens_of_every_layer(changes, layers, width, tmp_path):
    torch.manual_seed(0)
    tokenizer = UniFlow(replace(SMALL, **changes)).eval()
    images = torch.rand(2, 3, 64, 32)
    states = tokenizer.encoder(images, every_layer=True)
    tokens = (64 // tokenizer.cfg.patch) * (32 // tokenizer.cfg.patch)
    assert tokenizer.encoder.depth == len(states) == layers and tokenizer.encoder.width == width
    assert {tuple(s.shape) for s in states} == {(2, tokens, width)}
    assert all(not torch.allclose(a, b) for a, b in pairwise(states))
    (last,) = tokenizer.encoder(images)
    assert torch.equal(last, states[-1])
    assert tokenizer.reconstruct(images).shape == images.shape
    tokenizer.save_pretrained(tmp_path)      # a saved one is built from its config alone
    again = load(str(tmp_path))
    assert again.cfg == tokenizer.cfg and torch.equal(again.encode(images).latents, tokenizer.encode(images).latents)


def test_colours_are_normalised_as_in_pretraining():
    assert UniFlow(SMALL).pixel_mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    plain = UniFlow(replace(SMALL, encoder=EncoderConfig("timm", name=TIMM), patch=16))
    assert plain.pixel_mean.flatten().tolist() == pytest.approx(plain.encoder.network.pretrained_cfg["mean"])
    siglip = {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 16, "patch_size": 8, "image_size": 32}
    half = UniFlow(replace(SMALL, encoder=EncoderConfig("transformers", config=siglip))).pixel_std
    assert half.flatten().tolist() == list(HALF)
    own = EncoderConfig("transformers", config=siglip, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    assert UniFlow(replace(SMALL, encoder=own)).pixel_std.flatten().tolist() == [1, 2, 3]
    unknown = EncoderConfig("transformers", config={**siglip, "model_type": "vit"})
    with pytest.raises(ConfigError, match=r"set model\.encoder\.mean"):
        UniFlow(replace(SMALL, encoder=unknown))


def internvit_folder(folder, image_size=32, **changes):
    """An InternViT checkpoint as its authors write it, and its tensors by our names."""
    torch.manual_seed(5)
    ours = InternViT(image_size, 8, 32, 3, 4, 48).state_dict()
    theirs = {official_name(f"encoder.{k}"): v for k, v in ours.items()} | changes
    folder.mkdir()
    config = {"num_attention_heads": 4, "layer_norm_eps": 1e-6, "norm_type": "layer_norm", "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    half = len(theirs) // 2
    for number, part in enumerate((list(theirs)[:half], list(theirs)[half:]), 1):      # in shards, as large ones are
        save_file({k: theirs[k].clone() for k in part}, folder / f"model-{number}-of-2.safetensors")
    return ours


def test_an_encoder_starts_from_an_internvit_folder(tmp_path):
    tokenizer, ours = small(), internvit_folder(tmp_path / "vit")
    assert tokenizer.start_part("encoder", str(tmp_path / "vit")) == str(tmp_path / "vit")
    assert all(torch.equal(v, ours[k]) for k, v in tokenizer.encoder.state_dict().items())
    larger = internvit_folder(tmp_path / "larger", image_size=64)
    assert "positions resized from 8 × 8 to 4 × 4" in tokenizer.start_part("encoder", str(tmp_path / "larger"))
    positions = tokenizer.encoder.position_embedding
    assert positions.shape == (1, 17, 32) and torch.equal(positions[:, 0], larger["position_embedding"][:, 0])


def test_an_encoder_refuses_what_does_not_fit(tmp_path):
    tokenizer = small()
    internvit_folder(tmp_path / "extra", **{"head.weight": torch.zeros(3)})
    internvit_folder(tmp_path / "shape", **{"encoder.layers.0.ls1": torch.zeros(3)})
    internvit_folder(tmp_path / "heads")
    (tmp_path / "heads" / "config.json").write_text(json.dumps({"num_attention_heads": 8}))
    (tmp_path / "empty").mkdir()
    messages = {"extra": r"head\.weight", "shape": r"another shape layers\.0\.ls1", "heads": "num_attention_heads",
                "empty": "no weights in safetensors"}
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message):
            tokenizer.start_part("encoder", str(tmp_path / name))


def test_an_encoder_that_is_nowhere_is_missing(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match="InternViT-nowhere"):
        small().start_part("encoder", "OpenGVLab/InternViT-nowhere")


def test_an_encoder_starts_from_another_uniflow(tmp_path):
    other = small().save_pretrained(tmp_path / "saved")
    torch.manual_seed(9)
    tokenizer = UniFlow(SMALL)
    assert "encoder" in tokenizer.start_part("encoder", str(other))
    assert all(torch.equal(v, small().encoder.state_dict()[k]) for k, v in tokenizer.encoder.state_dict().items())


def test_an_encoder_starts_from_transformers_and_timm_folders(tmp_path):
    import timm
    from timm.models._hub import save_for_hf

    cfg = replace(SMALL, encoder=EncoderConfig("transformers", config=DINO))
    torch.manual_seed(1)
    source, tokenizer = UniFlow(cfg).encoder.network, UniFlow(cfg)
    source.save_pretrained(tmp_path / "dino")
    assert "transformers" in tokenizer.start_part("encoder", str(tmp_path / "dino"))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in tokenizer.encoder.network.state_dict().items())
    deeper = UniFlow(replace(cfg, encoder=EncoderConfig("transformers", config={**DINO, "num_hidden_layers": 4})))
    with pytest.raises(CheckpointError, match="does not fit the encoder"):
        deeper.start_part("encoder", str(tmp_path / "dino"))

    torch.manual_seed(2)
    source = timm.create_model(TIMM, pretrained=False)      # with its classifier, for its own image size
    save_for_hf(source, tmp_path / "timm", safe_serialization=True)
    tokenizer = UniFlow(replace(SMALL, encoder=EncoderConfig("timm", name=TIMM), patch=16))
    tokenizer.start_part("encoder", str(tmp_path / "timm"))
    own, given = tokenizer.encoder.network.state_dict(), source.state_dict()
    assert all(torch.equal(v, given[k]) for k, v in own.items() if k != "pos_embed") and "head.weight" not in own
    other = UniFlow(replace(SMALL, encoder=EncoderConfig("timm", name="test_vit2"), patch=16))
    with pytest.raises(CheckpointError):
        other.start_part("encoder", str(tmp_path / "timm"))


# --- official weights ---------------------------------------------------------------------------------------------------

def manifest():
    return json.loads((SET / "official_full_manifest.json").read_text())


def official_weights():
    return read_weights(SET / "weights.safetensors"), json.loads((SET / "config.json").read_text())


def test_the_official_key_tree_is_covered_both_ways():
    told = manifest()
    state = {name: torch.empty(shape, device="meta") for name, shape in told["tensors"].items()}
    converted = from_official(state)
    assert len(state) == 530 and converted.model == ModelConfig() and converted.heads == {}
    assert from_official(state, told["release_config"]).model == converted.model
    assert {k: list(v.shape) for k, v in to_official(converted.tokenizer).items()} == told["tensors"]
    assert {k: told["release_config"][k] for k in RELEASED} == RELEASED


def test_conversion_there_and_back_keeps_every_number():
    state, config = official_weights()
    back = to_official(from_official(state, config).tokenizer)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda s: s.pop("decoder_pos_embed"), "misses decoder_pos_embed"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("global_blocks.1.")], "misses global_blocks.1.attn.proj.bias and 11"),
    (lambda s: s.update({"lpips.net": torch.zeros(1)}), "left over lpips.net"),
    (lambda s: s.update({"chal_proj.c_proj.bias": torch.zeros(9)}), "another shape chal_proj.c_proj.bias"),
    (lambda s: s.update({"epoch": 3}), "no state dict"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(damage, message):
    state, config = official_weights()
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        from_official(state, config)


@pytest.mark.parametrize(("change", "message"), [
    ({"use_chal_proj": False}, "use_chal_proj"), ({"vit_hidden_size": 32}, "two names"), ({"hidden_act": "relu"}, "GELU"),
])
def test_a_network_that_we_do_not_have_is_refused(change, message):
    state, config = official_weights()
    with pytest.raises(ConfigError, match=message):
        from_official(state, {"constructor_args": config["constructor_args"] | change})
    arguments = {k: v for k, v in config["constructor_args"].items() if k != "patch_size"}
    with pytest.raises(ConfigError, match="lacks patch_size"):
        from_official(state, arguments)


def test_the_authors_file_becomes_a_tokenizer():
    _, config = official_weights()
    converted = convert_official("uniflow", SET / "weights.safetensors", config)
    assert converted.tokenizer.cfg.steps == 4 and converted.tokenizer.provenance["converted_from"] == OFFICIAL["hub_id"]
    images = torch.rand(1, 3, 16, 16)
    assert converted.tokenizer.reconstruct(images).shape == images.shape


def test_the_first_weights_can_have_a_gain():
    torch.manual_seed(0)
    scaled = UniFlow(replace(SMALL, init_gain=2.0))
    assert scaled.conditioner.unproject.fc1.weight.std().item() == pytest.approx(2 * SMALL.latent_channels**-0.5, rel=0.2)
    assert not scaled.flow.out.weight.any()      # the first velocity stays 0
    with pytest.raises(ConfigError, match="init_gain"):
        UniFlow(replace(SMALL, init_gain=-1.0))
