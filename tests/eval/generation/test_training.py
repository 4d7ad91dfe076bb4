"""Generators train by the common loop: on images encoded on the fly, and on cached latents."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tokenizers_lab.config import load_config
from tokenizers_lab.data.batch import LatentBatch
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError, DataError
from tokenizers_lab.eval.generation.generator import seeded_normal
from tokenizers_lab.eval.generation.objective import LatentFlowObjective
from tokenizers_lab.eval.latent_cache import CacheOptions, write_latents
from tokenizers_lab.hub import build_tokenizer, load, weights_sha256
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.training.loop import train

SIZES = {
    "lightningdit": ["model.width=16", "model.depth=2", "model.heads=2"],
    "ditdh": ["model.width=16", "model.depth=2", "model.heads=2", "model.head_width=24", "model.head_depth=1",
              "model.head_heads=2"],
}
TEACHER = ("objective.teacher={backend: random, input_size: 28, config: {model_type: dinov2, hidden_size: 24, "
           "num_hidden_layers: 1, num_attention_heads: 2, image_size: 28, patch_size: 14, intermediate_size: 32}}")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A small untrained tokenizer, nine images of three classes, and the tokenizer's latents of them."""
    root = tmp_path_factory.mktemp("generators")
    for i in range(9):
        folder = root / "images" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    sizes = [f"model.{part}.{size}" for part in ("encoder", "decoder") for size in ("width=16", "depth=1", "heads=2")]
    cfg = load_config("rectok/tiny", ["model.image_size=32", "data.size=32", "model.latent_channels=4", *sizes])
    torch.manual_seed(0)
    tokenizer = build_tokenizer("rectok", cfg.model)
    tokenizer.save_pretrained(root / "tokenizer")
    data = ImageDataConfig(train=str(root / "images"), size=32, workers=0)
    write_latents(load(root / "tokenizer"), data, root / "latents", CacheOptions(flips=True, moments=True), name="tok",
                  source="images", batch_size=4)
    return {name: str(root / name) for name in ("tokenizer", "images", "latents")}


def options(places, out: Path, system: str, data: str, *more: str) -> list[str]:
    """Overrides of a run of six steps."""
    return [f"out={out}", f"system={system}", "name=t", *SIZES[system], "model.channels=4", "model.grid=4", "model.classes=3",
            f"data.train={places[data]}", f"data.val={places[data]}", "data.size=32", "data.workers=0", "data.val_limit=null",
            "objective.tokenizer=" + (places["tokenizer"] if data == "images" else "null"), "train.batch_size=4", "train.ema=0.5",
            "train.validate_every=3", "train.checkpoint_every=100", "train.log_every=1",
            "stages=[{name: a, steps: 6, lr: 1e-2, schedule: constant, weights: {mse: 1, cosine: 1}}]", *more]


def recipe(system: str) -> str:
    return {"lightningdit": "generation/vtp-lightningdit-tiny", "ditdh": "generation/rectok-ditdh-tiny"}[system]


