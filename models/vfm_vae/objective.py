"""Losses of VFM-VAE (arXiv 2510.18457): multi-scale reconstruction, alignment with the foundation model, two discriminators,
equivariance regularisation."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.discriminators.augment import augment
from tokenizers_lab.discriminators.multiscale_patchgan import MultiScalePatchGAN, patch_feature_matching, patch_loss
from tokenizers_lab.discriminators.projected import JudgeFeatures, ProjectedHeads
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.losses.adversarial import frozen_parameters, hinge_discriminator, hinge_generator
from tokenizers_lab.losses.alignment import adaptive_weight, distance_matrix_loss, marginal_cosine_loss, pool_to
from tokenizers_lab.losses.equivariance import Change, draw_change, scale_and_turn
from tokenizers_lab.quantizers.gaussian import DiagonalGaussian
from tokenizers_lab.quantizers.result import QuantizerResult
from tokenizers_lab.teachers.networks import load_network
from tokenizers_lab.training.objective import Judge, Losses, Objective

from .config import ModelConfig, ObjectiveConfig, check_objective
from .model import VFMVAE
from .vfm import SIGHTS, FoundationModel

ADVERSARIAL = frozenset({"gan", "patchgan", "feature_matching"})


@dataclass
class Made:
    """What the autoencoder makes of a training batch, on the way to its losses."""

    target: Tensor                          # (B, 3, H, W) in [0, 1], scaled and turned as the output is
    change: Change                          # by what
    moments: Tensor                         # (B, 2C, h, w), or (B, C, h, w) of discrete latents
    posterior: DiagonalGaussian
    quantized: QuantizerResult | None       # of discrete latents
    latents: Tensor                         # (B, C, h, w) z, drawn from the posterior or quantized, before any change
    features: Tensor                        # (B, D, rows, columns) of the foundation model's last layer
    images: list[Tensor]                    # (B, 3, ...) about [−1, 1], the largest first


class VFMVAEObjective(Objective):
    """The paper's losses, the alignment head and the discriminators.

    `build_frozen=False` leaves LPIPS and the judge's network out; `judge_widths` then says how wide the judge's features are, and
    whoever needs the networks puts them into `frozen`. Raises WeightsMissing if a network is nowhere found.
    """

    cfg: ObjectiveConfig
    discriminators_first: ClassVar[bool] = True

    def __init__(
        self, cfg: ObjectiveConfig, model: ModelConfig, build_frozen: bool = True, judge_widths: list[int] | None = None
    ):
        super().__init__(cfg)
        check_objective(cfg)
        with torch.device("meta"):
            vfm = FoundationModel(model.vfm)
        self.sight = SIGHTS[vfm.kind]
        self.aligned = list(model.vfm.layers).index(-1) if -1 in model.vfm.layers else len(model.vfm.layers) - 1
        if cfg.vf:
            self.heads["vf"] = nn.Conv2d(model.latent_channels, vfm.widths[self.aligned], 1, bias=False)
            nn.init.xavier_normal_(self.heads["vf"].weight, 0.5)      # type: ignore[arg-type]
        if build_frozen:
            self.build_frozen()
            judge_widths = self.frozen["judge"].widths if cfg.judge is not None else None      # type: ignore[assignment]
        if cfg.judge is not None:
            if judge_widths is None:
                raise ConfigError("the judge is not built: say the widths of its features in judge_widths")
            self.discriminators["projected"] = ProjectedHeads(judge_widths)
        if cfg.patchgan:
            self.discriminators["patchgan"] = MultiScalePatchGAN(3, cfg.patchgan_width, cfg.patchgan_layers, cfg.patchgan_scales)
        self.draw = Draw(0)      # of the micro-batch at hand, for the discriminators' augmentation

    def build_frozen(self) -> None:
        """Load LPIPS and the judge's network."""
        from tokenizers_lab.losses.perceptual import LPIPS

        if self.cfg.lpips != "none":
            self.frozen["lpips"] = LPIPS(self.cfg.lpips)
        if self.cfg.judge is not None:
            own = self.cfg.judge
            found = load_network(own.backend, own.source, dict(own.config))
            options = {name: found.spec[name] for name in ("mean", "std") if name in found.spec}
            self.frozen["judge"] = JudgeFeatures(found.network, own.layers, found.provenance, **options)

    def provenance(self) -> dict[str, str]:
        """Where LPIPS and the judge's network come from."""
        return {name: str(network.provenance) for name, network in self.frozen.items()}

    # --- the forward of a training step ---------------------------------------------------------------------------------

    def draw_change(self, tokenizer: VFMVAE, images: Tensor, draw: Draw) -> Change:
        """How this batch is scaled and turned."""
        if not self.cfg.equivariance:
            return Change()
        sides = (images.shape[2] // tokenizer.downsample, images.shape[3] // tokenizer.downsample)
        own = self.cfg
        smallest = own.equivariance_smallest / tokenizer.downsample
        return draw_change(draw, own.equivariance_latent, own.equivariance_scale, sides, smallest)

    def autoencode(self, tokenizer: VFMVAE, images: Tensor, draw: Draw) -> Made:
        """Encode (smaller images, if that is drawn), sample, change the latents (if that is drawn), decode."""
        change = self.draw_change(tokenizer, images, draw)
        moments, features = tokenizer.moments(images, 1.0 if change.of_latents else change.scale)
        posterior = tokenizer.posterior(moments)
        quantized = None
        if tokenizer.discrete:
            quantized = tokenizer.quantize(moments, entropy=True)
            latents = quantized.quantized
        else:
            latents = posterior.sample(draw.normal("posterior", tuple(posterior.mean.shape)))
        entering = scale_and_turn(latents, change.scale, change.turns) if change.of_latents else latents
        target = scale_and_turn(images, change.scale, change.turns, self.sight.judged, antialias=True)
        aligned = features.layers[self.aligned]
        return Made(target, change, moments, posterior, quantized, latents, aligned, tokenizer.images(entering))

    # --- terms ----------------------------------------------------------------------------------------------------------

    def smaller_targets(self, made: Made) -> list[Tensor]:
        """The target in [−1, 1] at the size of each smaller image."""
        options: dict[str, Any] = {"mode": self.sight.judged, "align_corners": False, "antialias": True}
        return [F.interpolate(made.target, tuple(image.shape[2:]), **options) * 2 - 1 for image in made.images[1:]]

    def multiscale(self, made: Made) -> Tensor:
        """Weighted L1 of the smaller images, the largest first."""
        pairs = zip(self.cfg.multiscale_weights, made.images[1:], self.smaller_targets(made))
        return sum((w * F.l1_loss(image, target) for w, image, target in pairs), made.target.new_zeros(()))

    def vf(self, made: Made) -> Tensor:
        """Distance-matrix and marginal-cosine losses of the projected, untransformed latents to the last layer's features."""
        own, z = self.cfg, made.latents
        features = pool_to(made.features.detach(), (z.shape[2], z.shape[3]))
        projected = self.heads["vf"](z)                                                   # (B, D, h, w)
        distance = distance_matrix_loss(features, projected, own.distance_margin)
        cosine = marginal_cosine_loss(features, projected, own.cosine_margin)
        return own.distance_weight * distance + own.cosine_weight * cosine

    def vf_scale(self, tokenizer: VFMVAE, terms: dict[str, Tensor], vf: Tensor) -> Tensor:
        """What the term vf is scaled by: 1, or how much larger the reconstruction's gradient is at the last layer before the
        latents."""
        fuse = tokenizer.encoder.fuse
        parameter = fuse.weight if isinstance(fuse, nn.Linear) else fuse.blocks[-1].mlp.w2.weight
        if not self.cfg.adaptive or not parameter.requires_grad or not torch.is_grad_enabled():
            return torch.ones_like(vf.detach())
        reference = sum((w * terms[name] for name, w in self.cfg.adaptive.items() if name in terms), vf.new_zeros(()))
        return adaptive_weight(reference, vf, parameter)

    def reconstruction(self, made: Made, active: frozenset[str]) -> dict[str, Tensor]:
        """The terms l1, l2, lpips, ssim and multiscale, as far as they are active."""
        x_hat, x = made.images[0], made.target * 2 - 1
        terms: dict[str, Tensor] = {}
        if "l1" in active:
            terms["l1"] = F.l1_loss(x_hat, x)
        if "l2" in active:
            terms["l2"] = F.mse_loss(x_hat, x)
        if "lpips" in active:
            terms["lpips"] = self.frozen["lpips"](x_hat * 0.5 + 0.5, made.target).mean()
        if "ssim" in active:
            from tokenizers_lab.metrics import ssim

            terms["ssim"] = 1 - ssim((x_hat * 0.5 + 0.5).clamp(0, 1), made.target.clamp(0, 1)).mean()
        if "multiscale" in active:
            terms["multiscale"] = self.multiscale(made)
        return terms

    # --- discriminators -------------------------------------------------------------------------------------------------

    def judged(self, images: Tensor, purpose: str) -> Tensor:
        """Logits of the projected discriminator for images (B, 3, H, W) about [−1, 1]."""
        own = self.cfg.judge
        assert own is not None
        x = augment(images, self.draw, purpose) if self.cfg.augment else images
        x = x * 0.5 + 0.5
        if x.shape[3] > own.size and float(self.draw.uniform(f"{purpose}.crop")) < own.crop and x.shape[2] >= own.size:
            top, left = (int(self.draw.integers(f"{purpose}.crop{axis}", 0, x.shape[axis] - own.size + 1)) for axis in (2, 3))
            x = x[:, :, top : top + own.size, left : left + own.size]
        if tuple(x.shape[2:]) != (own.size, own.size):
            x = F.interpolate(x, (own.size, own.size), mode=self.sight.judged, align_corners=False,
                              antialias=max(x.shape[2:]) > own.size)
        return self.discriminators["projected"](self.frozen["judge"](x))

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Losses:
        """Both discriminators' losses; images in [−1, 1], generated ones first, as two passes."""
        terms: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        with torch.autocast(real.device.type, enabled=False):
            if "projected" in self.discriminators:
                fake_logits, real_logits = self.judged(fake.detach(), "fake"), self.judged(real, "real")
                terms["discriminator"] = 2 * hinge_discriminator(real_logits, fake_logits)
                logs |= {"logits_real": real_logits.detach().mean(), "logits_fake": fake_logits.detach().mean()}
            if "patchgan" in self.discriminators:
                network, kind = self.discriminators["patchgan"], self.cfg.patchgan_loss
                fake_loss = patch_loss(network(fake.detach()), "fake", kind)
                terms["patchgan"] = fake_loss + patch_loss(network(real), "real", kind)
        return Losses(terms, logs=logs)

    def adversarial(self, fake: Tensor, real: Tensor, active: frozenset[str]) -> dict[str, Tensor]:
        """The generator's terms gan, patchgan and feature_matching; images in [−1, 1]."""
        terms: dict[str, Tensor] = {}
        with frozen_parameters(self.discriminators):
            if "gan" in active:
                terms["gan"] = hinge_generator(self.judged(fake, "generator"))
            if active & {"patchgan", "feature_matching"}:
                found = self.discriminators["patchgan"](fake)
                if "patchgan" in active:
                    terms["patchgan"] = patch_loss(found, "generator", self.cfg.patchgan_loss)
                if "feature_matching" in active:
                    with torch.no_grad():
                        wanted = self.discriminators["patchgan"](real)
                    terms["feature_matching"] = patch_feature_matching(wanted, found)
        return terms

    # --- what the loop calls --------------------------------------------------------------------------------------------

    def generator_losses(
        self, tokenizer: nn.Module, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The terms of `config.TERMS` that are active; all in float32."""
        assert isinstance(tokenizer, VFMVAE)
        self.draw = draw
        made = self.autoencode(tokenizer, batch.images, draw)
        fake, real = made.images[0], made.target * 2 - 1
        if judge is not None:
            judge(real, fake)
        with torch.autocast(fake.device.type, enabled=False):
            terms = self.reconstruction(made, active)
            logs = {"scale": fake.new_tensor(made.change.scale), "latent_std": made.posterior.std.mean().detach()}
            if "vf" in active:
                vf = self.vf(made)
                scale = self.vf_scale(tokenizer, terms, vf)
                terms["vf"] = scale * vf
                logs |= {"vf_scale": scale, "vf_unscaled": vf.detach()}
            if "kl" in active:
                terms["kl"] = made.posterior.kl().mean()
            if made.quantized is not None:
                terms |= {name: loss for name, loss in made.quantized.losses.items() if name in active}
                logs |= made.quantized.health
            if active & ADVERSARIAL:
                terms |= self.adversarial(fake, real, active)
        return Losses(terms, fake=fake, real=real, logs=logs)
