"""Computes every tensor of a RecTok parity folder, by the functions that train and infer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.distillation import feature_distance
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.nn.rope import axial_table
from tokenizers_lab.parity import GivenDraw
from tokenizers_lab.teachers.vision_config import VisionTeacherConfig
from tokenizers_lab.training.objective import weighted_sum

from .config import ModelConfig, ObjectiveConfig
from .convert import Converted, from_official, official_name, official_shape
from .model import RecTok
from .objective import Noised, RecTokObjective

# purpose of a draw: tensors of io.safetensors that may stand for it, the first that is there counts
DRAWS = {
    "mask_ratio": ("train.mask_ratio",),
    "mask": ("train.rand_mask_noise",),
    "posterior": ("train.rand_posterior_eps",),
    "time": ("train.rand_t_uniform", "train.rand_t_normal", "train.rand_t"),
    "noise": ("train.rand_noise",),
}
SUPPORTED_TEACHERS = ("DINOv3ViTModel",)


def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs. Images there are in [−1, 1]."""
    config = json.loads((folder / "config.json").read_text())
    converted = from_official(read_weights(folder / "weights.safetensors"), config)
    check_arguments(config["constructor_args"], converted.model)
    tokenizer = RecTok(converted.model)
    load_weights(tokenizer, converted.tokenizer, "weights.safetensors")
    statistics = [given[name].flatten().expand(converted.model.latent_channels) for name in ("stats.mean", "stats.std")]
    tokenizer.set_latent_statistics(*statistics)
    objective = build_objective(folder, config, converted)
    images = to_unit(given["x"])
    result = inference(tokenizer.eval(), images)
    result |= decoders(tokenizer, objective, given["z"])
    tokenizer.train()
    objective.train()
    result |= training(tokenizer, objective, images, GivenDraw(given, DRAWS), config["loss"])
    return result


def to_unit(images: Tensor) -> Tensor:
    """[−1, 1] to [0, 1], as the authors do before their teachers and losses."""
    return (images + 1) * 0.5


def to_signed(images: Tensor) -> Tensor:
    """[0, 1] to [−1, 1]."""
    return images * 2 - 1


def check_arguments(arguments: dict[str, Any], model: ModelConfig) -> None:
    """Raise ConfigError on options of the authors that we do not have, and if the weights are of another model."""
    if arguments.get("cls_token_type", "none") != "none" or arguments.get("diff_cls_token", False):
        raise ConfigError("class tokens (cls_token_type, diff_cls_token) are not supported: the release has none")
    told = (arguments["img_size"], arguments["patch_size"], arguments["token_channels"], not arguments.get("disable_kl", False),
            bool(arguments.get("use_qknorm", False)))
    seen = (model.image_size, model.patch, model.latent_channels, model.variational, model.qk_norm)
    if told != seen:
        raise ConfigError(f"config.json and weights.safetensors disagree: image, patch, channels, KL, qk-norm {told} and {seen}")


def build_objective(folder: Path, config: dict[str, Any], converted: Converted) -> RecTokObjective:
    """The objective that the folder's config describes, with its semantic decoders, teachers and discriminator."""
    arguments, semantic = config["constructor_args"], converted.semantic
    networks = teachers(folder, config, list(semantic.widths))
    objective = RecTokObjective(
        ObjectiveConfig(
            teachers={name: VisionTeacherConfig(backend="random") for name in semantic.widths},
            semantic_decoder=semantic.size,
            semantic_kind=arguments.get("sem_dec_type", "transformer"),
            semantic_input="noisy" if arguments.get("sem_input_type", "noisy") == "noisy" else "clean",
            semantic_target=arguments.get("sem_target", "rec+align"),
            semantic_loss=config["loss"].get("sem_loss_type", "cosine"),
            gamma=float(arguments.get("gamma", 1.0)),
            noise_schedule=arguments.get("noise_schedule", "shift"),
            mask_ratio=float(arguments.get("mask_ratio", 0.4)),
            mask_ratio_min=min(float(arguments.get("mask_ratio_min", -0.1)), float(arguments.get("mask_ratio", 0.4))),
            mask_ratio_type="random" if arguments.get("mask_ratio_type", "random").lower() == "random" else "fixed",
            discriminator_width=config.get("discriminator", {}).get("ndf", 64),
            discriminator_layers=config.get("discriminator", {}).get("n_layers", 3),
        ),
        converted.model,
        build_frozen=False,
        teacher_widths=semantic.widths,
    )
    load_weights(objective.heads, converted.heads, "weights.safetensors")
    objective.frozen.update({f"teacher_{name}": network for name, network in networks.items()})
    judge = folder / "discriminator.safetensors"
    if judge.exists():
        load_weights(objective.discriminators["patchgan"], read_weights(judge), judge.name)
    return objective


