"""Computes every tensor of a VFM-VAE parity folder, by the functions that train and infer."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.discriminators.multiscale_patchgan import patch_feature_matching, patch_loss
from tokenizers_lab.discriminators.projected import DiscriminatorHead
from tokenizers_lab.losses.equivariance import scale_and_turn
from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.parity import GivenDraw
from tokenizers_lab.training.objective import weighted_sum

from .config import ObjectiveConfig
from .convert import Converted, from_official, official_head_name, official_patchgan_name
from .model import VFMVAE
from .objective import VFMVAEObjective

DRAWS = {"posterior": ("rand_posterior_eps",)}
CROP = 48                                                # of the foundation model's input that the folder keeps
WEIGHTS = {"l1": 1.0, "multiscale": 1.0}                 # of loss.rec_without_perceptual
VF_WEIGHT, KL_WEIGHT = 5.0, 1e-6
HALF = 0.5                                               # scale of the folder's equivariance tensors, which turn by 90°


def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs. Losses there are in [−1, 1]."""
    config = json.loads((folder / "config.json").read_text())
    converted = from_official(read_weights(folder / "weights.safetensors"), config, fetch=False)
    tokenizer = VFMVAE(converted.model)
    vfm = {f"vfm.network.{k}": v for k, v in read_weights(folder / "vfm.safetensors").items()}
    load_weights(tokenizer, converted.tokenizer | vfm, "weights.safetensors and vfm.safetensors")
    objective = build_objective(config, converted)
    tokenizer.eval()
    objective.eval()
    result = encoding(tokenizer, given)
    result |= decoding(tokenizer, given)
    result |= equivariance(tokenizer, objective, given)
    result |= training(tokenizer, objective, given)
    judge = folder / "discriminator.safetensors"
    if judge.exists():
        result |= discriminators(objective, read_weights(judge), config["discriminator"], given, result["forward.image"])
    return {k: v.detach() for k, v in result.items()}


def build_objective(config: dict[str, Any], converted: Converted) -> VFMVAEObjective:
    """The objective that the folder's config describes, without the networks that it stubs."""
    arguments, sizes = config["constructor_args"], config.get("discriminator", {})
    objective = VFMVAEObjective(
        ObjectiveConfig(
            lpips="none", judge=None, vf=bool(converted.heads), multiscale_weights=[0.1] * (converted.model.blocks - 1),
            patchgan=True, patchgan_width=sizes.get("ndf", 64), patchgan_layers=sizes.get("n_layers", 3),
            patchgan_scales=sizes.get("num_D", 3),
            distance_margin=arguments.get("distmat_margin", 0.0), cosine_margin=arguments.get("cos_margin", 0.0),
            distance_weight=arguments.get("distmat_weight", 1.0), cosine_weight=arguments.get("cos_weight", 1.0),
            adaptive=WEIGHTS if arguments.get("use_adaptive_vf_loss", True) else {}, equivariance=False,
        ),
        converted.model,
        build_frozen=False,
    )
    load_weights(objective.heads, converted.heads, "weights.safetensors")
    return objective


def tokens(grid: Tensor) -> Tensor:
    """Maps (B, C, h, w) as tokens (B, h·w, C)."""
    return grid.flatten(2).transpose(1, 2)


