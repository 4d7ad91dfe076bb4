"""The LightningDiT network and its conversion; every tensor of the authors' is checked in test_parity.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenizers_lab.cli.main import call
from tokenizers_lab.data.batch import LatentBatch
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError
from tokenizers_lab.eval.generation.config import LatentObjectiveConfig, SamplingConfig
from tokenizers_lab.eval.generation.lightningdit.config import ModelConfig, check_model
from tokenizers_lab.eval.generation.lightningdit.convert import OFFICIAL, from_official, to_official
from tokenizers_lab.eval.generation.lightningdit.model import LightningDiT
from tokenizers_lab.eval.generation.objective import LatentFlowObjective
from tokenizers_lab.hub import convert_official, load
from tokenizers_lab.nn.transformer import set_activation_checkpointing

SET = Path(__file__).parent.parent.parent / "parity" / "lightningdit"
MANIFESTS = sorted(SET.glob("official_full_manifest*.json"))
SMALL = ModelConfig(channels=6, grid=4, classes=5, width=24, depth=3, heads=2)
CHANGES = {
    "as it is": {}, "patch 2": {"patch": 2, "grid": 6}, "QK-norm": {"qk_norm": True}, "layer norms": {"norm": "layer_norm"},
    "both": {"norm": "layer_norm", "qk_norm": True}, "GELU": {"swiglu": False, "mlp_ratio": 2.5}, "no rotary": {"rope": False},
    "no shifts": {"shifts": False}, "sigma": {"learn_sigma": True, "patch": 2}, "one cell": {"grid": 1},
    "ratio": {"mlp_ratio": 3.3}, "always a class": {"unconditional": False},
}
SIZES = {      # depth, width, heads; parameters at 64 and 32 channels, patch 1
    "B": (12, 768, 12, 130_605_376, 130_556_192), "XL": (28, 1152, 16, 675_330_496, 675_256_736),
    "1p0B": (24, 1536, 24, 1_029_499_456, 1_029_401_120), "1p6B": (28, 1792, 28, 1_631_881_840, 1_631_767_120),
}


def moved(cfg, seed=0):
    """A network away from its first weights, with which its output is 0."""
    generator = torch.Generator().manual_seed(seed)
    network = LightningDiT(cfg).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def inputs(cfg, items=3):
    x = torch.randn(items, cfg.channels, cfg.grid, cfg.grid, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0.1, 0.9, items), torch.arange(items) % cfg.classes


# --- network ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_any_options_give_a_velocity_that_depends_on_everything(changes):
    cfg = replace(SMALL, **changes)
    network, (x, time, labels) = moved(cfg), inputs(cfg)
    whole = network(x, time, labels, tokens_after=2)
    assert whole.velocity.shape == x.shape and whole.tokens.shape == (3, (cfg.grid // cfg.patch) ** 2, 24)
    alone = torch.cat([network(*(t[i : i + 1] for t in (x, time, labels))).velocity for i in range(3)])
    torch.testing.assert_close(alone, whole.velocity, atol=1e-5, rtol=1e-5)
    for other in ((x + 0.1, time, labels), (x, 1 - time, labels), (x, time, (labels + 1) % 5)):
        assert not torch.allclose(network(*other).velocity, whole.velocity, atol=1e-4)


def test_the_first_velocity_is_zero_and_all_but_the_position_table_trains():
    network = LightningDiT(SMALL)
    assert not network(*inputs(SMALL)).velocity.any()
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["positions"]
    assert {name for name, _ in network.named_buffers()} == {"latent_mean", "latent_std", "rope"}


@pytest.mark.parametrize("patch", [1, 2])
def test_of_twice_the_channels_the_first_half_counts(patch):
    cfg = replace(SMALL, learn_sigma=True, patch=patch)
    network, plain, given = moved(cfg), LightningDiT(replace(cfg, learn_sigma=False)).eval(), inputs(cfg)
    state, kept = network.state_dict(), torch.arange(2 * 6 * patch**2) % 12 < 6      # a token's channels are its fastest axis
    plain.load_state_dict({k: v[kept] if k.startswith("final.linear.") else v for k, v in state.items()})
    torch.testing.assert_close(network(*given).velocity, plain(*given).velocity)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_parameters_of_every_size(size):
    depth, width, heads, *counts = size
    for channels, count in zip((64, 32), counts, strict=True):
        with torch.device("meta"):
            network = LightningDiT(ModelConfig(channels=channels, width=width, depth=depth, heads=heads))
        assert sum(p.numel() for p in network.parameters()) == count


def test_checkpointed_activations_give_the_same_gradients():
    network, given = moved(SMALL), inputs(SMALL)
    found = []
    for on in (False, True):
        assert set_activation_checkpointing(network, on) == 1
        network.zero_grad()
        network(*given).velocity.square().mean().backward()
        found.append(network.block(0).attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (3, 6, 4, 5), (3, 6, 8, 8), (3, 6, 4)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"latents must be \(B, 6, 4, 4\)"):
        moved(SMALL)(torch.zeros(shape), torch.zeros(3), torch.zeros(3, dtype=torch.int64))


def test_tokens_of_a_block_that_is_not_there_are_refused():
    for after in (0, 4):
        with pytest.raises(InputError, match="1 to 3 blocks"):
            moved(SMALL)(*inputs(SMALL), tokens_after=after)


@pytest.mark.parametrize(("changes", "word"), [
    ({"heads": 5}, "model.width"), ({"heads": 4}, "rotary"), ({"patch": 3}, "model.grid"), ({"depth": 0}, "depth"),
    ({"norm": "batch"}, "model.norm"), ({"mlp_ratio": 0.0}, "mlp_ratio"), ({"channels": 0}, "channels"),
    ({"sampling": SamplingConfig(steps=0)}, "steps"),
])
def test_options_that_do_not_fit_are_refused(changes, word):
    with pytest.raises(ConfigError, match=word):
        check_model(replace(SMALL, **changes))


def test_it_learns_a_batch():
    torch.manual_seed(0)
    network = LightningDiT(SMALL)
    objective = LatentFlowObjective(LatentObjectiveConfig(), SMALL)
    batch = LatentBatch(inputs(SMALL, 8)[0], [str(i) for i in range(8)], torch.arange(8) % 5)
    adam = torch.optim.Adam(network.parameters(), 3e-3)

    def loss(step):
        terms = objective.generator_losses(network, batch, Draw(0, step=step), frozenset({"mse", "cosine"})).terms
        return terms["mse"] + terms["cosine"]

    first = loss(0).item()
    for step in range(60):
        adam.zero_grad()
        loss(step % 4).backward()
        adam.step()
    assert loss(0).item() < 0.8 * first


def test_saved_and_loaded_it_samples_the_same(tmp_path):
    network = moved(replace(SMALL, sampling=SamplingConfig(steps=3, guidance=2.0, guided_channels=3)))
    network.set_latent_statistics(torch.arange(6.0), torch.full((6,), 2.0))
    network.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert isinstance(loaded, LightningDiT) and loaded.cfg == network.cfg
    labels = torch.tensor([0, 4])
    assert torch.equal(loaded.sample(labels, [1, 2]), network.sample(labels, [1, 2]))
    assert torch.equal(loaded.denormalise(torch.zeros(1, 6, 4, 4))[0, :, 0, 0], torch.arange(6.0))


# --- conversion ---------------------------------------------------------------------------------------------------------

def official():
    arguments = json.loads((SET / "config.json").read_text())["constructor_args"]
    return load_file(SET / "weights.safetensors"), arguments


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda f: f.stem)
def test_every_key_of_the_release_is_covered_both_ways(file):
    told = json.loads(file.read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in told["tensors"].items()}
    converted = from_official(state)
    assert {k: list(v.shape) for k, v in to_official(converted.tokenizer).items()} == told["tensors"]
    with torch.device("meta"):
        network = LightningDiT(converted.model)
    assert sum(p.numel() for p in network.parameters()) == told["parameters"]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == told["parameters_trained"]


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_there_and_back_is_the_same_model(changes):
    cfg = replace(SMALL, **changes)
    network = moved(cfg)
    state = to_official(network.state_dict())
    arguments = {"num_heads": 2, "class_dropout_prob": 0.1 if cfg.unconditional else 0.0, "mlp_ratio": cfg.mlp_ratio}
    converted = from_official(state, {"constructor_args": arguments})
    assert replace(converted.model, sampling=cfg.sampling) == cfg
    assert all(torch.equal(converted.tokenizer[k], v) for k, v in network.state_dict().items())


def test_tables_are_loaded_not_computed():
    state, arguments = official()
    for name in ("pos_embed", "feat_rope.freqs_cos"):
        state[name] = state[name] + 0.5
    converted = from_official(state, arguments)
    assert torch.equal(converted.tokenizer["positions"], state["pos_embed"])
    assert torch.equal(converted.tokenizer["rope"][:, :8], state["feat_rope.freqs_cos"])


@pytest.mark.parametrize("wrap", [
    lambda s: {"ema": s, "model": {}, "opt": {}}, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    lambda s: {"ema": {f"_orig_mod.{k}": v for k, v in s.items()}, "config": "x"},
])
def test_checkpoints_of_any_wrapping(wrap):
    state, _ = official()
    found = to_official(from_official(wrap(state)).tokenizer)      # heads are seen in the rotary table
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


def test_an_average_without_rotary_tables_gets_them():
    state, arguments = official()
    stripped = {k: v for k, v in state.items() if not k.startswith("feat_rope")}
    found = to_official(from_official(stripped, arguments).tokenizer)
    torch.testing.assert_close(found["feat_rope.freqs_sin"], state["feat_rope.freqs_sin"])


@pytest.mark.parametrize(("change", "error", "said"), [
    (lambda s, a: s.pop("final_layer.linear.bias"), CheckpointError, "misses final_layer.linear.bias"),
    (lambda s, a: s.update(extra=torch.zeros(1)), CheckpointError, "left over extra"),
    (lambda s, a: s.pop("x_embedder.proj.weight"), CheckpointError, "misses x_embedder.proj.weight"),
    (lambda s, a: s.update({"blocks.1.attn.qkv.bias": torch.zeros(7)}), CheckpointError, "another shape"),
    (lambda s, a: s.update(pos_embed=torch.zeros(1, 15, 32)), CheckpointError, "no square grid"),
    (lambda s, a: [s.pop(k) for k in list(s) if k.startswith("blocks.2.")], CheckpointError, "misses blocks.2."),
    (lambda s, a: a.update(use_qknorm=True), ConfigError, "use_qknorm is True"),
    (lambda s, a: a.update(num_heads=3), ConfigError, "multiple"),
    (lambda s, a: s.clear(), CheckpointError, "no checkpoint"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(change, error, said):
    state, arguments = official()
    change(state, arguments)
    with pytest.raises(error, match=said):
        from_official(state, arguments)


def test_heads_that_nothing_shows_are_asked_for():
    network = moved(replace(SMALL, rope=False))
    with pytest.raises(ConfigError, match="num_heads"):
        from_official(to_official(network.state_dict()))


def test_the_hub_file_is_converted(tmp_path):
    state, _ = official()
    file = tmp_path / OFFICIAL["files"][0]
    torch.save({"model": state, "ema": state}, file)
    converted = convert_official("lightningdit", file)
    assert converted.tokenizer.system == "lightningdit" and converted.tokenizer.provenance["licence"] == "MIT"
    assert converted.tokenizer.cfg.sampling.steps == 249 and converted.heads == {}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_the_released_statistics_are_converted_with_it(tmp_path, capsys, ending):
    stats = {"mean": torch.linspace(-1, 1, 8).view(1, 8, 1, 1), "std": torch.linspace(0.5, 2, 8).view(1, 8, 1, 1)}
    file = tmp_path / f"stats.{ending}"
    torch.save(stats, file) if ending == "pt" else save_file(stats, file)
    arguments = json.loads((SET / "config.json").read_text())["constructor_args"]
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    words = ["convert", "lightningdit", str(SET / "weights.safetensors"), str(tmp_path / "out"), "--official-config",
             str(tmp_path / "arguments.json"), "--latent-stats"]
    assert call([*words, str(file)]) == 0
    generator = load(tmp_path / "out")
    assert torch.equal(generator.latent_mean, stats["mean"][0]) and torch.equal(generator.latent_std, stats["std"][0])
    torch.save({"mean": stats["mean"]}, tmp_path / "half.pt")
    words[3] = str(tmp_path / "other")
    assert call([*words, str(tmp_path / "half.pt")]) == 2
    assert "holds no tensors 'mean' and 'std'" in capsys.readouterr().err
