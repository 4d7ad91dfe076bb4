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
            # not torch's remove_parametrizations: it deletes the weight from the class, which copies of the module share
            values = {name: getattr(layer, name).clone() for name in layer.parametrizations}      # type: ignore[union-attr]
            del layer.parametrizations
            layer.__class__ = type(layer).__bases__[0]
            for name, value in values.items():
                layer.register_parameter(name, nn.Parameter(value))
            count += len(values)
    return count
