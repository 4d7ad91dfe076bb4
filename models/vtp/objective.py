"""Losses of VTP (arXiv 2512.13687, sec. 3): reconstruction, self-distillation and image-text contrast of one batch, and the
finetuning of the pixel decoder against a discriminator."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.data.multicrop import multi_crops, random_crop
from tokenizers_lab.discriminators.patchgan import PatchGAN
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import DataError
from tokenizers_lab.losses.adversarial import frozen_parameters, hinge_discriminator, hinge_generator
from tokenizers_lab.losses.alignment import adaptive_weight
from tokenizers_lab.losses.contrastive import clamp_logit_scale, contrastive_loss
from tokenizers_lab.losses.self_distillation import centred, dino_loss, ibot_loss, koleo_loss, moved_centre, sinkhorn
from tokenizers_lab.nn.dino_head import DINOHead
from tokenizers_lab.nn.masking import block_masks
from tokenizers_lab.schedules import half_cosine, ramp
from tokenizers_lab.self_distillation import (
    Tokens,
    frozen_copy,
    kept_samples,
    masked_patches,
    student_logits,
    teacher_logits,
    update_teacher,
)
from tokenizers_lab.training.objective import Judge, Losses, Objective

from .config import ModelConfig
from .model import VTP
from .network import Trunk
from .objective_config import RECONSTRUCTION, SELF_DISTILLATION, ObjectiveConfig, check_objective


class Centres(nn.Module):
    """Means of the teacher's logits (K,) of class and of patch tokens, which centring takes off."""

    classes: Tensor
    patches: Tensor

    def __init__(self, prototypes: int):
        super().__init__()
        self.register_buffer("classes", torch.zeros(prototypes))
        self.register_buffer("patches", torch.zeros(prototypes))


