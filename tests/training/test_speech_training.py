"""The loop with speech: discriminators that learn first, held-out metrics, the guard."""

import json

import pytest
import torch
from runner import DM_CODEC
from safetensors.torch import load_file

from tokenizers_lab.config import load_config
from tokenizers_lab.models.dm_codec.objective import DMCodecObjective
from tokenizers_lab.training.checkpoint import newest_checkpoint
from tokenizers_lab.training.loop import train

STAGE = "stages=[{{name: a, steps: {}, lr: 1e-3, weights: {{waveform: 500, {}: 1}}}}]"


@pytest.fixture
def config(tmp_path):
    options = [*DM_CODEC[:-1], "objective.guidance=sm", "objective.speech_teacher.backend=none", f"out={tmp_path}",
               "train.validate_every=0", "data.val=null"]
    return lambda *more: load_config("dm_codec/tiny", [*options, *more])


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def saved(run, name, prefix=""):
    state = load_file(newest_checkpoint(run) / "training" / f"{name}.safetensors")
    return torch.cat([v.flatten() for k, v in sorted(state.items()) if k.startswith(prefix)])


@pytest.mark.parametrize("first", [True, False])
def test_the_generator_is_judged_by_discriminators_that_have_learned_first(config, monkeypatch, first):
    seen = {"learning": [], "judging": []}
    learn, judge = DMCodecObjective.discriminator_losses, DMCodecObjective.adversarial

    def learning(self, *arguments):
        seen["learning"].append(flat(self.discriminators))
        return learn(self, *arguments)

    def judging(self, *arguments):
        seen["judging"].append(flat(self.discriminators))
        return judge(self, *arguments)

    monkeypatch.setattr(DMCodecObjective, "discriminators_first", first)
    monkeypatch.setattr(DMCodecObjective, "discriminator_losses", learning)
    monkeypatch.setattr(DMCodecObjective, "adversarial", judging)
    run = train(config(STAGE.format(2, "gan"))).folder
    same = [torch.equal(a, b) for a, b in zip(seen["learning"], seen["judging"])]
    assert len(same) == 2 and all(same) != first and any(same) != first
    assert not torch.equal(seen["learning"][0], seen["learning"][1])      # they learn in every step
    assert saved(run, "objective", "discriminators.").isfinite().all()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_feature_matching_alone_trains_the_discriminators(config, accumulate):
    plain, matched = (train(config(f"name={term}", f"train.accumulate={accumulate}", STAGE.format(2, term))).folder
                      for term in ("mel", "feature_matching"))
    assert not torch.equal(saved(plain, "objective", "discriminators."), saved(matched, "objective", "discriminators."))
    rows = [json.loads(line) for line in (matched / "metrics.jsonl").read_text().splitlines()]
    assert all(row["discriminator_grad_norm"] > 0 for row in rows)


def test_a_bad_batch_moves_neither_side(config, monkeypatch):
    real = DMCodecObjective.autoencode

    def spoiled(self, tokenizer, audio, draw):
        made = real(self, tokenizer, audio, draw)
        if draw.step == 1:
            made.reconstruction = made.reconstruction * float("nan")
        return made

    monkeypatch.setattr(DMCodecObjective, "autoencode", spoiled)
    run = train(config(STAGE.format(3, "gan"), "train.checkpoint_every=1", "train.keep_last=9")).folder
    folders = [run / f"checkpoints/step_{step:08d}/training" for step in (1, 2, 3)]
    for name in ("raw", "objective"):
        before, after, later = (load_file(folder / f"{name}.safetensors") for folder in folders)
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert any(not torch.equal(after[k], later[k]) for k in before)


def test_held_out_speech_is_measured_and_the_least_mel_distance_is_the_best(config):
    run = train(config(STAGE.format(3, "mel"), "data.val=sample:speech", "train.validate_every=1", "train.keep_last=1",
                       "train.keep_best=1", "train.checkpoint_every=100")).folder
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mel = {row["step"]: row["mel"] for row in rows if row["kind"] == "val"}
    assert len(mel) == 3 and all({"mel", "sisdr"} <= row.keys() for row in rows if row["kind"] == "val")
    kept = {int(folder.name.removeprefix("step_")) for folder in (run / "checkpoints").iterdir()}
    assert kept == {min(mel, key=mel.__getitem__), 3}
