"""`features(images, layers)` of every image tokenizer: its encoder's layers by number, for probes; and the probe on them."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tokenizers_lab.cli.main import call
from tokenizers_lab.config import load_config
from tokenizers_lab.errors import InputError
from tokenizers_lab.hub import build_tokenizer
from tokenizers_lab.models.vfm_vae.config import VFMConfig
from tokenizers_lab.models.vfm_vae.vfm import FoundationModel
from tokenizers_lab.registry import systems

IMAGE_SYSTEMS = [name for name, system in systems().items() if system.kind == "image"]
DINO = {"model_type": "dinov2", "image_size": 56, "patch_size": 8, "mlp_ratio": 2, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8, "intermediate_size": 48, "hidden_size": 32,
          "num_hidden_layers": 3, "num_attention_heads": 4}


def build(system):
    torch.manual_seed(0)
    return build_tokenizer(system, load_config(f"{system}/tiny").model).eval()


@pytest.fixture(params=IMAGE_SYSTEMS)
def tokenizer(request):
    return build(request.param)


def test_all_image_systems_are_here():
    assert {"rectok", "uniflow", "vfm_vae", "vtp"} <= set(IMAGE_SYSTEMS)


@torch.no_grad()
def test_layers_are_found_by_number_from_both_ends(tokenizer):
    images = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    first, last, again = tokenizer.features(images, (0, -1, 0))
    assert torch.equal(first.patch_tokens, again.patch_tokens)
    assert first.patch_tokens.dim() == last.patch_tokens.dim() == 3 and len(last.patch_tokens) == 2
    assert first.patch_tokens.shape != last.patch_tokens.shape or not torch.equal(first.patch_tokens, last.patch_tokens)
    (default,) = tokenizer.features(images)
    assert torch.equal(default.patch_tokens, last.patch_tokens)
    (alone,) = tokenizer.features(images[1:])
    torch.testing.assert_close(alone.patch_tokens, last.patch_tokens[1:], atol=1e-4, rtol=1e-4)
    for wrong in ((99,), (-99,), ()):
        with pytest.raises(InputError):
            tokenizer.features(images, wrong)
    with pytest.raises(InputError):
        tokenizer.features(images[:, :2])


@torch.no_grad()
def test_rectoks_last_layer_is_what_its_head_reads():
    tokenizer, images = build("rectok"), torch.rand(2, 3, 64, 64)
    tokens = tokenizer.features(images)[0].patch_tokens
    torch.testing.assert_close(tokenizer.encoder.head(tokens), tokenizer.encoder(images))
    x, rope = tokenizer.encoder.tokens(images)
    transformer = tokenizer.encoder.transformer
    by_hand = transformer.norm_out(transformer.blocks[0](transformer.norm_in(x), rope))
    assert torch.equal(tokenizer.features(images, (0,))[0].patch_tokens, by_hand)


@torch.no_grad()
def test_uniflows_last_layer_is_what_its_projection_reads():
    tokenizer, images = build("uniflow"), torch.rand(2, 3, 64, 64)
    latents = tokenizer.encode(images).latents.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokenizer.project(tokenizer.features(images)[0].patch_tokens), latents)
    state = tokenizer.encoder.embed(tokenizer.normalise(images))
    first = tokenizer.encoder.layers[0](state)[:, 1:]
    torch.testing.assert_close(tokenizer.features(images, (0,))[0].patch_tokens, first)


@pytest.mark.parametrize(("config", "has_class"), [(DINO, True), (SIGLIP, False)])
def test_vfm_vaes_layers_are_the_foundation_models(config, has_class):
    torch.manual_seed(0)
    cfg = load_config("vfm_vae/tiny").model
    vfm = VFMConfig(config=config, scale=1.0, layers=[1, 2, -1])
    tokenizer = build_tokenizer("vfm_vae", replace(cfg, vfm=vfm, widths=[8, 8, 8])).eval()
    images = torch.rand(2, 3, 64, 64)
    maps = tokenizer.vfm(images).layers      # 1: behind the first block; -1: behind the final norm
    found = tokenizer.features(images, (0, 1, 2))
    for layer, grid in zip(found, maps):
        assert torch.equal(layer.patch_tokens, grid.flatten(2).transpose(1, 2))
        assert (layer.class_token is not None) is has_class
    if has_class:
        inside = tokenizer.vfm.network(pixel_values=tokenizer.vfm.preprocess(images), output_hidden_states=True)
        torch.testing.assert_close(found[2].class_token, inside.last_hidden_state[:, 0])
        torch.testing.assert_close(found[0].class_token, inside.hidden_states[1][:, 0])


def test_stages_of_a_cnn_are_layers_too():
    vfm = FoundationModel(VFMConfig(backend="timm", name="tf_efficientnet_lite0", scale=1.0, layers=[0, -1]))
    images = torch.rand(1, 3, 64, 64)
    found = vfm.tokens(images, [0, vfm.depth - 1])
    assert [f.patch_tokens.shape for f in found] == [m.flatten(2).transpose(1, 2).shape for m in vfm(images).layers]
    assert all(torch.equal(f.patch_tokens, m.flatten(2).transpose(1, 2)) for f, m in zip(found, vfm(images).layers))


@pytest.mark.parametrize("system", IMAGE_SYSTEMS)
def test_the_probe_reads_them_and_latents_of_every_system(system, tmp_path, capsys):
    model = build(system).save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    for colour, shade in (("dark", 0.2), ("light", 0.7)):
        (tmp_path / "images" / colour).mkdir(parents=True)
        for i in range(10):
            pixels = (255 * (shade + 0.1 * torch.rand(64, 64, 3, generator=generator))).byte().numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / colour / f"{i}.png")
    words = ["probe", "linear", str(model), str(tmp_path / "images"), "--device", "cpu", "--no-baselines", "--holdout", "2"]
    found = {}
    for name, options in (("blocks", ["--features", "blocks", "--layers=0,-1"]), ("latents", ["--features", "latents"])):
        assert call([*words, *options, "--iterations", "20", "--out", str(tmp_path / "out.json")]) == 0
        (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
        found[name] = row
        assert row["metrics"]["accuracy"]["value"] == 100      # brightness reaches every layer
    assert "layers 0, -1" in found["blocks"]["features"] and "latents" in found["latents"]["features"]
    assert "layers 0, -1" in capsys.readouterr().out
