"""Hidden layers of vision networks of transformers and timm, by number."""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import ConfigError


def is_cnn(network: Any) -> bool:
    """Whether it is a convolutional network of timm, whose stages are its layers."""
    return not hasattr(getattr(network, "config", None), "model_type") and not hasattr(network, "patch_embed")


def blocks_of(network: Any) -> nn.ModuleList:
    """The transformer blocks of a vision network. Raises ConfigError if they are not found."""
    config: Any = getattr(network, "config", None)
    if hasattr(config, "model_type"):
        depth = config.num_hidden_layers
        found = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    else:
        found = [network.blocks] if hasattr(network, "blocks") else []
    if not found:
        raise ConfigError(f"the blocks of {type(network).__name__} are not known")
    return found[0]


def prefix_tokens(network: Any) -> int:
    """Class and register tokens before the patches."""
    config: Any = getattr(network, "config", None)
    if not hasattr(config, "model_type"):
        return network.num_prefix_tokens
    return 0 if config.model_type.startswith("siglip") else 1 + getattr(config, "num_register_tokens", 0)


def stage_features(network: Any, values: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Maps (B, C, h, w) of a timm CNN's stages; negative numbers count from the last."""
    count = len(network.feature_info)
    stages = [layer % count for layer in layers]
    unique = sorted(set(stages))
    maps = network.forward_intermediates(values, indices=unique, intermediates_only=True, stop_early=True, output_fmt="NCHW")
    return [maps[unique.index(stage)] for stage in stages]


def hidden_layers(network: Any, values: Tensor, layers: Sequence[int], final_norm: bool = True) -> tuple[list[Tensor], Any]:
    """Tokens (B, prefix + N, C) of a vision transformer's layers, and its own output, from pixel values (B, 3, H, W).

    A layer is 0: what enters the first block; n: what leaves block n; −1: the tokens behind the final norm (without
    `final_norm`: before it), −2: what leaves the last block, −3: the one before, and so on. The network may have positions for
    another size. Raises ConfigError on a layer that it does not have.
    """
    blocks = blocks_of(network)
    numbers = [number_of(layer, len(blocks), final_norm) for layer in layers]
    seen: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for number in {n for n in numbers if n is not None}:
            if number == 0:
                handle = blocks[0].register_forward_pre_hook(_keeps_input(seen), with_kwargs=True)
            else:
                handle = blocks[number - 1].register_forward_hook(_keeps_output(seen, number))
            hooks.callback(handle.remove)
        output = run(network, values)
    last = getattr(output, "last_hidden_state", output)
    return [last if number is None else seen[number] for number in numbers], output


def number_of(layer: int, depth: int, final_norm: bool = True) -> int | None:
    """Number of blocks that a layer comes behind; none: all and the final norm. Raises ConfigError if it is not there."""
    if layer == -1:
        return None if final_norm else depth
    number = layer if layer >= 0 else depth + 2 + layer
    if not 0 <= number <= depth:
        raise ConfigError(f"there is no layer {layer} in a network of {depth} blocks")
    return number


def run(network: Any, values: Tensor) -> Any:
    """What a vision transformer gives for pixel values of any size: an output of transformers, or timm's final tokens."""
    config: Any = getattr(network, "config", None)
    if not hasattr(config, "model_type"):
        return network.forward_features(values)
    options: dict[str, Any] = {}
    if "interpolate_pos_encoding" in inspect.signature(network.forward).parameters:
        options["interpolate_pos_encoding"] = True      # the others adapt their positions by themselves
    if config.model_type == "vit_mae":                  # with all patches, in their order: the mask sorts by this noise
        tokens = (values.shape[2] // config.patch_size) * (values.shape[3] // config.patch_size)
        options["noise"] = torch.arange(tokens, device=values.device).float().expand(len(values), -1)
    return network(pixel_values=values, **options)


def _keeps_input(seen: dict[int, Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[0] = args[0] if args else kwargs["hidden_states"]
    return hook


def _keeps_output(seen: dict[int, Tensor], number: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[number] = output if isinstance(output, Tensor) else output[0]
    return hook
