"""RecTok's losses: which terms there are, what they see, where their gradients go."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.diffusion import flow
from tokenizers_lab.distillation import feature_distance
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.models.rectok.config import TERMS, ModelConfig, ObjectiveConfig, ViTConfig, check_objective
from tokenizers_lab.models.rectok.model import RecTok
from tokenizers_lab.models.rectok.objective import RecTokObjective
from tokenizers_lab.teachers.vision_config import VisionTeacherConfig

SMALL = ModelConfig(image_size=32, patch=8, latent_channels=6, encoder=ViTConfig(32, 1, 4), decoder=ViTConfig(32, 1, 4))
DINO = {
    "model_type": "dinov3_vit", "hidden_size": "16", "intermediate_size": "24", "num_hidden_layers": "1",
    "num_attention_heads": "2", "patch_size": "8", "image_size": "32",
}
TEACHERS = {"a": VisionTeacherConfig("random", config=DINO),
            "b": VisionTeacherConfig("random", config={**DINO, "hidden_size": "24"})}
CONFIG = ObjectiveConfig(
    teachers={"a": TEACHERS["a"]}, semantic_decoder=ViTConfig(16, 1, 2), lpips="none", logits_network="none",
    discriminator_width=4, discriminator_layers=2, mask_ratio=0.5, mask_ratio_type="fixed",
)
ALL = frozenset({"mse", "kl", "semantic", "gan"})


def build(**changes):
    torch.manual_seed(0)
    tokenizer = RecTok(SMALL)
    return tokenizer.train(), RecTokObjective(replace(CONFIG, **changes), SMALL).train()


@pytest.fixture
def batch():
    return ImageBatch(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), ["a", "b"])


def test_only_active_terms_are_computed(batch):
    tokenizer, objective = build()
    for active in (ALL, frozenset({"mse"}), frozenset({"semantic", "kl"}), frozenset()):
        losses = objective.generator_losses(tokenizer, batch, Draw(0), active)
        assert losses.terms.keys() == active
        assert all(t.dim() == 0 and t.dtype == torch.float32 for t in losses.terms.values())
        assert losses.fake.shape == losses.real.shape == batch.images.shape and losses.fake.requires_grad
    assert losses.logs["masked"] == 0.5 and 0 < losses.logs["time"] < 1


def test_gradients_reach_tokenizer_and_heads_but_neither_teacher_nor_discriminator(batch):
    tokenizer, objective = build()
    losses = objective.generator_losses(tokenizer, batch, Draw(0), ALL)
    sum(losses.terms.values()).backward()
    assert all(p.grad is not None for p in [*tokenizer.parameters(), *objective.heads.parameters()])
    assert all(p.grad is None for p in [*objective.frozen.parameters(), *objective.discriminators.parameters()])
    assert all(p.requires_grad for p in objective.discriminators.parameters())
    assert not objective.frozen["teacher_a"].training and objective.discriminators.training
    judged = objective.discriminator_losses(losses.real, losses.fake.detach())
    judged.terms["discriminator"].backward()
    assert all(p.grad is not None for p in objective.discriminators.parameters())


def test_the_same_draws_give_the_same_losses(batch):
    tokenizer, objective = build(mask_ratio_type="random")

    def losses(draw):
        return objective.generator_losses(tokenizer, batch, draw, frozenset({"mse", "semantic"})).terms

    first, again, other = losses(Draw(0, step=1)), losses(Draw(0, step=1)), losses(Draw(0, step=2))
    assert all(torch.equal(first[k], again[k]) and not torch.equal(first[k], other[k]) for k in first)


def test_mask_ratios_follow_the_config():
    _, objective = build(mask_ratio_type="random", mask_ratio=0.4, mask_ratio_min=-0.1)
    hidden = torch.tensor([objective.draw_mask(2, 100, Draw(0, step=s)).masked.shape[1] for s in range(300)]) / 100
    assert hidden.max() <= 0.4 and 0.1 < (hidden == 0).float().mean() < 0.3      # a fifth of U(−0.1, 0.4) is below 0
    _, objective = build(mask_ratio=0.3)
    assert objective.draw_mask(2, 100, Draw(0)).masked.shape[1] == 30
    _, objective = build(mask_ratio=0.0)
    assert objective.draw_mask(2, 100, Draw(0)) is None


def test_a_stage_may_turn_noise_and_mask_off(batch):
    tokenizer, objective = build()
    made = objective.autoencode(tokenizer, batch.images, Draw(0))
    assert made.mask is not None and made.time.shape == (2, 1, 1) and made.latents.shape == (2, 8, 6)
    noise = Draw(0).normal("noise", (2, 8, 6))
    torch.testing.assert_close(made.noised, (1 - made.time) * made.latents + made.time * noise)
    objective.cfg = replace(objective.cfg, gamma=2.0)
    louder = objective.autoencode(tokenizer, batch.images, Draw(0))
    torch.testing.assert_close(louder.noised - made.noised, made.time * noise)
    objective.cfg = replace(objective.cfg, gamma=0.0, mask_ratio=0.0)
    made = objective.autoencode(tokenizer, batch.images, Draw(0))
    assert made.mask is None and made.time is None and made.noised is made.latents
    assert not torch.equal(made.latents, made.posterior.mean)      # still a draw from the posterior


@pytest.mark.parametrize("schedule", ["shift", "lognorm", "uniform"])
def test_noise_schedules(batch, schedule):
    tokenizer, objective = build(noise_schedule=schedule)
    times = torch.cat([objective.autoencode(tokenizer, batch.images, Draw(0, step=s)).time.flatten() for s in range(100)])
    assert times.min() >= 0 and times.max() <= 1
    shift = math.sqrt(16 * 6 / 4096)      # of this grid and width; mean of the shifted uniform in closed form
    expected = {"uniform": 0.5, "lognorm": 0.5, "shift": shift * (shift - 1 - math.log(shift)) / (shift - 1) ** 2}[schedule]
    assert times.mean() == pytest.approx(expected, abs=0.05)
    spread = {"uniform": 1 / math.sqrt(12), "lognorm": 0.208}.get(schedule)
    assert spread is None or times.std() == pytest.approx(spread, abs=0.04)


def test_time_functions_in_closed_form():
    u = torch.linspace(0, 1, 5)
    assert torch.equal(flow.shift_time(u, 1.0), u)
    torch.testing.assert_close(flow.shift_time(torch.tensor(0.5), 3.0), torch.tensor(0.75))
    assert flow.resolution_shift(256 * 128) == pytest.approx(math.sqrt(8))
    torch.testing.assert_close(flow.lognorm_time(torch.tensor(0.0)), torch.tensor(0.5))
    with pytest.raises(ValueError, match="unknown noise schedule"):
        flow.sample_time(Draw(0), (1,), "cosine")


def test_semantic_losses_of_several_teachers_are_averaged(batch):
    tokenizer, objective = build(teachers=TEACHERS)
    made = objective.autoencode(tokenizer, batch.images, Draw(0))
    singles = [feature_distance(*objective.semantic_pair(name, made), "cosine") for name in ("a", "b")]
    torch.testing.assert_close(objective.semantic(made), (singles[0] + singles[1]) / 2)
    assert objective.semantic_pair("b", made)[1].shape == (2, 16, 24)
    assert set(objective.provenance()) == {"teacher.a", "teacher.b"}
    assert all("random weights" in text for text in objective.provenance().values())


def test_the_clean_sample_can_be_the_semantic_decoders_input(batch):
    tokenizer, objective = build()
    made = objective.autoencode(tokenizer, batch.images, Draw(0))
    noisy = objective.semantic_pair("a", made)[1]
    objective.cfg = replace(objective.cfg, semantic_input="clean")
    clean = objective.semantic_pair("a", made)[1]
    assert not torch.equal(noisy, clean)
    assert torch.equal(clean, objective.heads["semantic_a"](made.latents, made.grid, made.mask))


def test_reconstruction_target_counts_masked_tokens_only(batch):
    tokenizer, objective = build(semantic_target="reconstruction")
    made = objective.autoencode(tokenizer, batch.images, Draw(0))
    target, prediction = objective.semantic_pair("a", made)
    features = objective.frozen["teacher_a"].features(batch.images, (4, 4))
    assert prediction.shape == target.shape == (2, 8, 16)
    assert all(torch.equal(target[i], features[i, made.mask.masked[i]]) for i in range(2))


@pytest.mark.parametrize("mask", [{"mask_ratio": 0.0}, {"mask_ratio": 0.01, "mask_ratio_min": -5.0, "mask_ratio_type": "random"}])
def test_reconstruction_target_without_masked_tokens_is_no_loss_but_keeps_the_graph(batch, mask):
    tokenizer, objective = build(semantic_target="reconstruction", **mask)
    loss = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"semantic"})).terms["semantic"]
    loss.backward()
    gradients = [p.grad for p in objective.heads.parameters() if p.grad is not None]
    assert loss.item() == pytest.approx(0, abs=1e-6) and len(gradients) > 10
    assert max(g.abs().max() for g in gradients) < 1e-6


def test_an_mlp_decoder_predicts_each_token_alone(batch):
    tokenizer, objective = build(semantic_kind="mlp", mask_ratio=0.0)
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"semantic"}))
    losses.terms["semantic"].backward()
    assert [tuple(p.shape) for p in objective.heads["semantic_a"].parameters()] == [(24, 6), (24,), (16, 24), (16,)]
    assert all(p.grad is not None for p in objective.heads.parameters())


def test_feature_distances():
    a, b = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[2.0, 0.0], [3.0, 0.0]]])
    assert feature_distance(a, b, "cosine").item() == 0.5
    assert feature_distance(a, b, "l2").item() == (1 + 0 + 9 + 4) / 4
    assert feature_distance(a, b, "l1").item() == (1 + 0 + 3 + 2) / 4
    with pytest.raises(ValueError, match="unknown distillation loss"):
        feature_distance(a, b, "huber")


class Constant(nn.Module):
    """A perceptual network that gives a set distance, times the mean of the first image."""

    provenance = "test"

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, y):
        return self.value * x.mean((1, 2, 3))


def test_the_perceptual_loss_is_the_weighted_mean_of_its_networks(batch):
    tokenizer, objective = build()
    objective.cfg = replace(objective.cfg, lpips="vgg", logits_network="convnext_small")
    objective.frozen.update({"lpips": Constant(2.0), "logits": Constant(7.0)})
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"perceptual"}))
    torch.testing.assert_close(losses.terms["perceptual"], (1.0 * 2 + 0.1 * 7) / 1.1 * losses.fake.mean())
    objective.cfg = replace(objective.cfg, lpips="none")
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"perceptual"}))
    torch.testing.assert_close(losses.terms["perceptual"], 7 * losses.fake.mean())


def test_adversarial_losses_are_hinge_losses_and_see_real_images_first(batch):
    tokenizer, objective = build()
    discriminator = objective.discriminators["patchgan"]
    seen = []
    discriminator.register_forward_hook(lambda module, args, out: seen.append((args[0].detach(), out.detach())))
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"gan"}))
    assert torch.equal(seen[0][0], losses.fake) and torch.equal(losses.terms["gan"], -seen[0][1].mean())
    judged = objective.discriminator_losses(losses.real, losses.fake.detach())
    assert torch.equal(seen[1][0], batch.images) and torch.equal(seen[2][0], losses.fake)
    expected = 0.5 * (F.relu(1 - seen[1][1]).mean() + F.relu(1 + seen[2][1]).mean())
    torch.testing.assert_close(judged.terms["discriminator"], expected)
    assert discriminator.main[3].num_batches_tracked == 3


def test_frozen_networks_are_not_among_what_is_saved(batch):
    _, objective = build()
    saved = [k for k in objective.state_dict() if not k.startswith("frozen.")]
    assert saved and all(k.startswith(("heads.semantic_a.", "discriminators.patchgan.")) for k in saved)


def test_without_frozen_networks_the_teachers_widths_must_be_told():
    objective = RecTokObjective(CONFIG, SMALL, build_frozen=False, teacher_widths={"a": 16})
    assert not objective.frozen and objective.provenance() == {}
    with pytest.raises(ConfigError, match="teacher_widths"):
        RecTokObjective(CONFIG, SMALL, build_frozen=False)


def test_the_tiny_recipe_has_every_loss_with_real_networks():
    from tokenizers_lab.config import load_config

    cfg = load_config("rectok/tiny")
    tokenizer, objective = RecTok(cfg.model).train(), RecTokObjective(cfg.objective, cfg.model).train()
    batch = ImageBatch(torch.rand(2, 3, cfg.data.size, cfg.data.size), ["a", "b"])
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset(TERMS))
    assert set(losses.terms) == set(TERMS) and all(t.isfinite() for t in losses.terms.values())
    for name in ("perceptual", "semantic"):
        tokenizer.zero_grad()
        losses.terms[name].backward(retain_graph=True)
        assert tokenizer.encoder.embed.weight.grad.abs().sum() > 0, name
    sources = objective.provenance()
    assert set(sources) == {"teacher.lite0", "lpips", "logits"} and "stands in" in sources["logits"]
    assert not any("random" in source for source in sources.values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"noise_schedule": "shifted"}, "noise_schedule must be one of shift, lognorm, uniform"),
    ({"semantic_kind": "mlp"}, "mask_ratio=0"),
    ({"logits_network": "teacher", "teachers": {}}, "teachers is empty"),
    ({"teachers": {"a.b": TEACHERS["a"]}}, "no dots"),
    ({"mask_ratio": 1.0}, "mask_ratio < 1"),
    ({"gamma": -1.0}, "gamma"),
    ({"semantic_decoder": ViTConfig(18, 1, 3)}, "multiple of 4"),
])
def test_impossible_objectives_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_objective(replace(CONFIG, **changes))


@pytest.mark.parametrize(("override", "message"), [
    ("stages.0.weights.mpe=1", "has no loss 'mpe'"),
    ("objective.teachers={}", "teachers is empty"),
    ("data.size=60", "multiple of model.patch"),
    ("model.variational=false", "kl needs model.variational"),
    ("stages.0.objective.noise_schedule=never", "stages.0.objective.noise_schedule must be one of"),
    ("objective.semantic_loss=cosin", "semantic_loss must be one of"),
])
def test_a_run_that_cannot_work_is_refused_when_its_config_is_read(override, message):
    from tokenizers_lab.config import load_config

    with pytest.raises(ConfigError, match=message):
        load_config("rectok/tiny", [override])
    assert set(load_config("rectok/tiny").stages[0].weights) == set(TERMS)      # every loss of the paper
