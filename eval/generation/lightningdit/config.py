"""Options of LightningDiT. Defaults are XL/1 on VA-VAE's latents, as released.

Sizes (width, depth, heads): B 768, 12, 12; L 1024, 24, 16; XL 1152, 28, 16; 1p0B 1536, 24, 24; 1p6B 1792, 28, 28.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.eval.generation.config import GeneratorConfig, check_generator, validate_generator
from tokenizers_lab.nn.dit import NORMS, check_heads


@dataclass
class ModelConfig(GeneratorConfig):
    """The network that ships."""

    width: int = 1152                 # channels of a token
    depth: int = 28                   # blocks
    heads: int = 16                   # attention heads
    patch: int = 1                    # latent positions a side of a token
    mlp_ratio: float = 4.0            # hidden channels of an MLP over width; a SwiGLU takes two thirds of them
    norm: str = "rms_norm"            # rms_norm, or layer_norm (without weights in the blocks)
    qk_norm: bool = False             # normalise queries and keys: fewer NaN losses, slower convergence (the authors' advice)
    swiglu: bool = True               # SwiGLU; else GELU in its tanh form
    rope: bool = True                 # rotary positions, beside the fixed table
    shifts: bool = True               # shifts in the blocks' modulations, beside scales and gates
    learn_sigma: bool = False         # twice the output channels, of which the second half goes unused
    unconditional: bool = True        # the label table has a row for no class

    @property
    def token_width(self) -> int:
        """Channels of the hidden tokens that REPA aligns."""
        return self.width


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that do not fit together."""
    check_generator(cfg, where)
    if min(cfg.width, cfg.depth, cfg.heads, cfg.patch) < 1 or cfg.mlp_ratio <= 0:
        raise ConfigError(f"{where}: width, depth, heads and patch must be at least 1, and mlp_ratio above 0")
    if cfg.grid % cfg.patch:
        raise ConfigError(f"{where}.grid {cfg.grid} must be a multiple of {where}.patch {cfg.patch}")
    check_heads(cfg.width, cfg.heads, cfg.rope, f"{where}.")
    if cfg.norm not in NORMS:
        raise ConfigError(f"{where}.norm must be one of {', '.join(NORMS)}; not '{cfg.norm}'")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    check_model(cfg.model)
    validate_generator(cfg)
