"""The UniFlow tokenizer (arXiv 2510.10575): a vision transformer's tokens as latents, and a flow that paints each patch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenizers_lab.diffusion.flow import FlowPath
from tokenizers_lab.diffusion.guidance import zero_guided
from tokenizers_lab.diffusion.noise import start_noise
from tokenizers_lab.diffusion.pixel_flow import TIME_SCALE, PixelFlow, unpatchify
from tokenizers_lab.diffusion.samplers import euler
from tokenizers_lab.errors import InputError
from tokenizers_lab.nn.layer_tokens import LayerTokens, checked_layers
from tokenizers_lab.nn.patch import resize_positions, sincos_positions, to_grid, to_tokens
from tokenizers_lab.nn.transformer import BlockStack
from tokenizers_lab.nn.vit import MLP, ViTBlock, init_linear
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer

from .config import ModelConfig, check_model
from .encoders import build_encoder, colour_statistics, start_encoder

PATH = FlowPath("data")      # t = 0 noise, t = 1 pixels; the paper writes its mirror image
GLOBAL_EPS = 1e-5            # of the global blocks' layer norms


class Conditioner(BlockStack):
    """Latents to the flow network's conditions: tokens of the whole image, mixed by the global blocks."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.unproject = MLP(cfg.latent_channels, cfg.width, cfg.width)
        side = cfg.image_size // cfg.patch
        self.global_positions = nn.Parameter(sincos_positions(side, cfg.width))
        self.blocks = nn.ModuleList(
            ViTBlock(cfg.width, cfg.global_heads, 4 * cfg.width, eps=GLOBAL_EPS) for _ in range(cfg.global_blocks)
        )
        self.positions = nn.Parameter(sincos_positions(side, cfg.width))
        self.apply(init_linear)

    def forward(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """latents: (B, N, C), not normalised, of a grid of (rows, columns). Returns (B, N, width)."""
        tokens = self.unproject(latents.to(self.positions.dtype))
        tokens = tokens + resize_positions(self.global_positions, *grid)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        return tokens + resize_positions(self.positions, *grid)


class UniFlow(ImageTokenizer):
    """UniFlow: images (B, 3, H, W) in [0, 1] to latents (B, C, H/patch, W/patch), any size that is a multiple of the patch.

    Encoding is deterministic. Latents are normalised by `latent_mean` and `latent_std` (per channel; 0 and 1 until they are
    collected). Decoding samples a flow, by default in as many steps as the config says and always from the same noise.
    """

    system = "uniflow"
    decode_options = ("steps", "guidance")
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        check_model(cfg)
        self.downsample = cfg.patch
        self.encoder = build_encoder(cfg)
        width = self.encoder.width
        self.project = MLP(width, width, cfg.latent_channels).apply(init_linear)
        self.conditioner = Conditioner(cfg)
        self.flow = PixelFlow(3 * cfg.patch**2, cfg.width, cfg.flow_blocks)
        if cfg.init_gain:
            scale_first_weights(self, cfg.init_gain)
        self.times = sampling_times(cfg.steps, cfg.schedule_power)      # as numbers, which an export can follow
        self.add_latent_statistics(cfg.latent_channels)
        for name, value in zip(("pixel_mean", "pixel_std"), colour_statistics(cfg.encoder, self.encoder)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """[0, 1] to the space of the encoder's input, in which the flow paints too."""
        return (images - self.pixel_mean) / self.pixel_std

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of the images' tokens."""
        return images.shape[2] // self.cfg.patch, images.shape[3] // self.cfg.patch

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> ImageEncoding:
        """Normalised latents (B, C, h, w); there is no posterior to sample. Raises InputError on unusable images."""
        self.check_images(images)
        tokens = self.project(self.encoder(self.normalise(images))[-1])                   # (B, N, C)
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        return ImageEncoding(latents=to_grid((wide - self.latent_mean) / self.latent_std, *self.grid(images)))

    def decode(
        self,
        latents: Tensor,
        generator: torch.Generator | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        chunk: int | None = None,
    ) -> Tensor:
        """Images in [0, 1] from normalised latents (B, C, h, w).

        generator: draws the noise for the whole batch; none: each image starts from the same noise, see `start_noise`.
        steps: of Euler; none: the config's. guidance: 1 is none; against a zero condition, which is not trained as such.
        chunk: so many patches at a time go through the flow network, with the same result in less memory; none: all.
        Raises InputError on another shape or numbers out of range.
        """
        if latents.dim() != 4 or latents.shape[1] != self.cfg.latent_channels or not latents.is_floating_point():
            wanted = f"float (B, {self.cfg.latent_channels}, h, w)"
            raise InputError(f"latents must be {wanted}, not {latents.dtype} {tuple(latents.shape)}")
        grid = (latents.shape[2], latents.shape[3])
        tokens = to_tokens(latents) * self.latent_std + self.latent_mean
        condition = self.conditioner(tokens, grid)                                        # (B, N, width)
        noise = start_noise((*condition.shape[:2], 3 * self.cfg.patch**2), condition.device, generator)
        rows = self.sample(condition.flatten(0, 1), noise.flatten(0, 1), steps, guidance, chunk)      # (B·N, P)
        pixels = unpatchify(rows.unflatten(0, condition.shape[:2]), grid, self.cfg.patch)
        return (pixels * self.pixel_std + self.pixel_mean).clamp(0, 1)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[LayerTokens]:
        """Patch tokens after each of these layers of the encoder (from 0; negative: from the end), before any final norm.

        Raises InputError on unusable images and on layers that are not there.
        """
        self.check_images(images)
        places = checked_layers(layers, self.encoder.depth)
        states = self.encoder(self.normalise(images), every_layer=True)
        return [LayerTokens(states[place]) for place in places]

    def sample(
        self,
        condition: Tensor,
        noise: Tensor,
        steps: int | None = None,
        guidance: float = 1.0,
        chunk: int | None = None,
        power: float | None = None,
    ) -> Tensor:
        """Normalised pixels of patches (R, P) from conditions (R, width) and noise (R, P). power: none: the config's schedule."""
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk must be at least 1 patch, not {chunk}")
        times = self.times
        if steps is not None or power is not None:
            power = self.cfg.schedule_power if power is None else power
            times = sampling_times(self.cfg.steps if steps is None else steps, power)
        noise = noise.to(torch.promote_types(condition.dtype, noise.dtype))
        parts = [(condition, noise)] if chunk is None else list(zip(condition.split(chunk), noise.split(chunk)))
        made = [euler(zero_guided(self.velocity, c, guidance), x, times) for c, x in parts]
        return made[0] if len(made) == 1 else torch.cat(made)

    def velocity(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """dx/dt of patches x (R, P) at times (R,) in [0, 1] under conditions (R, width)."""
        return self.flow(x, TIME_SCALE * time, condition)

    def start_part(self, part: str, source: str) -> str:
        """See Tokenizer. The encoder also starts from a pretrained network: a folder or hub id of the encoder's own kind."""
        from tokenizers_lab.hub import is_tokenizer

        if part != "encoder" or is_tokenizer(source):
            return super().start_part(part, source)
        return start_encoder(self.cfg, self.encoder, source)


def scale_first_weights(module: nn.Module, gain: float) -> None:
    """Draw linear layers anew from N(0, gain² / inputs), but for those that start at 0. For narrow networks: with a deviation of
    0.02 the tokens, and latents above all, begin so small that the positions drown them."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and (layer.weight.is_meta or layer.weight.any()):
            nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)


def sampling_times(steps: int, power: float) -> list[float]:
    """The steps + 1 times from noise (0) to pixels (1). Raises InputError on values out of range."""
    with torch.device("cpu"):      # also while a model is built on the meta device
        return PATH.times(steps, power=power).tolist()
