"""Losses of RecTok (arXiv 2512.13421, sec. 3): reconstruction and semantic distillation along the flow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.diffusion import flow
from tokenizers_lab.discriminators.patchgan import PatchGAN
from tokenizers_lab.distillation import feature_distance
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.losses.adversarial import frozen_parameters, hinge_discriminator, hinge_generator
from tokenizers_lab.nn.masking import TokenMask, gather_tokens, random_mask
from tokenizers_lab.quantizers.gaussian import DiagonalGaussian
from tokenizers_lab.training.objective import Judge, Losses, Objective

from .config import ModelConfig, ObjectiveConfig, check_objective
from .model import RecTok, SemanticMLP, SemanticTransformer


@dataclass
class Noised:
    """What the autoencoder makes of a training batch, on the way to its losses."""

    images: Tensor                  # (B, 3, H, W) in [0, 1]
    grid: tuple[int, int]           # (rows, columns) of tokens
    mask: TokenMask | None          # none: all tokens are visible
    moments: Tensor                 # (B, n, 2C) of the visible tokens
    posterior: DiagonalGaussian     # of the visible tokens
    latents: Tensor                 # (B, n, C) z, drawn from the posterior
    time: Tensor | None             # (B, 1, 1) t; none: no flow noise
    noised: Tensor                  # (B, n, C) x_t, which the pixel decoder is given
    reconstruction: Tensor          # (B, 3, H, W) about [0, 1], not clamped


class RecTokObjective(Objective):
    """The paper's losses, its semantic decoders (one a teacher) and its discriminator.

    `build_frozen=False` leaves teachers and perceptual networks out; `teacher_widths` then says how wide the teachers'
    features are, and whoever needs the networks puts them into `frozen`. Raises WeightsMissing if a network is nowhere found.
    """

    cfg: ObjectiveConfig

    def __init__(
        self, cfg: ObjectiveConfig, model: ModelConfig, build_frozen: bool = True, teacher_widths: Mapping[str, int] | None = None
    ):
        super().__init__(cfg)
        check_objective(cfg)
        widths = dict(teacher_widths or {})
        side = model.image_size // model.patch
        if build_frozen:
            self.build_frozen(side)
            widths = {name: self.teacher(name).width for name in cfg.teachers}
        for name in cfg.teachers:
            if name not in widths:
                raise ConfigError(f"teacher '{name}' is not built: say its width in teacher_widths")
            self.heads[f"semantic_{name}"] = (
                SemanticMLP(model.latent_channels, widths[name]) if cfg.semantic_kind == "mlp"
                else SemanticTransformer(model.latent_channels, cfg.semantic_decoder, side**2, widths[name])
            )
        self.discriminators["patchgan"] = PatchGAN(3, cfg.discriminator_width, cfg.discriminator_layers)

    def build_frozen(self, side: int) -> None:
        """Load teachers and perceptual networks; side: tokens a side of the training images."""
        from tokenizers_lab.losses.perceptual import LPIPS, LogitDistance
        from tokenizers_lab.teachers.vision import build_vision_teacher

        for name, teacher in self.cfg.teachers.items():
            self.frozen[f"teacher_{name}"] = build_vision_teacher(teacher, (side, side))
        if self.cfg.lpips != "none":
            self.frozen["lpips"] = LPIPS(self.cfg.lpips)
        if self.cfg.logits_network != "none":
            network = self.logits_teacher() if self.cfg.logits_network == "teacher" else self.cfg.logits_network
            self.frozen["logits"] = LogitDistance(network)

    def teacher(self, name: str) -> Any:
        """The teacher of that name in the config. Raises ConfigError if it was not built."""
        if f"teacher_{name}" not in self.frozen:
            raise ConfigError(f"teacher '{name}' was not built")
        return self.frozen[f"teacher_{name}"]

    def logits_teacher(self) -> Any:
        """The first teacher with a classifier. Raises ConfigError if there is none."""
        for name in self.cfg.teachers:
            if self.teacher(name).has_logits:
                return self.teacher(name)
        raise ConfigError("objective.logits_network is teacher, but no teacher has a classifier; choose convnext_small or none")

    def provenance(self) -> dict[str, str]:
        """Where teachers and perceptual networks come from."""
        built = [name for name in self.cfg.teachers if f"teacher_{name}" in self.frozen]
        found = {f"teacher.{name}": str(self.teacher(name).provenance) for name in built}
        found |= {name: str(self.frozen[name].provenance) for name in ("lpips", "logits") if name in self.frozen}
        if "logits" in found and self.cfg.logits_network == "teacher":
            found["logits"] = f"stands in for ConvNeXt-S: {found['logits']}"
        return found

    def draw_mask(self, items: int, tokens: int, draw: Draw) -> TokenMask | None:
        """Which tokens of the batch's items are hidden: one ratio for all of them, other places in each."""
        if self.cfg.mask_ratio == 0:
            return None
        ratio = self.cfg.mask_ratio
        if self.cfg.mask_ratio_type == "random":
            ratio = max(0.0, float(draw.uniform("mask_ratio", (), self.cfg.mask_ratio_min, self.cfg.mask_ratio)))
        return random_mask(draw.uniform("mask", (items, tokens)), ratio)

    def noise_shift(self, tokens: int, channels: int) -> float:
        """s of the noise schedule: √(N · C / 4096), N of the whole grid even where tokens are masked."""
        return flow.resolution_shift(tokens * channels)

    def autoencode(self, tokenizer: RecTok, images: Tensor, draw: Draw) -> Noised:
        """Mask, encode, draw from the posterior, add flow noise, decode. images: (B, 3, H, W) in [0, 1]."""
        rows, cols = grid = tokenizer.grid(images)
        mask = self.draw_mask(len(images), rows * cols, draw)
        moments = tokenizer.encoder(images, mask)
        posterior = tokenizer.posterior(moments)
        latents = posterior.mode()                                                        # (B, n, C)
        if tokenizer.cfg.variational:
            latents = posterior.sample(draw.normal("posterior", tuple(latents.shape)))
        time, noised = None, latents
        if self.cfg.gamma > 0:
            shift = self.noise_shift(rows * cols, latents.shape[2])
            time = flow.sample_time(draw, (len(images), 1, 1), self.cfg.noise_schedule, shift)
            noised = flow.interpolate(latents, self.cfg.gamma * draw.normal("noise", tuple(latents.shape)), time)
        reconstruction = tokenizer.decoder(noised, grid, mask)
        return Noised(images, grid, mask, moments, posterior, latents, time, noised, reconstruction)

    def semantic_pair(self, name: str, made: Noised) -> tuple[Tensor, Tensor]:
        """(teacher's features, prediction from x_t) that the semantic loss compares: all tokens, or the masked ones."""
        target = self.teacher(name).features(made.images, made.grid)                      # (B, N, T)
        given = made.noised if self.cfg.semantic_input == "noisy" else made.latents
        prediction = self.heads[f"semantic_{name}"](given, made.grid, made.mask).float()
        if self.cfg.semantic_target == "reconstruction":
            if made.mask is None or made.mask.masked.shape[1] == 0:
                return target, target + 0 * prediction      # nothing to fill in: no loss, but the graph stays
            target, prediction = gather_tokens(target, made.mask.masked), gather_tokens(prediction, made.mask.masked)
        return target, prediction

    def semantic(self, made: Noised) -> Tensor:
        """Mean over the teachers of the distance between their features and the prediction."""
        pairs = [self.semantic_pair(name, made) for name in self.cfg.teachers]
        if not pairs:
            raise ConfigError("the loss semantic needs a teacher in objective.teachers")
        with torch.autocast(made.images.device.type, enabled=False):
            return torch.stack([feature_distance(*pair, self.cfg.semantic_loss) for pair in pairs]).mean()

    def perceptual(self, fake: Tensor, real: Tensor) -> Tensor:
        """(LPIPS + w · squared distance of a classifier's logits) / (1 + w), w = `logits_weight`; images (B, 3, H, W)."""
        parts, weights = [], []
        if self.cfg.lpips != "none":
            parts.append(self.frozen["lpips"](fake, real).mean())
            weights.append(1.0)
        if self.cfg.logits_network != "none":
            parts.append(self.frozen["logits"](fake, real).mean())
            weights.append(self.cfg.logits_weight)
        if not parts:
            raise ConfigError("the loss perceptual needs objective.lpips or objective.logits_network")
        return sum((w * p for w, p in zip(weights, parts)), real.new_zeros(())) / sum(weights)

    def adversarial(self, fake: Tensor) -> Tensor:
        """The generator's hinge loss; the discriminator's parameters get no gradient from it."""
        discriminator = self.discriminators["patchgan"]
        with frozen_parameters(discriminator):
            return hinge_generator(discriminator(fake))

    def generator_losses(
        self, tokenizer: nn.Module, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The terms mse, perceptual, kl, semantic and gan, as far as they are active; all in float32."""
        assert isinstance(tokenizer, RecTok)
        made = self.autoencode(tokenizer, batch.images, draw)
        x, x_hat = made.images, made.reconstruction
        if judge is not None:
            judge(x, x_hat)
        terms: dict[str, Tensor] = {}
        if "semantic" in active:
            terms["semantic"] = self.semantic(made)
        with torch.autocast(x.device.type, enabled=False):
            mse = F.mse_loss(x_hat, x)
            if "mse" in active:
                terms["mse"] = mse
            if "perceptual" in active:
                terms["perceptual"] = self.perceptual(x_hat, x)
            if "kl" in active:
                terms["kl"] = made.posterior.kl().mean()
            if "gan" in active:
                terms["gan"] = self.adversarial(x_hat)
        hidden = 0.0 if made.mask is None else made.mask.masked.shape[1] / made.mask.restore.shape[1]
        logs = {
            "masked": mse.new_tensor(hidden),                                # share of hidden tokens
            "time": mse.new_zeros(()) if made.time is None else made.time.mean(),
            "latent_std": made.posterior.std.mean().detach(),                # of the posterior
            "noisy_psnr": -10 * mse.detach().clamp_min(1e-10).log10(),       # of the reconstruction from x_t
        }
        return Losses(terms, fake=x_hat, real=x, logs=logs)

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Losses:
        """Hinge loss; real first, then fake, as two passes, since each updates the batch-norm statistics."""
        discriminator = self.discriminators["patchgan"]
        with torch.autocast(real.device.type, enabled=False):
            real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
            loss = hinge_discriminator(real_logits, fake_logits)
        logs = {"logits_real": real_logits.detach().mean(), "logits_fake": fake_logits.detach().mean()}
        return Losses({"discriminator": loss}, logs=logs)
