"""Losses of LM-SPT (arXiv 2506.16738, sec. III): reconstruction, and semantic distillation through resynthesised speech."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.data.resample import resample
from tokenizers_lab.discriminators.dac import DacDiscriminator
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.losses.adversarial import (
    feature_matching,
    frozen_parameters,
    least_squares_discriminator,
    least_squares_generator,
)
from tokenizers_lab.losses.multiscale_mel import MultiWindowMelLoss
from tokenizers_lab.quantizers.factorised import dropout_levels
from tokenizers_lab.quantizers.result import codebook_health
from tokenizers_lab.training.objective import Judge, Losses, Objective

from .config import ModelConfig, ObjectiveConfig, check_objective
from .model import LMSPT, Resynthesis


class LMSPTObjective(Objective):
    """The authors' losses, the Whisper teacher and the discriminators.

    The authors update the discriminators first, on the same reconstruction, and judge it then with the updated ones.
    `build_frozen=False` leaves the teacher out; whoever needs it puts it into `frozen["teacher"]`.
    """

    cfg: ObjectiveConfig
    discriminators_first = True

    def __init__(self, cfg: ObjectiveConfig, model: ModelConfig, build_frozen: bool = True):
        super().__init__(cfg)
        check_objective(cfg)
        self.rate, self.resynthesis_rate = model.output_sample_rate or model.sample_rate, model.auxiliary.sample_rate
        self.input_rate = model.sample_rate
        self.mel = MultiWindowMelLoss(self.rate, cfg.mel_bands, cfg.mel_windows)
        self.discriminators["dac"] = DacDiscriminator(
            self.rate, cfg.mpd_periods, cfg.msd_rates, cfg.mrd_windows, cfg.mpd_channels, cfg.msd_channels, cfg.msd_groups,
            cfg.mrd_channels)
        if build_frozen:
            from tokenizers_lab.teachers.speech import build_speech_teacher

            self.frozen["teacher"] = build_speech_teacher(cfg.teacher, cfg.teacher_seconds)

    @property
    def teacher(self) -> Any:
        """The Whisper encoder. Raises ConfigError if it was not built."""
        if "teacher" not in self.frozen:
            raise ConfigError("the teacher was not built")
        return self.frozen["teacher"]

    def provenance(self) -> dict[str, str]:
        """Where the teacher comes from."""
        return {"teacher": str(self.teacher.provenance)} if "teacher" in self.frozen else {}

    def autoencode(self, tokenizer: LMSPT, audio: Tensor, draw: Draw) -> Resynthesis:
        """The training pass of audio (B, 1, L), with quantizer dropout in training mode."""
        if not tokenizer.training:
            return tokenizer(audio)
        acoustic = tokenizer.cfg.codebooks - 1
        return tokenizer(audio, dropout_levels(draw, "quantizer_dropout", len(audio), acoustic, self.cfg.quantizer_dropout))

    def hear(self, resynthesis: Tensor, rate: int) -> Tensor:
        """The teacher's input features of resynthesised audio (B, 1, L) at `rate` Hz."""
        audio = resample(resynthesis.squeeze(1), rate, self.teacher.sample_rate)
        return self.teacher.log_mel(audio, floor_over_batch=self.cfg.distill_floor == "batch")

    def distill(self, resynthesis: Tensor, original: Tensor, rate: int | None = None) -> Tensor:
        """Distance of the teacher's features of both, padding included; the gradient goes to the resynthesis.

        resynthesis: (B, 1, L) at `rate` Hz, none: the auxiliary decoder's; original: (B, 1, L') at the teacher's rate.
        """
        with torch.no_grad():
            target = self.teacher.features(original.squeeze(1))
        features = self.teacher.encode(self.hear(resynthesis, rate or self.resynthesis_rate))
        distance = F.mse_loss if self.cfg.distill_loss == "l2" else F.l1_loss
        return distance(features.float(), target.float())

    def adversarial(self, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        """The generator's least-squares and feature-matching terms, sums over the members; audio (B, 1, L).

        Feature matching leaves out each member's last map. The discriminators' parameters get no gradient from either.
        """
        judge = self.discriminators["dac"]
        with torch.no_grad():
            reals = judge(real)
        with frozen_parameters(judge):
            fakes = judge(fake)
        return {
            "gan": torch.stack([least_squares_generator(f.logits) for f in fakes]).sum(),
            "feature_matching": torch.stack(
                [feature_matching(r.features[:-1], f.features[:-1]) for r, f in zip(reals, fakes)]).sum(),
        }

    def terms(self, made: Resynthesis, batch: Any, active: frozenset[str]) -> dict[str, Tensor]:
        """The active terms of what the network made of a batch, in float32; see `generator_losses`."""
        real, fake = self.reference(batch), made.reconstruction
        terms: dict[str, Tensor] = {}
        with torch.autocast(real.device.type, enabled=False):
            if "mel" in active:
                terms["mel"] = self.mel(fake, real)
            if active & {"gan", "feature_matching"}:
                terms |= {name: term for name, term in self.adversarial(fake, real).items() if name in active}
            if "distill" in active:
                terms["distill"] = self.distill(made.resynthesis, self.teacher_audio(batch))
        for part, result in (("acoustic", made.quantized.acoustic), ("semantic", made.quantized.semantic)):
            terms |= {f"{part}_{name}": loss for name, loss in result.losses.items() if f"{part}_{name}" in active}
        return terms

    def reference(self, batch: Any) -> Tensor:
        """The audio (B, 1, L) that the reconstruction is compared with."""
        return resample(batch.audio, self.input_rate, self.rate)

    def teacher_audio(self, batch: Any) -> Tensor:
        """The original (B, 1, L) at the teacher's rate: the batch's own, made from the source, or its audio resampled."""
        given = getattr(batch, "teacher_audio", None)
        return resample(batch.audio, self.input_rate, self.teacher.sample_rate) if given is None else given

    def generator_losses(
        self, tokenizer: nn.Module, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The terms of `config.TERMS` that are active. batch.audio: (B, 1, L) at the tokenizer's rate."""
        assert isinstance(tokenizer, LMSPT)
        made = self.autoencode(tokenizer, batch.audio, draw)
        if judge is not None:
            judge(self.reference(batch), made.reconstruction)
        parts = {"acoustic": (made.quantized.acoustic, tokenizer.cfg.acoustic_size),
                 "semantic": (made.quantized.semantic, tokenizer.quantizer.semantic_size)}
        logs = {
            f"{part}_{name}": value for part, (result, size) in parts.items()
            for name, value in codebook_health(result.codes, size).items()
        }
        return Losses(self.terms(made, batch, active), fake=made.reconstruction, real=self.reference(batch), logs=logs)

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Losses:
        """Least squares, summed over the members; audio (B, 1, L)."""
        judge = self.discriminators["dac"]
        with torch.autocast(real.device.type, enabled=False):
            reals, fakes = judge(real), judge(fake.detach())
            loss = torch.stack([least_squares_discriminator(r.logits, f.logits) for r, f in zip(reals, fakes)]).sum()
        logs = {f"logits_{name}": torch.stack([j.logits.detach().mean() for j in judged]).mean()
                for name, judged in (("real", reals), ("fake", fakes))}
        return Losses({"discriminator": loss}, logs=logs)
