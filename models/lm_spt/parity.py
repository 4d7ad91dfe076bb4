"""Computes every tensor of an LM-SPT parity folder, by the functions that train and infer."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.parity import GivenDraw
from tokenizers_lab.settings import OptimizerConfig, StageConfig
from tokenizers_lab.training.objective import weighted_sum
from tokenizers_lab.training.optim import build_optimizer, learning_rate, set_learning_rate

from .config import ObjectiveConfig
from .convert import discriminator_from_official, discriminator_name, from_official, official_names
from .model import LMSPT
from .objective import LMSPTObjective
from .parity_parts import (
    discriminator_tensors,
    forward_tensors,
    inference,
    mel_tensors,
    quantizer_tensors,
    scale_tensors,
    segments,
    teacher_tensors,
    usage,
    variant_quantizer,
)

DRAWS = {"quantizer_dropout": ("train.rand_dropout_acoustic",)}
# names of the folder's weights of the loss: ours
WEIGHTS = {
    "mel_weight": "mel", "adversarial_weight": "gan", "feature_matching_weight": "feature_matching",
    "acoustic_codebook_weight": "acoustic_codebook", "acoustic_commitment_weight": "acoustic_commitment",
    "lambda_distill_loss": "distill", "lambda_semantic_commitment_loss": "semantic_commitment",
    "lambda_semantic_codebook_loss": "semantic_codebook",
}
OFFICIAL_TERMS = {"gan": "adv_generator"}
BY_TERM = {"mel": "mel", "gan": "adv_generator_before", "distill": "distill", "acoustic_commitment": "acoustic_commitment",
           "semantic_codebook": "semantic_codebook"}


def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder / "weights.safetensors", config)
    objective = build_objective(folder, config, tokenizer)
    batch = segments(given, config, tokenizer, objective.teacher.sample_rate)
    result = {"data.speech": batch.audio.squeeze(1), "data.duration_total": batch.seconds}
    result |= inference(tokenizer, batch.audio, given)
    dropout = objective.cfg.quantizer_dropout
    result |= quantizer_tensors("q", tokenizer.quantizer, given, dropout)
    result |= usage(tokenizer.quantizer, given)
    if "fsq_variant" in config:
        fsq = variant_quantizer(folder / "fsq_quantizer.safetensors", config["fsq_variant"])
        result |= quantizer_tensors("fsq", fsq, given, config["fsq_variant"]["quantizer_dropout"])
    if "causal_variant" in config:
        causal = load_tokenizer(folder / "weights_causal.safetensors", config["causal_variant"])
        result |= {f"causal.{name}": value for name, value in inference(causal, given["causal.x"], {}).items()}
        result |= causal_tensors(causal, given["causal.x"], result)
    if "discriminator_msd" in config:
        result |= scale_tensors(scale_objective(folder, config, tokenizer), batch.audio)
    result |= schedule(config["train"], given["schedule.steps"])
    result |= validation(tokenizer, objective, batch)
    result |= training(tokenizer, objective, batch, GivenDraw(given, DRAWS), config)
    return {name: value.detach() for name, value in result.items()}


def load_tokenizer(file: Path, config: dict[str, Any]) -> LMSPT:
    """The tokenizer of the authors' weights and arguments, in eval mode."""
    converted = from_official(read_weights(file), config)
    tokenizer = LMSPT(converted.model)
    load_weights(tokenizer, converted.tokenizer, file.name)
    return tokenizer.eval()


def discriminator_options(described: dict[str, Any]) -> dict[str, Any]:
    """Our objective's options of the discriminators that a folder describes."""
    arguments = described["constructor_args"]
    options = {"mpd_periods": arguments["periods"], "msd_rates": arguments["rates"], "mrd_windows": arguments["fft_sizes"]}
    sizes = ("mpd_channels", "mrd_channels", "msd_channels", "msd_groups")
    return options | {name: described[name] for name in sizes if name in described}


