"""VTP's losses: which terms there are, what they see, where their gradients go, how the teacher follows."""

import copy
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from pairs import write_shapes

from tokenizers_lab.config import load_config
from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.multicrop import CropConfig
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError, DataError
from tokenizers_lab.models.vtp.config import ModelConfig, TextEncoderConfig
from tokenizers_lab.models.vtp.model import VTP
from tokenizers_lab.models.vtp.objective import VTPObjective
from tokenizers_lab.models.vtp.objective_config import HeadConfig, ObjectiveConfig, check_objective
from tokenizers_lab.nn.dinov3_vit import BlocksConfig
from tokenizers_lab.settings import StageConfig
from tokenizers_lab.text import TextConfig
from tokenizers_lab.training.checkpoint import newest_checkpoint
from tokenizers_lab.training.loop import train

BYTES = TextConfig(vocabulary=257, pad=256, context=16)
SMALL = ModelConfig(
    image_size=32, patch=8, latent_channels=6, trunk=BlocksConfig(32, 2, 2), decoder=BlocksConfig(32, 1, 2, norm="layer_norm"),
    text=TextEncoderConfig(width=16, depth=1, heads=2, text=BYTES))
CONFIG = ObjectiveConfig(
    ssl_share=0.5, rec_share=0.5, head=HeadConfig(12, 16, 8), lpips="none", discriminator_width=4, discriminator_layers=2,
    crops=CropConfig(global_size=32, local_size=16, local_crops=2))
SSL = frozenset({"dino", "ibot", "koleo"})
ALL = SSL | {"l1", "gan", "contrastive"}
STAGE = StageConfig("s", steps=1, weights={"dino": 1.0})


def build(**changes):
    torch.manual_seed(0)
    tokenizer = VTP(SMALL).train()
    objective = VTPObjective(replace(CONFIG, **changes), SMALL).train()
    objective.begin_stage(tokenizer, STAGE)
    return tokenizer, objective


@pytest.fixture
def batch():
    images = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    return ImageBatch(images, ["a", "b", "c", "d"], texts=["a fox", "a bird", "a frog", "a much too long text about an owl"])


def test_only_active_terms_are_computed(batch):
    tokenizer, objective = build()
    for active in map(frozenset, (ALL, {"l1"}, {"dino"}, {"ibot", "koleo"}, {"contrastive"}, ())):
        losses = objective.generator_losses(tokenizer, batch, Draw(0), active)
        assert losses.terms.keys() == active
        assert all(t.dim() == 0 and t.dtype == torch.float32 and t.isfinite() for t in losses.terms.values())
        assert (losses.fake is not None) == bool(active & {"l1", "gan"})
    losses = objective.generator_losses(tokenizer, batch, Draw(0), ALL)
    assert losses.fake.shape == losses.real.shape == (2, 3, 32, 32) and losses.fake.requires_grad
    assert losses.logs["logit_scale"] == pytest.approx(1 / 0.07)


def test_each_objective_takes_its_share_of_one_batch(batch):
    tokenizer, objective = build()
    seen = {}

    def keep(name):
        return lambda module, given, kept: seen.setdefault(name, []).append(len((given or tuple(kept.values()))[0]))

    tokenizer.trunk.register_forward_pre_hook(keep("student"), with_kwargs=True)
    objective.copies["trunk"].register_forward_pre_hook(keep("teacher"), with_kwargs=True)
    tokenizer.text.register_forward_pre_hook(keep("texts"), with_kwargs=True)
    objective.generator_losses(tokenizer, batch, Draw(0), ALL)
    assert seen == {"student": [2, 4, 4, 4], "teacher": [4], "texts": [4]}      # rec, global crops, local crops, contrast
    chosen = [set(objective.share(8, 0.5, "share.ssl", Draw(0, step=s)).tolist()) for s in range(20)]
    assert all(len(c) == 4 for c in chosen) and len({frozenset(c) for c in chosen}) > 10


