"""Losses of VFM-VAE beyond the parity folder: equivariance, augmentation, discriminators, the alignment's adaptive weight."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.discriminators.augment import augment, cut, translate
from tokenizers_lab.discriminators.multiscale_patchgan import logit_loss
from tokenizers_lab.discriminators.projected import JudgeFeatures
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.losses.alignment import adaptive_weight, distance_matrix_loss, marginal_cosine_loss
from tokenizers_lab.losses.equivariance import SCALES, Change, draw_change, scale_and_turn
from tokenizers_lab.models.vfm_vae.config import (
    JudgeConfig,
    ModelConfig,
    ObjectiveConfig,
    QuantizerConfig,
    VFMConfig,
    check_objective,
)
from tokenizers_lab.models.vfm_vae.model import VFMVAE
from tokenizers_lab.models.vfm_vae.objective import VFMVAEObjective

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8, "intermediate_size": 48, **TINY}
DINO = {"model_type": "dinov2", "image_size": 32, "patch_size": 8, "mlp_ratio": 2, **TINY}
SMALL = ModelConfig(
    image_size=64, downsample=8, latent_channels=8, vfm=VFMConfig(config=SIGLIP, scale=1.0, layers=[0, -1]), widths=[8, 8],
    expansion=4, code=24, blocks=5, channel_base=1536, channel_max=24, res_blocks=1, latent_widths=[64, 16, 16, 8],
    attention_blocks=[0], attention_depths=[1],
)
JUDGE = JudgeConfig(backend="random", config=DINO, layers=[1, 2, 3, 0], size=32)
CFG = ObjectiveConfig(lpips="none", judge=JUDGE, patchgan=True, patchgan_width=4, multiscale_weights=[0.1] * 4,
                      adaptive={"l1": 1.0, "multiscale": 1.0})
ACTIVE = frozenset({"l1", "l2", "ssim", "multiscale", "kl", "vf", "gan", "patchgan", "feature_matching"})


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return VFMVAE(SMALL).train(), VFMVAEObjective(CFG, SMALL).train()


@pytest.fixture(scope="module")
def batch():
    return ImageBatch(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), [])


def test_every_term_is_there_and_only_the_right_parameters_have_gradients(parts, batch):
    tokenizer, objective = parts
    judged = []
    losses = objective.generator_losses(tokenizer, batch, Draw(0), ACTIVE, lambda real, fake: judged.append((real, fake)))
    assert losses.terms.keys() == ACTIVE and all(t.isfinite() for t in losses.terms.values()) and len(judged) == 1
    sum(losses.terms.values()).backward()
    assert tokenizer.encoder.fuse.blocks[0].mlp.w2.weight.grad.any() and objective.heads["vf"].weight.grad.any()
    assert all(p.grad is None for p in [*tokenizer.vfm.parameters(), *objective.discriminators.parameters()])
    found = objective.discriminator_losses(losses.real, losses.fake.detach())
    assert found.terms.keys() == {"discriminator", "patchgan"}
    sum(found.terms.values()).backward()
    assert all(p.grad is not None for p in objective.discriminators.parameters())
    assert all(p.grad is None for p in objective.frozen.parameters())


def test_one_draw_gives_one_result(parts, batch):
    tokenizer, objective = parts
    active = frozenset({"l1", "vf"})
    one, two, three = (objective.generator_losses(tokenizer, batch, Draw(seed), active).terms for seed in (3, 3, 4))
    assert one["l1"] == two["l1"] != three["l1"] and one["vf"] == two["vf"]


def test_the_target_changes_as_the_output_does(parts, batch, monkeypatch):
    tokenizer, objective = parts
    for change in (Change(0.5, 1, True), Change(0.5), Change(1.0, 3, True)):
        monkeypatch.setattr(objective, "draw_change", lambda *given, change=change: change)
        made = objective.autoencode(tokenizer, batch.images, Draw(0))
        assert made.images[0].shape == made.target.shape == (2, 3, int(64 * change.scale), int(64 * change.scale))
        assert made.latents.shape[2] == (8 if change.of_latents else 4)
        torch.testing.assert_close(made.target, scale_and_turn(batch.images, change.scale, change.turns, antialias=True))


def test_changes_are_drawn_as_often_as_said():
    drawn = [draw_change(Draw(0, step=i), 0.5, 0.25, (16, 16)) for i in range(2000)]
    latents = [c for c in drawn if c.of_latents]
    assert len(latents) / 2000 == pytest.approx(0.5, abs=0.04)
    assert {c.scale for c in latents} == set(SCALES) and {c.turns for c in latents} == {0, 1, 2, 3}
    others = [c for c in drawn if not c.of_latents]
    assert sum(c.scale < 1 for c in others) / len(others) == pytest.approx(0.25, abs=0.04) and not any(c.turns for c in others)
    assert {draw_change(Draw(1, step=i), 1.0, 0.0, (8, 6), smallest=3).scale for i in range(50)} == {0.5, 1.0}


def test_quarter_turns_are_clockwise():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert scale_and_turn(x, 1.0, 1).flatten().tolist() == [2, 0, 3, 1]


def test_alignment_losses_are_their_definitions():
    torch.manual_seed(0)
    a, u = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 2, 3)
    rows_a, rows_u = (F.normalize(t.flatten(2).transpose(1, 2), dim=-1) for t in (a, u))
    differences = torch.stack([(x @ x.T - y @ y.T).abs() for x, y in zip(rows_a, rows_u)])
    torch.testing.assert_close(distance_matrix_loss(a, u), differences.mean())
    torch.testing.assert_close(distance_matrix_loss(a, u, 0.2), (differences - 0.2).clamp(0).mean())
    torch.testing.assert_close(marginal_cosine_loss(a, u, 0.1), (0.9 - (rows_a * rows_u).sum(-1)).clamp(0).mean())


def test_the_distance_matrix_needs_no_tensor_of_pairs_and_channels():
    """Nothing that it computes is larger than one matrix of pairs of positions, with its gradient too."""
    features, latents = torch.randn(1, 48, 20, 30), torch.randn(1, 8, 20, 30, requires_grad=True)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            found = function(*arguments, **(options or {}))
            sizes.extend(t.untyped_storage().nbytes() // 4 for t in [found] if isinstance(t, torch.Tensor))
            return found

    with Sizes():
        distance_matrix_loss(features, latents).backward()
    assert max(sizes) == 600**2 and latents.grad.any()


def test_the_adaptive_weight_evens_out_gradients():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adaptive_weight(6 * w.sum(), 2 * w.sum(), w)
    assert weight.item() == pytest.approx(3, rel=1e-3) and not weight.requires_grad


def test_augmentation_shifts_and_cuts_where_it_says():
    x = torch.arange(1.0, 17).view(1, 1, 4, 4).repeat(2, 1, 1, 1)
    moved = translate(x, torch.tensor([1, 0]), torch.tensor([0, -2]))
    assert torch.equal(moved[0, 0, :3], x[0, 0, 1:]) and not moved[0, 0, 3].any()
    assert torch.equal(moved[1, 0, :, 2:], x[1, 0, :, :2]) and not moved[1, 0, :, :2].any()
    holes = cut(x, torch.tensor([1, 4]), torch.tensor([2, 0]), 2, 2) == 0
    assert holes[0, 0].nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert holes[1, 0].nonzero().tolist() == [[3, 0]]      # beyond the edge, the edge line goes
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    found = augment(images, Draw(0))
    found.sum().backward()
    assert found.shape == images.shape and images.grad.isfinite().all() and (found == 0).any()
    assert torch.equal(augment(images, Draw(0)), found) and not torch.equal(augment(images, Draw(1)), found)


def test_the_judge_sees_patches_with_the_class_token_added(parts):
    judge: JudgeFeatures = parts[1].frozen["judge"]
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    found = judge(x)
    assert [tuple(f.shape) for f in found] == [(2, 32, 16)] * 4 and not judge.training
    found[0].sum().backward()
    assert x.grad.any() and all(p.grad is None for p in judge.parameters())
    with pytest.raises(ValueError, match="no loss"):
        logit_loss(torch.zeros(2), "real", "l1")


def test_a_discrete_latent_has_the_quantizers_terms(batch):
    torch.manual_seed(0)
    model = replace(SMALL, latent="vq", quantizer=QuantizerConfig(codebooks=4, size=64))
    tokenizer = VFMVAE(model).train()
    objective = VFMVAEObjective(replace(CFG, judge=None, patchgan=False), model)
    terms = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"l1", "quantizer", "entropy"})).terms
    sum(terms.values()).backward()
    assert set(terms) == {"l1", "quantizer", "entropy"} and tokenizer.quantizer.weight.grad.any()


@pytest.mark.parametrize("changes", [
    {"lpips": "resnet"}, {"patchgan_loss": "l1"}, {"patchgan_layers": 0}, {"equivariance_scale": 1.5}, {"adaptive": {"kl": 1.0}},
])
def test_unusable_options_are_refused(changes):
    with pytest.raises(ConfigError):
        check_objective(replace(CFG, **changes))


def test_the_judge_needs_a_width_where_it_is_not_built():
    with pytest.raises(ConfigError, match="judge_widths"):
        VFMVAEObjective(CFG, SMALL, build_frozen=False)