def build_objective(folder: Path, config: dict[str, Any], tokenizer: LMSPT) -> LMSPTObjective:
    """The objective that the folder's config describes, with its teacher and discriminators."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from tokenizers_lab.teachers.speech import WhisperTeacher

    described, mel = config["teacher"], config["loss"]["mel"]
    if (mel["pow"], mel["mag_weight"], mel["log_weight"], mel["clamp_eps"]) != (2, 1, 1, 1e-5):
        raise ConfigError(f"the mel loss must have the authors' power, weights and floor, not {mel}")
    cfg = ObjectiveConfig(
        quantizer_dropout=config["constructor_args"]["quantizer_dropout"],
        teacher_seconds=described["window_seconds"],
        distill_loss={"mse": "l2", "l1": "l1"}[described.get("distill_type", "mse")],
        mel_bands=mel["n_mels"], mel_windows=mel["window_lengths"], **discriminator_options(config["discriminator"]))
    objective = LMSPTObjective(cfg, tokenizer.cfg, build_frozen=False)
    sizes = ("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "max_source_positions",
             "activation_function")
    network = WhisperEncoder(WhisperConfig(**{name: described[name] for name in sizes}))
    load_weights(network, read_weights(folder / "teacher.safetensors"), "teacher.safetensors")
    objective.frozen["teacher"] = WhisperTeacher(network, cfg.teacher_seconds, provenance="parity set")
    load_discriminators(objective, folder / "discriminator.safetensors")
    return objective


def load_discriminators(objective: LMSPTObjective, file: Path) -> None:
    """Load the authors' discriminators into the objective."""
    judge = objective.discriminators["dac"]
    counts = len(objective.cfg.mpd_periods), len(objective.cfg.msd_rates)
    load_weights(judge, discriminator_from_official(read_weights(file), judge.state_dict(), *counts), file.name)


def scale_objective(folder: Path, config: dict[str, Any], tokenizer: LMSPT) -> LMSPTObjective:
    """An objective whose discriminators are the folder's scale discriminators alone."""
    cfg = ObjectiveConfig(**discriminator_options(config["discriminator_msd"]))
    objective = LMSPTObjective(cfg, tokenizer.cfg, build_frozen=False)
    load_discriminators(objective, folder / "discriminator_msd.safetensors")
    return objective


