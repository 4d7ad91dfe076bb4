"""The DiT-DH network and its conversion; every tensor of the authors' is checked in test_parity.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenizers_lab.errors import CheckpointError, ConfigError, InputError
from tokenizers_lab.eval.generation.config import SamplingConfig
from tokenizers_lab.eval.generation.ditdh.config import ModelConfig, check_model
from tokenizers_lab.eval.generation.ditdh.convert import OFFICIAL, from_official, to_official
from tokenizers_lab.eval.generation.ditdh.model import DiTDH
from tokenizers_lab.hub import convert_official, load
from tokenizers_lab.nn.transformer import set_activation_checkpointing

SET = Path(__file__).parent.parent.parent / "parity" / "ditdh"
MANIFESTS = sorted(SET.glob("official_full_manifest*.json"))
SMALL = ModelConfig(channels=6, grid=4, classes=5, width=16, depth=2, heads=2, head_width=24, head_depth=2, head_heads=3)
CHANGES = {
    "as it is": {}, "one width": {"head_width": 16, "head_heads": 2, "head_depth": 1}, "QK-norm": {"qk_norm": True},
    "layer norms": {"norm": "layer_norm", "qk_norm": True}, "GELU": {"swiglu": False, "mlp_ratio": 2.5},
    "no table": {"position_table": False}, "other grid": {"grid": 3}, "ratio": {"mlp_ratio": 3.3},
    "always a class": {"unconditional": False}, "noise": {"clock": "noise"},
}
SIZES = {      # depth, width, heads; parameters at 128 and 768 channels
    "S": (12, 384, 6, 193_587_924, 196_455_764), "B": (12, 768, 12, 291_182_292, 294_295_892),
    "L": (24, 1024, 16, 618_466_996, 621_744_436), "XL": (28, 1152, 16, 835_316_436, 838_675_796),
}


def moved(cfg, seed=0):
    """A network away from its first weights, with which its output is 0."""
    generator = torch.Generator().manual_seed(seed)
    network = DiTDH(cfg).eval()
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
    whole = network(x, time, labels, tokens_after=1)
    assert whole.velocity.shape == x.shape and whole.tokens.shape == (3, cfg.grid**2, 16)
    alone = torch.cat([network(*(t[i : i + 1] for t in (x, time, labels))).velocity for i in range(3)])
    torch.testing.assert_close(alone, whole.velocity, atol=1e-5, rtol=1e-5)
    for other in ((x + 0.1, time, labels), (x, 1 - time, labels), (x, time, (labels + 1) % 5)):
        assert not torch.allclose(network(*other).velocity, whole.velocity, atol=1e-5)


def test_the_head_alone_and_its_condition_for_each_token():
    network, (x, time, labels) = moved(SMALL), inputs(SMALL)
    condition, tokens = network.encode(x, time, labels)
    assert condition.shape == (3, 16, 16) and tokens is None
    assert torch.equal(network.decode(x, condition), network(x, time, labels).velocity)
    shifted = condition.clone()
    shifted[:, 5] += 1
    change = (network.decode(x, shifted) - network.decode(x, condition)).abs().amax((0, 1)).flatten()
    assert change.argmax() == 5


def test_what_does_not_train():
    network = DiTDH(SMALL)
    assert not network(*inputs(SMALL)).velocity.any()
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == {"positions", "t_embed.frequencies"}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_parameters_of_every_size(size):
    depth, width, heads, *counts = size
    for channels, count in zip((128, 768), counts, strict=True):
        with torch.device("meta"):
            network = DiTDH(ModelConfig(channels=channels, width=width, depth=depth, heads=heads))
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


def test_tokens_of_the_head_are_refused():
    with pytest.raises(InputError, match="1 to 2 blocks of the encoder"):
        moved(SMALL)(*inputs(SMALL), tokens_after=3)


@pytest.mark.parametrize(("changes", "word"), [
    ({"heads": 3}, "model.width"), ({"head_heads": 5}, "model.head_width"), ({"head_heads": 4}, "rotary"),
    ({"head_depth": 0}, "depths"), ({"norm": "batch"}, "model.norm"), ({"clock": "wall"}, "model.clock"), ({"grid": 0}, "grid"),
])
def test_options_that_do_not_fit_are_refused(changes, word):
    with pytest.raises(ConfigError, match=word):
        check_model(replace(SMALL, **changes))


def test_by_the_other_clock_sampling_runs_the_other_way():
    network = moved(SMALL)
    mirrored = moved(replace(SMALL, clock="noise"))
    plain = SamplingConfig(steps=4, shift=0, stop=0.001)
    assert network.times(plain)[0] == 0 and mirrored.times(plain)[0] == 1
    torch.testing.assert_close(1 - network.times(plain), mirrored.times(plain))
    with pytest.raises(InputError, match="the guide"):
        network.guided_velocity(torch.tensor([1]), SamplingConfig(guidance=2.0), mirrored)


def test_saved_and_loaded_it_samples_the_same(tmp_path):
    network = moved(replace(SMALL, sampling=SamplingConfig(steps=3, shift=0), clock="noise"))
    network.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert isinstance(loaded, DiTDH) and loaded.cfg == network.cfg and loaded.path.clock == "noise"
    labels, guide = torch.tensor([0, 4]), moved(replace(SMALL, width=8, depth=1, clock="noise"), seed=1)
    guided = SamplingConfig(steps=3, guidance=1.4, guidance_low=0.2, guidance_high=0.9)
    found = [n.sample(labels, [1, 2], guided, guide) for n in (loaded, network)]
    assert torch.equal(*found) and not torch.allclose(found[0], network.sample(labels, [1, 2]), atol=1e-4)


# --- conversion ---------------------------------------------------------------------------------------------------------

def official(name="weights", arguments="constructor_args"):
    return load_file(SET / f"{name}.safetensors"), json.loads((SET / "config.json").read_text())[arguments]


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda f: f.stem)
@pytest.mark.parametrize("tables", [True, False])
def test_every_key_of_the_release_is_covered_both_ways(file, tables):
    told = json.loads(file.read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in told["tensors"].items()
             if tables or "rope" not in name}      # RecTok's average: parameters only
    converted = from_official(state)
    assert {k: list(v.shape) for k, v in to_official(converted.tokenizer).items()} == told["tensors"]
    with torch.device("meta"):
        network = DiTDH(converted.model)
    assert sum(p.numel() for p in network.parameters()) == told["parameters"]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == told["parameters_trained"]


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_there_and_back_is_the_same_model(changes):
    cfg = replace(SMALL, **changes)
    network = moved(cfg)
    arguments = {"depth": [cfg.depth, cfg.head_depth], "label_dropout_prob": 0.1 if cfg.unconditional else 0.0,
                 "mlp_ratio": cfg.mlp_ratio}
    converted = from_official(to_official(network.state_dict()), {"constructor_args": arguments, "clock": cfg.clock})
    assert replace(converted.model, sampling=cfg.sampling) == cfg
    assert all(torch.equal(converted.tokenizer[k], v) for k, v in network.state_dict().items())


def test_sizes_are_seen_without_a_config():
    for name in ("weights", "guidance_weights"):
        state, _ = official(name)
        found = to_official(from_official({"model": state}).tokenizer)
        assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    state, arguments = official("variant_weights", "variant_constructor_args")      # both widths are one
    with pytest.raises(ConfigError, match="depth"):
        from_official(state)
    assert from_official(state, arguments).model.mlp_ratio == 3.0


def test_frequencies_and_tables_are_loaded_not_computed():
    state, arguments = official()
    for name in ("pos_embed", "t_embedder.W", "dec_feat_rope.freqs_sin"):
        state[name] = state[name] + 0.5
    converted = from_official(state, arguments).tokenizer
    assert torch.equal(converted["positions"], state["pos_embed"])
    assert torch.equal(converted["t_embed.frequencies"], state["t_embedder.W"])
    assert torch.equal(converted["head_rope"][:, 16:], state["dec_feat_rope.freqs_sin"])


def test_whose_clock_it_is():
    state, arguments = official()
    names = {"token_channels": "in_channels", "label_dropout_prob": "class_dropout_prob"}
    rae = {names.get(k, k): v for k, v in arguments.items() if k not in ("img_size", "tokenizer_patch_size")}
    for checkpoint, told, clock in (
        (state, arguments, "data"), ({"model": state, "model_ema": state}, None, "data"), (state, rae, "noise"),
        ({"ema": state, "model": state}, None, "noise"), (state, {**arguments, "clock": "noise"}, "noise"),
    ):
        model = from_official(checkpoint, told).model
        assert model.clock == clock and model.sampling.stop == (0.001 if clock == "noise" else 0.0)


def test_the_moving_average_is_taken():
    state, arguments = official()
    average = {k: v + 1 for k, v in state.items() if "rope" not in k}
    found = from_official({"model": state, "model_ema": average}, arguments).tokenizer
    assert torch.equal(found["final.linear.bias"], state["final_layer.linear.bias"] + 1)
    torch.testing.assert_close(found["encoder_rope"][:, :8], state["enc_feat_rope.freqs_cos"])


@pytest.mark.parametrize(("change", "error", "said"), [
    (lambda s, a: s.pop("s_projector.bias"), CheckpointError, "misses s_projector.bias"),
    (lambda s, a: s.update(extra=torch.zeros(1)), CheckpointError, "left over extra"),
    (lambda s, a: s.pop("s_embedder.proj.weight"), CheckpointError, "misses s_embedder.proj.weight"),
    (lambda s, a: s.update({"t_embedder.W": torch.zeros(7)}), CheckpointError, "another shape"),
    (lambda s, a: [s.pop(k) for k in list(s) if k.startswith("blocks.4.")], CheckpointError, "misses blocks.4."),
    (lambda s, a: a.update(use_rmsnorm=False), ConfigError, "use_rmsnorm is False"),
    (lambda s, a: a.update(wo_shift=True), ConfigError, "wo_shift is True"),
    (lambda s, a: s.clear(), CheckpointError, "no checkpoint"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(change, error, said):
    state, arguments = official()
    change(state, arguments)
    with pytest.raises(error, match=said):
        from_official(state, arguments)


def test_the_hub_file_is_converted(tmp_path):
    state, _ = official()
    file = tmp_path / OFFICIAL["files"][2]
    torch.save({"model": state, "model_ema": {k: v for k, v in state.items() if "rope" not in k}, "epoch": 29}, file)
    with pytest.raises(ConfigError, match="num_heads"):      # the average has no tables, and these are no released sizes
        convert_official("ditdh", file)
    arguments = json.loads((SET / "config.json").read_text())
    converted = convert_official("ditdh", file, arguments)
    assert converted.tokenizer.cfg.sampling.steps == 149 and converted.tokenizer.provenance["licence"] == "Apache-2.0"