@torch.no_grad()
def encoding(tokenizer: VFMVAE, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The foundation model, the projection, and the posterior."""
    result: dict[str, Tensor] = {}
    for suffix, prior in (("", 1.0), ("_eq_half", HALF)):
        moments, features = tokenizer.moments(given["x01"], prior)
        result[f"encode.moments{suffix}"] = moments
        result[f"vfm.pixel_values{suffix}_crop"] = features.pixels[:, :, :CROP, -CROP:]
        result |= {f"vfm.features{suffix}.{i}": tokens(layer) for i, layer in enumerate(features.layers)}
        if suffix:
            continue
        pooled = getattr(features.output, "pooler_output", None)
        if pooled is not None:
            result["vfm.pooled"] = pooled
        result |= {f"encode.patch_quant.{i}": t for i, t in enumerate(tokenizer.encoder.compress(features.layers))}
    posterior = tokenizer.posterior(result["encode.moments"])
    result["encode.mode"] = posterior.mode()
    if posterior.logvar is not None:
        result["encode.logvar"] = posterior.logvar
        result["encode.z_sample"] = posterior.sample(given["rand_posterior_eps"])
    return result


@torch.no_grad()
def decoding(tokenizer: VFMVAE, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder, step by step and as a whole."""
    decoder = tokenizer.decoder
    wide = decoder.decompress(given["z"])
    code = decoder.code(wide)
    maps = decoder.synthesis.latent_maps(wide)
    result = {"decode.post_quant": wide, "decode.w": code}
    result |= {f"decode.z_conv.{i}": value for i, value in maps.items()}
    result |= {f"decode.block_out.{i}": step.features for i, step in enumerate(decoder.synthesis.steps(maps, code))}
    images = tokenizer.images(given["z"])
    result |= {"decode.image": images[0]} | {f"decode.multiscale.{i}": image for i, image in enumerate(images[1:])}
    result["decode.image_small_latent"] = tokenizer.images(given["z_small"])[0]
    return result


@torch.no_grad()
def equivariance(tokenizer: VFMVAE, objective: VFMVAEObjective, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Latents and target at half size, turned once."""
    latents = scale_and_turn(given["z"], HALF, 1)
    return {
        "eq.latent_half_rot90": latents,
        "eq.image_from_latent": tokenizer.images(latents)[0],
        "eq.target01_half_rot90": scale_and_turn(given["x01"], HALF, 1, objective.sight.judged, antialias=True),
    }


def training(tokenizer: VFMVAE, objective: VFMVAEObjective, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """One training forward without equivariance, its losses, and the gradient norms of their sum."""
    draw = GivenDraw(given, DRAWS)
    made = objective.autoencode(tokenizer, given["x01"], draw)
    targets = objective.smaller_targets(made)
    result = {"forward.image": made.images[0]}
    result |= {f"target.multiscale.{i}": target for i, target in enumerate(targets)}
    result |= {f"loss.multiscale_l1.{i}": F.l1_loss(a, b) for i, (a, b) in enumerate(zip(made.images[1:], targets))}
    active = frozenset({"l1", "l2", "multiscale", "kl"} | ({"vf"} if "vf" in objective.heads else set()))
    losses = objective.generator_losses(tokenizer, ImageBatch(given["x01"], []), draw, active)
    terms = losses.terms
    reconstruction = weighted_sum({name: terms[name] for name in WEIGHTS}, WEIGHTS)
    total = reconstruction + KL_WEIGHT * terms["kl"]
    result |= {f"loss.{name}": terms[name] for name in ("l1", "l2", "multiscale", "kl")}
    if "vf" in terms:
        total = total + VF_WEIGHT * terms["vf"]
        result["loss.vf"] = losses.logs["vf_unscaled"]
        result["loss.vf_adaptive_weight"] = VF_WEIGHT * losses.logs["vf_scale"]
    result |= {"loss.rec_without_perceptual": reconstruction, "loss.total_without_perceptual_and_gan": total}
    total.backward()
    decoder = tokenizer.decoder
    parts: dict[str, list[nn.Module]] = {
        "ldm_adapter": [tokenizer.encoder, decoder.decompress, objective.heads], "mapping": [decoder.mapping],
        "synthesis": [decoder.synthesis],
    }
    for name, modules in parts.items():
        found = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
        result[f"grad_norm.{name}"] = torch.nn.utils.get_total_norm(found)
    return result


@torch.no_grad()
def discriminators(
    objective: VFMVAEObjective, state: dict[str, Tensor], sizes: dict[str, Any], given: dict[str, Tensor], fake: Tensor
) -> dict[str, Tensor]:
    """The StyleGAN-T head on given features, the PatchGAN on the images, and their losses."""
    head = DiscriminatorHead(sizes["head_channels"]).eval()
    load_renamed(head, {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}, official_head_name)
    logits = head(given["disc_head.in"])
    result = {"disc_head.logits": logits, "loss.stylegan_t_real": F.relu(1 - logits).mean(),
              "loss.stylegan_t_fake": F.relu(1 + logits).mean()}
    network = objective.discriminators["patchgan"]
    layers = objective.cfg.patchgan_layers
    load_renamed(network, {k.removeprefix("patchgan."): v for k, v in state.items() if k.startswith("patchgan.")},
                 lambda key: official_patchgan_name(key, layers))
    real_judged, fake_judged = network(given["x01"] * 2 - 1), network(fake)
    result |= {f"patchgan.logits_real.scale{i}": judged.logits for i, judged in enumerate(real_judged)}
    for kind in ("mse", "bce", "hinge"):
        result[f"loss.patchgan_disc_real_{kind}"] = patch_loss(real_judged, "real", kind)
        result[f"loss.patchgan_disc_fake_{kind}"] = patch_loss(fake_judged, "fake", kind)
        result[f"loss.patchgan_gen_{kind}"] = patch_loss(fake_judged, "generator", kind)
    result["loss.feature_matching"] = patch_feature_matching(real_judged, fake_judged)
    return result


def load_renamed(module: nn.Module, state: dict[str, Tensor], official: Any) -> None:
    """Load a state dict under official names. Raises CheckpointError if it does not fit."""
    names = {official(key): key for key in module.state_dict()}
    load_weights(module, {names.get(key, key): value for key, value in state.items()}, "discriminator.safetensors")
