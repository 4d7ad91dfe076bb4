"""Losses of UniFlow (arXiv 2510.10575, sec. 3): flow matching of every patch's pixels, layer-wise adaptive self-distillation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.diffusion.flow import draw_times, flow_loss
from tokenizers_lab.diffusion.pixel_flow import patchify
from tokenizers_lab.distillation import cosine_distance
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.quantizers.bsq import mean_over_ranks
from tokenizers_lab.training.objective import Judge, Losses, Objective

from .config import ModelConfig, ObjectiveConfig, check_objective
from .encoders import build_encoder
from .model import PATH, UniFlow


class DistillAdapter(nn.Module):
    """Linear, then layer norm: the student's tokens in a teacher's width (InternVideo2's)."""

    def __init__(self, width: int, width_out: int):
        super().__init__()
        self.head = nn.Linear(width, width_out)
        self.norm = nn.LayerNorm(width_out)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, width). Returns (B, N, width_out)."""
        return self.norm(self.head(tokens))


class UniFlowObjective(Objective):
    """The paper's losses, and the encoder's copy of the stage's beginning, which it follows.

    `build_frozen=False` leaves the teacher of the term semantic out; `teacher_width` then says how wide its features are.
    Raises WeightsMissing if the teacher is nowhere found.
    """

    cfg: ObjectiveConfig

    def __init__(self, cfg: ObjectiveConfig, model: ModelConfig, build_frozen: bool = True, teacher_width: int | None = None):
        super().__init__(cfg)
        check_objective(cfg)
        self.copies["teacher"] = build_encoder(model).requires_grad_(False).eval()
        if cfg.semantic_teacher is not None:
            if build_frozen:
                from tokenizers_lab.teachers.vision import build_vision_teacher

                side = model.image_size // model.patch
                self.frozen["semantic"] = teacher = build_vision_teacher(cfg.semantic_teacher, (side, side))
                teacher_width = teacher.width
            if teacher_width is None:
                raise ConfigError("the semantic teacher is not built: say its width in teacher_width")
            width: Any = self.copies["teacher"].width
            self.heads["adapter"] = DistillAdapter(width, teacher_width)

    def begin_stage(self, tokenizer: nn.Module, stage: Any) -> None:
        """The teacher becomes the encoder as it is now, where the stage distils."""
        assert isinstance(tokenizer, UniFlow)
        if stage.weights.get("distill"):
            self.copies["teacher"].load_state_dict(tokenizer.encoder.state_dict())
            self.copies.requires_grad_(False).eval()

    def provenance(self) -> dict[str, str]:
        """Where the semantic teacher comes from; the other one is the encoder itself."""
        return super().provenance() | {f"teacher.{name}": str(network.provenance) for name, network in self.frozen.items()}

    def times(self, items: int, tokens: int, draw: Draw) -> Tensor:
        """(items · tokens,) times of the flow loss: one a patch, or one an image for all of its patches."""
        if self.cfg.time_per == "image":
            return draw_times(self.cfg.time, draw, (items,)).repeat_interleave(tokens)
        return draw_times(self.cfg.time, draw, (items * tokens,))

    def flow(self, tokenizer: UniFlow, pixels: Tensor, latents: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """(E‖v_θ(x_t, t, c) − (x₁ − x₀)‖², the times): x₁ the patches, x₀ noise, c from latents (B, N, C) with gradient."""
        condition = tokenizer.conditioner(latents, tokenizer.grid(pixels))                # (B, N, width)
        data = patchify(pixels, tokenizer.cfg.patch).flatten(0, 1)                        # (B·N, P)
        noise = draw.normal("noise", tuple(data.shape))
        time = self.times(condition.shape[0], condition.shape[1], draw)
        predicted = tokenizer.velocity(PATH.at(data, noise, time), time, condition.flatten(0, 1))
        return flow_loss(predicted, PATH.velocity(data, noise), self.cfg.norm), time

    def semantic(self, images: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """1 − cos of the adapted last tokens (B, N, width) and the semantic teacher's features of the images in [0, 1]."""
        if "semantic" not in self.frozen:
            raise ConfigError("the loss semantic needs objective.semantic_teacher")
        teacher: Any = self.frozen["semantic"]
        return cosine_distance(teacher.features(images, grid), self.heads["adapter"](tokens).float())

    def generator_losses(
        self, tokenizer: nn.Module, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The terms flow, distill, semantic and dispersive, as far as they are active; all in float32."""
        assert isinstance(tokenizer, UniFlow)
        pixels = tokenizer.normalise(batch.images)
        states = tokenizer.encoder(pixels, every_layer="distill" in active)               # L or 1 times (B, N, width)
        terms: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        if active & {"flow", "dispersive"}:
            latents = tokenizer.project(states[-1])                                       # (B, N, C)
            logs["latent_std"] = latents.detach().float().std()
        if "flow" in active:
            terms["flow"], time = self.flow(tokenizer, pixels, latents, draw)
            logs["time"] = time.mean()
        if "distill" in active:
            with torch.no_grad():
                targets = self.copies["teacher"](pixels, every_layer=True)
            terms["distill"], weights, misalignments = self_distillation(states, targets, self.cfg.beta)
            for layer, (weight, misalignment) in enumerate(zip(weights, misalignments), 1):
                logs |= {f"distill_weight_{layer:02d}": weight, f"misalignment_{layer:02d}": misalignment}
        if "semantic" in active:
            terms["semantic"] = self.semantic(batch.images, states[-1], tokenizer.grid(pixels))
        if "dispersive" in active:
            terms["dispersive"] = dispersive_loss(latents)
        return Losses(terms, logs=logs)


def self_distillation(students: Sequence[Tensor], teachers: Sequence[Tensor], beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ_l w_l · d_l, w (L,), α (L,)) of tokens (B, N, width) of each layer 1 … L; w and α without gradient.

    d_l = 1 − mean cos of student and teacher, α_l = d_l. With several processes both are means over all of them.
    """
    distances = torch.stack([cosine_distance(t.float(), s.float()) for s, t in zip(students, teachers, strict=True)])
    distances = mean_over_ranks(distances)
    misalignments = distances.detach()
    weights = layer_weights(misalignments, beta)
    return (weights * distances).sum(), weights, misalignments


def layer_weights(misalignments: Tensor, beta: float) -> Tensor:
    """w_l = (l/L) · exp(β·α_l) / Σ_k (k/L) · exp(β·α_k) of α (L,): deeper and less aligned layers count more."""
    depth = torch.arange(1, len(misalignments) + 1, device=misalignments.device, dtype=misalignments.dtype)
    return (depth.log() + beta * misalignments).softmax(0)


def dispersive_loss(latents: Tensor) -> Tensor:
    """log of the mean of exp(−‖z_i − z_j‖² / n) over all ordered pairs of a batch, i = j too; latents (B, …), n numbers each."""
    flat = latents.flatten(1).float()
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")      # (B, B)
    return (-distances.square() / flat.shape[1]).exp().mean().log()
