"""The DiT-DH network."""

from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.diffusion.flow import FlowPath
from tokenizers_lab.errors import InputError
from tokenizers_lab.eval.generation.generator import GeneratorOutput, LatentGenerator
from tokenizers_lab.nn.dit import DiTBlock, FinalLayer, FourierTimeEmbedding, LabelEmbedding, init_dit, mlp_hidden
from tokenizers_lab.nn.patch import PatchEmbed, sincos_positions, to_grid
from tokenizers_lab.nn.rope import integer_table
from tokenizers_lab.nn.transformer import BlockStack

from .config import ModelConfig, check_model


class DiTDH(LatentGenerator, BlockStack):
    """A deep narrow encoder makes a condition of each token of the noisy latents; a shallow wide head sees the latents again
    (RAE, arXiv 2510.11690, sec. 5; the head after DDT, arXiv 2504.05741).

    Conditions pass SiLU where they are made and again inside the blocks, as released weights need it. Position table, rotary
    tables and Fourier frequencies belong to the weights: released ones are loaded, not computed.
    """

    system = "ditdh"
    cfg: ModelConfig
    encoder_rope: Tensor
    head_rope: Tensor

    def __init__(self, cfg: ModelConfig):
        check_model(cfg)
        super().__init__(cfg)
        self.path = FlowPath(cfg.clock)
        self.x_embed = PatchEmbed(cfg.channels, cfg.head_width, 1)
        self.s_embed = PatchEmbed(cfg.channels, cfg.width, 1)
        self.s_projector = nn.Identity() if cfg.width == cfg.head_width else nn.Linear(cfg.width, cfg.head_width)
        self.t_embed = FourierTimeEmbedding(cfg.width)
        self.y_embed = LabelEmbedding(cfg.classes, cfg.width, cfg.unconditional)
        table = nn.Parameter(sincos_positions(cfg.grid, cfg.width), requires_grad=False) if cfg.position_table else None
        self.register_parameter("positions", table)
        self.register_buffer("encoder_rope", integer_table(cfg.width // cfg.heads, cfg.grid, cfg.grid))
        self.register_buffer("head_rope", integer_table(cfg.head_width // cfg.head_heads, cfg.grid, cfg.grid))
        sizes = [(cfg.width, cfg.heads)] * cfg.depth + [(cfg.head_width, cfg.head_heads)] * cfg.head_depth
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, mlp_hidden(width, cfg.mlp_ratio, cfg.swiglu), cfg.norm, cfg.qk_norm, cfg.swiglu)
            for width, heads in sizes
        )
        self.final = FinalLayer(cfg.head_width, cfg.channels, cfg.norm)
        init_dit(self, xavier=False)

    def block(self, index: int) -> DiTBlock:
        """The block of that index, from 0."""
        found = self.blocks[index]
        assert isinstance(found, DiTBlock)
        return found

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, tokens_after: int | None = None) -> GeneratorOutput:
        """x: (B, C, h, w) at times (B,) in [0, 1] of the config's clock; labels: (B,) int64, `null_class` for none.

        tokens_after: give the hidden tokens (B, N, width) after that many of the encoder's blocks too. Raises InputError on other
        shapes.
        """
        self.check_latents(x)
        if tokens_after is not None and not 1 <= tokens_after <= self.cfg.depth:
            raise InputError(f"tokens_after must be 1 to {self.cfg.depth} blocks of the encoder, not {tokens_after}")
        condition, tokens = self.encode(x, time, labels, tokens_after)
        return GeneratorOutput(self.decode(x, condition), tokens)

    def encode(self, x: Tensor, time: Tensor, labels: Tensor, tokens_after: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The condition of each token (B, N, width), with time and SiLU, and the hidden tokens asked for."""
        tokens = None
        embedded = self.t_embed(time)                                                    # (B, width)
        condition = F.silu(embedded + self.y_embed(labels))
        s = self.s_embed(x)                                                              # (B, N, width)
        if self.positions is not None:
            s = s + self.positions
        for i, block in enumerate(self.blocks[: self.cfg.depth], start=1):
            s = self.run(block, s, condition, self.encoder_rope)
            if i == tokens_after:
                tokens = s
        return F.silu(embedded[:, None] + s), tokens

    def decode(self, x: Tensor, condition: Tensor) -> Tensor:
        """The head alone: the velocity (B, C, h, w) of x (B, C, h, w) under the encoder's conditions (B, N, width)."""
        condition = self.s_projector(condition)                                          # (B, N, head width)
        h = self.x_embed(x)
        for block in self.blocks[self.cfg.depth :]:
            h = self.run(block, h, condition, self.head_rope)
        return to_grid(self.final(h, condition), self.cfg.grid, self.cfg.grid)
