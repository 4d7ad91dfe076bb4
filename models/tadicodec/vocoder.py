"""Losses of TaDiCodec's vocoder: mel distance at seven scales, period and spectral discriminators (Amphion's Vocos recipe)."""


import torch
from torch import Tensor, nn

from tokenizers_lab.discriminators.mpd import MultiPeriodDiscriminator
from tokenizers_lab.discriminators.result import Judgement
from tokenizers_lab.discriminators.spectrogram import MultiResolutionSpectrogramDiscriminator
from tokenizers_lab.losses.adversarial import adversarial_by_family, discrimination_by_family, sum_of
from tokenizers_lab.losses.multiscale_mel import MultiWindowMelLoss
from tokenizers_lab.training.objective import Judge, Losses

from .vocoder_config import VocoderObjectiveConfig, check_vocoder_objective

MATCHING = {"feature_matching": "period", "spectral_feature_matching": "spectral"}      # term: family of discriminators


class VocoderLosses:
    """The terms of a vocoder's training and its discriminators, for an objective that trains one.

    The objective makes `discriminators` its own and puts `mel_loss` among its frozen networks; this class only refers to them,
    so that no weight is registered twice.
    """

    def __init__(self, cfg: VocoderObjectiveConfig, sample_rate: int):
        """Raises ConfigError on sizes that make no network."""
        check_vocoder_objective(cfg)
        self.cfg = cfg
        self.mel_loss = MultiWindowMelLoss(sample_rate, cfg.mel_bands, cfg.mel_windows, power=1.0)
        self.discriminators = nn.ModuleDict({
            "period": MultiPeriodDiscriminator(cfg.periods, cfg.period_channels, last_kernel=2),
            "spectral": MultiResolutionSpectrogramDiscriminator(
                cfg.spectral_ffts, cfg.spectral_hops, cfg.spectral_windows, cfg.spectral_channels, cfg.spectral_kernels),
        })

    def mel(self, fake: Tensor, real: Tensor) -> Tensor:
        """Σ over the scales of mean |log10 mel(fake) − log10 mel(real)|."""
        return self.mel_loss.terms(fake, real)[0].sum()

    def judge(self, audio: Tensor) -> dict[str, list[Judgement]]:
        """Every discriminator's view of audio (B, 1, samples), by family. No member's output is among its features."""
        views = {family: network(audio) for family, network in self.discriminators.items()}
        views["period"] = [Judgement(m.logits, m.features[:-1]) for m in views["period"]]
        return views

    def generator_terms(
        self, vocoder: nn.Module, audio: Tensor, mel: Tensor, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The terms mel, gan, feature_matching and spectral_feature_matching, as far as they are active, unweighted.

        audio: (B, 1, samples); mel: its normalised spectrogram (B, bands, T), which `vocoder` makes audio (B, 1, T · hop) of.
        judge: called with (real, fake) before the terms are computed, so that the discriminators are updated first.
        """
        fake = vocoder(mel)
        samples = min(audio.shape[2], fake.shape[2])      # a last hop that is not full has no frame
        real, fake = audio[..., :samples], fake[..., :samples].to(audio.dtype)
        if judge is not None:
            judge(real, fake)
        terms: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        with torch.autocast(real.device.type, enabled=False):
            if "mel" in active:
                terms["mel"] = self.mel(fake, real)
            if active & {"gan", *MATCHING}:
                gan, matching = adversarial_by_family(self.judge, self.discriminators, real, fake)
                terms |= {"gan": sum_of(gan.values())} if "gan" in active else {}
                terms |= {term: matching[family] for term, family in MATCHING.items() if term in active}
                logs |= {f"gan_{family}": value.detach() for family, value in gan.items()}
        return Losses(terms, fake=fake, real=real, logs=logs)

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Losses:
        """The least-squares loss of each family, summed over its members, of audio (B, 1, samples); `fake` is detached."""
        losses, logs = discrimination_by_family(self.judge, real, fake)
        return Losses(losses, logs=logs)
