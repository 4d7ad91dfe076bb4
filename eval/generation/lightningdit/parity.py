"""Computes every tensor of a LightningDiT parity folder, by the functions that train and infer."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.diffusion.flow import TimeConfig, draw_times
from tokenizers_lab.diffusion.guidance import conditioned
from tokenizers_lab.diffusion.samplers import euler
from tokenizers_lab.eval.generation.config import LatentObjectiveConfig, SamplingConfig
from tokenizers_lab.eval.generation.parity import block_parts, official_network, read_arguments, training
from tokenizers_lab.eval.generation.pixels import to_uint8
from tokenizers_lab.eval.latents import LatentMoments, as_vectors
from tokenizers_lab.nn.patch import sincos_positions
from tokenizers_lab.parity import GivenDraw
from tokenizers_lab.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD

from .convert import from_official
from .model import LightningDiT

PARTS = {
    "x_embedder": ("x_embed.",), "t_embedder": ("t_embed.",), "y_embedder": ("y_embed.",), "blocks": ("blocks.",),
    "final_layer": ("final.",),
}


def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs. Time 0 is noise."""
    config = read_arguments(folder)
    network = official_network(LightningDiT, from_official, folder / "weights.safetensors", config)
    with torch.no_grad():
        result = forward(network, given) | times(given, config) | images(given)
        result |= sampling(network, given, config["sample"]) | statistics(network, given, config)
        if (folder / "variant_weights.safetensors").exists():
            variant = official_network(
                LightningDiT, from_official, folder / "variant_weights.safetensors", config["variant_constructor_args"])
            result |= other_options(variant, given)
    transport, optimizer = config["transport"], config["optimizer"]
    objective = LatentObjectiveConfig(
        time=time_config(transport), label_drop=float(config["constructor_args"]["class_dropout_prob"]))
    weights = {"mse": 1.0, "cosine": 1.0 if transport.get("use_cosine_loss") else 0.0}
    clip = float(optimizer.get("max_grad_norm") or "inf")
    result |= training(network, given, objective, weights, PARTS, optimizer, clip, float(config["ema_decay"]))
    return result | {k.replace(".blocks.", ".block"): v for k, v in result.items() if ".blocks." in k}


def time_config(transport: Mapping[str, Any]) -> TimeConfig:
    """Distribution of the times by the authors' options."""
    if not transport.get("use_lognorm"):
        return TimeConfig()
    return TimeConfig("lognorm", mean=float(transport.get("lognorm_mu", 0.0)), std=float(transport.get("lognorm_sigma", 1.0)))


