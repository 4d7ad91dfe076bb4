"""The loop in this process: guard, strikes, limits, accumulation, checkpointing, starting weights."""

import json
import os
import signal

import pytest
import torch
from runner import SHORT
from safetensors import safe_open
from safetensors.torch import load_file

from tokenizers_lab.config import load_config
from tokenizers_lab.errors import CheckpointError, ConfigError, DataError, TrainingError
from tokenizers_lab.hub import load
from tokenizers_lab.models.rectok.objective import RecTokObjective
from tokenizers_lab.training import run as run_parts
from tokenizers_lab.training.checkpoint import newest_checkpoint, read_state
from tokenizers_lab.training.loop import train

# mse and KL alone, one stage: no teacher, no perceptual network, no GAN
PLAIN = [*(o for o in SHORT if not o.startswith("stages")), "objective.teachers={}", "objective.lpips=none",
         "objective.logits_network=none", "train.validate_every=0",
         "stages=[{name: train, steps: 4, lr: 1e-3, weights: {mse: 1.0, kl: 1e-6}}]"]


@pytest.fixture
def config(tmp_path):
    return lambda *options, base=PLAIN: load_config("rectok/tiny", [*base, f"out={tmp_path}", *options])


def weights(run, name="raw"):
    return load_file(newest_checkpoint(run) / "training" / f"{name}.safetensors")


def records(run, kind="train"):
    return [r for line in (run / "metrics.jsonl").read_text().splitlines() if (r := json.loads(line))["kind"] == kind]


def spoil(monkeypatch, steps):
    """Make the mse of these steps NaN."""
    real = RecTokObjective.generator_losses

    def losses(self, tokenizer, batch, draw, *rest):
        found = real(self, tokenizer, batch, draw, *rest)
        if draw.step in steps:
            found.terms["mse"] = found.terms["mse"] * float("nan")
        return found

    monkeypatch.setattr(RecTokObjective, "generator_losses", losses)


def test_a_non_finite_step_updates_nothing_and_keeps_its_batch(config, monkeypatch):
    cfg = config("train.checkpoint_every=1", "train.keep_last=9", "train.ema=0.5")
    spoil(monkeypatch, {1})
    run = train(cfg).folder
    before, after, later = (load_file(run / f"checkpoints/step_{s:08d}/training/raw.safetensors") for s in (1, 2, 3))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert any(not torch.equal(after[k], later[k]) for k in before)
    assert all(v.isfinite().all() for v in weights(run).values())
    kept = run / "nonfinite/step_00000001_rank_0.safetensors"
    with safe_open(kept, "pt") as file:
        assert len(file.metadata()["keys"].splitlines()) == 4 and file.get_tensor("0.images").shape == (4, 3, 32, 32)


def test_strikes_in_a_row_end_the_run(config, monkeypatch):
    spoil(monkeypatch, {1, 2, 3})
    with pytest.raises(TrainingError, match=r"3 steps in a row.*nonfinite"):
        train(config("train.max_strikes=3", "train.checkpoint_every=1"))
    spoil(monkeypatch, set())
    assert train(config("name=other")).status == "finished"


def test_accumulated_micro_batches_are_one_batch(config):
    # without randomness that depends on the micro-batch, two halves give the gradient of the whole
    quiet = ["model.variational=false", "objective.gamma=0", "objective.mask_ratio=0",
             "stages.0.weights={mse: 1.0}", "stages.0.steps=3"]
    whole = train(config("name=whole", "train.accumulate=1", *quiet))
    halves = train(config("name=halves", "train.accumulate=2", *quiet))
    a, b = weights(whole.folder), weights(halves.folder)
    start = train(config("name=start", *quiet[:-1], "stages.0.steps=1", "stages.0.lr=0")).folder
    moved = max((a[k] - v).abs().max() for k, v in weights(start).items())
    apart = max((a[k] - b[k]).abs().max() for k in a)
    assert moved > 1e-3 and apart < 1e-4, (moved, apart)


def test_activation_checkpointing_changes_nothing(config):
    plain, saving = (train(config(f"name=c{on}", f"train.activation_checkpointing={on}")).folder for on in ("false", "true"))
    a, b = weights(plain), weights(saving)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_only_the_named_parts_train_and_the_discriminator_starts_fresh(config):
    cfg = config("train.checkpoint_every=8", "train.keep_last=9", base=SHORT)
    run = train(cfg).folder
    first, second = (load_file(run / f"checkpoints/step_{s:08d}/training/raw.safetensors") for s in (8, 12))
    changed = {k.split(".")[0] for k in first if not torch.equal(first[k], second[k])}
    assert changed == {"decoder"}
    assert {r["stage"] for r in records(run)} == {"train", "decoder-finetune"}
    by_step = {r["step"]: r for r in records(run)}
    assert {"mse", "perceptual", "kl", "semantic"} <= by_step[1].keys() and "gan" not in by_step[1]
    assert {"gan", "discriminator"} <= by_step[6].keys()
    assert "kl" not in by_step[9] and "semantic" not in by_step[9]
    # what load() gives is the EMA, not the raw weights
    ema = load(str(run)).state_dict()
    assert any(not torch.equal(ema[k], second[k]) for k in second)


def test_time_limit_saves_and_a_resumed_run_ends(config):
    result = train(config("train.max_minutes=1e-9"))
    assert result.status == "out of time" and result.step == 0
    assert train(config(), resume="auto").status == "finished"
    assert train(config(), resume="must").step == 4      # nothing left to do


