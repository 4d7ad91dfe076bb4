"""Computes every tensor of a DiT-DH parity folder, by the functions that train and infer."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.diffusion.flow import FlowPath, TimeConfig, resolution_shift
from tokenizers_lab.diffusion.samplers import euler
from tokenizers_lab.eval.generation.config import LatentObjectiveConfig, SamplingConfig
from tokenizers_lab.eval.generation.objective import LatentFlowObjective
from tokenizers_lab.eval.generation.parity import (
    block_parts,
    forward_step,
    given_batch,
    given_draw,
    official_network,
    read_arguments,
    training,
)
from tokenizers_lab.eval.generation.pixels import to_uint8
from tokenizers_lab.eval.latents import LatentMoments
from tokenizers_lab.nn.patch import sincos_positions
from tokenizers_lab.settings import StageConfig
from tokenizers_lab.training.optim import learning_rate

from .convert import from_official
from .model import DiTDH

HIGH = 0.999      # RAE's training times stay below


def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs."""
    config = read_arguments(folder)
    network = official_network(DiTDH, from_official, folder / "weights.safetensors", config)
    drop = float(config["constructor_args"]["label_dropout_prob"])
    with torch.no_grad():
        result = forward(network, given) | rates(given["lr.epochs"], config["lr_schedule"])
        guide = None
        if (folder / "guidance_weights.safetensors").exists():
            guide = official_network(
                DiTDH, from_official, folder / "guidance_weights.safetensors", config["guidance_model_constructor_args"])
            result["forward.guide_velocity"] = guide(given["x"], given["t"], given["y"]).velocity
        if (folder / "variant_weights.safetensors").exists():
            variant = official_network(
                DiTDH, from_official, folder / "variant_weights.safetensors", config["variant_constructor_args"])
            result |= other_options(variant, given)
        result |= sampling(network, guide, given, config["sample"]) | statistics(given["stats.moments"])
        if "rae" in config:
            result |= rae(network, given, config["rae"], drop)
        result["image.uint8"] = to_uint8(given["image.float01"]).movedim(1, -1)
    parts: dict[str, tuple[str, ...]] = {name: (f"{prefix}.",) for name, prefix in (
        ("x_embedder", "x_embed"), ("s_embedder", "s_embed"), ("s_projector", "s_projector"), ("t_embedder", "t_embed"),
        ("y_embedder", "y_embed"), ("final_layer", "final"))}
    depth = network.cfg.depth
    parts["encoder_blocks"] = tuple(f"blocks.{i}." for i in range(depth))
    parts["head_blocks"] = tuple(f"blocks.{i}." for i in range(depth, len(network.blocks)))
    objective = LatentObjectiveConfig(time=TimeConfig(shift=0, mirror=True), label_drop=drop)
    optimizer = config["optimizer"]
    return result | training(network, given, objective, {"mse": 1.0}, parts, optimizer, float(optimizer["grad_clip"] or "inf"),
                             float(config["ema_rate"]))


