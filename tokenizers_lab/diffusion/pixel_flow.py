"""The patch-wise pixel flow network: the velocity of each patch's pixels under its token (UniFlow, sec. 3; after MAR's)."""

from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.nn.dit import TimeEmbedding
from tokenizers_lab.nn.vit import init_linear

TIME_SCALE = 1000.0      # the network is told 1000 · t
EPS = 1e-6               # of the layer norms


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images (B, c, H, W) as rows of pixels (B, N, c·patch·patch): colour slowest, then rows, then columns; N row by row."""
    b, c, height, width = images.shape
    parts = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def unpatchify(rows: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `patchify` for a grid of (rows, columns): (B, N, c·patch·patch) → (B, c, H, W)."""
    parts = rows.unflatten(2, (-1, patch, patch)).unflatten(1, grid)                   # (B, h, w, c, patch, patch)
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class ResidualBlock(nn.Module):
    """u + gate · MLP(norm(u) · (1 + scale) + shift): shift, scale and gate come from time and condition."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """u: (R, width); y: (R, width), the activated sum of time and condition."""
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)
        return u + gate * self.mlp(self.norm(u) * (1 + scale) + shift)


class PixelFlow(nn.Module):
    """The velocity of patches under their conditions; each row is a patch of its own, which sees no other.

    All linear maps start truncated normal (0.02), biases at 0; modulation and output at 0, so the first velocity is 0.
    """

    def __init__(self, pixels: int, width: int, depth: int):
        """pixels: numbers in a patch, colours included; width: also of the condition; depth: residual blocks."""
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(width, width)
        self.input_proj = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.out_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, pixels)
        self.apply(init_linear)
        for zero in (self.out, self.out_modulation, *(m.modulation for m in self.modules() if isinstance(m, ResidualBlock))):
            nn.init.zeros_(zero.weight)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """x: (R, pixels); time: (R,), t · TIME_SCALE, 0 at noise; condition: (R, width). Returns dx/dt (R, pixels)."""
        dtype = self.input_proj.weight.dtype
        y = F.silu(self.time_embed(time) + self.cond_embed(condition.to(dtype)))
        u = self.input_proj(x.to(dtype))
        for block in self.blocks:
            u = block(u, y)
        shift, scale = self.out_modulation(y).chunk(2, dim=-1)
        return self.out(F.layer_norm(u, u.shape[-1:], eps=EPS) * (1 + scale) + shift)
