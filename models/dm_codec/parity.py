"""Computes every tensor of a DM-Codec parity folder, by the functions that train and infer."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.nn.dac import Snake
from tokenizers_lab.parity import RowDraw
from tokenizers_lab.quantizers.codebook import kmeans
from tokenizers_lab.settings import OptimizerConfig, StageConfig
from tokenizers_lab.training.objective import Losses, weighted_sum
from tokenizers_lab.training.optim import build_optimizer, learning_rate, set_learning_rate

from .config import DiscriminatorConfig, MelConfig, ObjectiveConfig
from .convert import DISCRIMINATORS, discriminator_name, discriminators_from_official, from_official, official_name
from .model import DMCodec
from .objective import Coded, DMCodecObjective
from .parity_teachers import teacher_tensors

GUIDES = {"sm": "hubert", "lm": "llm"}      # our name of a teacher: the authors'
TERMS = {
    "waveform": "recon_l1", "mel": "mel", "commitment": "commit", "gan": "adversarial", "feature_matching": "feature_matching",
}
ALL_TERMS = frozenset({*TERMS, "distillation"})


@dataclass
class GivenBatch:
    """What the objective reads of a training batch."""

    audio: Tensor                                                # (B, 1, samples)
    features: dict[str, Tensor] = field(default_factory=dict)    # teacher: (B, T, D)


def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs."""
    config = json.loads((folder / "config.json").read_text())
    check_config(config)
    audio = given["wav"]
    result, targets = teacher_tensors(folder, config, audio)
    codec, objective = build(folder, config, "step")
    result |= inference(codec.eval(), objective, given) | layers(codec, audio) | kmeans_tensors(codec, given)
    result |= judged(objective.eval(), audio, codec)
    mel: Any = objective.frozen["mel"]
    result |= {f"mel.wav.{k}": levels for k, levels in enumerate(mel.spectrograms(audio))}
    result |= snake_tensors(given)
    for variant in config["training_variants"]:
        result |= training_step(folder, config, variant, given, targets)
    return {name: value.detach() for name, value in result.items()}