@pytest.mark.parametrize("system", list(SIZES))
@pytest.mark.parametrize("data", ["images", "latents"])
def test_it_learns_and_knows_its_tokenizer(places, tmp_path, system, data):
    cfg = load_config(recipe(system), options(places, tmp_path, system, data))
    result = train(cfg)
    generator = load(result.folder)
    assert generator.provenance["tokenizer"]["sha256"] == weights_sha256(places["tokenizer"])
    assert not torch.equal(generator.latent_std, torch.ones_like(generator.latent_std))
    lines = (result.folder / "metrics.jsonl").read_text()
    assert lines.count("velocity_mse") == 2      # at steps 3 and 6
    labels = torch.tensor([0, 2, 3])
    apart = torch.cat([generator.sample(labels[i : i + 1], [i]) for i in range(3)])
    torch.testing.assert_close(generator.sample(labels, [0, 1, 2]), apart, rtol=1e-4, atol=1e-5)
    latents = load_file(next(Path(places["latents"]).glob("*.safetensors")))["latents"]
    normalised = generator.normalise(latents)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(normalised.std((0, 2, 3), correction=0), torch.ones(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(generator.denormalise(normalised), latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("system", "data"), [("lightningdit", "latents"), ("ditdh", "images")])
def test_a_resumed_run_is_the_same_run(places, tmp_path, monkeypatch, system, data):
    whole = train(load_config(recipe(system), options(places, tmp_path / "whole", system, data))).folder
    cfg = load_config(recipe(system), options(places, tmp_path / "parts", system, data))
    taken, losses = [], LatentFlowObjective.generator_losses

    def stopped(self, *args, **named):
        taken.append(1)
        if len(taken) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, *args, **named)

    monkeypatch.setattr(LatentFlowObjective, "generator_losses", stopped)
    assert train(cfg).status == "interrupted"
    assert train(cfg, resume="must").status == "finished" and len(taken) == 6
    for name in ("model.safetensors", "training/raw.safetensors"):
        a, b = ((run / "checkpoints/step_00000006" / name).read_bytes() for run in (whole, tmp_path / f"parts/{system}-t"))
        assert a == b


def test_hidden_tokens_follow_a_teacher(places, tmp_path):
    weights = "stages=[{name: a, steps: 2, lr: 1e-2, weights: {mse: 1, alignment: 0.5}}]"
    more = [TEACHER, "objective.align_after=1", "objective.align_width=16", weights]
    result = train(load_config(recipe("lightningdit"), options(places, tmp_path, "lightningdit", "images", *more)))
    assert '"alignment"' in (result.folder / "metrics.jsonl").read_text()
    heads = load_file(result.folder / "checkpoints/step_00000002/training/objective.safetensors")
    assert heads["heads.projector.0.weight"].shape == (16, 16)
    with pytest.raises(ConfigError, match=r"objective\.tokenizer: cached latents show none"):
        load_config(recipe("lightningdit"), options(places, tmp_path, "lightningdit", "latents", *more))


def test_what_does_not_fit_is_said(places, tmp_path):
    given = options(places, tmp_path, "lightningdit", "latents")
    with pytest.raises(ConfigError, match=r"latents \(4, 4, 4\), but model\.channels"):
        train(load_config(recipe("lightningdit"), [*given, "model.channels=6"]))
    with pytest.raises(DataError, match=r"class 2, but model\.classes is 2"):
        train(load_config(recipe("lightningdit"), [*given, "model.classes=2"]), resume="fresh")
    images = [*options(places, tmp_path, "ditdh", "images"), "objective.tokenizer=null"]
    with pytest.raises(ConfigError, match=r"objective\.tokenizer, or cache their latents"):
        train(load_config(recipe("ditdh"), images))


def test_losses_are_those_of_the_path(places, tmp_path):
    cfg = load_config(recipe("lightningdit"), [*options(places, tmp_path, "lightningdit", "latents"), "objective.label_drop=0.5"])
    torch.manual_seed(0)
    generator = build_tokenizer("lightningdit", cfg.model)
    for p in generator.parameters():
        torch.nn.init.normal_(p, std=0.2)
    seen = []
    generator.register_forward_pre_hook(lambda module, args: seen.append(args))
    objective = LatentFlowObjective(cfg.objective, cfg.model)
    latents, spread = torch.randn(8, 4, 4, 4), torch.rand(8, 4, 4, 4)
    batch = LatentBatch(latents, list("abcdefgh"), torch.arange(8) % 3, spread)
    draw = Draw(0, 0, 5)
    terms = objective.generator_losses(generator, batch, draw, frozenset({"mse", "cosine"})).terms
    (x, time, labels), = seen
    data = latents + spread * draw.normal("posterior", (8, 4, 4, 4))
    noise = draw.normal("noise", (8, 4, 4, 4))
    torch.testing.assert_close(time, torch.sigmoid(draw.normal("time", (8,))))
    t = time[:, None, None, None]
    torch.testing.assert_close(x, t * data + (1 - t) * noise)
    dropped = draw.uniform("label_drop", (8,)) < 0.5
    assert 0 < dropped.sum() < 8 and labels.tolist() == [3 if d else i % 3 for i, d in enumerate(dropped.tolist())]
    velocity = generator(x, time, labels).velocity
    torch.testing.assert_close(terms["mse"], (velocity - (data - noise)).square().mean())
    cosine = torch.nn.functional.cosine_similarity(velocity, data - noise, dim=1)
    torch.testing.assert_close(terms["cosine"], (1 - cosine).mean())


def test_noise_is_each_images_own():
    together = seeded_normal([5, 9, 5], (2, 3), "start")
    torch.testing.assert_close(together[1], seeded_normal([9], (2, 3), "start")[0], rtol=0, atol=0)
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
