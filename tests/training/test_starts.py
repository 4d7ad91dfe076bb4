"""What a run starts from: parts of other tokenizers, and copies that an objective makes when a stage begins."""

import pytest
import torch
from runner import SHORT
from safetensors.torch import load_file
from torch import nn

from tokenizers_lab.config import load_config
from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.hub import build_tokenizer
from tokenizers_lab.models.rectok.objective import RecTokObjective
from tokenizers_lab.network import read_config
from tokenizers_lab.training.checkpoint import newest_checkpoint
from tokenizers_lab.training.loop import train

PLAIN = [*(o for o in SHORT if not o.startswith("stages")), "objective.teachers={}", "objective.lpips=none",
         "objective.logits_network=none", "train.validate_every=0", "train.checkpoint_every=1", "train.keep_last=9"]
STAGES = "stages=[{name: a, steps: 2, lr: 1e-3, weights: {mse: 1.0}}, {name: b, steps: 2, lr: 1e-3, weights: {mse: 1.0}}]"


@pytest.fixture
def config(tmp_path):
    return lambda *options: load_config("rectok/tiny", [*PLAIN, STAGES, f"out={tmp_path}", *options])


def test_a_part_starts_from_another_tokenizers(config, tmp_path):
    torch.manual_seed(7)
    other = build_tokenizer("rectok", config().model)
    other.save_pretrained(tmp_path / "other")
    run = train(config(f"init_parts.decoder={tmp_path / 'other'}", "stages.0.lr=0", "stages.1.lr=0")).folder
    found = load_file(newest_checkpoint(run) / "training" / "raw.safetensors")
    wanted = other.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in found.items() if k.startswith("decoder."))
    assert not torch.equal(found["encoder.embed.weight"], wanted["encoder.embed.weight"])
    assert read_config(newest_checkpoint(run))["provenance"]["init_parts.decoder"] == f"decoder of {tmp_path / 'other'}"


def test_parts_that_are_nowhere_or_of_another_size_are_refused(config, tmp_path):
    build_tokenizer("rectok", config("model.decoder.width=64").model).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"init_parts: decoder of .*shape"):
        train(config(f"init_parts.decoder={tmp_path / 'wide'}"))
    with pytest.raises(ConfigError, match="names the part 'vocoder'"):
        train(config(f"init_parts.vocoder={tmp_path / 'wide'}"))


class Copying(RecTokObjective):
    """Keeps the encoder as it was when a stage began."""

    def __init__(self, cfg, model, **options):
        super().__init__(cfg, model, **options)
        self.copies["first"] = nn.Linear(3 * model.patch**2, model.encoder.width)

    def begin_stage(self, tokenizer, stage):
        embed = tokenizer.encoder.embed
        self.copies["first"].load_state_dict({"weight": embed.weight.flatten(1).detach(), "bias": embed.bias.detach()})


def test_copies_are_made_when_a_stage_begins_and_survive_a_resumed_run(config, monkeypatch):
    monkeypatch.setattr("tokenizers_lab.models.rectok.objective.RecTokObjective", Copying)
    run = train(config()).folder

    def kept(step, name):
        return load_file(run / f"checkpoints/step_{step:08d}/training/{name}.safetensors")

    encoder = {step: kept(step, "raw")["encoder.embed.weight"].flatten(1) for step in (2, 3)}
    assert not torch.equal(encoder[2], encoder[3])
    for step in (3, 4):
        assert torch.equal(kept(step, "objective")["copies.first.weight"], encoder[2])
    assert not torch.equal(kept(1, "objective")["copies.first.weight"], encoder[2])
    end = kept(4, "raw")
    for lost in ((4,), (3, 4)):      # goes on from the middle of stage b; then from the boundary, where it begins anew
        for step in lost:
            (run / f"checkpoints/step_{step:08d}").rename(run / f"set-aside-{len(lost)}-{step}")
        assert train(config(), resume="must").status == "finished"
        assert all(torch.equal(v, end[k]) for k, v in kept(4, "raw").items())
