"""Computes every tensor of a UniFlow parity folder, by the functions that train and infer."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tokenizers_lab.diffusion.pixel_flow import patchify, unpatchify
from tokenizers_lab.network import load_weights, read_weights

from .convert import from_official
from .model import UniFlow
from .objective import DistillAdapter, dispersive_loss

# options of `UniFlow.sample` that stand in tensors' names
OPTIONS: list[tuple[str, str, type]] = [
    (r"sample\.from_latent_(\d+)step", "steps", int),
    (r"sample\.from_latent_cfg_([\d.]+)", "guidance", float),
    (r"sample\.from_latent_pow_([\d.]+)", "power", float),
]


@torch.no_grad()
def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs. Images there are normalised."""
    config = json.loads((folder / "config.json").read_text())
    converted = from_official(read_weights(folder / "weights.safetensors"), config)
    tokenizer = UniFlow(converted.model).eval()
    load_weights(tokenizer, converted.tokenizer, "weights.safetensors")
    images, patch = given["x"], converted.model.patch
    grid = tokenizer.grid(images)

    states = tokenizer.encoder.hidden_states(images)
    latents = tokenizer.project(tokenizer.encoder(images)[-1])
    result = {f"encode.hidden_states.{i}": state for i, state in enumerate(states)}
    result |= {
        "encode.embeddings": states[0],
        "encode.embeddings_other_size": tokenizer.encoder.embed(given["x_other_size"]),
        "encode.latent": latents,
        "disp_loss": dispersive_loss(latents),
        "patchify": patchify(images, patch),
        "unpatchify": unpatchify(patchify(images, patch), grid, patch),
        "decode.unprojected": tokenizer.conditioner.unproject(latents),
        "decode.condition": tokenizer.conditioner(latents, grid),
        "flow.time_embed": tokenizer.flow.time_embed(given["vel.t"]),
        "flow.velocity": tokenizer.flow(given["vel.x"], given["vel.t"], given["vel.c"]),
    }
    with safe_open(folder / "io.safetensors", "pt") as opened:
        names = list(opened.keys())
    result |= sampled(tokenizer, given, result["decode.condition"], grid, names)
    if (folder / "adapter.safetensors").exists():
        sizes = config["distill_adapter"]
        adapter = DistillAdapter(sizes["in_channels"], sizes["out_channels"])
        load_weights(adapter, read_weights(folder / "adapter.safetensors"), "adapter.safetensors")
        result["distill_adapter.out"] = adapter(states[-1])
    return result


def sampled(
    tokenizer: UniFlow, given: dict[str, Tensor], own: Tensor, grid: tuple[int, int], wanted: list[str]
) -> dict[str, Tensor]:
    """Images that the flow samples from the given noise: under the condition of the images' own latents, and of `latent`."""
    condition = tokenizer.conditioner(given["latent"], grid)

    def images(under: Tensor, **options: Any) -> Tensor:
        rows = tokenizer.sample(under.flatten(0, 1), given["noise"], **options)
        return unpatchify(rows.unflatten(0, under.shape[:2]), grid, tokenizer.cfg.patch)

    result = {
        "decode.condition_from_latent": condition, "forward.reconstruction": images(own), "sample.from_latent": images(condition),
    }
    for name in wanted:
        for pattern, option, kind in OPTIONS:
            if found := re.fullmatch(pattern, name):
                result[name] = images(condition, **{option: kind(found[1])})
    return result
