"""Computes every tensor of a VTP parity folder, by the functions that train and infer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.nn.dino_head import DINOHead
from tokenizers_lab.nn.dinov3_vit import PRECISIONS, RotaryBlocks, RotaryConfig
from tokenizers_lab.nn.patch import to_grid, to_tokens
from tokenizers_lab.nn.rope import grid_periods
from tokenizers_lab.self_distillation import frozen_copy, masked_patches, student_logits, teacher_logits, update_teacher

from .config import ModelConfig
from .convert import dino_head, from_official
from .model import VTP
from .network import Trunk

# suffix of a tensor's name: the precision of the rotary tables that it was made with; none: that of the release
VARIANTS = {
    "": RotaryConfig("bfloat16", "bfloat16"), "@rope_mixed": RotaryConfig("float32", "bfloat16"), "@rope_fp32": RotaryConfig(),
}
ROPE_GRID = (3, 2)            # of the folder's tables
EMA_MOMENTUM = 0.75           # of its teacher's step


@torch.no_grad()
def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs. Images there are ImageNet-normalised."""
    config = json.loads((folder / "config.json").read_text())
    converted = from_official(read_weights(folder / "weights.safetensors"), config)
    check_arguments(config["constructor_args"], converted.model)
    tokenizer = VTP(converted.model)
    load_weights(tokenizer, converted.tokenizer, "weights.safetensors")
    tokenizer.eval()
    result: dict[str, Tensor] = {}
    for suffix, rotary in VARIANTS.items():
        with rotary_precision(tokenizer, rotary):
            found = reconstruction(tokenizer, given) | tables(tokenizer)
            if converted.model.text is not None:
                found |= contrast(tokenizer, given)
            if not suffix:
                found |= features(tokenizer, given["x"])
                if (folder / "ssl_heads.safetensors").exists():
                    found |= self_distillation(tokenizer, folder, config["dino_head"], given)
        result |= {name + suffix: value for name, value in found.items()}
    return result


def check_arguments(arguments: dict[str, Any], model: ModelConfig) -> None:
    """Raise ConfigError if the weights are of another model than the authors' options say."""
    told: dict[str, Any] = {}
    for option, cfg in (("vision", model.trunk), ("decoder", model.decoder)):
        told |= {
            f"{option}_embed_dim": cfg.width, f"{option}_num_heads": cfg.heads, f"{option}_ffn_layer": cfg.ffn,
            f"{option}_norm_layer": cfg.norm.replace("_", ""), f"{option}_use_qk_norm": cfg.qk_norm,
        }
    told |= {"vision_patch_size": model.patch, "vision_feature_bottleneck": model.latent_channels}
    for name, seen in told.items():
        if arguments.get(name) is not None and arguments[name] != seen:      # no bottleneck: as wide as the trunk
            raise ConfigError(f"config.json and weights.safetensors disagree: {name} is {arguments[name]} and {seen}")


@contextmanager
def rotary_precision(tokenizer: VTP, rotary: RotaryConfig) -> Iterator[None]:
    """Both networks' rotary tables in that precision for a while."""
    parts: tuple[RotaryBlocks, ...] = (tokenizer.trunk, tokenizer.decoder)
    before = [part.rotary for part in parts]
    for part in parts:
        part.rotary = rotary
    try:
        yield
    finally:
        for part, own in zip(parts, before):
            part.rotary = own


