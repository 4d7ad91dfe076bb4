"""Steps whose losses are finite but too large are skipped, the discriminators' by themselves, and resumed runs agree."""

import json
import math

import pytest
import torch
from runner import SHORT
from safetensors.torch import load_file

from tokenizers_lab.config import load_config
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.models.rectok.objective import RecTokObjective
from tokenizers_lab.settings import GuardConfig
from tokenizers_lab.training.guard import find_jump, too_large
from tokenizers_lab.training.loop import train

BASE = [*(o for o in SHORT if not o.startswith("stages")), "objective.teachers={}", "objective.lpips=none",
        "objective.logits_network=none", "train.validate_every=0", "train.checkpoint_every=1", "train.keep_last=9"]
PLAIN = "stages=[{name: train, steps: 6, lr: 1e-3, weights: {mse: 1.0, kl: 1e-6}}]"
GAN = "stages=[{name: train, steps: 4, lr: 1e-3, weights: {mse: 1.0, gan: 0.1}}]"


@pytest.fixture
def config(tmp_path):
    return lambda *options: load_config("rectok/tiny", [*BASE, f"out={tmp_path}", *options])


def enlarge(monkeypatch, steps, factor=20.0):
    """Make the mse of these steps larger."""
    real = RecTokObjective.generator_losses

    def losses(self, tokenizer, batch, draw, *rest):
        found = real(self, tokenizer, batch, draw, *rest)
        if draw.step in steps:
            found.terms["mse"] = found.terms["mse"] * factor
        return found

    monkeypatch.setattr(RecTokObjective, "generator_losses", losses)


def kept(run, step, name="raw"):
    return load_file(run / f"checkpoints/step_{step:08d}/training/{name}.safetensors")


def same(a, b, part=""):
    return all(torch.equal(a[k], b[k]) for k in a if k.startswith(part))


def test_a_jump_is_skipped_once_and_is_no_strike(config, monkeypatch):
    enlarge(monkeypatch, {2, 3})
    run = train(config(PLAIN, "train.guard.jump=10", "train.max_strikes=1")).folder
    moved = [not same(kept(run, step), kept(run, step + 1)) for step in range(1, 6)]      # by steps 1, 2, …, 5
    assert moved == [True, False, True, True, True]      # step 3 is as large as the one before it
    state = json.loads((run / "checkpoints/step_00000003/training/state.json").read_text())
    assert state["strikes"] == 0 and set(state["terms"]) == {"mse", "kl"} and not (run / "nonfinite").exists()


def test_it_looks_at_the_named_losses_and_begins_when_told(config, monkeypatch):
    enlarge(monkeypatch, {2})
    for number, option in enumerate(("train.guard.terms=[kl]", "train.guard.start=3", "train.guard.jump=30")):
        run = train(config(PLAIN, f"name=n{number}", "train.guard.jump=10", option)).folder
        assert not same(kept(run, 2), kept(run, 3)), option


def test_a_resumed_run_remembers_the_last_losses(config, monkeypatch):
    enlarge(monkeypatch, {2})
    run = train(config(PLAIN, "train.guard.jump=10")).folder
    end = kept(run, 6)
    for step in range(3, 7):      # the jump is the first step of the resumed run
        (run / f"checkpoints/step_{step:08d}").rename(run / f"aside-{step}")
    assert train(config(PLAIN, "train.guard.jump=10"), resume="must").status == "finished"
    assert same(end, kept(run, 6)) and same(kept(run, 2), kept(run, 3))


def test_discriminators_with_large_losses_do_not_move_but_the_generator_does(config):
    run = train(config(GAN, "train.guard={discriminator: 1e-9, start: 2}")).folder

    def moved(first, name, part):
        return not same(kept(run, first, name), kept(run, first + 1, name), part)

    names = [k for k in kept(run, 1, "objective") if k.startswith("discriminators.") and k.endswith("weight")]
    assert names and [any(moved(step, "objective", name) for name in names) for step in (1, 2, 3)] == [True, False, False]
    assert all(moved(step, "raw", "decoder.") for step in (1, 2, 3))


def test_the_rules_by_hand():
    cfg = GuardConfig(jump=10, discriminator=5, start=2)
    assert find_jump(cfg, {"l1": 11.0}, {"l1": 1.0}, 2) == "l1 is 11, 11.0 times what it was"
    for values, last, step in (({"l1": 10.0}, {"l1": 1.0}, 2), ({"l1": 11.0}, {"l1": 1.0}, 1), ({"l1": 11.0}, {}, 2),
                               ({"l1": 1.0}, {"l1": 1e-7}, 2), ({"l1": math.nan}, {"l1": 1.0}, 2)):
        assert find_jump(cfg, values, last, step) is None
    large, small = {"discriminator": torch.tensor(5.5)}, {"discriminator": torch.tensor(4.5)}
    assert too_large(cfg, large, 2) and not too_large(cfg, large, 1) and not too_large(cfg, small, 2)
    assert not too_large(GuardConfig(), large, 2)


def test_a_jump_of_less_than_one_is_refused(config):
    with pytest.raises(ConfigError, match=r"guard.jump.*above 1"):
        config(PLAIN, "train.guard.jump=0.5")
    with pytest.raises(ConfigError, match="discriminator must not be negative"):
        config(PLAIN, "train.guard.discriminator=-1")


def test_vfm_vaes_recipe_has_the_papers_guard_ramp_and_crops():
    strong, weak = (load_config(f"vfm_vae/imagenet256-{stage}") for stage in ("strong", "weak"))
    guard = strong.train.guard
    assert (guard.jump, guard.discriminator, guard.terms) == (10, 1e4, ["l1", "lpips", "ssim", "multiscale"])
    assert weak.train.guard == guard
    assert 50_000 <= guard.start * strong.train.batch_size < 51_000
    half_life = math.log(0.5) / math.log(strong.train.ema) * strong.train.batch_size
    assert half_life == pytest.approx(160_000, rel=0.01)
    assert (strong.train.ema_rampup, weak.train.ema_rampup) == (0.05, 0)      # the second stage goes on with the average
    assert (strong.data.crop, strong.data.crop_share, strong.data.crop_filter) == ("random", 0.5, "lanczos")
