"""What the parity checks of the generators share: parts of a block, a training step, optimiser steps."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenizers_lab.data.batch import LatentBatch
from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.nn.dit import DiTBlock
from tokenizers_lab.nn.rope import apply_paired
from tokenizers_lab.parity import GivenDraw
from tokenizers_lab.settings import OptimizerConfig
from tokenizers_lab.training.objective import weighted_sum
from tokenizers_lab.training.optim import build_optimizer, set_learning_rate, update_ema

from .config import LatentObjectiveConfig
from .generator import LatentGenerator
from .objective import LatentFlowObjective
from .official import official_name

# purpose of a draw: tensors of io.safetensors that may stand for it, the first that is there counts
DRAWS = {
    "noise": ("train.rand_noise",),
    "time": ("train.rand_time_normal", "train.rand_time_uniform"),
    "label_drop": ("train.rand_label_drop",),
}


class Step(NamedTuple):
    """One training forward."""

    loss: Tensor                                # weighted sum of the terms, with its graph
    terms: dict[str, Tensor]                    # batch means
    x: Tensor                                   # what the network was given
    time: Tensor
    labels: Tensor
    velocity: Tensor
    target: Tensor


def read_arguments(folder: Path) -> dict[str, Any]:
    """config.json of a parity folder."""
    return json.loads((folder / "config.json").read_text())


def official_network(build: Any, convert: Any, file: Path, arguments: Mapping[str, Any]) -> Any:
    """The generator (`build` of a config) of an official state dict in a file (`convert`), in eval mode."""
    converted = convert(read_weights(file), arguments)
    network = build(converted.model).eval()
    load_weights(network, converted.tokenizer, file.name)
    return network


def block_parts(block: DiTBlock, x: Tensor, condition: Tensor, rope: Tensor | None) -> dict[str, Tensor]:
    """Every inner tensor of a block, by the names of the parity folders; `out` is the block's own."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, given, out, name=name: seen.update({f"{name}_in": given[0], f"{name}_out": out}))
        for name, module in (("attn", block.attn), ("mlp", block.mlp), ("norm1", block.norm1), ("norm2", block.norm2),
                             ("modulation", block.modulation), ("qkv", block.attn.qkv), ("proj", block.attn.out))
    ]
    try:
        out = block(x, condition, rope)
    finally:
        for hook in hooks:
            hook.remove()
    q, k, _ = block.attn.project(seen["attn_in"])
    turned = (q, k) if rope is None else (apply_paired(q, rope), apply_paired(k, rope))
    return {
        "adaln": seen["modulation_out"], "norm1": seen["norm1_out"], "attn_in": seen["attn_in"], "qkv": seen["qkv_out"],
        "q_before_rope": q, "k_before_rope": k, "q_rope": turned[0], "k_rope": turned[1],
        "attn_before_proj": seen["proj_in"], "attn_out": seen["attn_out"], "norm2": seen["norm2_out"], "mlp_in": seen["mlp_in"],
        "mlp_out": seen["mlp_out"], "out": out,
    }


def given_draw(given: Mapping[str, Tensor], item: int | None = None) -> GivenDraw:
    """The folder's draws in float32, as our draws are, of the whole batch or of one of its items."""
    rows = slice(None) if item is None else slice(item, item + 1)
    return GivenDraw({k: v[rows].float() for k, v in given.items() if k.startswith("train.rand_")}, DRAWS)


def given_batch(given: Mapping[str, Tensor], item: int | None = None) -> LatentBatch:
    """The folder's training batch, or one of its items."""
    rows = slice(None) if item is None else slice(item, item + 1)
    latents = given["train.x1"][rows]
    return LatentBatch(latents, [str(i) for i in range(len(latents))], given["train.labels"][rows])


def forward_step(
    network: LatentGenerator, objective: LatentFlowObjective, batch: LatentBatch, draw: GivenDraw, weights: Mapping[str, float]
) -> Step:
    """The objective's losses, and what it told the network."""
    seen: dict[str, Any] = {}
    hook = network.register_forward_hook(lambda _, told, out: seen.update(x=told[0], time=told[1], labels=told[2], out=out))
    try:
        losses = objective.generator_losses(network, batch, draw, frozenset(weights))
    finally:
        hook.remove()
    target = network.path.velocity(network.normalise(batch.latents), draw.normal("noise", tuple(batch.latents.shape)))
    return Step(weighted_sum(losses.terms, dict(weights)), losses.terms, seen["x"], seen["time"], seen["labels"],
                seen["out"].velocity, target)


def training(
    network: LatentGenerator, given: Mapping[str, Tensor], cfg: LatentObjectiveConfig, weights: Mapping[str, float],
    parts: Mapping[str, tuple[str, ...]], optimizer: Mapping[str, Any], clip: float, decay: float,
) -> dict[str, Tensor]:
    """Losses, gradients and two optimiser steps on the folder's batch. The network is left as it was.

    parts: gradient norm → what the names of its parameters begin with. optimizer: the authors' options; clip: norm to which
    gradients are clipped; decay: of the moving average. Parameters and gradients are under their official names.
    """
    objective = LatentFlowObjective(cfg, network.cfg)
    trained, ema = copy.deepcopy(network).train(), copy.deepcopy(network)

    def named(of: nn.Module, under: str) -> dict[str, Tensor]:
        pairs = [(name, p.grad if under.startswith("grad") else p) for name, p in of.named_parameters()]
        return {f"{under}.{official_name(name)}": value.detach().clone() for name, value in pairs if value is not None}

    def run(item: int | None = None) -> Step:
        return forward_step(trained, objective, given_batch(given, item), given_draw(given, item), weights)

    step, single = run(), [run(i).terms for i in range(len(given["train.x1"]))]
    result = {
        "train.t": step.time, "train.xt": step.x, "train.velocity_target": step.target, "train.velocity": step.velocity,
        "train.labels_after_drop": step.labels, "loss.total": step.loss,
    }
    for term in step.terms:
        result[f"loss.{term}"] = step.terms[term]
        result[f"loss.{term}_per_sample"] = torch.stack([terms[term] for terms in single])
    adam = build_optimizer(trained.named_parameters(), OptimizerConfig(
        weight_decay=float(optimizer["weight_decay"]), eps=float(optimizer["eps"]), decay_vectors=True,
        betas=(float(optimizer["beta1"]), float(optimizer["beta2"]))))
    set_learning_rate(adam, float(optimizer["lr"]))
    for number in (1, 2):
        if number == 2:
            step = run()
            result["step2.loss_total"] = step.loss
        adam.zero_grad()
        step.loss.backward()
        if number == 1:
            result |= named(trained, "grad")
            result |= {f"grad_norm.{name}": grad_norm(trained, prefixes) for name, prefixes in parts.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), clip)
        if number == 1:
            result |= {"grad_norm.total": norm} | named(trained, "grad_clipped")
        adam.step()
        update_ema(ema, trained, decay)
        result |= named(trained, f"step{number}") | named(ema, f"ema{number}")
    return {k: v.detach() for k, v in result.items()}


def grad_norm(network: nn.Module, prefixes: tuple[str, ...]) -> Tensor:
    """L2 norm of the gradients of all parameters whose names begin so."""
    found = [p.grad for name, p in network.named_parameters() if name.startswith(prefixes) and p.grad is not None]
    return torch.nn.utils.get_total_norm(found)
