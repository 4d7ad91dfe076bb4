"""Peers' image tokenizers in our convention: diffusers' AutoencoderKL and AutoencoderDC."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.errors import CheckpointError, InputError
from tokenizers_lab.hub import hub_snapshot
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer

PREFIX = "diffusers:"
CLASSES = ("AutoencoderKL", "AutoencoderDC")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SEED = 1                 # of random weights; not 0, which the harness's untrained copies have
DEFAULT_SIZE = 256       # pixels, where the config does not say what it was trained on


@dataclass
class PeerConfig:
    """What builds a peer."""

    autoencoder: str                                         # one of CLASSES
    options: dict[str, Any] = field(default_factory=dict)    # its config.json

    @property
    def image_size(self) -> int:
        """Pixels a side that it was trained on, where its config says so."""
        size = self.options.get("sample_size")
        return size if isinstance(size, int) and size > 0 else DEFAULT_SIZE


RANDOM_PEERS = {      # networks with random weights, by name: the first at the size of Stable Diffusion's, the others for a try
    "kl-random": PeerConfig("AutoencoderKL", {
        "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4, "sample_size": 256}),
    "kl-random-tiny": PeerConfig("AutoencoderKL", {
        "block_out_channels": (8, 16, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 4, "latent_channels": 4, "sample_size": 64}),
    "dc-random-tiny": PeerConfig("AutoencoderDC", {
        "latent_channels": 8, "attention_head_dim": 8,
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",), "encoder_block_out_channels": (8, 16, 16, 16),
        "encoder_layers_per_block": (1, 1, 1, 1), "encoder_qkv_multiscales": ((), (), (), (5,)),
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",), "decoder_block_out_channels": (8, 16, 16, 16),
        "decoder_layers_per_block": (1, 1, 1, 1), "decoder_qkv_multiscales": ((), (), (), (5,))}),
}
PEER_HELP = f"{PREFIX} and a folder that diffusers saved, a hub id, or {', '.join(RANDOM_PEERS)}"


class DiffusersPeer(ImageTokenizer):
    """An autoencoder of diffusers as an image tokenizer; with random weights until it is given others.

    Latents are scaled as diffusion models see them: (z − shift_factor) · scaling_factor.
    """

    system = "diffusers"

    def __init__(self, cfg: PeerConfig):
        """Raises CheckpointError if diffusers cannot build it."""
        super().__init__(cfg)
        self.autoencoder = _build(cfg)
        config = self.autoencoder.config
        widths = config.encoder_block_out_channels if cfg.autoencoder == "AutoencoderDC" else config.block_out_channels
        self.downsample = 2 ** (len(widths) - 1)
        channels = config.latent_channels
        self.latent_mean: Tensor
        self.latent_std: Tensor
        shift = getattr(config, "shift_factor", None) or 0.0
        self.register_buffer("latent_mean", torch.full((channels,), float(shift)), persistent=False)
        self.register_buffer("latent_std", torch.full((channels,), 1 / float(config.scaling_factor)), persistent=False)

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> ImageEncoding:
        """(B, 3, H, W) in [0, 1] to (B, C, h, w). Raises InputError to sample from AutoencoderDC, which has no posterior."""
        self.check_images(images)
        found = self.autoencoder.encode(images * 2 - 1)
        posterior = getattr(found, "latent_dist", None)
        if posterior is None:
            if sample:
                raise InputError(f"{self.cfg.autoencoder} has no posterior to draw latents from")
            raw = found.latent
        else:
            raw = posterior.sample(generator) if sample else posterior.mode()
        return ImageEncoding((raw - self.latent_mean[:, None, None]) / self.latent_std[:, None, None], posterior=posterior)

    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, h, w) to images in [0, 1]."""
        raw = latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        return (self.autoencoder.decode(raw).sample / 2 + 0.5).clamp(0, 1)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The autoencoder's own, so that its hash is that of the published file."""
        return self.autoencoder.state_dict(*args, **kwargs)


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def _build(cfg: PeerConfig) -> Any:
    try:
        return _class(cfg.autoencoder).from_config(cfg.options).eval().requires_grad_(False)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"diffusers cannot build this {cfg.autoencoder}: {' '.join(str(error).split())}") from error


def load_peer(name: str, device: torch.device | str = "cpu") -> DiffusersPeer:
    """The autoencoder of a folder that diffusers saved, of a pipeline's folder, or of a hub id; or one of RANDOM_PEERS, whose
    provenance says that its weights are random; float32, eval mode.

    Raises CheckpointError if it is no AutoencoderKL or AutoencoderDC, or if a weight is missing or left over; WeightsMissing
    if it would have to be fetched and cannot be.
    """
    if name in RANDOM_PEERS:
        return random_peer(RANDOM_PEERS[name]).to(device).eval()
    folder = Path(name).expanduser()
    source = f"folder {folder.resolve().name}"      # the files' hashes say what it is: where it lies is nobody's business
    if not folder.is_dir():
        if folder.exists() or name.count("/") != 1:
            raise CheckpointError(f"{name} is no folder and no hub id: after {PREFIX} comes one of them")
        wanted = ["config.json", INDEX, *WEIGHTS]
        folder, source = hub_snapshot(name, [*wanted, *(f"vae/{file}" for file in wanted)]), f"hub {name}"
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"      # a pipeline's autoencoder
    cfg = _read_config(folder)
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    if not files:
        raise CheckpointError(f"{name} has no {WEIGHTS[0]}")
    peer = DiffusersPeer(cfg)
    peer.autoencoder = _load(folder, cfg.autoencoder)
    peer.provenance = {
        "source": source, "class": cfg.autoencoder, "files": {file.name: sha256_of(file) for file in files},
        "config_sha256": sha256_of(folder / "config.json"),
    }
    return peer.to(device).eval()


def random_peer(cfg: PeerConfig) -> DiffusersPeer:
    """An autoencoder with seeded random weights; global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        peer = DiffusersPeer(cfg)
    peer.provenance = {"source": f"random weights (seed {SEED})", "class": cfg.autoencoder}
    return peer


def _read_config(folder: Path) -> PeerConfig:
    file = folder / "config.json"
    try:
        options = json.loads(file.read_text())
        name = options["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has no readable config.json of diffusers: {error}") from error
    if name not in CLASSES:
        raise CheckpointError(f"{folder} holds diffusers' {name}; image tokenizers that can be measured: {', '.join(CLASSES)}")
    return PeerConfig(name, options)


def _load(folder: Path, name: str) -> Any:
    try:
        network, info = _class(name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True)
    except Exception as error:      # diffusers and safetensors raise many kinds for a damaged folder
        raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise CheckpointError(f"{folder}: {what.replace('_', ' ')} in its weights, such as {info[what][0]}")
    return network.eval().requires_grad_(False)
