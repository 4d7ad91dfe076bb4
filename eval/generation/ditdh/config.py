"""Options of DiT-DH. Defaults are XL on RecTok's latents, as released.

Sizes (width, depth, heads; the head is 2048, 2, 16 in all): S 384, 12, 6; B 768, 12, 12; L 1024, 24, 16; XL 1152, 28, 16.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers_lab.diffusion.flow import CLOCKS
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.eval.generation.config import GeneratorConfig, check_generator, validate_generator
from tokenizers_lab.nn.dit import NORMS, check_heads


@dataclass
class ModelConfig(GeneratorConfig):
    """The network that ships."""

    channels: int = 128               # C of the latents
    clock: str = "data"               # what stands at time 1: data (RecTok) or noise (RAE)
    width: int = 1152                 # encoder: channels of a token, and of the condition that it makes of it
    depth: int = 28                   # encoder: blocks
    heads: int = 16                   # encoder: attention heads
    head_width: int = 2048            # head: channels of a token
    head_depth: int = 2               # head: blocks
    head_heads: int = 16              # head: attention heads
    mlp_ratio: float = 4.0            # hidden channels of an MLP over width; a SwiGLU takes two thirds of them
    norm: str = "rms_norm"            # rms_norm, or layer_norm (without weights in the blocks)
    qk_norm: bool = False             # normalise queries and keys
    swiglu: bool = True               # SwiGLU; else GELU in its tanh form
    position_table: bool = True       # add a fixed table to the encoder's tokens, beside rotary positions
    unconditional: bool = True        # the label table has a row for no class

    @property
    def token_width(self) -> int:
        """Channels of the hidden tokens that REPA aligns."""
        return self.width


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that do not fit together."""
    check_generator(cfg, where)
    if cfg.clock not in CLOCKS:
        raise ConfigError(f"{where}.clock must be one of {', '.join(CLOCKS)}; not '{cfg.clock}'")
    sizes = (cfg.width, cfg.depth, cfg.heads, cfg.head_width, cfg.head_depth, cfg.head_heads)
    if min(sizes) < 1 or cfg.mlp_ratio <= 0:
        raise ConfigError(f"{where}: widths, depths and heads must be at least 1, and mlp_ratio above 0")
    check_heads(cfg.width, cfg.heads, True, f"{where}.")
    check_heads(cfg.head_width, cfg.head_heads, True, f"{where}.head_")
    if cfg.norm not in NORMS:
        raise ConfigError(f"{where}.norm must be one of {', '.join(NORMS)}; not '{cfg.norm}'")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    check_model(cfg.model)
    validate_generator(cfg)
