"""LM-SPT's losses: which terms there are, what they see, where their gradients go; and its parity function on other options."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.models.lm_spt.config import (
    TERMS,
    AuxiliaryConfig,
    ModelConfig,
    ObjectiveConfig,
    TeacherConfig,
    check_objective,
)
from tokenizers_lab.models.lm_spt.convert import discriminator_name, to_official
from tokenizers_lab.models.lm_spt.model import LMSPT
from tokenizers_lab.models.lm_spt.objective import LMSPTObjective
from tokenizers_lab.models.lm_spt.parity import WEIGHTS, compute

MODEL = ModelConfig(
    strides=[4, 5, 6, 2], decoder_strides=[2, 6, 5, 4], semantic_width=2, acoustic_width=2, decoder_width=32, latent=8,
    codebooks=4, semantic_size=32, semantic_dim=4, acoustic_size=16, acoustic_dim=4,
    auxiliary=AuxiliaryConfig(width=16, strides=[8, 5, 4]),
)
TEACHER = {"d_model": "8", "encoder_layers": "1", "encoder_attention_heads": "2", "encoder_ffn_dim": "16", "num_mel_bins": "20"}
CONFIG = ObjectiveConfig(
    teacher=TeacherConfig(backend="random", config=TEACHER), teacher_seconds=0.5, mel_bands=[10, 20], mel_windows=[256, 512],
    mpd_periods=[2, 3], mpd_channels=[2, 2, 2, 2, 2], msd_rates=[2], msd_channels=[2] * 6, msd_groups=[1] * 6,
    mrd_windows=[512, 256], mrd_channels=2,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(model=MODEL, **changes):
    torch.manual_seed(0)
    return LMSPT(model).train(), LMSPTObjective(replace(CONFIG, **changes), model).train()


@pytest.fixture
def batch():
    return SimpleNamespace(audio=torch.rand(4, 1, 2400, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8)


def parts_with_gradient(tokenizer):
    """Parts whose parameters got a gradient other than 0."""
    found = {name.split(".")[0] if not name.startswith("quantizer") else ".".join(name.split(".")[:2])
             for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    tokenizer.zero_grad()
    return found


def test_only_active_terms_are_computed(batch):
    tokenizer, objective = build()
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset(TERMS))
    assert set(losses.terms) == set(TERMS) and all(t.dim() == 0 and t.isfinite() for t in losses.terms.values())
    assert losses.fake.shape == losses.real.shape == batch.audio.shape
    assert set(losses.logs) == {f"{part}_{what}" for part in ("acoustic", "semantic") for what in ("usage", "perplexity")}
    for name in TERMS:
        assert set(objective.generator_losses(tokenizer, batch, Draw(0), frozenset({name})).terms) == {name}


def test_where_gradients_go(batch):
    tokenizer, objective = build()
    semantic = {"semantic_encoder", "quantizer.semantic"}
    expected = {
        "mel": semantic | {"acoustic_encoder", "quantizer.acoustic", "decoder"},
        "acoustic_commitment": semantic | {"acoustic_encoder", "quantizer.acoustic"},      # through the subtraction
        "distill": semantic | {"aux_decoder"},
        "semantic_commitment": semantic,
        "semantic_codebook": {"quantizer.semantic"},
    }
    for name, parts in expected.items():
        objective.generator_losses(tokenizer, batch, Draw(0), frozenset({name})).terms[name].backward()
        assert parts_with_gradient(tokenizer) == parts, name
    for name in ("gan", "feature_matching"):
        objective.generator_losses(tokenizer, batch, Draw(0), frozenset({name})).terms[name].backward()
        assert parts_with_gradient(tokenizer) == expected["mel"]
        assert all(p.grad is None and p.requires_grad for p in objective.discriminators.parameters())
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset())
    objective.discriminator_losses(losses.real, losses.fake).terms["discriminator"].backward()
    assert parts_with_gradient(tokenizer) == set()
    assert all(p.grad is not None for p in objective.discriminators.parameters())
    assert all(p.grad is None for p in objective.frozen.parameters())


def test_adversarial_terms_are_sums_over_the_members(batch):
    tokenizer, objective = build()
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset(TERMS))
    reals, fakes = (objective.discriminators["dac"](x) for x in (losses.real, losses.fake))
    assert [len(judged.features) for judged in fakes] == [6, 6, 7, 26, 26]
    torch.testing.assert_close(losses.terms["gan"], sum(((1 - f.features[-1]) ** 2).mean() for f in fakes))
    matching = sum((a - b).abs().mean() for r, f in zip(reals, fakes) for a, b in zip(r.features[:-1], f.features[:-1]))
    torch.testing.assert_close(losses.terms["feature_matching"], matching)
    expected = sum(((1 - r.features[-1]) ** 2).mean() + (f.features[-1] ** 2).mean() for r, f in zip(reals, fakes))
    torch.testing.assert_close(objective.discriminator_losses(losses.real, losses.fake).terms["discriminator"], expected)


def test_quantizer_dropout_is_for_training_and_its_share_of_the_items(batch):
    tokenizer, objective = build()
    seen = []
    tokenizer.register_forward_pre_hook(lambda module, args: seen.append(args[1] if len(args) > 1 else None))
    for step in range(20):
        objective.autoencode(tokenizer, batch.audio, Draw(0, step=step))
    used = torch.stack(seen)
    assert set(used[:, :2].unique().tolist()) == {1, 2, 3} and (used[:, 2:] == 3).all()
    a, b = (objective.autoencode(tokenizer, batch.audio, Draw(0, step=s)).reconstruction for s in (0, 1))
    assert torch.equal(a, objective.autoencode(tokenizer, batch.audio, Draw(0)).reconstruction)
    assert not torch.equal(a[:2], b[:2]) and torch.allclose(a[2:], b[2:], atol=1e-5)
    seen.clear()
    objective.autoencode(tokenizer.eval(), batch.audio, Draw(0))
    assert seen == [None]


def test_the_teacher_hears_the_source_where_the_batch_has_it(batch):
    tokenizer, objective = build()
    heard = []
    log_mel = objective.teacher.log_mel
    objective.teacher.log_mel = lambda audio, floor_over_batch=False: heard.append((audio, floor_over_batch)) or log_mel(
        audio, floor_over_batch)
    objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"distill"}))
    batch.teacher_audio = torch.rand(4, 1, 1600) - 0.5
    objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"distill"}))
    (resampled, _), (resynthesis, floor), (given, _), _ = heard
    assert resampled.shape == resynthesis.shape == given.shape == (4, 1600)
    assert floor and torch.equal(given, batch.teacher_audio[:, 0]) and resynthesis.requires_grad
    objective.cfg = replace(objective.cfg, distill_floor="item")
    objective.hear(torch.rand(2, 1, 100), 16_000)
    assert heard[-1][1] is False


def test_distances_of_features():
    _, objective = build()
    a, b = torch.rand(2, 1, 8000) - 0.5, torch.rand(2, 1, 8000) - 0.5
    features = [objective.teacher.features(x[:, 0], floor) for x, floor in ((a, True), (b, False))]
    torch.testing.assert_close(objective.distill(a, b), F.mse_loss(*features))
    objective.cfg = replace(objective.cfg, distill_loss="l1")
    torch.testing.assert_close(objective.distill(a, b), F.l1_loss(*features))
    assert objective.distill(b, b).item() == pytest.approx(0, abs=1e-2)


def test_outputs_at_another_rate_are_compared_at_that_rate(batch):
    model = replace(MODEL, output_sample_rate=16_000, decoder_strides=[2, 2, 2, 5, 4])
    tokenizer, objective = build(model)
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset(TERMS))
    assert losses.fake.shape == losses.real.shape == (4, 1, 1600)
    assert tokenizer.eval().reconstruct(batch.audio).shape == (4, 1, 1600)


def test_what_is_saved_and_where_the_teacher_comes_from():
    _, objective = build()
    saved = [k for k in objective.state_dict() if not k.startswith("frozen.")]
    assert saved and all(k.startswith("discriminators.dac.") for k in saved)
    assert "random weights" in objective.provenance()["teacher"]
    bare = LMSPTObjective(CONFIG, MODEL, build_frozen=False)
    assert bare.provenance() == {}
    with pytest.raises(ConfigError, match="not built"):
        bare.teacher  # noqa: B018


@pytest.mark.parametrize(("changes", "message"), [
    ({"distill_loss": "mse"}, "distill_loss must be one of l2, l1"),
    ({"distill_floor": "clip"}, "distill_floor must be one of batch, item"),
    ({"quantizer_dropout": 1.5}, "quantizer_dropout"),
    ({"teacher_seconds": 31.0}, "at most 30"),
    ({"mel_bands": [10]}, "equal lengths"),
    ({"msd_groups": [1]}, "6 entries"),
])
def test_impossible_objectives_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_objective(replace(CONFIG, **changes))


OPTIONS = {
    "shared encoder, no subtraction": {"shared_encoder": True, "subtract": False},
    "FSQ, causal": {"fsq_levels": [5, 4, 3], "causal": True, "kernel": 5, "dilations": [1, 2]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_parity_function_takes_other_options(name, tmp_path):
    """Every option of the authors that a folder may set: what is computed is whole and finite (numbers: tests/test_parity.py)."""
    torch.manual_seed(0)
    model = replace(MODEL, **OPTIONS[name])
    tokenizer, objective = LMSPT(model), LMSPTObjective(replace(CONFIG, msd_rates=[1, 2]), model)
    save_file({k: v.contiguous().clone() for k, v in to_official(tokenizer.state_dict(), model).items()},
              tmp_path / "weights.safetensors")
    save_file({discriminator_name(k, 2, 2): v.contiguous() for k, v in objective.discriminators["dac"].state_dict().items()},
              tmp_path / "discriminator.safetensors")
    save_file({k: v.contiguous() for k, v in objective.teacher.network.state_dict().items()}, tmp_path / "teacher.safetensors")
    loss = dict.fromkeys(WEIGHTS, 0.5)
    config = {
        "constructor_args": {
            "quantizer_dropout": 0.5, "use_shared_encoder": model.shared_encoder, "semantic_subtraction": model.subtract,
            "semantic_quantizer_kwargs": {"levels": model.fsq_levels}, "dilation": model.dilations, "n_codebooks": 4,
        },
        "discriminator": {
            "constructor_args": {"periods": [2, 3], "rates": [1, 2], "fft_sizes": [512, 256]}, "mpd_channels": [2] * 5,
            "msd_channels": [2] * 6, "msd_groups": [1] * 6, "mrd_channels": 2,
        },
        "teacher": {
            "num_mel_bins": 20, "d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
            "max_source_positions": 25, "activation_function": "gelu", "window_seconds": 0.5, "distill_type": "l1",
        },
        "loss": loss | {"mel": {"n_mels": [10, 20], "window_lengths": [256, 512], "pow": 2, "mag_weight": 1, "log_weight": 1,
                                "clamp_eps": 1e-5}},
        "train": {"betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.01, "learning_rate": 1e-3, "min_lr": 1e-4,
                  "warmup_steps": 2, "discriminator_lr": 1e-3, "clip_grad_norm": 1.0, "step_index": 1, "steps_per_epoch": 5,
                  "max_epoch": 2},
        "data": {"raw_sample_rate": 22_050, "segment_seconds": 0.1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {
        "data.raw.0": torch.rand(4000) - 0.5, "data.raw.1": torch.rand(1500) - 0.5, "data.rand_start": torch.tensor([700, 0]),
        "train.rand_dropout_acoustic": torch.tensor([2, 1]), "q.rand_dropout_acoustic": torch.tensor([1, 2, 3, 3]),
        "q.z_semantic": torch.randn(4, 8, 3), "q.z_acoustic": torch.randn(4, 8, 3), "schedule.steps": torch.arange(4),
        "infer.x_odd": torch.rand(1, 1, 1111) - 0.5, "infer.codes_given": torch.ones(4, 1, 2, dtype=torch.int64),
    }
    made = compute(tmp_path, given)
    assert all(value.isfinite().all() for value in made.values())
    assert made["data.speech"].shape == (2, 2400) and made["loss.distill"] == made["loss.distill_l1"]
    named = {"loss.total", "valid.spec_loss", "q.train.z_q", "usage.acoustic_after_2", "step.param_after.decoder.model.0"
             + (".conv" if model.causal else "") + ".bias", "disc.before.logits_fake.5", "grad_norm.semantic_encoder"}
    assert named <= made.keys()
