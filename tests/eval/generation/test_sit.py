"""SiT and REG against formulas written out, and what they refuse."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tokenizers_lab.config import load_config
from tokenizers_lab.data.batch import ImageBatch, LatentBatch
from tokenizers_lab.diffusion.samplers import sde_times
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError, WeightsMissing
from tokenizers_lab.eval.generation.generator import SamplingConfig, seeded_normal
from tokenizers_lab.eval.generation.sit.config import SIZES, ModelConfig, ObjectiveConfig
from tokenizers_lab.eval.generation.sit.convert import from_official, to_official
from tokenizers_lab.eval.generation.sit.model import SiT
from tokenizers_lab.eval.generation.sit.objective import SiTObjective
from tokenizers_lab.hub import build_tokenizer, load
from tokenizers_lab.network import load_weights
from tokenizers_lab.nn.transformer import set_activation_checkpointing
from tokenizers_lab.teachers.vision_config import VisionTeacherConfig

SMALL = ModelConfig(channels=3, grid=4, classes=10, width=16, depth=3, heads=2, class_token=12)
PLAIN = replace(SMALL, class_token=None)
CONFIGS = {
    "REG": SMALL, "plain": PLAIN, "patch 2": replace(SMALL, patch=2, grid=6),
    "QK-norm": replace(PLAIN, qk_norm=True, mlp_ratio=2.5),
}
DINO = {"model_type": "dinov2", "hidden_size": "12", "num_hidden_layers": "2", "num_attention_heads": "2", "image_size": "56",
        "patch_size": "14"}
TEACHER = VisionTeacherConfig(backend="random", source="", config=DINO)
OBJECTIVE = ObjectiveConfig(teacher=TEACHER, align_after=2, align_width=20)
LABELS = torch.tensor([3, 10, 0])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(network, seed=0):
    """Away from the first weights, with which the output is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def inputs(cfg, items=3):
    given = {} if cfg.class_token is None else {"class_token": normal(items, cfg.class_token, seed=5)}
    return (normal(items, cfg.channels, cfg.grid, cfg.grid, seed=6), torch.tensor([0.1, 0.5, 1.0])[:items], LABELS[:items]), given


# --- network ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_parameters_are_those_of_the_formula(size, patch):
    """Counted layer by layer: DiT's tab. 1 with REG's class token beside it."""
    width, depth, heads = size
    linear = lambda a, b: a * b + b      # noqa: E731
    block = linear(width, 3 * width) + linear(width, width) + 2 * 4 * width * width + 5 * width + linear(width, 6 * width)
    pixels = patch**2 * 32
    plain = depth * block + linear(pixels, width) + linear(256, width) + linear(width, width) + 1001 * width
    plain += linear(width, 2 * width) + linear(width, pixels)
    reg = linear(768, width) + 2 * width + linear(width, 768)
    cfg = ModelConfig(channels=32, grid=16, patch=patch, width=width, depth=depth, heads=heads)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in SiT(replace(cfg, class_token=k)).parameters()) for k in (None, 768)]
    assert counts == [plain, plain + reg]
    if (size, patch) == (SIZES["XL"], 1):
        assert counts == [674_853_152, 676_626_848]