@torch.no_grad()
def causal_tensors(tokenizer: LMSPT, audio: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the causal variant that have names of their own."""
    made = tokenizer(audio)
    semantic, acoustic = tokenizer.latents(audio)
    rename = {"codes": "infer.codes", "decode": "infer.decode", "decode_semantic_only": "infer.decode_semantic_only",
              "aux_semantic_decode": "infer.aux_semantic_decode"}
    parts = {"acoustic": made.quantized.acoustic, "semantic": made.quantized.semantic}
    return {
        "causal.z_semantic": semantic, "causal.z_acoustic": acoustic, "causal.forward_x": made.reconstruction,
        "causal.forward_semantic_x": made.resynthesis,
        **{f"causal.{name}": found[f"causal.{ours}"] for name, ours in rename.items()},
        **{f"causal.loss.{part}_{name}": loss for part, made in parts.items() for name, loss in made.losses.items()},
    }


def stages(train: dict[str, Any]) -> tuple[StageConfig, StageConfig]:
    """The recipe of the generator, and that of the discriminators, whose rate is constant."""
    generator = StageConfig(
        name="train", lr=train["learning_rate"], min_lr=train["min_lr"], warmup=train["warmup_steps"], schedule="cosine")
    return generator, StageConfig(name="discriminators", lr=train["discriminator_lr"], schedule="constant")


def schedule(train: dict[str, Any], steps: Tensor) -> dict[str, Tensor]:
    """Learning rates at the given steps, and at the step that is computed."""
    generator, discriminators = stages(train)
    total = train["steps_per_epoch"] * train["max_epoch"]
    return {
        "schedule.lr": torch.tensor([learning_rate(generator, generator.lr, step, total) for step in steps.tolist()]),
        "step.lr_generator": torch.tensor(learning_rate(generator, generator.lr, train["step_index"], total)),
        "step.lr_discriminator": torch.tensor(learning_rate(discriminators, discriminators.lr, train["step_index"], total)),
    }


@torch.no_grad()
def validation(tokenizer: LMSPT, objective: LMSPTObjective, batch: Any) -> dict[str, Tensor]:
    """All losses in eval mode."""
    tokenizer.eval()
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset(WEIGHTS.values()))
    assert losses.fake is not None and losses.real is not None
    terms = losses.terms
    return {
        "valid.codes": tokenizer(batch.audio).quantized.codes,
        "valid.spec_loss": terms["mel"], "valid.adv_g_loss": terms["gan"], "valid.feat_loss": terms["feature_matching"],
        "valid.acoustic.codebook_loss": terms["acoustic_codebook"], "valid.semantic.codebook_loss": terms["semantic_codebook"],
        "valid.acoustic.commitment_loss": terms["acoustic_commitment"],
        "valid.semantic.commitment_loss": terms["semantic_commitment"], "valid.semantic.distill_loss": terms["distill"],
        "valid.disc_loss": objective.discriminator_losses(losses.real, losses.fake).terms["discriminator"],
    }


def training(
    tokenizer: LMSPT, objective: LMSPTObjective, batch: Any, draw: GivenDraw, config: dict[str, Any]
) -> dict[str, Tensor]:
    """One step of training: the discriminators' update, then the generator's, with every loss and gradient."""
    tokenizer.train()
    objective.train()
    weights = {ours: float(config["loss"][name]) for name, ours in WEIGHTS.items()}
    active, rates = frozenset(weights), schedule(config["train"], torch.zeros(1))
    made = objective.autoencode(tokenizer, batch.audio, draw)
    real, fake = objective.reference(batch), made.reconstruction
    result = forward_tensors(tokenizer, made, batch.audio, draw, objective.cfg.quantizer_dropout)
    result |= mel_tensors(objective, real, fake) | discriminator_tensors(objective, real, fake)
    result |= teacher_tensors(objective, made, batch)
    before = objective.terms(made, batch, active)
    result |= {f"loss.before.{OFFICIAL_TERMS.get(name, name)}": before[name] for name in ("gan", "feature_matching")}
    for ours, official in BY_TERM.items():
        result |= {f"grad_norm_by_term.{official}.{k}": v for k, v in term_norms(tokenizer, before[ours]).items()}

    # the discriminators
    loss = objective.discriminator_losses(real, fake).terms["discriminator"]
    counts = len(objective.cfg.mpd_periods), len(objective.cfg.msd_rates)
    judge = objective.discriminators["dac"]
    named = {f"discriminator.{discriminator_name(key, *counts)}": p for key, p in judge.named_parameters()}
    result |= update(named, loss, rates["step.lr_discriminator"].item(), config["train"])
    result |= {"loss.discriminator": loss, "grad_norm.discriminator_total": result["grad_norm.total"]}

    # the generator, judged by the updated discriminators
    made.resynthesis.retain_grad()
    after = objective.terms(made, batch, active)
    total = weighted_sum(after, weights)
    named = {name: p for key, p in tokenizer.named_parameters() for name in official_names(key, tokenizer.cfg)}
    result |= update(named, total, rates["step.lr_generator"].item(), config["train"], generator_parts(tokenizer))
    assert made.resynthesis.grad is not None
    result |= {f"loss.{OFFICIAL_TERMS.get(name, name)}": term for name, term in after.items()}
    return result | {"loss.total": total, "grad_norm.generator_total": result["grad_norm.total"],
                     "grad.total_wrt_semantic_x": made.resynthesis.grad[0]}


def update(
    named: dict[str, nn.Parameter], loss: Tensor, lr: float, train: dict[str, Any], parts: dict[str, nn.Module] | None = None
) -> dict[str, Tensor]:
    """One clipped AdamW step from zero state: gradients and parameters after it by official name, norms of the parts."""
    settings = OptimizerConfig(betas=tuple(train["betas"]), eps=train["eps"], weight_decay=train["weight_decay"])
    unique = {id(p): (name, p) for name, p in named.items()}.values()           # a shared encoder has two names
    optimizer = build_optimizer(unique, settings)
    set_learning_rate(optimizer, lr)
    optimizer.zero_grad()
    loss.backward()
    result = {f"grad.{name}": p.grad.clone() for name, p in named.items() if p.grad is not None}
    for part, module in (parts or {}).items():
        result[f"grad_norm.{part}"] = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    result["grad_norm.total"] = torch.nn.utils.clip_grad_norm_([p for _, p in unique], train["clip_grad_norm"])
    optimizer.step()
    return result | {f"step.param_after.{name}": p.detach().clone() for name, p in named.items()}


def generator_parts(tokenizer: LMSPT) -> dict[str, nn.Module]:
    """The codec's parts, under the names of the folder's gradient norms."""
    parts: dict[str, nn.Module] = {
        "semantic_encoder": tokenizer.semantic_encoder, "decoder": tokenizer.decoder, "aux_decoder": tokenizer.aux_decoder,
        "quantizer_semantic": tokenizer.quantizer.semantic, "quantizer_acoustic": tokenizer.quantizer.acoustic,
    }
    return parts if tokenizer.cfg.shared_encoder else {**parts, "acoustic_encoder": tokenizer.acoustic_encoder}


def term_norms(tokenizer: LMSPT, term: Tensor) -> dict[str, Tensor]:
    """L2 norm of a term's gradient in every part."""
    parts = {name: list(part.parameters()) for name, part in generator_parts(tokenizer).items()}
    if not term.requires_grad:      # FSQ's losses are 0
        return {name: torch.zeros(()) for name in parts}
    gradients = torch.autograd.grad(term, [p for part in parts.values() for p in part], retain_graph=True, allow_unused=True)
    found = iter(gradients)
    return {name: torch.nn.utils.get_total_norm([g for g in (next(found) for _ in part) if g is not None] or [torch.zeros(1)])
            for name, part in parts.items()}
