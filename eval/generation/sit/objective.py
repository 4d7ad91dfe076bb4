"""What SiT learns: flow matching of the latents, and with REG of a vision network's class token beside them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.diffusion.flow import draw_times, flow_loss
from tokenizers_lab.distillation import cosine_distance
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.eval.generation.objective import (
    HELD_OUT_TIMES,
    LatentFlowObjective,
    drop_labels,
    held_out_noise,
)
from tokenizers_lab.teachers.vision import VisionTeacher
from tokenizers_lab.training.objective import Judge, Losses

from .config import ModelConfig, ObjectiveConfig


class SiTObjective(LatentFlowObjective):
    """REG's terms (arXiv 2507.01467, sec. 3; its weights 1, 0.03 and 0.5):

      mse        (v̂ − v)² of the latents, mean over channels, positions and images
      class_mse  (v̂ − v)² of the class token, noised along the same path at the same time
      alignment  1 − cos of the projected hidden tokens and the teacher's class token and patch features, mean over images and
                 tokens (published: −cos, which differs by a constant); without a class token of the patches alone (REPA)
      cosine     LightningDiT's, not REG's: 1 − cos(v̂, v) along the channels
    """

    cfg: ObjectiveConfig
    model_cfg: ModelConfig

    def __init__(self, cfg: ObjectiveConfig, model_cfg: ModelConfig):
        """Raises ConfigError if the class token is missing a teacher, or has another width than the teacher's features."""
        super().__init__(cfg, model_cfg)
        wanted = model_cfg.class_token
        if "teacher" not in self.frozen:
            if wanted is not None:
                raise ConfigError(f"model.class_token {wanted} needs objective.teacher, whose class token it is")
            return
        teacher = self.teacher
        if wanted not in (None, teacher.width):
            raise ConfigError(f"model.class_token must be {teacher.width}, the channels of {teacher.provenance}, not {wanted}")
        if teacher.kind == "dinov2":      # REG resizes once, see `seen`
            teacher.spec = replace(teacher.spec, detour=0)
        for linear in self.heads["projector"].modules():      # first weights as the network's, of which it is part there
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    @property
    def teacher(self) -> VisionTeacher:
        """The frozen network whose features are followed."""
        teacher = self.frozen["teacher"]
        assert isinstance(teacher, VisionTeacher)
        return teacher

    def generator_losses(
        self, tokenizer: Any, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """`tokenizer` is the SiT that trains. Raises ConfigError where images are needed and the data are cached latents."""
        data = tokenizer.normalise(self.latents_of(batch, draw))                          # (B, C, h, w)
        noise = draw.normal("noise", tuple(data.shape))
        time = draw_times(self.time_config(), draw, (len(data),))                         # (B,)
        labels = drop_labels(self.labels_of(batch), self.cfg.label_drop, tokenizer.null_class, draw)
        path, entangled = tokenizer.path, tokenizer.cfg.class_token is not None
        target, class_target, features, given = path.velocity(data, noise), None, None, {}
        if entangled or "alignment" in active:
            class_token, features = self.seen(batch)                                      # (B, D), (B, N, D)
            if entangled:
                class_noise = draw.normal("class_noise", tuple(class_token.shape))
                class_target = path.velocity(class_token, class_noise)
                given["class_token"] = path.at(class_token, class_noise, time)
                features = torch.cat([class_token[:, None], features], dim=1)             # (B, 1 + N, D)
        after = self.cfg.align_after if "alignment" in active else None
        made = tokenizer(path.at(data, noise, time), time, labels, tokens_after=after, **given)
        terms = {}
        if "mse" in active:
            terms["mse"] = flow_loss(made.velocity, target)
        if "class_mse" in active:
            if class_target is None:
                raise ConfigError("the term class_mse needs model.class_token")
            terms["class_mse"] = flow_loss(made.class_velocity, class_target)
        if "cosine" in active:
            terms["cosine"] = cosine_distance(target.movedim(1, -1), made.velocity.float().movedim(1, -1))
        if "alignment" in active:
            if made.tokens is None:
                raise ConfigError(f"objective.align_after {self.cfg.align_after} is above model.depth {tokenizer.cfg.depth}")
            assert features is not None
            terms["alignment"] = cosine_distance(features, self.heads["projector"](made.tokens).float())
        return Losses(terms)

    @torch.no_grad()
    def seen(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The teacher's class token (B, D) and its features on the grid of the tokens (B, N, D), of the batch's images.

        Raises ConfigError if there is no teacher, or if the batch holds no images.
        """
        if "teacher" not in self.frozen:
            raise ConfigError("class_mse and alignment need objective.teacher")
        if not hasattr(batch, "images"):
            raise ConfigError("SiT's class token and alignment need images for the teacher, but data.train holds cached latents: "
                              "give images, and the tokenizer that encodes them in objective.tokenizer")
        teacher, images = self.teacher, batch.images.float()
        side = self.model_cfg.grid // self.model_cfg.patch
        if teacher.kind == "dinov2":      # REG: bicubic without antialiasing; before or after normalising is the same
            images = F.interpolate(images, teacher.network_size(images.shape[-2:], (side, side)), mode="bicubic")
        return teacher.class_and_features(images, (side, side))

    @torch.no_grad()
    def held_out_metrics(self, network: Any, batch: Any) -> dict[str, Tensor]:
        """`velocity_mse` (B,) as of the other generators, and with a class token `class_velocity_mse` (B,) of it."""
        data = network.normalise(self.latents_of(batch, None))
        class_token = None if network.cfg.class_token is None else self.seen(batch)[0]
        labels, losses, class_losses = self.labels_of(batch), [], []
        for i in range(HELD_OUT_TIMES):
            time = torch.full((len(data),), (i + 0.5) / HELD_OUT_TIMES, device=data.device)
            noise, given = self.noise_of(batch.keys, i, data), {}
            if class_token is not None:
                class_noise = self.noise_of([f"{key} class" for key in batch.keys], i, class_token)
                given["class_token"] = network.path.at(class_token, class_noise, time)
            made = network(network.path.at(data, noise, time), time, labels, **given)
            losses.append(squared(made.velocity, network.path.velocity(data, noise)))
            if class_token is not None:
                class_losses.append(squared(made.class_velocity, network.path.velocity(class_token, class_noise)))
        found = {"velocity_mse": torch.stack(losses).mean(0)}
        if class_losses:
            found["class_velocity_mse"] = torch.stack(class_losses).mean(0)
        return found

    def noise_of(self, keys: list[str], number: int, like: Tensor) -> Tensor:
        """N(0, 1) that belongs to each key, of that tensor's shape (B, ...)."""
        return torch.stack([held_out_noise(key, number, tuple(like.shape[1:])) for key in keys]).to(like.device)

    def provenance(self) -> dict[str, str]:
        """Tokenizer and teacher, and what its class token is."""
        found = super().provenance()
        if "teacher" in self.frozen and self.model_cfg.class_token is not None and not self.teacher.has_class_token:
            found["class_token"] = f"mean of the patch features of {self.teacher.provenance}, which has no class token"
        return found


def squared(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean (v̂ − v)² of each item, (B,)."""
    return (predicted.float() - target).square().flatten(1).mean(1)