def test_gradients_reach_tokenizer_and_head_but_not_the_teacher(batch):
    tokenizer, objective = build()
    losses = objective.generator_losses(tokenizer, batch, Draw(0), ALL)
    sum(losses.terms.values()).backward()
    assert [n for n, p in [*tokenizer.named_parameters(), *objective.heads.named_parameters()] if p.grad is None] == []
    assert all(p.grad is None and not p.requires_grad for p in objective.copies.parameters())
    assert all(p.grad is None for p in objective.discriminators.parameters())
    judged = objective.discriminator_losses(losses.real, losses.fake.detach())
    judged.terms["discriminator"].backward()
    assert all(p.grad is not None for p in objective.discriminators.parameters())
    tokenizer.zero_grad()
    objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"l1"})).terms["l1"].backward()
    assert tokenizer.trunk.bottleneck.weight.grad.abs().max() > 0      # the reconstruction alone goes through it
    tokenizer.zero_grad()
    objective.generator_losses(tokenizer, batch, Draw(0), SSL).terms["ibot"].backward()
    assert tokenizer.trunk.bottleneck.weight.grad is None and tokenizer.decoder.pixels.weight.grad is None


def test_the_same_draws_give_the_same_losses(batch):
    tokenizer, objective = build(ssl_drop=0.5, rec_drop=0.5, contrastive_drop=0.5)

    def losses(draw):
        return objective.generator_losses(tokenizer, batch, draw, ALL).terms

    first, again, other = losses(Draw(0, step=1)), losses(Draw(0, step=1)), losses(Draw(0, step=2))
    assert all(torch.equal(first[k], again[k]) and not torch.equal(first[k], other[k]) for k in first)


def test_the_teacher_starts_as_the_student_and_follows(batch):
    tokenizer, objective = build(momentum=0.75, momentum_end=1.0)
    trunk, head = objective.copies["trunk"], objective.copies["head"]
    assert all(torch.equal(a, b) for a, b in zip(trunk.parameters(), tokenizer.trunk.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), objective.heads["dino"].parameters()))
    with torch.no_grad():
        tokenizer.trunk.norm.weight += 1.0
        objective.heads["dino"].mlp[0].bias += 2.0
        tokenizer.contrast.logit_scale.fill_(9.0)
    objective.after_step(tokenizer)
    torch.testing.assert_close(trunk.norm.weight, torch.full((32,), 1.25))
    torch.testing.assert_close(head.mlp[0].bias, torch.full((16,), 0.5))
    assert tokenizer.contrast.logit_scale.item() == pytest.approx(math.log(100))
    objective.progress = 0.5      # halfway to standing still
    objective.after_step(tokenizer)
    torch.testing.assert_close(trunk.norm.weight, torch.full((32,), 1.25 + 0.125 * 0.75))
    tokenizer.trunk.requires_grad_(False)
    objective.progress, before = 0.0, trunk.norm.weight.clone()
    objective.after_step(tokenizer)
    assert torch.equal(trunk.norm.weight, before)
    objective.begin_stage(tokenizer, StageConfig("r", steps=1, weights={"l1": 1.0, "dino": 0.0}))
    assert torch.equal(trunk.norm.weight, before)
    objective.begin_stage(tokenizer, STAGE)
    assert torch.equal(trunk.norm.weight, tokenizer.trunk.norm.weight)


def test_centring_uses_the_centre_of_the_step_before(batch):
    tokenizer, objective = build(targets="centring")
    centres = objective.heads["centres"]
    first = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"dino"})).terms["dino"]
    assert centres.classes.abs().max() > 0 and centres.patches.abs().max() == 0
    second = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"dino"})).terms["dino"]
    assert not torch.equal(first, second)
    logits = torch.randn(6, 12)
    expected = ((logits - centres.classes) / 0.04).softmax(1)
    torch.testing.assert_close(objective.teacher_targets(logits, "classes"), expected)


def test_the_teachers_temperature_rises():
    _, objective = build(teacher_warmup=0.4)
    found = []
    for objective.progress in (0.0, 0.2, 0.4, 0.9):
        found.append(objective.teacher_temperature())
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_the_gan_is_scaled_to_the_reconstruction(batch):
    tokenizer, objective = build()
    active = frozenset({"l1", "gan"})
    terms = objective.generator_losses(tokenizer, batch, Draw(0), active).terms
    last = tokenizer.decoder.pixels.weight
    sizes = {k: torch.autograd.grad(v, last, retain_graph=True)[0].norm() for k, v in terms.items()}
    assert sizes["gan"] == pytest.approx(sizes["l1"].item(), rel=0.05)
    objective.cfg = replace(objective.cfg, gan_adaptive_max=1e-6)
    assert objective.generator_losses(tokenizer, batch, Draw(0), active).terms["gan"].abs() < 1e-5
    objective.cfg = replace(objective.cfg, gan_adaptive=False)
    plain = objective.generator_losses(tokenizer, batch, Draw(0), active).terms["gan"]
    assert torch.equal(plain, objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"gan"})).terms["gan"])


