"""Which hidden states of a frozen transformer are its features."""

from torch import Tensor

AVERAGE = -1


def pick_layer(hidden_states: Tensor, layer: int = AVERAGE) -> Tensor:
    """(B, T, D): one of hidden_states (layers + 1, B, T, D), entry 0 being the first layer's input, or their mean (−1)."""
    return hidden_states.mean(0) if layer == AVERAGE else hidden_states[layer]