def reconstruction(tokenizer: VTP, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Latents and images of both inputs, and the image of the given latent."""
    result = {"rec.image_from_latent": tokenizer.decoder(to_tokens(given["latent"]), grid_of(given["latent"]))}
    for name, suffix in (("x", ""), ("x_other_size", "_other_size")):
        if name in given:
            grid = tokenizer.trunk.grid(given[name])
            latents = tokenizer.trunk.latents(given[name])
            result[f"rec.latent{suffix}"] = to_grid(latents, *grid)
            result[f"rec.image{suffix}"] = tokenizer.decoder(latents, grid)
    return result


def grid_of(latents: Tensor) -> tuple[int, int]:
    """(rows, columns) of latents (B, C, h, w)."""
    return latents.shape[2], latents.shape[3]


def tables(tokenizer: VTP) -> dict[str, Tensor]:
    """The trunk's rotary periods and tables."""
    trunk = tokenizer.trunk
    types = PRECISIONS[trunk.rotary.coordinates], PRECISIONS[trunk.rotary.periods]
    cos, sin = trunk.table(*ROPE_GRID)[trunk.prefix :].chunk(2, dim=-1)
    return {"rope.periods": grid_periods(trunk.head_dim, types[0]).to(types[1]), "rope.trunk_cos": cos, "rope.trunk_sin": sin}


def contrast(tokenizer: VTP, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Images and texts in one space."""
    assert tokenizer.contrast is not None
    images, texts = tokenizer.project_images(tokenizer.trunk.semantic(given["x"])), tokenizer.embed_texts(given["text"])
    unit_images, unit_texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    return {
        "clip.image_features_raw": images, "clip.image_features": unit_images,
        "clip.text_features_raw": texts, "clip.text_features": unit_texts,
        "clip.logits_per_image": tokenizer.contrast(unit_images, unit_texts),
    }


def features(tokenizer: VTP, pixels: Tensor) -> dict[str, Tensor]:
    """The trunk's tokens, of the last block and of each."""
    trunk = tokenizer.trunk
    found = trunk(pixels)
    narrow = trunk.narrow(found)
    result = {
        "feature.cls_token": found.class_token, "feature.patch_tokens": found.patch_tokens,
        "feature.cls_token_bottleneck": narrow.class_token, "feature.patch_tokens_bottleneck": narrow.patch_tokens,
    }
    for number, tokens in enumerate(trunk.intermediate(pixels, range(trunk.depth))):
        result |= {f"feature.intermediate.{number}.cls_token": tokens.class_token,
                   f"feature.intermediate.{number}.patch_tokens": tokens.patch_tokens}
    return result


def self_distillation(tokenizer: VTP, folder: Path, sizes: dict[str, int], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What student and teacher say of the crops; the head by itself; the teacher's step."""
    state = read_weights(folder / "ssl_heads.safetensors")
    width = Trunk.semantic_width(tokenizer.cfg)
    head, teacher_head = (
        DINOHead(width, sizes["out_dim"], sizes["hidden_dim"], sizes["bottleneck_dim"], sizes["nlayers"]) for _ in range(2))
    load_weights(head, dino_head(state, "dino_head."), "ssl_heads.safetensors")
    load_weights(teacher_head, dino_head(state, "teacher_dino_head."), "ssl_heads.safetensors")
    teacher_trunk = frozen_copy(tokenizer.trunk)
    masked = masked_patches(given["ssl.masks"])
    taught = teacher_logits(teacher_trunk.semantic, teacher_head, given["ssl.global_crops"], masked)
    said = student_logits(tokenizer.trunk.semantic, head, given["ssl.global_crops"], given["ssl.masks"], given["ssl.local_crops"])
    result = {
        "dino_head.out": head(given["dino_head.in"]), "dino_head.out_no_last_layer": head.project(given["dino_head.in"]),
        "ssl.mask_indices": masked,
        "ssl.student_global_cls": said.class_tokens, "ssl.student_global_cls_after_head": said.classes,
        "ssl.student_local_cls_after_head": said.local_classes, "ssl.student_masked_patch_after_head": said.patches,
        "ssl.teacher_cls_after_head_swapped": taught.classes, "ssl.teacher_masked_patch_after_head": taught.patches,
    }
    teacher, student = ({"trunk": teacher_trunk, "head": teacher_head}, {"trunk": tokenizer.trunk, "head": head})
    update_teacher(nn.ModuleDict(teacher), nn.ModuleDict(student), EMA_MOMENTUM)
    last = dict(teacher_head.named_parameters())["last.parametrizations.weight.original1"]
    return result | {f"ema.teacher_last_layer_weight_v_after_{EMA_MOMENTUM}": last.detach().clone()}