def forward(network: DiTDH, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own parts on x, t and y, and its constants."""
    x, time, labels, depth = given["x"], given["t"], given["y"], network.cfg.depth
    condition = F.silu(network.t_embed(time) + network.y_embed(labels))
    patches, given_to_head = network.s_embed(x), network.x_embed(x)
    tokens = patches if network.positions is None else patches + network.positions
    encoder = block_parts(network.block(0), tokens, condition, network.encoder_rope)
    per_token, last = network.encode(x, time, labels, tokens_after=depth)
    projected = network.s_projector(per_token)
    head = block_parts(network.block(depth), given_to_head, projected, network.head_rope)
    h = given_to_head
    for block in network.blocks[depth:]:
        h = block(h, projected, network.head_rope)
    result = {f"forward.encoder_block0.{k}": v for k, v in encoder.items()}
    result |= {f"forward.head_block0.{k}": v for k, v in head.items()}
    for name, table in (("encoder", network.encoder_rope), ("head", network.head_rope)):
        result[f"rope.{name}_cos"], result[f"rope.{name}_sin"] = table.chunk(2, dim=-1)
    shape = network.cfg.channels * network.cfg.grid**2
    return result | {
        "forward.encoder_condition": condition,
        "forward.encoder_out": last,
        "forward.encoder_patch_embed": patches,
        "forward.final.norm": network.final.norm(h),
        "forward.final.tokens": network.final(h, projected),
        "forward.head_condition": projected,
        "forward.head_condition_before_projection": per_token,
        "forward.head_last_block.out": h,
        "forward.head_patch_embed": given_to_head,
        "forward.label_embed": network.y_embed(labels),
        "forward.time_embed": network.t_embed(time),
        "forward.time_fourier": network.t_embed.features(time),
        "forward.velocity": network(x, time, labels).velocity,
        "forward.velocity_given_s": network.decode(x, per_token),
        "forward.velocity_null": network(x, time, torch.full_like(labels, network.null_class)).velocity,
        "init.pos_embed": sincos_positions(network.cfg.grid, network.cfg.width),
        "norm.small_out": network.final.norm(given["norm.small_in"]),
        "time.shift": torch.tensor(resolution_shift(shape), dtype=torch.float64),
    }


def other_options(variant: DiTDH, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network of other options."""
    made = variant(*(given[f"variant.{name}"] for name in ("x", "t", "y")), tokens_after=variant.cfg.depth)
    return {"variant.encoder_out": made.tokens, "variant.velocity": made.velocity}


def sampling(
    network: DiTDH, guide: DiTDH | None, given: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """RecTok's time grid and samples, and guided velocities at given times."""
    noise, labels = given["sample.rand_noise"], given["sample.labels"]
    steps, (low, high) = int(options["num_sampling_steps"]) - 1, options["interval_for_guided"]
    scales = {"cfg": float(options["cfg_scale"]), "autoguidance": float(options["guidance_scale"])}
    found = resolution_shift(network.cfg.channels * network.cfg.grid**2)
    shift = max(found, 1 / found)      # the authors' code puts more steps near noise for small latents too
    plain = SamplingConfig(steps=steps, shift=shift)

    def sample(cfg: SamplingConfig, by: DiTDH | None = None) -> Tensor:
        return network.solve(network.guided_velocity(labels, cfg, by), noise, cfg, [])

    grid = network.times(plain)
    result = {
        "sample.times": grid.float(), "sample.euler": sample(plain),
        "sample.euler_state_after_step1": euler(network.guided_velocity(labels, plain), noise, grid[:2]),
    }
    for name, by in (("cfg", None), ("autoguidance", guide)):
        if name == "autoguidance" and by is None:
            continue
        everywhere = SamplingConfig(steps=steps, shift=shift, guidance=scales[name])
        inside = SamplingConfig(steps=steps, guidance=scales[name], guidance_low=float(low), guidance_high=float(high))
        result[f"sample.euler_{name}"] = sample(everywhere, by)
        result[f"guided.velocity_{name}_interval"] = network.guided_velocity(given["y"], inside, by)(
            given["x"], given["guided.times"])
    return result


def rae(network: DiTDH, given: Mapping[str, Tensor], options: Mapping[str, Any], drop: float) -> dict[str, Tensor]:
    """The same weights by RAE's clock: training times and losses, and its sampler."""
    network = copy.deepcopy(network)
    network.cfg.clock, network.path = "noise", FlowPath("noise")
    cfg = SamplingConfig(steps=int(options["num_steps"]) - 1, shift=0, stop=1 - HIGH)
    result = {
        "rae.sample.times": network.times(cfg).float(),
        "rae.sample.euler": network.solve(
            network.guided_velocity(given["sample.labels"], cfg), given["sample.rand_noise"], cfg, []),
    }
    mean, std = float(options["logit_normal_mu"]), float(options["logit_normal_sigma"])
    for name, time in (("uniform", TimeConfig(high=HIGH, shift=0)),
                       ("logit_normal", TimeConfig("lognorm", mean=mean, std=std, high=HIGH, shift=0))):
        objective = LatentFlowObjective(LatentObjectiveConfig(time=time, label_drop=drop), network.cfg)
        steps = [forward_step(network.train(), objective, given_batch(given, i), given_draw(given, i), {"mse": 1.0})
                 for i in range(len(given["train.x1"]))]
        found = {
            "t": torch.cat([s.time for s in steps]), "xt": torch.cat([s.x for s in steps]),
            "velocity_target": torch.cat([s.target for s in steps]), "loss_per_sample": torch.stack([s.loss for s in steps]),
        }
        result |= {f"rae.train_{name}.{k}": v for k, v in found.items()}
    return result


def statistics(moments: Tensor) -> dict[str, Tensor]:
    """Statistics (C,) of the posterior means in moments (n, N, 2C)."""
    found = LatentMoments()
    found.add(moments.chunk(2, dim=-1)[0].flatten(0, 1))
    return {"stats.mean": torch.from_numpy(found.mean).float(), "stats.std": torch.from_numpy(found.std).float()}


def rates(epochs: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Learning rates at those epochs: constant, then along a line to the smallest, then constant."""
    stage = StageConfig(
        name="generator", epochs=float(options["warmup_end_epoch"]), lr=float(options["lr"]), min_lr=float(options["min_lr"]),
        schedule="linear", decay_from=float(options["warmup_start_epoch"]), decay_until=float(options["warmup_end_epoch"]),
    )
    values = [learning_rate(stage, stage.lr, epoch, float(options["warmup_end_epoch"])) for epoch in epochs.double().tolist()]
    return {"lr.values": torch.tensor(values, dtype=torch.float64)}