def test_starting_weights(config, tmp_path):
    first = train(config("name=first")).folder
    second = train(config("name=second", f"init_from={first}", "stages.0.lr=0", "train.ema=0.0")).folder
    start, end = load(str(first)).state_dict(), weights(second)
    assert all(torch.equal(start[k], end[k]) for k in start)
    with pytest.raises(CheckpointError, match=r"init_from.*shape"):
        train(config("name=third", f"init_from={first}", "model.latent_channels=8"))


def test_a_run_is_never_overwritten_nor_mixed_by_accident(config):
    train(config())
    with pytest.raises(TrainingError, match=r"--resume.*--fresh"):
        train(config())
    with pytest.raises(ConfigError, match=r"model.decoder.depth=1, not 2"):
        train(config("model.decoder.depth=2"), resume="must")
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(config("name=other"), resume="must")
    assert train(config(), resume="fresh").status == "finished"


def test_a_damaged_checkpoint_is_skipped_and_all_damaged_is_an_error(config):
    cfg = config("train.checkpoint_every=2", "train.keep_last=9")
    run = train(cfg).folder
    expected = weights(run)
    for step, outcome in ((4, "resumes"), (2, "refuses")):
        file = run / f"checkpoints/step_{step:08d}/training/optimizers.pt"
        file.write_bytes(file.read_bytes()[:-100])
        if outcome == "refuses":
            for other in (run / "checkpoints").glob("step_00000004"):
                (other / "manifest.json").unlink()
            with pytest.raises(CheckpointError, match="every checkpoint"):
                train(cfg, resume="must")
        else:
            with pytest.warns(UserWarning, match="damaged"):
                assert train(cfg, resume="must").step == 4
            assert all(torch.equal(expected[k], v) for k, v in weights(run).items())


def test_validation_keeps_the_best_checkpoint(config):
    run = train(config("train.validate_every=1", "train.checkpoint_every=100", "train.keep_last=1", "train.keep_best=1")).folder
    psnr = {r["step"]: r["psnr"] for r in records(run, "val")}
    best = max(psnr, key=psnr.__getitem__)
    kept = {int(p.name.removeprefix("step_")) for p in (run / "checkpoints").iterdir()}
    assert kept == {best, 4}
    assert read_state(run / f"checkpoints/step_{best:08d}")["validation"]["psnr"] == psnr[best]


def test_impossible_batches_and_missing_data(config, tmp_path):
    with pytest.raises(ConfigError, match=r"micro-batches|multiple"):
        train(config("train.batch_size=5", "train.accumulate=2"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        train(config(f"data.train={tmp_path / 'empty'}"))


def test_trackers(config, monkeypatch):
    monkeypatch.setattr("tokenizers_lab.training.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match="tensorboard and wandb"):
        train(config("train.trackers=[mlflow]"))
    with pytest.raises(ConfigError, match="pip install wandb"):
        train(config("train.trackers=[wandb]"))


def test_a_signal_while_validating_saves_and_the_resumed_run_validates_once(config, monkeypatch):
    real, calls = run_parts.validate, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) in (1, 3):      # in the middle of the run, then at its end
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(run_parts, "validate", interrupted)
    options = ("train.validate_every=2", "train.checkpoint_every=100")
    first = train(config(*options))
    assert (first.status, first.step, first.signal) == ("interrupted", 2, signal.SIGTERM)
    assert read_state(newest_checkpoint(first.folder))["validation"] == {}
    second = train(config(*options), resume="must")
    assert (second.status, second.step) == ("interrupted", 4)
    third = train(config(*options), resume="must")
    assert (third.status, third.step) == ("finished", 4)
    assert [r["step"] for r in records(first.folder, "val")] == [2, 4]
    assert "psnr" in read_state(newest_checkpoint(first.folder))["validation"]
    assert train(config(*options), resume="must").status == "finished" and len(calls) == 4


def test_a_resumed_run_is_the_same_run(config):
    train(config("train.checkpoint_every=2"))
    with pytest.raises(ConfigError, match=r"stages.0.lr=0.001, not 0.1"):
        train(config("stages.0.lr=0.1"), resume="must")
    with pytest.raises(ConfigError, match=r"train.best must be one of psnr, ssim"):
        train(config("train.best=pnsr"), resume="must")


def test_damaged_newer_checkpoints_do_not_push_out_whole_ones(config):
    cfg = config("train.checkpoint_every=1", "train.keep_last=1", "train.keep_best=0")
    run = train(config("train.checkpoint_every=1", "train.keep_last=9")).folder
    for step in (3, 4):
        (run / f"checkpoints/step_{step:08d}/manifest.json").unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert train(cfg, resume="must").step == 4
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == ["damaged-step_00000003", "damaged-step_00000004", "step_00000004"]


@pytest.mark.slow
def test_compiled_parts_follow_the_stages(config):
    stage = "steps: 1, lr: 1e-3, weights: {mse: 1.0}"
    stages = f"stages=[{{name: a, parts: [decoder], {stage}}}, {{name: b, {stage}}}]"
    plain, compiled = (train(config(f"name=c{on}", f"train.compile={on}", stages)).folder for on in ("false", "true"))
    a, b = weights(plain), weights(compiled)
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)
    first = load(str(plain / "checkpoints/step_00000001")).state_dict()
    assert any(not torch.equal(first[k], b[k]) for k in b if k.startswith("encoder."))      # stage b trains the encoder
