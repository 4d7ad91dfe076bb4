"""Computes the vocoder's tensors of a TaDiCodec parity folder, by the functions that train and infer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.discriminators.result import Judgement
from tokenizers_lab.losses.adversarial import least_squares_generator, sum_of
from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.nn.vocos import Vocos
from tokenizers_lab.training.objective import weighted_sum

from .convert_vocoder import (
    discriminators_from_official,
    vocoder_from_official,
    vocoder_objective,
    vocoder_sizes,
)
from .vocoder import VocoderLosses
from .vocoder_config import VOCODER_TERMS

FAMILIES = {"period": "period_gan", "spectral": "spec_gan"}      # ours: the authors'
# our term: (the folder's tensor, the authors' option of its weight)
TERMS = {
    "mel": ("mel_loss", "mel_loss_weight"), "gan": ("adv_loss", "adv_loss_weight"),
    "feature_matching": ("fm_loss", "fm_loss_weight"), "spectral_feature_matching": ("spec_fm_loss", "spec_fm_loss_weight"),
}


def vocoder_tensors(
    folder: Path, config: Mapping[str, Any], given: Mapping[str, Tensor], to_mel: Callable[[Tensor], Tensor],
    guided: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every tensor of io.safetensors that is named vocoder.…, vocoder_train.… or pipeline.wav.

    to_mel: the front end, from audio (B, 1, samples) to normalised mel (B, bands, T). guided: the folder's `sample.guided` as
    computed by the codec, (B, T, bands); none: no pipeline.wav.
    """
    vocoder = build_vocoder(folder, config)
    result: dict[str, Tensor] = {}
    with torch.no_grad():
        if "vocoder.mel" in given:
            result |= layers(vocoder, given["vocoder.mel"])
        if guided is not None:
            result["pipeline.wav"] = vocoder(guided.transpose(1, 2))
    if "vocoder_train.wav" in given:
        audio = given["vocoder_train.wav"][:, None]                                        # (B, 1, samples)
        made = training(vocoder, build_losses(folder, config), config["loss"], audio, to_mel(audio))
        result |= {f"vocoder_train.{name}": value for name, value in made.items()}
    return {name: value.detach() for name, value in result.items()}


def build_vocoder(folder: Path, config: Mapping[str, Any]) -> Vocos:
    """The vocoder with the folder's weights, in eval mode."""
    vocoder = Vocos(**vocoder_sizes(config["vocos"]))
    official = read_weights(folder / "vocoder.safetensors")
    load_weights(vocoder, vocoder_from_official(official, vocoder), "vocoder.safetensors")
    return vocoder.eval()


def build_losses(folder: Path, config: Mapping[str, Any]) -> VocoderLosses:
    """The losses, with the folder's discriminators."""
    rate = config["loss"]["mel_loss"].get("sample_rate", config["preprocess"]["sample_rate"])
    losses = VocoderLosses(vocoder_objective(config), rate)
    official = read_weights(folder / "discriminators.safetensors")
    state = discriminators_from_official(official, losses.discriminators)
    load_weights(losses.discriminators, state, "discriminators.safetensors")
    return losses


def layers(vocoder: Vocos, mel: Tensor) -> dict[str, Tensor]:
    """What leaves the vocoder's layers, and its audio."""
    backbone, head = vocoder.backbone, vocoder.head
    embedded, features = backbone.embed(mel), backbone(mel)
    return {
        "vocoder.embed": embedded, "vocoder.block0": backbone.blocks[0](backbone.norm(embedded)),
        "vocoder.backbone": features.transpose(1, 2), "vocoder.head_linear": head.out(features.transpose(1, 2)),
        "vocoder.wav": vocoder(mel),
    }


def training(
    vocoder: Vocos, losses: VocoderLosses, options: Mapping[str, Any], audio: Tensor, mel: Tensor
) -> dict[str, Tensor]:
    """Both halves of a step, the discriminators being updated in neither."""
    views: dict[str, dict[str, list[Judgement]]] = {}
    result = {"mel": mel}

    def judge(real: Tensor, fake: Tensor) -> None:      # where training updates the discriminators
        judged = losses.discriminator_losses(real, fake)
        loss = options["disc_loss_weight"] * sum_of(judged.terms.values())
        loss.backward()
        views.update({"real": losses.judge(real), "fake": losses.judge(fake.detach())})
        result.update({"wav_fake": fake, "disc_loss": loss})

    made = losses.generator_terms(vocoder, audio, mel, frozenset(VOCODER_TERMS), judge)
    total = weighted_sum(made.terms, {term: options[weight] for term, (_, weight) in TERMS.items()})
    total.backward()
    members = {name: [m.logits for family in view.values() for m in family] for name, view in views.items()}
    result |= {
        "gen_loss": total, "real_loss": sum_of(least_squares_generator(logits) for logits in members["real"]),
        "fake_loss": sum_of(logits.square().mean() for logits in members["fake"]), "grad_norm.vocoder": grad_norm(vocoder),
    }
    result |= {name: made.terms[term] for term, (name, _) in TERMS.items()}
    for family, theirs in FAMILIES.items():
        result[f"grad_norm.{theirs}"] = grad_norm(losses.discriminators[family])
        result[f"{theirs}.features_real.0.0"] = views["real"][family][0].features[0]
        for name, view in views.items():
            result |= {f"{theirs}.logits_{name}.{i}": member.logits for i, member in enumerate(view[family])}
    return result


def grad_norm(module: nn.Module) -> Tensor:
    """L2 norm of the gradients of all parameters."""
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
