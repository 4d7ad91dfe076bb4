"""Losses of XY-Tokenizer (arXiv 2506.23325): a language model that must understand the codes, mel, commitment; then a GAN.

No training code is published. Stage 1 has the terms `asr`, `mel` and `commitment`; stage 2 `mel`, `gan` and
`feature_matching`, and trains the decoder only.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.discriminators.mpd import MultiPeriodDiscriminator
from tokenizers_lab.discriminators.msd import MultiScaleDiscriminator
from tokenizers_lab.discriminators.msstft import MultiScaleSTFTDiscriminator
from tokenizers_lab.discriminators.result import Judgement
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.losses.adversarial import adversarial_by_family, discrimination_by_family, sum_of
from tokenizers_lab.losses.multiscale_mel import MultiWindowMelLoss
from tokenizers_lab.teachers.listening import build_listener
from tokenizers_lab.training.objective import Judge, Losses, Objective

from .config import ModelConfig
from .model import Coded, XYTokenizer
from .objective_config import ObjectiveConfig, check_objective

FRONT = ("semantic_encoder", "semantic_encoder_adapter", "acoustic_encoder", "pre_rvq_adapter", "downsample", "quantizer")


class XYTokenizerObjective(Objective):
    """The listening language model (its trained parts among the heads) and the discriminators, where the config has them.

    `build_frozen=False` leaves the language model out. Raises WeightsMissing if it is nowhere found.
    """

    cfg: ObjectiveConfig
    discriminators_first = True

    def __init__(self, cfg: ObjectiveConfig, model: ModelConfig, build_frozen: bool = True):
        super().__init__(cfg)
        check_objective(cfg)
        self.frozen["mel"] = MultiWindowMelLoss(model.sample_rate, cfg.mel_bands, cfg.mel_windows)
        if build_frozen and cfg.listener.backend != "none":
            listener = build_listener(cfg.listener, model.code_channels)
            self.frozen["listener"] = listener
            self.heads["listener"] = listener.trainable()      # the same modules: what trains is saved, the rest is not
        sizes = cfg.discriminators
        if sizes.periods:
            self.discriminators["mpd"] = MultiPeriodDiscriminator(sizes.periods, sizes.period_channels)
        if sizes.scales:
            self.discriminators["msd"] = MultiScaleDiscriminator(sizes.scales, sizes.scale_channels)
        if sizes.windows:
            self.discriminators["msstft"] = MultiScaleSTFTDiscriminator(sizes.windows, sizes.stft_filters)

    def provenance(self) -> dict[str, str]:
        """Where the language model comes from."""
        built = {name: str(self.frozen[name].provenance) for name in ("listener",) if name in self.frozen}
        return super().provenance() | built

    # --- losses -----------------------------------------------------------------------------------------------------------

    def asr(self, coded: Coded, texts: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(cross-entropy of the transcripts after the codec's features, what is logged)."""
        if "listener" not in self.frozen:
            raise ConfigError("the term asr needs a language model: objective.listener.backend is none")
        heard = self.frozen["listener"](coded.features, coded.lengths, texts)
        return heard.loss, {"asr_tokens": heard.tokens.sum().float(), "asr_known": (heard.tokens > 0).float().mean()}

    def mel(self, audio: Tensor, reconstruction: Tensor, lengths: Tensor) -> Tensor:
        """Multi-scale mel distance, a mean over what is sound: padding is silent in both, and does not count."""
        share = lengths.sum() / (audio.shape[0] * audio.shape[2])
        return self.frozen["mel"](reconstruction, audio) / share.clamp_min(1e-8)

    def judge(self, audio: Tensor) -> dict[str, list[Judgement]]:
        """Every discriminator's view of audio (B, 1, samples), by family."""
        return {family: network(audio) for family, network in self.discriminators.items()}

    def generator_losses(
        self, tokenizer: nn.Module, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The terms asr, mel, commitment, gan and feature_matching, as far as they are active."""
        assert isinstance(tokenizer, XYTokenizer)
        rest(tokenizer)
        lengths = batch.lengths.to(batch.audio.device)
        coded = tokenizer(batch.audio, lengths, draw)
        audio, reconstruction = silent_padding(batch.audio, coded.reconstruction, lengths)
        if judge is not None:
            judge(audio, reconstruction)
        terms: dict[str, Tensor] = {}
        logs = {name: value.detach() for name, value in coded.quantized.health.items()}
        if "asr" in active:
            terms["asr"], heard = self.asr(coded, batch.texts)
            logs |= heard
        with torch.autocast(audio.device.type, enabled=False):
            if "mel" in active:
                terms["mel"] = self.mel(audio, reconstruction, lengths)
            if "commitment" in active:
                terms["commitment"] = coded.quantized.losses["commitment"]
            if "gan" in active or "feature_matching" in active:
                gan, matching = adversarial_by_family(self.judge, self.discriminators, audio, reconstruction)
                terms |= {"gan": sum_of(gan.values())} if "gan" in active else {}
                terms |= {"feature_matching": sum_of(matching.values())} if "feature_matching" in active else {}
                logs |= {f"gan_{family}": value.detach() for family, value in gan.items()}
                logs |= {f"feature_matching_{family}": value.detach() for family, value in matching.items()}
        return Losses(terms, fake=reconstruction, real=audio, logs=logs)

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Losses:
        """The least-squares loss of each family, summed over its members. Real first: spectral norm iterates at each forward."""
        losses, logs = discrimination_by_family(self.judge, real, fake)
        return Losses(losses, logs=logs)


def rest(tokenizer: XYTokenizer) -> None:
    """Eval mode for the parts that do not train. Codebooks have no gradients of their own and would go on moving by their
    averages: they rest where nothing in front of them trains."""
    for part in tokenizer.children():
        own = list(part.parameters())
        if own and not any(p.requires_grad for p in own):
            part.eval()
    front = [p for name in FRONT for p in tokenizer.get_submodule(name).parameters()]
    if not any(p.requires_grad for p in front):
        tokenizer.quantizer.eval()


def silent_padding(audio: Tensor, reconstruction: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, 1, samples) cut to the shorter, float32, and 0 behind each item's length."""
    samples = min(audio.shape[2], reconstruction.shape[2])
    inside = torch.arange(samples, device=audio.device) < lengths[:, None, None]      # (B, 1, samples)
    return audio[..., :samples].float() * inside, reconstruction[..., :samples].float() * inside
