"""What every audio discriminator returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Judgement:
    """One member's view of a batch."""

    logits: Tensor             # larger for what sounds real; any shape (B, …)
    features: list[Tensor]     # maps that feature matching compares