def by_hand(network, x, time, labels, class_token=None):
    """Velocity, class velocity and hidden tokens after two blocks, from the tensors of the state dict."""
    w, cfg = network.state_dict(), network.cfg
    side, width = cfg.grid // cfg.patch, cfg.width

    def linear(name, y):
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(y, eps=1e-6):
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + eps).sqrt()

    def silu(y):
        return y / (1 + (-y).exp())

    patches = x.reshape(len(x), cfg.channels, side, cfg.patch, side, cfg.patch).permute(0, 2, 4, 1, 3, 5).flatten(3)
    h = patches.flatten(1, 2) @ w["embed.weight"].flatten(1).T + w["embed.bias"]
    table = torch.zeros(side, side, width, dtype=torch.float64)
    for row in range(side):
        for col in range(side):
            for j in range(width // 4):
                frequency = 10_000 ** (-j / (width // 4))
                angles = [wave(at * frequency) for at in (col, row) for wave in (math.sin, math.cos)]
                table[row, col, j :: width // 4] = torch.tensor(angles, dtype=torch.float64)
    h = h + table.reshape(1, -1, width).float()
    if class_token is not None:      # no position is added to it
        first = norm(linear("class_embed", class_token)) * w["class_norm.weight"] + w["class_norm.bias"]
        h = torch.cat([first[:, None], h], dim=1)
    waves = [time * 10_000 ** (-k / 128) for k in range(128)]
    features = torch.stack([a.cos() for a in waves] + [a.sin() for a in waves], dim=1)
    c = linear("time_embed.mlp.2", silu(linear("time_embed.mlp.0", features))) + w["label_embed.weight"][labels]

    kept = None
    for i in range(cfg.depth):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.modulation", silu(c))[:, None].chunk(6, dim=-1)
        q, k, v = linear(f"{name}.attn.qkv", norm(h) * (1 + scale1) + shift1).chunk(3, dim=-1)
        heads = []
        for n in range(cfg.heads):
            part = slice(n * width // cfg.heads, (n + 1) * width // cfg.heads)
            q_n, k_n = q[..., part], k[..., part]
            if cfg.qk_norm:
                q_n, k_n = (norm(y, 1e-5) * w[f"{name}.attn.{s}_norm.weight"] + w[f"{name}.attn.{s}_norm.bias"]
                            for s, y in (("q", q_n), ("k", k_n)))
            heads.append((q_n @ k_n.transpose(1, 2) / math.sqrt(width / cfg.heads)).softmax(-1) @ v[..., part])
        h = h + gate1 * linear(f"{name}.attn.out", torch.cat(heads, dim=-1))
        y = linear(f"{name}.mlp.fc1", norm(h) * (1 + scale2) + shift2)
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        h = h + gate2 * linear(f"{name}.mlp.fc2", y)
        kept = h if i == 1 else kept
    shift, scale = linear("final.modulation", silu(c))[:, None].chunk(2, dim=-1)
    h = norm(h) * (1 + scale) + shift
    class_velocity = None
    if class_token is not None:
        class_velocity, h = linear("class_out", h[:, 0]), h[:, 1:]
    pixels = linear("final.linear", h).reshape(len(x), side, side, cfg.patch, cfg.patch, cfg.channels)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(x.shape), class_velocity, kept


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_the_forward_pass_is_the_one_written_out(cfg):
    network = moved(SiT(cfg))
    given, named = inputs(cfg)
    with torch.no_grad():
        made = network(*given, tokens_after=2, **named)
        velocity, class_velocity, tokens = by_hand(network, *given, **named)
    torch.testing.assert_close(made.velocity, velocity, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.tokens, tokens, rtol=1e-4, atol=1e-5)
    assert made.velocity.abs().max() > 0.1
    if cfg.class_token is None:
        assert made.class_velocity is None and made.tokens.shape == (3, 16, 16)
    else:
        torch.testing.assert_close(made.class_velocity, class_velocity, rtol=1e-4, atol=1e-5)
        assert made.tokens.shape == (3, 1 + (cfg.grid // cfg.patch) ** 2, 16)


def test_first_weights_give_no_velocity_and_all_parameters_learn():
    network = SiT(SMALL)
    given, named = inputs(SMALL)
    made = network(*given, **named)
    assert made.velocity.abs().max() == 0 and made.class_velocity.abs().max() == 0 and made.tokens is None
    moved(network).train()
    set_activation_checkpointing(network, True)
    made = network(*given, **named)
    (made.velocity.square().mean() + made.class_velocity.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_saved_and_loaded_it_is_the_same(tmp_path):
    network = moved(SiT(SMALL))
    network.set_latent_statistics(torch.ones(3), torch.full((3,), 2.0))
    again = load(str(network.save_pretrained(tmp_path / "sit")))
    given, named = inputs(SMALL)
    assert torch.equal(again(*given, **named).class_velocity, network(*given, **named).class_velocity)
    assert again.cfg == SMALL and torch.equal(again.normalise(torch.ones(1, 3, 4, 4)), torch.zeros(1, 3, 4, 4))


def test_wrong_inputs():
    network, (given, named) = SiT(SMALL), inputs(SMALL)
    with pytest.raises(InputError, match=r"must be \(3, 12\), not nothing"):
        network(*given)
    with pytest.raises(InputError, match=r"not \(3, 11\)"):
        network(*given, class_token=named["class_token"][:, :11])
    with pytest.raises(InputError, match="has no class token"):
        SiT(PLAIN)(*given, **named)
    with pytest.raises(InputError, match="latents must be"):
        network(given[0][..., :3], *given[1:], **named)      # not square
    for wrong, message in (
        ({"patch": 3}, "multiple of model.patch"), ({"heads": 3}, "multiple of 4 and of"), ({"width": 18}, "multiple of 4"),
        ({"depth": 0}, "at least 1"), ({"class_token": 0}, "class_token"),
    ):
        with pytest.raises(ConfigError, match=message):
            SiT(replace(SMALL, **wrong))


# --- sampling -----------------------------------------------------------------------------------------------------------

SDE = SamplingConfig(solver="euler_maruyama", steps=6)


def test_the_state_holds_latents_and_class_token():
    network = moved(SiT(SMALL))
    given, named = inputs(SMALL)
    state = network.join(given[0], named["class_token"])
    assert state.shape == (3, *network.state_shape) == (3, 60) and SiT(PLAIN).state_shape == (3, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(network.split(state), (given[0], named["class_token"])))
    made = network(*given, **named)
    assert torch.equal(network.velocity(state, *given[1:]), torch.cat([made.velocity.flatten(1), made.class_velocity], dim=1))


@pytest.mark.parametrize("scale", [1.0, 2.3])
@torch.no_grad()
def test_samples_are_regs_steps(scale):
    """Latents and class token by the SDE, both drifts guided up to t = 0.85."""
    network, labels, seeds = moved(SiT(SMALL)), LABELS[[0, 2]], [7, 8]
    found = network.sample(labels, seeds, replace(SDE, guidance=scale, guidance_high=0.85))

    times = torch.cat([torch.linspace(1, 0.04, 6, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    state = seeded_normal(seeds, (60,), "start").double()
    x, k = state[:, :48].reshape(2, 3, 4, 4), state[:, 48:]
    for i, (t, end) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
        drifts = []
        for y in (labels, torch.tensor([10, 10])):
            made = network(x.float(), torch.full((2,), t), y, class_token=k.float())
            velocities = made.velocity.double(), made.class_velocity.double()
            drifts.append([v + t * (z + (1 - t) * v) / t for z, v in zip((x, k), velocities)])
        w = scale if t <= 0.85 else 1.0
        x, k = (z + (d_u + w * (d_c - d_u)) * (end - t) for z, d_c, d_u in zip((x, k), *drifts))
        if i < 5:
            noise = math.sqrt(2 * t * (t - end)) * seeded_normal(seeds, (60,), i).double()
            x, k = x + noise[:, :48].reshape(2, 3, 4, 4), k + noise[:, 48:]
    assert found.shape == (2, 3, 4, 4) and found.dtype == torch.float32
    torch.testing.assert_close(found, x.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", [SMALL, PLAIN], ids=["REG", "plain"])
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_an_image_follows_from_its_seed_alone(cfg, solver):
    network, sampling = moved(SiT(cfg)), replace(SDE, solver=solver, guidance=2.0)
    together = network.sample(torch.tensor([1, 2, 3]), [4, 5, 6], sampling)
    alone = torch.cat([network.sample(torch.tensor([y]), [s], sampling) for y, s in ((1, 4), (2, 5), (3, 6))])
    assert together.shape == (3, 3, 4, 4)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[:1], network.sample(torch.tensor([1]), [9], sampling), atol=1e-2)
    other = network.sample(torch.tensor([1]), [4], replace(sampling, solver="heun"))
    assert not torch.allclose(together[:1], other, atol=1e-4)


def test_the_times_are_those_of_the_solver():
    network = SiT(SMALL)
    assert torch.equal(network.times(network.cfg.sampling), sde_times(250))
    assert network.times(SamplingConfig(steps=4)).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert torch.equal(network.times(replace(SDE, shift=2.0)), sde_times(6, shift=2.0))
    large = SiT(replace(SMALL, channels=64, grid=16))
    assert torch.equal(large.times(replace(SDE, shift=0.0)), sde_times(6, shift=2.0))      # √(64 · 16 · 16 / 4096)
    with pytest.raises(InputError, match="stop"):
        network.times(replace(SDE, stop=0.05))


def test_guidance_of_some_channels_leaves_the_rest_and_the_class_token():
    network, (given, named) = moved(SiT(SMALL)), inputs(SMALL)
    state, time = network.join(given[0], named["class_token"]), given[1]
    labels = torch.tensor([1, 2, 3])
    first = network.guided_velocity(labels, replace(SDE, guidance=2.0, guided_channels=2))(state, time)
    whole = network.guided_velocity(labels, replace(SDE, guidance=2.0))(state, time)
    plain = network.velocity(state, time, labels)
    assert torch.equal(first[:, :32], whole[:, :32]) and torch.equal(first[:, 32:], plain[:, 32:])
    assert not torch.allclose(whole[:, 48:], plain[:, 48:])      # without it the class token is guided too


# --- objective ----------------------------------------------------------------------------------------------------------

class Given:
    """Draws that are given."""

    def __init__(self, **values):
        self.values = values

    def normal(self, purpose, shape):
        assert tuple(self.values[purpose].shape) == tuple(shape)
        return self.values[purpose]

    uniform = normal

    def generator(self, purpose):
        return torch.Generator()


class Latents(torch.nn.Module):
    """Stands for a tokenizer."""

    def encode(self, images, sample=False, generator=None):
        from tokenizers_lab.tokenizer import ImageEncoding

        return ImageEncoding(F.adaptive_avg_pool2d(images, 4) * 4)


def objective_of(cfg=SMALL, **changes):
    objective = SiTObjective(replace(OBJECTIVE, **changes), cfg)
    objective.frozen["tokenizer"] = Latents()
    return objective


def batch_of(items=3, labels=(1, 2, 3)):
    images = torch.rand(items, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return ImageBatch(images, [f"image {i}" for i in range(items)], torch.tensor(labels[:items]))


REG_TERMS = frozenset({"mse", "class_mse", "alignment"})


def test_regs_terms_are_those_written_out():
    network, objective, batch = moved(SiT(SMALL)), objective_of(), batch_of()
    noise, class_noise = normal(3, 3, 4, 4, seed=8), normal(3, 12, seed=9)
    time, drop = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.5, 0.05, 0.1])
    draw = Given(noise=noise, class_noise=class_noise, time=time, label_drop=drop)
    terms = objective.generator_losses(network, batch, draw, REG_TERMS).terms
    assert list(terms) == ["mse", "class_mse", "alignment"]

    # DINOv2 sees 14 pixels for each token, by bicubic interpolation without antialiasing
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    values = F.interpolate((batch.images - mean) / std, (56, 56), mode="bicubic")
    seen = objective.teacher.network(pixel_values=values).last_hidden_state               # class token, then 4 × 4 patches
    assert seen.shape == (3, 17, 12)
    latents, t = F.adaptive_avg_pool2d(batch.images, 4) * 4, time.view(3, 1, 1, 1)
    x, k = (1 - t) * latents + t * noise, (1 - time[:, None]) * seen[:, 0] + time[:, None] * class_noise
    made = network(x, time, torch.tensor([1, 10, 3]), tokens_after=2, class_token=k)
    projected = objective.heads["projector"](made.tokens)
    cosines = (projected * seen).sum(-1) / projected.norm(dim=-1) / seen.norm(dim=-1)
    torch.testing.assert_close(terms["mse"], (made.velocity - (noise - latents)).square().mean())
    torch.testing.assert_close(terms["class_mse"], (made.class_velocity - (class_noise - seen[:, 0])).square().mean())
    torch.testing.assert_close(terms["alignment"], 1 - cosines.mean(), rtol=1e-4, atol=1e-5)


def test_without_a_class_token_patches_alone_are_aligned():
    network, objective, batch = moved(SiT(PLAIN)), objective_of(PLAIN), batch_of()
    draw = Given(noise=normal(3, 3, 4, 4), time=torch.tensor([0.2, 0.5, 0.9]), label_drop=torch.ones(3))
    terms = objective.generator_losses(network, batch, draw, frozenset({"mse", "alignment", "cosine"})).terms
    assert sorted(terms) == ["alignment", "cosine", "mse"]
    with pytest.raises(ConfigError, match="class_mse needs model"):
        objective.generator_losses(network, batch, draw, frozenset({"class_mse"}))
    plain = SiTObjective(ObjectiveConfig(), PLAIN)                                        # needs neither teacher nor images
    latents = LatentBatch(normal(3, 3, 4, 4), ["a", "b", "c"], torch.tensor([1, 2, 3]))
    assert list(plain.generator_losses(network, latents, Draw(0), frozenset({"mse"})).terms) == ["mse"]


def test_the_projector_has_regs_form():
    projector = objective_of().heads["projector"]
    assert [tuple(p.shape) for p in projector.parameters()] == [(20, 16), (20,), (20, 20), (20,), (12, 20), (12,)]
    assert all(not p.any() for p in projector.parameters() if p.dim() == 1)
    assert projector[0].weight.abs().max() <= math.sqrt(6 / 36) < 1.05 * projector[0].weight.abs().max()      # Xavier's bound


def test_held_out_velocities_are_measured_of_both():
    network, objective, batch = moved(SiT(SMALL)), objective_of(), batch_of()
    found = objective.held_out_metrics(network, batch)
    assert sorted(found) == ["class_velocity_mse", "velocity_mse"] and all(v.shape == (3,) for v in found.values())
    one = ImageBatch(batch.images[1:2], ["image 1"], batch.labels[1:2])
    for name, value in objective.held_out_metrics(network, one).items():
        torch.testing.assert_close(value, found[name][1:2])      # of the image, not of the batch
    assert list(objective_of(PLAIN).held_out_metrics(moved(SiT(PLAIN)), batch)) == ["velocity_mse"]
    zero = objective.held_out_metrics(SiT(SMALL).eval(), batch)["class_velocity_mse"]      # velocity 0: |noise − class token|²
    wanted = 1 + objective.seen(batch)[0].square().mean(1)
    assert bool(((zero / wanted - 1).abs() < 1).all())


def test_a_teacher_without_a_class_token_gives_its_mean(monkeypatch):
    lite0 = VisionTeacherConfig(backend="asset", source="efficientnet-lite0", input_size=64)
    try:
        objective = SiTObjective(replace(OBJECTIVE, teacher=lite0), PLAIN)
    except WeightsMissing as missing:
        pytest.skip(str(missing))
    class_token, features = objective.seen(batch_of())
    assert class_token.shape == (3, objective.teacher.width) and features.shape == (3, 16, objective.teacher.width)
    own = objective.teacher.features(batch_of().images, 4)
    assert torch.equal(features, own)
    torch.testing.assert_close(class_token, own.mean(1))      # its own grid is 4 × 4
    entangled = SiTObjective(replace(OBJECTIVE, teacher=lite0), replace(SMALL, class_token=objective.teacher.width))
    assert "mean of the patch features of" in entangled.provenance()["class_token"]
    assert "class_token" not in objective_of().provenance()


def test_what_the_objective_refuses():
    with pytest.raises(ConfigError, match="class_token must be 12, the channels of random weights"):
        SiTObjective(OBJECTIVE, replace(SMALL, class_token=13))
    with pytest.raises(ConfigError, match="needs objective"):
        SiTObjective(ObjectiveConfig(), SMALL)
    latents = LatentBatch(normal(3, 3, 4, 4), ["a", "b", "c"], torch.tensor([1, 2, 3]))
    with pytest.raises(ConfigError, match="holds cached latents"):
        objective_of().generator_losses(SiT(SMALL), latents, Draw(0), REG_TERMS)
    with pytest.raises(ConfigError, match="align_after 4 is above"):
        objective_of(align_after=4).generator_losses(SiT(SMALL), batch_of(), Draw(0), REG_TERMS)


def test_trained_it_generates_the_class_it_is_asked_for():
    """Latents and class token ±2 by class: signs of path, velocity and sampler have to fit."""
    cfg = ModelConfig(channels=1, grid=2, classes=2, width=16, depth=1, heads=2, class_token=12)
    torch.manual_seed(0)
    network, objective = SiT(cfg), objective_of(cfg, align_after=1)
    signs = torch.tensor([1.0, -1.0])
    labels = torch.arange(64) % 2
    objective.latents_of = lambda batch, draw: 2 * signs[labels].view(64, 1, 1, 1).expand(64, 1, 2, 2)
    objective.seen = lambda batch: (2 * signs[labels, None].expand(64, 12), torch.ones(64, 4, 12))
    batch = ImageBatch(torch.zeros(64, 3, 8, 8), ["x"] * 64, labels)
    optimizer = torch.optim.Adam([*network.parameters(), *objective.heads.parameters()], lr=1e-2)
    for step in range(150):
        terms = objective.generator_losses(network, batch, Draw(0, step=step), REG_TERMS).terms
        optimizer.zero_grad()
        (terms["mse"] + 0.1 * terms["class_mse"] + 0.5 * terms["alignment"]).backward()
        optimizer.step()
    for sampling in (replace(SDE, steps=20), SamplingConfig(steps=20), replace(SDE, steps=20, guidance=1.5)):
        made = network.eval().sample(torch.arange(20) % 2, list(range(20)), sampling)
        torch.testing.assert_close(made.mean((1, 2, 3)), 2 * signs[torch.arange(20) % 2], rtol=0, atol=1.0)
    assert terms["alignment"] < 0.5


# --- conversion ---------------------------------------------------------------------------------------------------------

def official(cfg, projected=True):
    """A state dict with REG's keys, drawn at random: its names written out, shapes in our config's sizes."""
    width, hidden, n = cfg.width, int(cfg.mlp_ratio * cfg.width), (cfg.grid // cfg.patch) ** 2 + (cfg.class_token is not None)
    pixels = cfg.patch**2 * cfg.channels
    shapes = {
        "x_embedder.proj": (width, cfg.channels, cfg.patch, cfg.patch), "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width), "final_layer.linear": (pixels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(cfg.depth):
        shapes |= {f"blocks.{i}.{k}": v for k, v in {
            "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden),
            "adaLN_modulation.1": (6 * width, width)}.items()}
        if cfg.qk_norm:
            shapes |= {f"blocks.{i}.attn.{s}_norm": (width // cfg.heads,) for s in "qk"}
    if cfg.class_token is not None:
        shapes |= {"cls_projectors2": (width, cfg.class_token), "wg_norm": (width,)}
        shapes |= {"final_layer.linear_cls": (cfg.class_token, width)}
    if projected:
        shapes |= {"projectors.0.0": (20, width), "projectors.0.2": (20, 20), "projectors.0.4": (12, 20)}
    tensors = {f"{k}.weight": v for k, v in shapes.items()} | {f"{k}.bias": v[:1] for k, v in shapes.items()}
    tensors |= {"y_embedder.embedding_table.weight": (cfg.classes + 1, width), "pos_embed": (1, n, width)}
    return {k: normal(*v, seed=i) for i, (k, v) in enumerate(sorted(tensors.items()))}


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_official_keys_are_covered_both_ways(cfg, projected):
    state = official(cfg, projected)
    converted = from_official({"ema": state, "model": {"other": torch.zeros(1)}}, {"depth": 3, "num_heads": 2})
    assert replace(converted.model, sampling=cfg.sampling) == cfg
    network = build_tokenizer("sit", converted.model)
    load_weights(network, converted.tokenizer, "here")
    assert len(converted.heads) == 6 * projected
    back = to_official(network.state_dict(), converted.heads)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    assert torch.equal(network.positions, state["pos_embed"]) and torch.equal(network.latent_std, torch.ones(3, 1, 1))


def test_sd_vaes_latents_are_scaled_as_released():
    converted = from_official(official(replace(SMALL, channels=4)), {"depth": 3, "num_heads": 2})
    torch.testing.assert_close(1 / converted.tokenizer["latent_std"], torch.full((4, 1, 1), 0.18215))


def test_wrong_checkpoints_are_refused():
    arguments, state = {"depth": 3, "num_heads": 2}, official(SMALL)
    for wrong, message in (
        ({k: v for k, v in state.items() if not k.startswith("blocks.2.")}, "misses blocks.2"),
        ({**state, "projectors.1.0.weight": torch.zeros(1)}, "left over projectors.1.0.weight"),
        ({k: v for k, v in state.items() if k != "pos_embed"}, "misses pos_embed"),
        ({k: v for k, v in state.items() if k != "projectors.0.4.weight"}, "misses projectors.0.4.weight"),
        ({**state, "wg_norm.weight": torch.zeros(3)}, "another shape wg_norm.weight"),
        ({"epoch": 3}, "no checkpoint of REG: it has none of ema"),
    ):
        with pytest.raises(CheckpointError, match=message):
            from_official(wrong, arguments)
    with pytest.raises(ConfigError, match="16 wide"):
        from_official(state)


# --- recipe -------------------------------------------------------------------------------------------------------------

def test_the_recipe_is_regs():
    cfg = load_config("generation/vfm_vae-sit-xl")
    assert (cfg.model.width, cfg.model.depth, cfg.model.heads) == SIZES["XL"] and cfg.model.class_token == 768
    assert cfg.stages[0].weights == {"mse": 1.0, "class_mse": 0.03, "alignment": 0.5}
    assert cfg.model.sampling == SamplingConfig(solver="euler_maruyama", steps=250)


@pytest.mark.parametrize(("override", "message"), [
    ("objective.teacher=null", "class_token 768 needs objective.teacher"),
    ("objective.tokenizer=null", "needs images"),
    ("model.class_token=null", "class_mse needs model.class_token"),
    ("objective.align_after=29", "above model.depth"),
    ("model.patch=3", "multiple of model.patch"),
    ("model.sampling.solver=ddim", "model.sampling.solver must be one of"),
    ("stages.0.weights.kl=1", "has no loss 'kl'"),
])
def test_what_a_recipe_may_not_say(override, message):
    overrides = [override] if "teacher" not in override else [override, "stages.0.weights={mse: 1.0}"]
    with pytest.raises(ConfigError, match=message):
        load_config("generation/vfm_vae-sit-xl", overrides)
