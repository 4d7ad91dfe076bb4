"""Quantizers of the package vector-quantize-pytorch by name, behind our result: flavours that no released model here needs."""

import difflib
from typing import Any

from torch import Tensor, nn

from tokenizers_lab.errors import ConfigError

from .codebook import wide
from .result import QuantizerResult, codebook_health

# name: (its class there, whether it has several codebooks in a row)
FLAVOURS = {
    "vq": ("VectorQuantize", False), "sim-vq": ("SimVQ", False), "fsq": ("FSQ", False), "lfq": ("LFQ", False),
    "residual-vq": ("ResidualVQ", True), "residual-sim-vq": ("ResidualSimVQ", True), "residual-fsq": ("ResidualFSQ", True),
    "residual-lfq": ("ResidualLFQ", True),
}
DRAWING = ("quantize_dropout", "stochastic_sample_codes", "threshold_ema_dead_code", "sample_codebook_temp")


class LibraryQuantizer(nn.Module):
    """One of FLAVOURS on vectors (B, D, T). Its loss, weighted as its options say, is the loss `quantizer`; FSQ has none."""

    def __init__(self, name: str, **options: Any):
        """options: those of the class there, such as dim and codebook_size, or levels. Raises ConfigError on an unknown name or
        option, on one whose randomness a resumed run would not repeat, and where the package is missing."""
        super().__init__()
        if name not in FLAVOURS:
            near = difflib.get_close_matches(name, FLAVOURS, n=1) or [", ".join(FLAVOURS)]
            raise ConfigError(f"there is no quantizer '{name}'; nearest: '{near[0]}'")
        try:
            import vector_quantize_pytorch as library
        except ImportError:
            raise ConfigError(f"the quantizer '{name}' needs a package: pip install vector-quantize-pytorch") from None
        random = [key for key in DRAWING if options.get(key)]
        if random:
            raise ConfigError(f"the quantizer '{name}' cannot have {random[0]}: it draws from the global seed, not the step's")
        class_name, self.residual = FLAVOURS[name]
        try:
            self.network: Any = getattr(library, class_name)(**options)
        except (TypeError, AssertionError) as error:
            raise ConfigError(f"the quantizer '{name}' cannot be built from {options}: {error}") from error
        self.name = name

    def forward(self, x: Tensor) -> QuantizerResult:
        """x: (B, D, T)."""
        found = self.network(wide(x).transpose(1, 2))
        quantized, codes, losses = found[0], found[1], list(found[2:])
        codes = codes.transpose(1, 2) if self.residual else codes[:, None]
        counted = self.network if hasattr(self.network, "codebook_size") else self.network.layers[0]
        size = int(counted.codebook_size)
        return QuantizerResult(
            quantized.transpose(1, 2).to(x.dtype), codes.long(), {"quantizer": losses[0].mean()} if losses else {},
            health=codebook_health(codes, size) if self.training else {},
        )

    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, K, T) int64 of x (B, D, T); the network must be in eval mode. Raises ValueError if it is not."""
        if self.training:
            raise ValueError("a quantizer encodes in eval mode: in training its codebooks move")
        return self(x).codes

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, D, T) of codes (B, K, T)."""
        if self.residual:
            return self.network.get_output_from_indices(codes.transpose(1, 2)).transpose(1, 2)
        get = getattr(self.network, "get_output_from_indices", None) or self.network.indices_to_codes
        return get(codes[:, 0]).transpose(1, 2)