class VTPObjective(Objective):
    """The paper's three objectives, each on its share of a batch, with the head and the teacher of self-distillation.

    The loader's images are the source of all views: contrast and reconstruction see a random crop of nearly all of them,
    self-distillation its global and local ones, cut and distorted on the device. The teacher, a copy of trunk and head, starts
    as they are when a stage with self-distillation begins, and follows them after each step.
    `build_frozen=False` leaves LPIPS out. Raises WeightsMissing if its weights are nowhere found.
    """

    cfg: ObjectiveConfig

    def __init__(self, cfg: ObjectiveConfig, model: ModelConfig, build_frozen: bool = True):
        super().__init__(cfg)
        check_objective(cfg, model.patch)
        self.size = model.image_size
        if build_frozen and cfg.lpips != "none":
            from tokenizers_lab.losses.perceptual import LPIPS

            self.frozen["lpips"] = LPIPS(cfg.lpips)
        if cfg.head is not None:
            own = cfg.head
            self.heads["dino"] = DINOHead(Trunk.semantic_width(model), own.prototypes, own.hidden, own.bottleneck, own.layers)
            if cfg.targets == "centring":
                self.heads["centres"] = Centres(own.prototypes)
            self.copies["head"] = frozen_copy(self.heads["dino"])
            self.copies["trunk"] = Trunk(model).requires_grad_(False).eval()
        if cfg.discriminator_width:
            self.discriminators["patchgan"] = PatchGAN(3, cfg.discriminator_width, cfg.discriminator_layers)

    def provenance(self) -> dict[str, str]:
        """Where LPIPS comes from."""
        return {name: str(network.provenance) for name, network in self.frozen.items()}

    # --- the teacher ----------------------------------------------------------------------------------------------------

    def begin_stage(self, tokenizer: nn.Module, stage: Any) -> None:
        """The teacher becomes trunk and head as they are now, where the stage distils."""
        assert isinstance(tokenizer, VTP)
        if any(stage.weights.get(name) for name in SELF_DISTILLATION):
            self.copies["trunk"].load_state_dict(tokenizer.trunk.state_dict())
            self.copies["head"].load_state_dict(self.heads["dino"].state_dict())

    def momentum(self) -> float:
        """Of the teacher, at this step."""
        return half_cosine(self.cfg.momentum, self.cfg.momentum_end, self.progress)

    def teacher_temperature(self) -> float:
        """At this step."""
        own = self.cfg
        share = self.progress / own.teacher_warmup if own.teacher_warmup else 1.0
        return ramp(own.teacher_temperature_start, own.teacher_temperature, share)

    @torch.no_grad()
    def after_step(self, tokenizer: nn.Module) -> None:
        """The teacher follows trunk and head, if they train; the contrast's temperature stays within 1 and 1/100."""
        assert isinstance(tokenizer, VTP)
        pairs = [("trunk", tokenizer.trunk), ("head", self.heads["dino"])] if "trunk" in self.copies else []
        for name, student in pairs:
            if any(p.requires_grad for p in student.parameters()):
                update_teacher(self.copies[name], student, self.momentum())
        if tokenizer.contrast is not None:
            clamp_logit_scale(tokenizer.contrast.logit_scale)

    def teacher_targets(self, logits: Tensor, kind: str) -> Tensor:
        """Distributions (R, K) from the teacher's logits of `kind`, classes or patches; the centre moves on."""
        temperature = self.teacher_temperature()
        if self.cfg.targets == "sinkhorn":
            return sinkhorn(logits, temperature, self.cfg.sinkhorn_iterations)
        centre = getattr(self.heads["centres"], kind)
        targets = centred(logits, centre, temperature)
        centre.copy_(moved_centre(centre, logits, self.cfg.centre_momentum))
        return targets

    # --- the three objectives -------------------------------------------------------------------------------------------

    def share(self, items: int, share: float, purpose: str, draw: Draw) -> Tensor:
        """Which of a batch's items an objective takes: at least one, at random."""
        return draw.permutation(purpose, items)[: max(1, round(share * items))]

    def self_distillation(
        self, tokenizer: VTP, images: Tensor, draw: Draw, active: frozenset[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms dino, ibot and koleo of images (b, 3, H, W), and what is logged of them."""
        crops, local = multi_crops(images, self.cfg.crops, draw)
        crops, local = tokenizer.normalise(crops), None if local is None else tokenizer.normalise(local)
        masks = block_masks(len(crops), tokenizer.trunk.grid(crops), self.cfg.mask_share, self.cfg.mask_ratios, draw)
        depth, drop = tokenizer.trunk.depth, self.cfg.ssl_drop
        kept = kept_samples(draw, "drop.global", depth, len(crops), drop)
        kept_local = None if local is None else kept_samples(draw, "drop.local", depth, len(local), drop)
        teacher_trunk: Any = self.copies["trunk"]
        said = teacher_logits(tokens_of(teacher_trunk), self.copies["head"], crops, masked_patches(masks))
        own = student_logits(tokens_of(tokenizer.trunk), self.heads["dino"], crops, masks, local, kept, kept_local)
        terms: dict[str, Tensor] = {}
        logs = {"masked": masks.float().mean()}
        if "dino" in active:
            targets = self.teacher_targets(said.classes, "classes")
            parts = dino_loss(own.classes, own.local_classes, targets, len(images), self.cfg.student_temperature)
            terms["dino"] = parts[0] + parts[1]
            logs |= {"dino_global": parts[0].detach(), "dino_local": parts[1].detach(),
                     "target_entropy": -torch.xlogy(targets, targets).sum(1).mean(),      # log K: the teacher says nothing
                     "prototypes_used": targets.new_tensor(targets.argmax(1).unique().numel())}
        if "ibot" in active:
            targets = self.teacher_targets(said.patches, "patches")
            terms["ibot"] = ibot_loss(own.patches, targets, masks, self.cfg.student_temperature)
        if "koleo" in active:
            first, second = own.class_tokens.chunk(2)
            terms["koleo"] = koleo_loss(first) + koleo_loss(second)
        return terms, logs

    def contrastive(self, tokenizer: VTP, views: Tensor, batch: Any, draw: Draw) -> Tensor:
        """The contrast of all views (B, 3, H, W) with the batch's captions, over all processes. Raises DataError without them."""
        assert tokenizer.contrast is not None
        if batch.texts is None:
            raise DataError("the loss contrastive needs a caption for every image: set data.texts=true")
        ids = tokenizer.text_ids(batch.texts).to(views.device)
        pixels = tokenizer.normalise(views)
        kept = kept_samples(draw, "drop.contrastive", tokenizer.trunk.depth, len(pixels), self.cfg.contrastive_drop)
        found = tokenizer.project_images(tokenizer.trunk.semantic(pixels, None, kept))
        images, texts = (F.normalize(x.float(), dim=-1) for x in (found, tokenizer.embed_texts(ids)))
        return contrastive_loss(images, texts, tokenizer.contrast.logit_scale, tokenizer.contrast.logit_bias)

    def reconstruct(self, tokenizer: VTP, views: Tensor, draw: Draw) -> Tensor:
        """Views (b, 3, H, W) through bottleneck and decoder: about [0, 1], not clamped."""
        pixels = tokenizer.normalise(views)
        kept = kept_samples(draw, "drop.rec", tokenizer.trunk.depth, len(pixels), self.cfg.rec_drop)
        latents = tokenizer.trunk.latents(pixels, kept)                                   # (b, N, C)
        return tokenizer.denormalise(tokenizer.decoder(latents, tokenizer.trunk.grid(pixels)))

    def reconstruction(self, tokenizer: VTP, x: Tensor, x_hat: Tensor, active: frozenset[str]) -> dict[str, Tensor]:
        """The terms l1, lpips and gan of images (b, 3, H, W) in [0, 1]; the first and the last are of [−1, 1]."""
        terms: dict[str, Tensor] = {}
        if "l1" in active:
            terms["l1"] = F.l1_loss(2 * x_hat, 2 * x)
        if "lpips" in active:
            terms["lpips"] = self.frozen["lpips"](x_hat, x).mean()
        if "gan" in active:
            discriminator = self.discriminators["patchgan"]
            with frozen_parameters(discriminator):
                gan = hinge_generator(discriminator(2 * x_hat - 1))
            reference = sum(terms.values(), x.new_zeros(()))      # l1 + lpips, before gan is among them
            terms["gan"] = gan
            last: Any = tokenizer.decoder.pixels.weight
            if self.cfg.gan_adaptive and terms.keys() != {"gan"} and last.requires_grad and torch.is_grad_enabled():
                terms["gan"] = adaptive_weight(reference, gan, last).clamp(0, self.cfg.gan_adaptive_max) * gan
        return terms

    # --- what the loop calls --------------------------------------------------------------------------------------------

    def view(self, images: Tensor, draw: Draw) -> Tensor:
        """What contrast and reconstruction see of images: a random crop at the model's size."""
        smallest = self.cfg.view_scale[0]
        if smallest == 1 and tuple(images.shape[2:]) == (self.size, self.size):
            return images
        return random_crop(images, self.size, self.cfg.view_scale, draw.within("view"))

    def generator_losses(
        self, tokenizer: nn.Module, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The terms of `objective_config.TERMS` that are active; all in float32."""
        assert isinstance(tokenizer, VTP)
        images = batch.images
        terms: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        fake = real = None
        views = self.view(images, draw) if active & (RECONSTRUCTION | {"contrastive"}) else images
        if active & RECONSTRUCTION:
            real = views[self.share(len(images), self.cfg.rec_share, "share.rec", draw)]
            fake = self.reconstruct(tokenizer, real, draw)
            with torch.autocast(images.device.type, enabled=False):
                terms |= self.reconstruction(tokenizer, real, fake.float(), active)
            logs["rec_psnr"] = -10 * (fake.detach() - real).square().mean().clamp_min(1e-10).log10()
        if active & SELF_DISTILLATION:
            own = images[self.share(len(images), self.cfg.ssl_share, "share.ssl", draw)]
            found, said = self.self_distillation(tokenizer, own, draw, active)
            terms |= found
            logs |= said
        if "contrastive" in active:
            terms["contrastive"] = self.contrastive(tokenizer, views, batch, draw)
            logs["logit_scale"] = tokenizer.contrast.logit_scale.detach().exp().mean()      # type: ignore[union-attr]
        if fake is None or real is None:
            return Losses(terms, logs=logs)
        return Losses(terms, fake=2 * fake - 1, real=2 * real - 1, logs=logs)

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Losses:
        """Hinge loss of images in [−1, 1]; real first, then fake, as two passes, since each updates the batch-norm statistics."""
        discriminator = self.discriminators["patchgan"]
        with torch.autocast(real.device.type, enabled=False):
            real_logits, fake_logits = discriminator(real.float()), discriminator(fake.detach().float())
            loss = hinge_discriminator(real_logits, fake_logits)
        logs = {"logits_real": real_logits.detach().mean(), "logits_fake": fake_logits.detach().mean()}
        return Losses({"discriminator": loss}, logs=logs)


def tokens_of(trunk: Trunk) -> Tokens:
    """What student and teacher see of crops: the trunk's class and patch tokens."""

    def tokens(pixels: Tensor, mask: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        found = trunk.semantic(pixels, mask, kept)
        return found.class_token, found.patch_tokens

    return tokens