def test_contrast_learns_and_needs_captions(batch):
    tokenizer, objective = build(view_scale=(1.0, 1.0))
    active, optimizer = frozenset({"contrastive"}), torch.optim.Adam(tokenizer.parameters(), 3e-3)
    values = []
    for step in range(15):
        loss = objective.generator_losses(tokenizer, batch, Draw(0, step=step), active).terms["contrastive"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
    with pytest.raises(DataError, match=r"data.texts=true"):
        objective.generator_losses(tokenizer, replace(batch, texts=None), Draw(0), active)


@pytest.mark.parametrize("changes, told", [
    ({"targets": "none"}, "targets"), ({"ssl_share": 0.0}, "ssl_share"), ({"mask_ratios": (0.5, 0.1)}, "mask_ratios"),
    ({"crops": CropConfig(local_size=20)}, "local_size"), ({"view_scale": (0.0, 1.0)}, "view_scale"),
    ({"momentum": 1.1}, "momentum"),
])
def test_impossible_options_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        check_objective(replace(CONFIG, **changes), 8)


@pytest.mark.parametrize("options, told", [
    (["data.texts=false"], "data.texts"), (["objective.head=null"], "objective.head"),
    (["objective.discriminator_width=0"], "discriminator_width"), (["objective.lpips=none"], "objective.lpips"),
    (["stages.0.weights.nothing=1"], "no loss 'nothing'"), (["stages.0.objective.head=null"], "cannot change 'head'"),
])
def test_stages_whose_losses_lack_something_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        load_config("vtp/tiny", options)


def hashes(run):
    folder = newest_checkpoint(run)
    told = json.loads((folder / "manifest.json").read_text())["sha256"]
    return folder.name, {k: v for k, v in told.items() if k.endswith((".safetensors", ".pt"))}


@pytest.mark.slow
def test_a_resumed_run_has_the_same_teacher_bit_for_bit(tmp_path):
    pairs = write_shapes(tmp_path / "pairs")
    stages = ("[{name: a, steps: 4, lr: 1e-3, weights: {l1: 1, dino: 1, ibot: 1, contrastive: 1}}, "
              "{name: b, steps: 2, lr: 1e-3, parts: [decoder], weights: {l1: 1, gan: 0.5}}]")
    small = [f"model.{part}.{size}" for part in ("trunk", "decoder") for size in ("width=32", "depth=1", "heads=2")]
    crops = [f"objective.crops.{size}" for size in ("global_size=32", "local_size=16", "local_crops=2")]
    cfg = load_config("vtp/tiny", [
        f"data.train={pairs}", f"data.val={pairs}", f"out={tmp_path}/a", "data.size=32", "data.train_size=40",
        "model.image_size=32", "train.batch_size=4", "train.log_every=1", "train.checkpoint_every=2", "train.validate_every=0",
        "train.keep_last=9",
        "objective.targets=centring", "objective.lpips=none", *small, *crops, f"stages={stages}"])
    assert train(cfg).status == "finished"
    name, whole = hashes(tmp_path / "a/vtp-tiny")
    other = tmp_path / "b/vtp-tiny"
    shutil.copytree(tmp_path / "a/vtp-tiny", other)
    for step in (4, 6):      # step 2: in the middle of the first stage
        shutil.rmtree(other / f"checkpoints/step_{step:08d}")
    again = copy.deepcopy(cfg)
    again.out = f"{tmp_path}/b"
    assert train(again, resume="must").status == "finished"
    assert hashes(other) == (name, whole) and "training/objective.safetensors" in whole
    losses = [[json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (tmp_path / "a/vtp-tiny", other)]
    assert losses[0] == losses[1]