def teachers(folder: Path, config: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The folder's teachers: `teacher` and teacher.safetensors, or for several `teachers` and teacher.<name>.safetensors."""
    import transformers

    from tokenizers_lab.teachers.vision import VisionTeacher

    described = config.get("teachers") or dict.fromkeys(names, config["teacher"])
    if names and described.keys() != set(names):
        raise ConfigError(f"config.json describes the teachers {sorted(described)}, the weights have decoders for {names}")
    if "teachers" not in config and len(names) > 1:
        raise ConfigError(f"{folder} has several teachers ({', '.join(names)}): describe each under 'teachers' in config.json")
    found = {}
    for name in names:
        kind = described[name].get("kind")
        if kind not in SUPPORTED_TEACHERS:
            raise ConfigError(f"a parity folder's teacher must be one of {', '.join(SUPPORTED_TEACHERS)}, not '{kind}'")
        network_config = transformers.DINOv3ViTConfig(**{k: v for k, v in described[name].items() if k != "kind"})
        network = transformers.DINOv3ViTModel(network_config)
        file = "teacher.safetensors" if "teachers" not in config else f"teacher.{name}.safetensors"
        load_weights(network, read_weights(folder / file), file)
        found[name] = VisionTeacher(network, "dinov3", provenance="parity set")
    return found


@torch.no_grad()
def inference(tokenizer: RecTok, images: Tensor) -> dict[str, Tensor]:
    """Encoding, decoding and the public interface, in eval mode."""
    grid = tokenizer.grid(images)
    moments = tokenizer.encoder(images)
    posterior = tokenizer.posterior(moments)
    encoding = tokenizer.encode(images)
    assert encoding.latents is not None
    result = {
        "encode.moments": moments,
        "encode.mode": posterior.mode(),
        "encode.kl_per_sample": posterior.kl(),
        "tokenize.normalized": encoding.latents,
        "detokenize.image01": tokenizer.decode(encoding.latents),
        "reconstruct.image01": tokenizer.reconstruct(images),
        "forward_eval.reconstruction": to_signed(tokenizer.decoder(posterior.mode(), grid)),
        "rope.encoder": axial_table(tokenizer.encoder.transformer.head_dim, *grid),
        "rope.decoder": axial_table(tokenizer.decoder.transformer.head_dim, *grid),
    }
    if posterior.logvar is not None:
        result |= {"encode.mean": posterior.mean, "encode.logvar": posterior.logvar, "encode.std": posterior.std}
    return result


@torch.no_grad()
def decoders(tokenizer: RecTok, objective: RecTokObjective, latents: Tensor) -> dict[str, Tensor]:
    """Both decoders on a given latent (B, N, C)."""
    side = tokenizer.cfg.image_size // tokenizer.cfg.patch
    result = {"decode.from_latent": to_signed(tokenizer.decoder(latents, (side, side)))}
    predictions = {name: objective.heads[f"semantic_{name}"](latents, (side, side)) for name in objective.cfg.teachers}
    return result | by_teacher("sem_decoder.from_latent", predictions)


def by_teacher(name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tensor of each teacher: under its plain name where there is one teacher, else with the teacher's name behind it."""
    result = {f"{name}.{teacher}": value for teacher, value in values.items()}
    if len(values) == 1:
        result[name] = next(iter(values.values()))
    return result


def training(
    tokenizer: RecTok, objective: RecTokObjective, images: Tensor, draw: GivenDraw, loss: dict[str, Any]
) -> dict[str, Tensor]:
    """One training forward, every loss, and the gradients."""
    made = objective.autoencode(tokenizer, images, draw)
    result = forward_tensors(objective, made, draw) | teacher_tensors(objective, made)

    terms = frozenset({"mse", "kl", "gan"} | ({"semantic"} if objective.cfg.teachers else set()))
    losses = objective.generator_losses(tokenizer, ImageBatch(images, []), draw, terms)
    weights = {
        "mse": float(loss.get("reconstruction_weight", 1.0)), "kl": float(loss.get("kl_weight", 1e-6)),
        "semantic": float(loss.get("sem_weight", 1.0)), "gan": float(loss.get("discriminator_weight", 0.5)),
    }
    without_gan = weighted_sum({k: v for k, v in losses.terms.items() if k != "gan"}, weights)
    result |= {
        "loss.reconstruction_mse": losses.terms["mse"], "loss.kl": losses.terms["kl"], "loss.gan_generator": losses.terms["gan"],
        "loss.total_no_gan": without_gan, "loss.total_with_gan": weighted_sum(losses.terms, weights),
    }
    without_gan.backward()
    result |= gradients(tokenizer, objective)
    assert losses.real is not None and losses.fake is not None
    judged = objective.discriminator_losses(losses.real, losses.fake.detach())
    result |= {
        "loss.discriminator_hinge": judged.terms["discriminator"],
        "disc.logits_real": objective.discriminators["patchgan"](losses.real),
        "disc.logits_real_mean": judged.logs["logits_real"],
        "disc.logits_fake_mean": judged.logs["logits_fake"],
    }
    return {k: v.detach() for k, v in result.items()}


def forward_tensors(objective: RecTokObjective, made: Noised, draw: GivenDraw) -> dict[str, Tensor]:
    """Mask, latents, noise level and reconstruction of the training forward."""
    tokens = made.grid[0] * made.grid[1]
    result = {
        "train.moments_visible": made.moments,
        "train.latent_noised": made.noised,
        "train.reconstruction": to_signed(made.reconstruction),
        "train.timestep_shift": torch.tensor(objective.noise_shift(tokens, made.latents.shape[2])),
    }
    if made.time is not None:
        result |= {"train.t_shifted": made.time, "train.t": made.time}
    if made.mask is not None:
        result |= {
            "train.ids_keep": made.mask.keep, "train.ids_masked": made.mask.masked, "train.ids_restore": made.mask.restore,
        }
    return result


def teacher_tensors(objective: RecTokObjective, made: Noised) -> dict[str, Tensor]:
    """The teachers' way to their features, the predictions, and every kind of semantic loss."""
    names = list(objective.cfg.teachers)
    if not names:
        return {}
    result: dict[str, Tensor] = {}
    size = (made.images.shape[2], made.images.shape[3])
    pairs = {name: objective.semantic_pair(name, made) for name in names}
    networks = {name: objective.teacher(name) for name in names}
    pixels = {name: teacher.preprocess(made.images, size) for name, teacher in networks.items()}
    result |= by_teacher("train.teacher_input_uint8", {name: teacher.to_uint8(made.images) for name, teacher in networks.items()})
    result |= by_teacher("train.teacher_pixel_values", pixels)
    with torch.no_grad():
        hidden = {name: teacher.hidden(pixels[name]) for name, teacher in networks.items()}
    result |= by_teacher("train.teacher_last_hidden_state", hidden)
    result |= by_teacher("train.teacher_features", {name: pair[0] for name, pair in pairs.items()})
    result |= by_teacher("train.pred_sem_features", {name: pair[1] for name, pair in pairs.items()})
    for kind in ("cosine", "l2", "l1"):
        result[f"loss.sem_{kind}"] = torch.stack([feature_distance(*pair, kind) for pair in pairs.values()]).mean()
    whole = objective.cfg
    if made.mask is not None:
        objective.cfg = replace(whole, semantic_target="reconstruction", semantic_loss="cosine")
        result["loss.sem_cosine_masked_only"] = objective.semantic(made)
        objective.cfg = whole
    return result


def gradients(tokenizer: RecTok, objective: RecTokObjective) -> dict[str, Tensor]:
    """Every gradient under its official name, and each part's L2 norm."""
    parts = {"encoder": tokenizer.encoder, "decoder": tokenizer.decoder, "sem_decoders": objective.heads}
    norms = {
        f"grad_norm.{name}": torch.nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None])
        for name, part in parts.items()
    }
    named = [*tokenizer.named_parameters(), *objective.heads.named_parameters()]
    return norms | {
        f"grad.{official_name(name)}": p.grad.reshape(official_shape(name, p.shape)) for name, p in named if p.grad is not None
    }