def check_config(config: dict[str, Any]) -> None:
    """Raise ConfigError on sizes of discriminators that we do not have."""
    scale, stft = config["discriminators"]["msd"], config["discriminators"]["mstftd"]
    fixed = {"groups": [1, 4, 16, 16, 16, 16, 1], "kernels": [15, 41, 41, 41, 41, 41, 5], "strides": [1, 2, 2, 4, 4, 1, 1]}
    for name, value in fixed.items():
        if scale.get(name, value) != value:
            raise ConfigError(f"discriminators.msd.{name} must be {value}, not {scale[name]}")
    if stft["n_ffts"] != stft["win_lengths"] or stft["hop_lengths"] != [n // 4 for n in stft["n_ffts"]]:
        raise ConfigError("discriminators.mstftd: windows must be as long as n_fft, hops a quarter of them")


def build(folder: Path, config: dict[str, Any], variant: str) -> tuple[DMCodec, DMCodecObjective]:
    """The codec, and the objective of one of the folder's training variants, with the folder's weights."""
    options, sizes = config["model_and_trainer_config"], config["discriminators"]
    converted = from_official(read_weights(folder / "weights.safetensors"), config)
    converted.model.released_start = True
    codec = DMCodec(converted.model)
    load_weights(codec, converted.tokenizer, "weights.safetensors")
    objective = DMCodecObjective(
        ObjectiveConfig(
            **variant_options(config["training_variants"][variant]),
            teacher_width=converted.teacher_width,
            mel=MelConfig(
                options["num_mels"], options["n_fft"], options["hop_size"], options["win_size"], float(options["fmin"]),
                options["fmax_for_loss"], [float(w) for w in options["mel_loss_lambdas"]],
            ),
            discriminators=DiscriminatorConfig(
                sizes["mpd"]["periods"], sizes["mpd"]["channels"], sizes["msd"]["scales"], sizes["msd"]["channels"],
                sizes["mstftd"]["n_ffts"], sizes["mstftd"]["filters"],
            ),
        ),
        converted.model, build_frozen=False,
    )
    load_weights(objective.heads, converted.heads, "weights.safetensors")
    judges = discriminators_from_official(objective.discriminators, read_weights(folder / "discriminator.safetensors"))
    load_weights(objective.discriminators, judges, "discriminator.safetensors")
    return codec, objective


def variant_options(variant: dict[str, Any]) -> dict[str, Any]:
    """Our objective's options of a training variant. Raises ConfigError on layers that we cannot express."""
    ours = {theirs: name for name, theirs in GUIDES.items()} | {"unlocked": "none"}
    teacher, lock = variant["teacher"], variant.get("lock", "unlocked")
    layer = variant["layers"] if lock == "unlocked" else variant["layers_second_forward"]
    if len(layer) != 1 or variant.get("layers_first_forward", [0]) != [0]:
        raise ConfigError(f"a training variant distils one layer, the locked teacher's being 0, not {variant}")
    weights = teacher.split("_")[1:] or [0.5, 0.5]
    return {
        "guidance": "combined" if teacher.startswith("combined") else ours[teacher], "sm_weight": float(weights[0]),
        "lm_weight": float(weights[1]), "lock": ours[lock], "layer": layer[0], "axis": variant["distill_type"][0],
        "similarity_weight": float(variant.get("lambda_sim", 1.0)), "targets_as_released": as_released(variant),
    }


def as_released(variant: dict[str, Any]) -> bool:
    """Whether the teachers' features have the superfluous axis of the released scripts."""
    return "(B, 1, T, D)" in variant.get("teacher_feature_shape", "")


# --- inference --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def inference(codec: DMCodec, objective: DMCodecObjective, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoding, quantizing and decoding in eval mode; the authors' codes are (K, B, T)."""
    audio, quantizer = given["wav"], codec.quantizer
    encoded = codec.encoder(audio)
    quantized = quantizer(encoded)
    codes, two = codec.analyse(audio), codec.analyse(audio, codebooks=2)
    later, second = quantizer.encode(encoded, first=1), quantizer.encode(encoded, last=2, first=1)
    fewer = quantizer(encoded, last=2)
    result = {
        "encoder.out": encoded, "rvq.quantized": quantized.quantized, "rvq.codes": flip(quantized.codes),
        "rvq.commit_loss_eval": quantized.losses["commitment"], "rvq.quantized_per_layer": torch.stack(quantized.layers),
        "decoder.out": codec.decoder(quantized.quantized), "forward.feature": student(objective, quantized.layers[0]),
        "forward.nq2_layer1.out": codec.decoder(fewer.quantized),
        "forward.nq2_layer1.feature": student(objective, fewer.layers[1]),
        "forward_feature.first_and_last": torch.stack([quantized.layers[0], quantized.layers[-1]]),
        "encode.codes": flip(codes), "encode.codes_nq2": flip(two), "encode.codes_st1": flip(later),
        "encode.codes_nq2_st1": flip(second),
        "decode.out": codec.synthesise(codes), "decode.out_nq2": codec.synthesise(codes[:, :2]),
        "decode.out_st1": codec.decoder(quantizer.decode(codes[:, 1:], first=1)),
        "decode.out_codes_st1": codec.decoder(quantizer.decode(later, first=1)),
        "rvq.decode": quantizer.decode(codes), "rvq.decode_st1": quantizer.decode(codes[:, 1:], first=1),
    }
    for name in ("odd", "short"):
        if f"wav_{name}" in given:
            encoded = codec.encoder(given[f"wav_{name}"])
            found = codec.analyse(given[f"wav_{name}"])
            result |= {
                f"{name}.encoder_out": encoded, f"{name}.codes": flip(found), f"{name}.out": codec.synthesise(found),
                f"{name}.feature": student(objective, quantizer(encoded).layers[0]),
            }
    return result


def student(objective: DMCodecObjective, value: Tensor) -> Tensor:
    """The feature (B, T, D) of a codebook's value (B, width, T)."""
    return objective.heads["transform"](value.transpose(1, 2))


def flip(codes: Tensor) -> Tensor:
    """(B, K, T) to (K, B, T), or back."""
    return codes.transpose(0, 1)


@torch.no_grad()
def layers(codec: DMCodec, audio: Tensor) -> dict[str, Tensor]:
    """Outputs of the encoder's and the decoder's layers, activations left out; long ones are cut in the middle."""
    given = {"encoder": audio, "decoder": codec.quantizer(codec.encoder(audio)).quantized}
    result = {}
    for name, x in given.items():
        for i, layer in enumerate(codec.get_submodule(f"{name}.model").children()):
            x = layer(x)
            if not isinstance(layer, (nn.ELU, Snake)):
                result[f"{name}.act.{i:02d}"] = x if x.shape[2] <= 80 else torch.cat([x[..., :40], x[..., -40:]], -1)
    return result


def snake_tensors(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The activation that the release does not use."""
    if "snake.x" not in given:
        return {}
    activation = Snake(given["snake.x"].shape[1])
    load_weights(activation, {"alpha": given["snake.alpha"]}, "io.safetensors")
    return {"snake.out": activation(given["snake.x"])}


@torch.no_grad()
def kmeans_tensors(codec: DMCodec, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """k-means of the encoder's vectors from the given rows; also of the first 9 vectors only, fewer than codes."""
    rows = codec.encoder(given["wav"]).transpose(1, 2).flatten(0, 1)
    runs = [("", "kmeans.rand_idx", rows, 50), ("_iter1", "kmeans.rand_idx", rows, 1),
            ("_fewer_samples", "kmeans.rand_idx_fewer_samples", rows[:9], 10)]
    result: dict[str, Tensor] = {}
    for suffix, draw, samples, iterations in runs:
        if draw in given:
            means, counts = kmeans(samples, samples[given[draw]], iterations)
            result |= {f"kmeans.means{suffix}": means, f"kmeans.bins{suffix}": counts.long()}
    return result


@torch.no_grad()
def judged(objective: DMCodecObjective, audio: Tensor, codec: DMCodec) -> dict[str, Tensor]:
    """The discriminators in eval mode on the audio and its reconstruction."""
    reconstruction = codec.decoder(codec.quantizer(codec.encoder(audio)).quantized)
    result = verdicts("disc_eval", objective, audio, reconstruction)
    for family, members in objective.judge(audio).items():
        for i, member in enumerate(members):
            maps = torch.stack([m.abs().mean() for m in member.features])
            result[f"disc_eval.{DISCRIMINATORS[family]}.{i}.fmap_real_meanabs"] = maps
    return result


def verdicts(prefix: str, objective: DMCodecObjective, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Outputs of every member for both, and how far their feature maps are apart."""
    views = {"real": objective.judge(real), "fake": objective.judge(fake)}
    result: dict[str, Tensor] = {}
    for family in views["real"]:
        for i, (r, f) in enumerate(zip(views["real"][family], views["fake"][family])):
            name = f"{prefix}.{DISCRIMINATORS[family]}.{i}"
            distances = [(a - b).abs().mean() for a, b in zip(r.features, f.features)]
            result |= {f"{name}.real": r.logits, f"{name}.fake": f.logits, f"{name}.fmap_l1": torch.stack(distances)}
    return result


# --- one training step --------------------------------------------------------------------------------------------------------

def training_step(
    folder: Path, config: dict[str, Any], variant: str, given: dict[str, Tensor], targets: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A step of the authors' trainer: forward, discriminators' update, generator's losses by the updated ones, its update."""
    codec, objective = build(folder, config, variant)
    described, options = config["training_variants"][variant], config["model_and_trainer_config"]
    if "inited = 0" in described.get("codebooks", ""):
        for buffer in codec.quantizer.buffers():
            buffer.zero_()
    codec.train()
    objective.train()
    batch = GivenBatch(given["wav"], {n: t[:, None] if as_released(described) else t for n, t in targets.items()})
    draw = RowDraw(given, {f"kmeans.{i}": (f"{variant}.fwd0.rand_kmeans_idx.{i}",) for i in range(codec.codebooks)})
    made = objective.passes(codec, batch.audio, draw)
    result = forward_tensors(objective, made)

    schedule = config["optimizer"]
    adam = OptimizerConfig(betas=tuple(schedule["betas"]), eps=schedule["eps"], weight_decay=0.0)
    rate = learning_rate(StageConfig("parity"), schedule["lr"], 1, schedule["num_train_steps"])
    result |= discriminator_update(objective, made[0], adam, rate)

    losses = objective.losses(made, batch, ALL_TERMS)
    weights = {
        "waveform": options["recon_loss_lambda"], "mel": 1.0, "commitment": options["commitment_loss_lambda"],
        "distillation": options["distill_loss_lambda"], "gan": 1.0, "feature_matching": 1.0,
    }
    total = weighted_sum(losses.terms, weights)
    result |= loss_tensors(objective, made, batch, losses) | {"loss.generator_total": total}
    optimizer = build_optimizer([*codec.named_parameters(), *objective.heads.named_parameters()], adam)
    result |= term_gradients(codec, objective, losses.terms | {
        f"distill.{GUIDES[name]}": value for name, value in objective.distances(made, batch).items()})
    total.backward()
    result |= gradients(codec, objective)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    result |= after(codec, objective) | {"lr_first_step": torch.tensor(rate, dtype=torch.float64)}
    return {f"{variant}.{name}": value for name, value in result.items()}


def forward_tensors(objective: DMCodecObjective, made: list[Coded]) -> dict[str, Tensor]:
    """The batch, the reconstruction, and codes and feature of each forward."""
    first = made[0]
    layer, lock = objective.cfg.layer, objective.cfg.lock
    result = {
        "wav": first.audio, "wav_hat": first.reconstruction, "encoder_out": first.encoded,
        "quantized": first.quantized.quantized,
    }
    for i, coded in enumerate(made):
        result[f"codes.fwd{i}"] = flip(coded.quantized.codes)
        result[f"feature.fwd{i}"] = objective.feature(coded, 0 if lock != "none" and i == 0 else layer)
    return result


def discriminator_update(objective: DMCodecObjective, coded: Coded, adam: OptimizerConfig, rate: float) -> dict[str, Tensor]:
    """The discriminators' losses and gradients, and their update."""
    keep = {k: v.clone() for k, v in objective.discriminators.state_dict().items()}
    with torch.no_grad():
        result = verdicts("d_phase", objective, coded.audio, coded.reconstruction)
    objective.discriminators.load_state_dict(keep)      # looking has moved the spectral norm's vectors
    losses = objective.discriminator_losses(coded.audio, coded.reconstruction.detach())
    total = weighted_sum(losses.terms, dict.fromkeys(losses.terms, 1.0))
    result |= {f"loss.disc.{DISCRIMINATORS[name]}": value for name, value in losses.terms.items()}
    result["loss.disc_total"] = total
    optimizer = build_optimizer(objective.discriminators.named_parameters(), adam)
    total.backward()
    result |= {f"grad_norm.disc.{DISCRIMINATORS[name]}": norm_of(p.grad for p in network.parameters())
               for name, network in objective.discriminators.items()}
    set_learning_rate(optimizer, rate)
    optimizer.step()
    keep = {k: v.clone() for k, v in objective.discriminators.state_dict().items()}
    with torch.no_grad():
        result |= verdicts("g_phase", objective, coded.audio, coded.reconstruction)
    objective.discriminators.load_state_dict(keep)
    return result


def loss_tensors(objective: DMCodecObjective, made: list[Coded], batch: GivenBatch, losses: Losses) -> dict[str, Tensor]:
    """Every loss, by the authors' names."""
    terms = losses.terms
    result = {
        "loss.recon_l1": terms["waveform"], "loss.mel_weighted_sum": terms["mel"], "loss.commit": terms["commitment"],
        "loss.commit_per_layer": made[0].quantized.layer_losses["commitment"], "loss.distill_combined": terms["distillation"],
    }
    for ours, theirs in (("gan", "adversarial"), ("feature_matching", "feature_matching")):
        result |= {f"loss.{theirs}.{DISCRIMINATORS[family]}": losses.logs[f"{ours}_{family}"] for family in DISCRIMINATORS}
    result |= {f"loss.mel.{k}": value for k, value in enumerate(objective.mel(made[0])[1])}
    result |= {f"loss.distill.{GUIDES[name]}": value for name, value in objective.distances(made, batch).items()}
    return result


def term_gradients(codec: DMCodec, objective: DMCodecObjective, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """L2 norm of each unweighted loss's gradient in each part."""
    result = {}
    named = [(part, p) for part, module in parts(codec, objective).items() for p in module.parameters()]
    for term, loss in terms.items():
        if not loss.requires_grad:      # a later layer distilled without a transform trains nothing
            continue
        found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        for part in parts(codec, objective):
            norm = norm_of(g for (owner, _), g in zip(named, found) if owner == part)
            result[f"grad_norm_of.{TERMS.get(term, term)}.{part}"] = norm
    return result


def parts(codec: DMCodec, objective: DMCodecObjective) -> dict[str, nn.Module]:
    """The generator's parts by the authors' names; those without parameters left out."""
    found = {"encoder": codec.encoder, "decoder": codec.decoder, "transform": objective.heads["transform"]}
    return {name: module for name, module in found.items() if any(True for _ in module.parameters())}


def norm_of(gradients: Iterable[Tensor | None]) -> Tensor:
    """L2 norm over all tensors; 0 where there is none."""
    found = [g for g in gradients if g is not None]
    return torch.nn.utils.get_total_norm(found) if found else torch.zeros(())


def gradients(codec: DMCodec, objective: DMCodecObjective) -> dict[str, Tensor]:
    """The total's gradients under their official names, and each part's L2 norm."""
    named = [*codec.named_parameters(), *objective.heads.named_parameters()]
    result = {f"grad.{official_name(name)}": p.grad for name, p in named if p.grad is not None}
    result |= {re.sub(r"\.model\.\d+\.lstm\.", ".lstm.", name): value for name, value in result.items() if ".lstm." in name}
    return result | {f"grad_norm.{name}": norm_of(p.grad for p in module.parameters())
                     for name, module in parts(codec, objective).items()}


def after(codec: DMCodec, objective: DMCodecObjective) -> dict[str, Tensor]:
    """Parameters and buffers when the step is over."""
    named = [*codec.named_parameters(), *objective.heads.named_parameters()]
    result = {f"params_after.{official_name(name)}": p for name, p in named}
    judges = objective.discriminators.state_dict().items()
    books = [codec.quantizer.book(i) for i in range(codec.codebooks)]
    return result | {f"params_after.{discriminator_name(k)}": v for k, v in judges} | {
        "codebook_after.cluster_size": torch.stack([b.cluster_size for b in books]),
        "codebook_after.embed": torch.stack([b.embed for b in books]),
        "codebook_after.embed_avg": torch.stack([b.embed_sum for b in books]),
    }
