"""What the layers of an image tokenizer's encoder say of images: the answer of its `features(images, layers)`."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tokenizers_lab.errors import InputError


class LayerTokens(NamedTuple):
    """Of one layer."""

    patch_tokens: Tensor                  # (B, N, D), row by row
    class_token: Tensor | None = None     # (B, D), where the network has one


def checked_layers(layers: Sequence[int], depth: int, what: str = "the encoder") -> list[int]:
    """The same layers counted from 0; negative ones count from the end. Raises InputError on one that is not there, or none."""
    if not layers:
        raise InputError("features need a layer")
    wrong = [number for number in layers if not -depth <= number < depth]
    if wrong:
        raise InputError(f"{what} has the layers 0 to {depth - 1}, but {wrong[0]} was asked for")
    return [number % depth for number in layers]
