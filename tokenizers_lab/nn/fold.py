"""Weight norms folded into plain weights: for networks that will not be trained any more."""

import torch
from torch import nn
from torch.nn.utils import parametrize


@torch.no_grad()
def fold_weight_norms(module: nn.Module) -> int:
    """Replace every parametrised weight inside `module` by its value, in place; returns how many there were.

    Outputs stay the same to the bit; each call saves computing the weights. The keys of the state dict change.
    """
    count = 0
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer):
            for name in list(layer.parametrizations):      # type: ignore[arg-type]
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
                count += 1
    return count
