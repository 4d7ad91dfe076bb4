"""Losses of DM-Codec (arXiv 2410.15017, sec. 3): reconstruction, adversarial, commitment, and distillation by two teachers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.discriminators.mpd import MultiPeriodDiscriminator
from tokenizers_lab.discriminators.msd import MultiScaleDiscriminator
from tokenizers_lab.discriminators.msstft import MultiScaleSTFTDiscriminator
from tokenizers_lab.discriminators.result import Judgement
from tokenizers_lab.distillation import dimension_distance, frame_distance
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.losses.adversarial import adversarial_by_family, discrimination_by_family, sum_of
from tokenizers_lab.losses.spectral import MultiScaleMelLoss
from tokenizers_lab.quantizers.result import QuantizerResult
from tokenizers_lab.teachers.cache import FeatureSource
from tokenizers_lab.training.objective import Judge, Losses, Objective

from .config import ModelConfig, ObjectiveConfig, check_objective
from .convert import build_transform
from .model import DMCodec

TEACHERS = ("sm", "lm")      # speech model, language model


@dataclass
class Coded:
    """What the codec makes of a training batch, on the way to its losses."""

    audio: Tensor                # (B, 1, samples) in [−1, 1], cut to the reconstruction's length
    encoded: Tensor              # (B, D, T), the encoder's output
    quantized: QuantizerResult
    reconstruction: Tensor       # (B, 1, samples) about [−1, 1], cut to the audio's length


class DMCodecObjective(Objective):
    """The paper's losses, the map to the teachers' width, the teachers and three families of discriminators.

    Features of the teachers come with the batch (`features`: sm, lm), else from the frozen teachers. Those of `cached` (name:
    where its features are from) are not built, as their features always come with the batch; `build_frozen=False` leaves all
    out.
    Raises WeightsMissing if a teacher is nowhere found.
    """

    cfg: ObjectiveConfig
    discriminators_first = True

    def __init__(
        self, cfg: ObjectiveConfig, model: ModelConfig, build_frozen: bool = True, cached: Mapping[str, str] | None = None
    ):
        super().__init__(cfg)
        check_objective(cfg, model)
        self.cached_from = dict(cached or {})
        self.hop = math.prod(model.strides)      # samples of a frame
        self.heads["transform"] = build_transform(model.width, cfg.teacher_width)
        sizes = cfg.discriminators
        self.discriminators["mpd"] = MultiPeriodDiscriminator(sizes.periods, sizes.period_channels)
        self.discriminators["msd"] = MultiScaleDiscriminator(sizes.scales, sizes.scale_channels)
        self.discriminators["msstft"] = MultiScaleSTFTDiscriminator(sizes.windows, sizes.stft_filters)
        mel = cfg.mel
        self.frozen["mel"] = MultiScaleMelLoss(
            model.sample_rate, mel.n_fft, mel.hop, mel.window, mel.bands, len(mel.weights), mel.low, mel.high)
        if build_frozen:
            self.build_frozen()

    def build_frozen(self) -> None:
        """Load the teachers that the guidance needs and that do not come with the data."""
        from tokenizers_lab.teachers.asr import build_asr
        from tokenizers_lab.teachers.language import LANGUAGE_ASSETS, build_language_teacher
        from tokenizers_lab.teachers.ssl import build_ssl_teacher
        from tokenizers_lab.teachers.whisper import WHISPER_ASSETS

        known = {"speech_teacher": WHISPER_ASSETS, "language_teacher": LANGUAGE_ASSETS, "recognizer": WHISPER_ASSETS}
        for name, assets in known.items():
            teacher = getattr(self.cfg, name)
            if teacher.backend == "asset" and teacher.source not in assets:
                raise ConfigError(f"objective.{name}.source must be one of {', '.join(assets)}, not '{teacher.source}'")
        for name, teacher in (("sm", self.cfg.speech_teacher), ("lm", self.cfg.language_teacher)):
            if name in self.guides() and teacher.backend != "none" and name not in self.cached_from:
                build = build_ssl_teacher if name == "sm" else build_language_teacher
                self.frozen[f"teacher_{name}"] = build(teacher.source, teacher.layer)
                width = self.frozen[f"teacher_{name}"].width
                if width != self.cfg.teacher_width:
                    raise ConfigError(f"{teacher.source} is {width} wide: set objective.teacher_width={width}")
        if "teacher_lm" in self.frozen and self.cfg.recognizer.backend != "none":
            recognizer = build_asr(self.cfg.recognizer.source)
            if self.cfg.recognizer.backend == "asset":
                recognizer.provenance += "; stands in for wav2vec 2.0"
            self.frozen["recognizer"] = recognizer

    def provenance(self) -> dict[str, str]:
        """Where teachers and recognizer come from."""
        names = {"teacher_sm": "teacher.sm", "teacher_lm": "teacher.lm", "recognizer": "recognizer"}
        built = {shown: str(self.frozen[name].provenance) for name, shown in names.items() if name in self.frozen}
        return super().provenance() | built

    def guides(self) -> tuple[str, ...]:
        """The teachers that the guidance names."""
        return TEACHERS if self.cfg.guidance == "combined" else (self.cfg.guidance,)

    # --- forward ----------------------------------------------------------------------------------------------------------

    def autoencode(self, tokenizer: DMCodec, audio: Tensor, draw: Draw) -> Coded:
        """Encode, quantize (in training the codebooks move), decode. audio: (B, 1, samples)."""
        encoded = tokenizer.encoder(audio)                                                # (B, D, T)
        quantized = tokenizer.quantizer(encoded, draw)
        reconstruction = tokenizer.decoder(quantized.quantized).to(audio.dtype)
        samples = min(audio.shape[2], reconstruction.shape[2])
        return Coded(audio[..., :samples], encoded, quantized, reconstruction[..., :samples])

    def passes(self, tokenizer: DMCodec, audio: Tensor, draw: Draw) -> list[Coded]:
        """One forward; with `lock` two, of which the first counts for all but the teacher that is not locked."""
        made = [self.autoencode(tokenizer, audio, draw)]
        if self.cfg.lock != "none":
            made.append(self.autoencode(tokenizer, audio, draw.within("second")))
        return made

    def feature(self, coded: Coded, layer: int) -> Tensor:
        """What follows the teachers: (B, T, teacher width) from the value of one codebook."""
        return self.heads["transform"](coded.quantized.layers[layer].transpose(1, 2).to(coded.audio.dtype))

    def student(self, name: str, made: list[Coded]) -> Tensor:
        """The feature that follows this teacher."""
        if self.cfg.lock == "none":
            return self.feature(made[0], self.cfg.layer)
        return self.feature(made[0], 0) if name == self.cfg.lock else self.feature(made[1], self.cfg.layer)

    def target(self, name: str, batch: Any, frames: int) -> Tensor:
        """Features (B, T, teacher width) of a teacher: those of the batch, else computed. Raises ConfigError without either."""
        given = getattr(batch, "features", None) or {}
        if name in given:
            return given[name]
        if f"teacher_{name}" not in self.frozen:
            raise ConfigError(f"the batch has no features '{name}' and no such teacher was built: precompute them or name one")
        teacher: Any = self.frozen[f"teacher_{name}"]
        audio = batch.audio.mean(1)
        if name == "sm":
            return teacher.features(audio)
        return teacher.features(self.transcripts(batch), frames)

    def transcripts(self, batch: Any) -> list[str]:
        """The batch's texts; recognized where the data have none or the config asks. Raises ConfigError without a recognizer."""
        known = getattr(batch, "texts", None) if self.cfg.texts == "manifest" else None
        texts = list(known or [None] * len(batch.audio))
        unknown = [i for i, text in enumerate(texts) if text is None]
        if unknown and "recognizer" not in self.frozen:
            raise ConfigError("the language model needs transcripts: put them into the manifest, or name a recognizer")
        recognizer: Any = self.frozen["recognizer"] if unknown else None
        for i, text in zip(unknown, recognizer.transcribe(batch.audio[unknown].mean(1)) if unknown else []):
            texts[i] = text
        return texts

    # --- features for the disk (`toklab features`) ------------------------------------------------------------------------

    def feature_sources(self) -> dict[str, FeatureSource]:
        """What decides each teacher's features; a teacher that was not built is known by its settings alone."""
        cfg, found = self.cfg, {}
        for name, teacher in (("sm", cfg.speech_teacher), ("lm", cfg.language_teacher)):
            if name in self.guides():
                settings: dict[str, Any] = {"source": teacher.source, "layer": teacher.layer}
                networks = [f"teacher_{name}"]
                if name == "lm":
                    settings |= {"recognizer": cfg.recognizer.source, "texts": cfg.texts, "hop": self.hop}
                    networks.append("recognizer")
                found[name] = FeatureSource(settings, [self.frozen[n] for n in networks if n in self.frozen])
        return found

    def precompute(self, batch: Any) -> dict[str, Tensor]:
        """Each teacher's features (B, T, teacher width) of a batch's segments, as training without them would compute them."""
        frames = -(-batch.audio.shape[-1] // self.hop)
        return {name: self.target(name, batch, frames) for name in self.guides()}

    # --- losses -----------------------------------------------------------------------------------------------------------

    def distances(self, made: list[Coded], batch: Any) -> dict[str, Tensor]:
        """Distance to each teacher of the guidance."""
        found = {}
        for name in self.guides():
            student = self.student(name, made).float()
            target = self.target(name, batch, student.shape[1]).to(student)
            if self.cfg.axis == "d":
                found[name] = dimension_distance(target, student, self.cfg.targets_as_released)
            else:
                found[name] = frame_distance(target, student, self.cfg.similarity_weight, self.cfg.targets_as_released)
        return found

    def distillation(self, distances: dict[str, Tensor]) -> Tensor:
        """The distance to the one teacher, or the weighted sum of both."""
        if self.cfg.guidance != "combined":
            return distances[self.cfg.guidance]
        return self.cfg.sm_weight * distances["sm"] + self.cfg.lm_weight * distances["lm"]

    def mel(self, coded: Coded) -> tuple[Tensor, Tensor]:
        """(weighted sum over the scales, the distance at each scale)."""
        scales = self.frozen["mel"](coded.reconstruction, coded.audio)
        return (scales * scales.new_tensor(self.cfg.mel.weights)).sum(), scales

    def judge(self, audio: Tensor) -> dict[str, list[Judgement]]:
        """Every discriminator's view of audio (B, 1, samples), by family."""
        return {family: network(audio) for family, network in self.discriminators.items()}

    def adversarial(self, coded: Coded) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(least-squares generator loss, feature matching × 2) of each family, summed over its members."""
        gan, matching = adversarial_by_family(self.judge, self.discriminators, coded.audio, coded.reconstruction)
        return gan, {family: 2 * value for family, value in matching.items()}

    def losses(self, made: list[Coded], batch: Any, active: frozenset[str]) -> Losses:
        """The active terms of a forward, in float32."""
        coded = made[0]
        terms: dict[str, Tensor] = {}
        logs = {name: value.detach() for name, value in coded.quantized.health.items()}
        with torch.autocast(coded.audio.device.type, enabled=False):
            if "waveform" in active:
                terms["waveform"] = F.l1_loss(coded.reconstruction, coded.audio)
            if "mel" in active:
                terms["mel"], scales = self.mel(coded)
                logs["mel_distance"] = scales[0].detach()
            if "commitment" in active:
                terms["commitment"] = coded.quantized.losses["commitment"]
            if "distillation" in active:
                distances = self.distances(made, batch)
                terms["distillation"] = self.distillation(distances)
                logs |= {f"distance_{name}": value.detach() for name, value in distances.items()}
            if "gan" in active or "feature_matching" in active:
                gan, matching = self.adversarial(coded)
                terms |= {"gan": sum_of(gan.values())} if "gan" in active else {}
                terms |= {"feature_matching": sum_of(matching.values())} if "feature_matching" in active else {}
                logs |= {f"gan_{family}": value.detach() for family, value in gan.items()}
                logs |= {f"feature_matching_{family}": value.detach() for family, value in matching.items()}
        return Losses(terms, fake=coded.reconstruction, real=coded.audio, logs=logs)

    def generator_losses(
        self, tokenizer: nn.Module, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The terms waveform, mel, commitment, distillation, gan and feature_matching, as far as they are active."""
        assert isinstance(tokenizer, DMCodec)
        made = self.passes(tokenizer, batch.audio, draw)
        if judge is not None:
            judge(made[0].audio, made[0].reconstruction)
        return self.losses(made, batch, active)

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Losses:
        """The least-squares loss of each family, summed over its members. Real first: spectral norm iterates at each forward."""
        losses, logs = discrimination_by_family(self.judge, real, fake)
        return Losses(losses, logs=logs)