def forward(network: LightningDiT, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own parts on x, t and y."""
    x, time, labels = given["x"], given["t"], given["y"]
    condition = network.t_embed(time) + network.y_embed(labels)
    patches = network.x_embed(x)
    first = block_parts(network.block(0), patches + network.positions, condition, network.rope)
    made = network(x, time, labels, tokens_after=len(network.blocks))
    side = network.cfg.grid // network.cfg.patch
    first["adaln"] = first["adaln"][:, 0]      # one condition an image
    result = {f"forward.block0.{k}": v for k, v in first.items()}
    if network.rope is not None:
        result["rope.cos"], result["rope.sin"] = network.rope.chunk(2, dim=-1)
    return result | {
        "forward.patch_embed": patches,
        "forward.condition": condition,
        "forward.label_embed": network.y_embed(labels),
        "forward.time_embed": network.t_embed(time),
        "forward.time_sincos": network.t_embed.features(time),
        "forward.time_embed_0_half_1": network.t_embed(torch.tensor([0.0, 0.5, 1.0])),
        "forward.last_block.out": made.tokens,
        "forward.final.adaln": network.final.modulation(F.silu(condition)),
        "forward.final.norm": network.final.norm(made.tokens),
        "forward.final.tokens": network.final(made.tokens, condition),
        "forward.velocity": made.velocity,
        "forward.velocity_null": network(x, time, torch.full_like(labels, network.null_class)).velocity,
        "init.pos_embed": sincos_positions(side, network.cfg.width),
        "norm.small_out": network.block(0).norm1(given["norm.small_in"]),
    }


def other_options(variant: LightningDiT, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A second network, of other options."""
    x, time, labels = (given[f"variant.{name}"] for name in ("x", "t", "y"))
    made = variant(x, time, labels, tokens_after=1)
    last = variant(x, time, labels, tokens_after=len(variant.blocks)).tokens
    return {
        "variant.block0.out": made.tokens,
        "variant.final.tokens": variant.final(last, variant.t_embed(time) + variant.y_embed(labels)),
        "variant.norm_small_out": variant.block(0).norm1(given["variant.norm_small_in"]),
        "variant.patch_embed": variant.x_embed(x),
        "variant.velocity": made.velocity,
    }


def times(given: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Training times of the folder's draws."""
    shape = tuple(given["time.rand_uniform"].shape)
    drawn = {k: v.float() for k, v in given.items() if k.startswith("time.rand_")}
    draw = GivenDraw(drawn, {"u": ["time.rand_uniform"], "n": ["time.rand_normal"]})
    cases = [TimeConfig("lognorm", mean=float(case["mu"]), std=float(case["sigma"])) for case in config["time_lognormal_cases"]]
    return {"time.uniform": draw_times(TimeConfig(), draw, shape, "u")} | {
        f"time.lognormal_{i}": draw_times(cfg, draw, shape, "n") for i, cfg in enumerate(cases)
    }


def images(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decoder outputs as 8-bit images, by VA-VAE's rule and by VTP's."""
    values = given["image.float"]
    mean, std = (torch.tensor(colours)[:, None, None] for colours in (IMAGENET_MEAN, IMAGENET_STD))
    made = {"vavae": to_uint8((values + 1) / 2, "half_up"), "vtp": to_uint8(values * std + mean, "truncate")}
    return {f"image.uint8_{name}": image.movedim(1, -1) for name, image in made.items()}


def sampling(network: LightningDiT, given: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Time grids, samples of every kind, and guided velocities in the authors' doubled batch."""
    noise, labels = given["sample.z0"], given["sample.labels"]
    alpha = float(options["timestep_shift"])
    plain = SamplingConfig(steps=int(options["num_steps"]) - 1)
    shifted = replace(plain, shift=1 / alpha if alpha > 0 else 1.0)
    guided = replace(shifted, guidance=float(options["cfg_scale"]), guidance_low=float(options["cfg_interval_start"]),
                     guided_channels=int(options["guided_channels"]))
    adaptive = replace(plain, solver="dopri5", shift=1 / (float(options["dopri5"].get("timestep_shift", 0)) or 1.0))

    def sample(cfg: SamplingConfig) -> Tensor:
        return network.solve(network.guided_velocity(labels, cfg), noise, cfg, [])

    states = [noise]
    for step in pairwise(network.times(shifted).tolist()):
        states.append(euler(network.guided_velocity(labels, shifted), states[-1], step))
    result = {
        "sample.times": network.times(plain).float(), "sample.times_shifted": network.times(shifted).float(),
        "sample.euler": sample(plain), "sample.dopri5": sample(adaptive), "sample.euler_shifted_cfg": sample(guided),
        "sample.euler_shifted_trajectory": torch.stack(states),
    }
    unconditional = conditioned(network.velocity, torch.full_like(labels, network.null_class))
    for i, name in enumerate(("below", "above")):
        time = given["guided.times"][i].expand(len(noise))
        first, second = network.guided_velocity(labels, guided)(noise, time), unconditional(noise, time)
        # both halves of the authors' batch have the same first channels; only the first half is used
        second = torch.cat([first[:, : guided.guided_channels], second[:, guided.guided_channels :]], dim=1)
        result[f"guided.velocity_{name}_start"] = torch.cat([first, second])
    return result


def statistics(network: LightningDiT, given: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Statistics of cached latents, and what the network makes of them."""
    moments = LatentMoments()
    moments.add(as_vectors(given["stats.latents"]))
    mean, std = (torch.from_numpy(values).float() for values in (moments.mean, moments.unbiased_std))
    centre, scale = (mean, std) if config["latents"]["latent_norm"] else (torch.zeros_like(mean), torch.ones_like(std))
    network.set_latent_statistics(centre, scale / float(config["latents"]["latent_multiplier"]))
    cut = slice(0, 2)
    normalised = network.normalise(given["stats.latents"][cut])
    guided = sampling(network, given, config["sample"])["sample.euler_shifted_cfg"]
    result = {
        "stats.mean": mean[None, :, None, None], "stats.std": std[None, :, None, None],
        "stats.normalized": normalised, "stats.normalized_flip": network.normalise(given["stats.latents_flip"][cut]),
        "stats.denormalized": network.denormalise(normalised),
        "sample.euler_shifted_cfg_denormalized": network.denormalise(guided),
    }
    channels = network.cfg.channels      # the training batch of the folder is normalised already
    network.set_latent_statistics(torch.zeros(channels), torch.ones(channels))
    return result
