"""The LightningDiT network."""

from torch import Tensor, nn

from tokenizers_lab.diffusion.flow import FlowPath
from tokenizers_lab.errors import InputError
from tokenizers_lab.eval.generation.generator import GeneratorOutput, LatentGenerator
from tokenizers_lab.nn.dit import DiTBlock, FinalLayer, LabelEmbedding, TimeEmbedding, init_dit, mlp_hidden
from tokenizers_lab.nn.patch import PatchEmbed, depth_to_space, sincos_positions
from tokenizers_lab.nn.rope import integer_table
from tokenizers_lab.nn.transformer import BlockStack

from .config import ModelConfig, check_model


class LightningDiT(LatentGenerator, BlockStack):
    """Patch embedding plus a fixed position table, blocks under the sum of time and class, final layer (arXiv 2501.01423).

    Position and rotary tables belong to the weights: released ones are loaded, not computed.
    """

    system = "lightningdit"
    path = FlowPath("data")
    cfg: ModelConfig
    rope: Tensor | None

    def __init__(self, cfg: ModelConfig):
        check_model(cfg)
        super().__init__(cfg)
        side = cfg.grid // cfg.patch
        self.x_embed = PatchEmbed(cfg.channels, cfg.width, cfg.patch)
        self.t_embed = TimeEmbedding(cfg.width)
        self.y_embed = LabelEmbedding(cfg.classes, cfg.width, cfg.unconditional)
        self.positions = nn.Parameter(sincos_positions(side, cfg.width), requires_grad=False)
        self.register_buffer("rope", integer_table(cfg.width // cfg.heads, side, side) if cfg.rope else None)
        hidden = mlp_hidden(cfg.width, cfg.mlp_ratio, cfg.swiglu)
        self.blocks = nn.ModuleList(
            DiTBlock(cfg.width, cfg.heads, hidden, cfg.norm, cfg.qk_norm, cfg.swiglu, cfg.shifts) for _ in range(cfg.depth)
        )
        self.final = FinalLayer(cfg.width, cfg.patch**2 * cfg.channels * (2 if cfg.learn_sigma else 1), cfg.norm)
        init_dit(self)

    def block(self, index: int) -> DiTBlock:
        """The block of that index, from 0."""
        found = self.blocks[index]
        assert isinstance(found, DiTBlock)
        return found

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, tokens_after: int | None = None) -> GeneratorOutput:
        """x: (B, C, h, w) at times (B,) in [0, 1], 0 noise and 1 data; labels: (B,) int64, `null_class` for none.

        tokens_after: give the hidden tokens (B, N, width) after that many blocks too. Raises InputError on other shapes.
        """
        self.check_latents(x)
        if tokens_after is not None and not 1 <= tokens_after <= len(self.blocks):
            raise InputError(f"tokens_after must be 1 to {len(self.blocks)} blocks, not {tokens_after}")
        tokens = None
        condition = self.t_embed(time) + self.y_embed(labels)                            # (B, width)
        h = self.x_embed(x) + self.positions                                             # (B, N, width)
        for i, block in enumerate(self.blocks, start=1):
            h = self.run(block, h, condition, self.rope)
            if i == tokens_after:
                tokens = h
        side = self.cfg.grid // self.cfg.patch
        out = depth_to_space(self.final(h, condition), side, side, self.cfg.patch)       # (B, C or 2C, h, w)
        return GeneratorOutput(out[:, : self.cfg.channels], tokens)
