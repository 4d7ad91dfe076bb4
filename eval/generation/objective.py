"""What generators learn: flow matching on a tokenizer's latents, optionally with cosine and REPA terms."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.data.batch import LatentBatch
from tokenizers_lab.diffusion.flow import draw_times, flow_loss
from tokenizers_lab.distillation import cosine_distance
from tokenizers_lab.draw import Draw, stable_seed
from tokenizers_lab.errors import ConfigError, DataError
from tokenizers_lab.teachers.vision import VisionTeacher, build_vision_teacher
from tokenizers_lab.training.objective import Judge, Losses, Objective

from .config import GeneratorConfig, LatentObjectiveConfig, latent_shift

__all__ = ["LatentFlowObjective", "LatentObjectiveConfig"]

HELD_OUT_TIMES = 4      # at which a held-out image's loss is measured: (i + ½) / 4


class LatentFlowObjective(Objective):
    """Velocity flow matching under class labels (LightningDiT, arXiv 2501.01423, sec. 4; RAE's DiT-DH, arXiv 2510.11690):

      mse        (v̂ − v)², mean over channels, positions and images
      cosine     1 − cos(v̂, v) along the channels, mean over positions and images (LightningDiT)
      alignment  1 − cos of projected hidden tokens and a frozen network's patch features (REPA, arXiv 2410.06940, eq. 8)
    """

    def __init__(self, cfg: LatentObjectiveConfig, model_cfg: GeneratorConfig):
        super().__init__(cfg)
        self.model_cfg = model_cfg
        if cfg.tokenizer is not None:
            self.frozen["tokenizer"] = load_latent_tokenizer(cfg.tokenizer)
        if cfg.teacher is not None:
            teacher = build_vision_teacher(cfg.teacher, grid=model_cfg.grid)
            self.frozen["teacher"] = teacher
            self.heads["projector"] = projector(model_cfg.token_width, cfg.align_width, teacher.width)

    def generator_losses(
        self, tokenizer: Any, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """`tokenizer` is the generator that trains."""
        data = tokenizer.normalise(self.latents_of(batch, draw))                         # (B, C, h, w)
        noise = draw.normal("noise", tuple(data.shape))
        time = draw_times(self.time_config(), draw, (len(data),))                        # (B,)
        labels = drop_labels(self.labels_of(batch), self.cfg.label_drop, tokenizer.null_class, draw)
        after = self.cfg.align_after if "alignment" in active else None
        made = tokenizer(tokenizer.path.at(data, noise, time), time, labels, tokens_after=after)
        target = tokenizer.path.velocity(data, noise)
        terms = {}
        if "mse" in active:
            terms["mse"] = flow_loss(made.velocity, target)
        if "cosine" in active:
            terms["cosine"] = cosine_distance(target.movedim(1, -1), made.velocity.float().movedim(1, -1))
        if "alignment" in active:
            terms["alignment"] = cosine_distance(self.teacher_features(batch, made.tokens), self.heads["projector"](made.tokens))
        return Losses(terms)

    def time_config(self) -> Any:
        """The distribution of times, its shift by the latents' size if it is 0."""
        return self.cfg.time if self.cfg.time.shift else replace(self.cfg.time, shift=latent_shift(self.model_cfg))

    @torch.no_grad()
    def latents_of(self, batch: Any, draw: Draw | None) -> Tensor:
        """(B, C, h, w) of cached latents or of images; a draw from the posterior where there is one and `draw` is given.

        Raises ConfigError for images without a tokenizer.
        """
        drawn = draw is not None and self.cfg.sample_posterior
        if isinstance(batch, LatentBatch):
            if batch.spread is None or not drawn:
                return batch.latents
            assert draw is not None
            return batch.latents + batch.spread * draw.normal("posterior", tuple(batch.latents.shape))
        if "tokenizer" not in self.frozen:
            raise ConfigError("data.train holds images: name the tokenizer that encodes them in objective.tokenizer, or cache "
                              "their latents with toklab latents")
        encoder: Any = self.frozen["tokenizer"]
        generator = draw.generator("posterior") if drawn and draw is not None else None
        return encoder.encode(batch.images, sample=drawn, generator=generator).latents.float()

    def labels_of(self, batch: Any) -> Tensor:
        """(B,) int64; of images without classes, the one that there is. Raises DataError where it is not known, or not there."""
        classes = self.model_cfg.classes
        if batch.labels is None and classes == 1:
            device = (batch.latents if isinstance(batch, LatentBatch) else batch.images).device
            return torch.zeros(len(batch), dtype=torch.int64, device=device)
        if batch.labels is None:
            raise DataError(f"{batch.keys[0]} has no class: a generator needs a folder of each class, or a manifest with labels; "
                            "or set model.classes=1")
        if not 0 <= int(batch.labels.min()) <= int(batch.labels.max()) < classes:
            raise DataError(f"the data have the class {int(batch.labels.max())}, but model.classes is {classes}")
        return batch.labels

    def teacher_features(self, batch: Any, tokens: Tensor) -> Tensor:
        """The frozen network's patch features (B, N, width) on the grid of the tokens."""
        teacher: Any = self.frozen["teacher"]
        assert isinstance(teacher, VisionTeacher)
        side = round(tokens.shape[1] ** 0.5)
        return teacher.features(batch.images, side)

    @torch.no_grad()
    def held_out_metrics(self, network: Any, batch: Any) -> dict[str, Tensor]:
        """`velocity_mse` (B,): the mean (v̂ − v)² of each image at four fixed times and noises, under its own label."""
        data = network.normalise(self.latents_of(batch, None))
        labels, losses = self.labels_of(batch), []
        for i in range(HELD_OUT_TIMES):
            time = torch.full((len(data),), (i + 0.5) / HELD_OUT_TIMES, device=data.device)
            noise = torch.stack([held_out_noise(key, i, tuple(data.shape[1:])) for key in batch.keys]).to(data.device)
            velocity = network(network.path.at(data, noise, time), time, labels).velocity
            losses.append((velocity.float() - network.path.velocity(data, noise)).square().flatten(1).mean(1))
        return {"velocity_mse": torch.stack(losses).mean(0)}

    def provenance(self) -> dict[str, str]:
        """Tokenizer and teacher."""
        found = {} if self.cfg.tokenizer is None else {"tokenizer": self.cfg.tokenizer}
        if "teacher" in self.frozen:
            found["teacher.alignment"] = str(self.frozen["teacher"].provenance)
        return found


def projector(width: int, hidden: int, width_out: int) -> nn.Sequential:
    """REPA's: three linear maps with SiLU between them."""
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width_out))


def drop_labels(labels: Tensor, share: float, null_class: int, draw: Draw) -> Tensor:
    """Labels (B,), each replaced by the null class when its U(0, 1) is below `share` (Ho and Salimans 2022)."""
    if share <= 0:
        return labels
    return torch.where(draw.uniform("label_drop", tuple(labels.shape)).to(labels.device) < share, null_class, labels)


def held_out_noise(key: str, number: int, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) that belongs to an image, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(stable_seed("held out", key, number)))


def load_latent_tokenizer(name: str) -> Any:
    """The image tokenizer of that name, in eval mode. Raises ConfigError if it has no continuous latents."""
    from tokenizers_lab.hub import load
    from tokenizers_lab.tokenizer import ImageTokenizer

    tokenizer = load(name)
    if not isinstance(tokenizer, ImageTokenizer) or not hasattr(tokenizer, "latent_mean"):
        raise ConfigError(f"objective.tokenizer: {name} is no image tokenizer with continuous latents")
    return tokenizer.requires_grad_(False)
