"""UniFlow's encoders: our InternViT, or a vision transformer of timm or transformers; built from the config, then given weights.

All are called alike: encoder(pixels, every_layer=False) → the patch tokens (B, N, width) of each layer, or of the last one in a
list of one, without class and register tokens and before any final norm. They have `width`, `depth` and `patch`.
"""

import difflib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import CONFIG_FILE, load_weights, read_weights
from tokenizers_lab.nn.patch import resize_positions
from tokenizers_lab.nn.vit import InternViT
from tokenizers_lab.teachers.networks import TRANSFORMERS_KINDS, local_folder
from tokenizers_lab.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD, PREPROCESSING

from .config import EncoderConfig, ModelConfig

# keys of InternViT's checkpoints ↔ keys of our InternViT; both keep the rest of the name
INTERNVIT_KEYS = {"embeddings.": "", "encoder.layers.": "layers."}


class TimmEncoder(nn.Module):
    """A vision transformer of timm without its classifier."""

    def __init__(self, cfg: EncoderConfig, image_size: int):
        super().__init__()
        self.network: Any = create_timm(cfg.name, cfg, image_size)
        self.width, self.depth = self.network.num_features, len(self.network.blocks)
        self.patch = self.network.patch_embed.patch_size[0]

    def forward(self, pixels: Tensor, every_layer: bool = False) -> list[Tensor]:
        """See the top of this file. pixels: (B, 3, H, W), normalised."""
        options = {"indices": None if every_layer else 1, "norm": False, "output_fmt": "NLC", "intermediates_only": True}
        return self.network.forward_intermediates(pixels.to(self.network.patch_embed.proj.weight.dtype), **options)


class TransformersEncoder(nn.Module):
    """A vision transformer of transformers."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.network: Any = create_transformers(dict(cfg.config))
        config = self.network.config
        self.width, self.depth = config.hidden_size, config.num_hidden_layers
        self.patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
        resizes = "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if resizes else {}      # others adapt their positions by themselves

    def forward(self, pixels: Tensor, every_layer: bool = False) -> list[Tensor]:
        """See the top of this file. pixels: (B, 3, H, W), normalised."""
        tokens = (pixels.shape[2] // self.patch) * (pixels.shape[3] // self.patch)
        pixels = pixels.to(next(self.network.parameters()).dtype)
        states = self.network(pixel_values=pixels, output_hidden_states=True, **self.options).hidden_states
        wanted = states[-self.depth :] if every_layer else states[-1:]            # the first of all is the embeddings
        return [state[:, -tokens:] for state in wanted]                           # class and register tokens come first


def build_encoder(cfg: ModelConfig) -> Any:
    """The encoder that the config describes, with random weights. Raises ConfigError if its patch is another."""
    size = cfg.encoder
    if size.kind == "internvit":
        return InternViT(
            cfg.image_size, cfg.patch, size.width, size.depth, size.heads, size.hidden, size.norm, size.norm_eps,
            size.qkv_bias, size.qk_norm, size.layer_scale, size.drop_path,
        )
    encoder = TimmEncoder(size, cfg.image_size) if size.kind == "timm" else TransformersEncoder(size)
    if encoder.patch != cfg.patch:
        raise ConfigError(f"model.patch is {cfg.patch}, but the {size.kind} encoder has patches of {encoder.patch}")
    return encoder


def create_timm(name: str, cfg: EncoderConfig, image_size: int, pretrained: bool = False) -> Any:
    """timm's network of that name for images of any size. Raises ConfigError if it is no plain vision transformer."""
    import timm

    if not name.startswith("local-dir:") and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ConfigError(f"timm has no network '{name}'" + (f"; nearest: '{near[0]}'" if near else ""))
    options: dict[str, Any] = {"num_classes": 0, "img_size": image_size, "dynamic_img_size": True}
    try:
        network: Any = timm.create_model(name, pretrained=pretrained, drop_path_rate=cfg.drop_path, **options)
    except TypeError as error:
        raise ConfigError(f"timm's '{name}' is no vision transformer that takes images of any size: {error}") from error
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "blocks"):
        raise ConfigError(f"timm's '{name}' does not give the tokens of every layer")
    return network


def create_transformers(options: dict[str, Any]) -> Any:
    """transformers' network of a config such as {"model_type": "dinov2", "hidden_size": 384}. Raises ConfigError."""
    from transformers import AutoConfig, AutoModel

    try:
        return AutoModel.from_config(AutoConfig.for_model(**options))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.encoder.config is no network of transformers: {str(error).splitlines()[0][:160]}") from error


def colour_statistics(cfg: EncoderConfig, encoder: Any) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) of the colours that the encoder was pretrained with. Raises ConfigError if not known."""
    if cfg.kind == "timm":
        mean, std = encoder.network.pretrained_cfg["mean"], encoder.network.pretrained_cfg["std"]
    elif cfg.kind == "internvit":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif cfg.config["model_type"] in TRANSFORMERS_KINDS:
        spec = PREPROCESSING[TRANSFORMERS_KINDS[cfg.config["model_type"]]]
        mean, std = spec.mean, spec.std
    elif cfg.mean and cfg.std:
        mean, std = (), ()
    else:
        raise ConfigError(f"how {cfg.config['model_type']} was given its colours is not known: set model.encoder.mean and .std")
    return list(cfg.mean or mean), list(cfg.std or std)


# --- first weights ------------------------------------------------------------------------------------------------------

def start_encoder(cfg: ModelConfig, encoder: Any, source: str) -> str:
    """Give the encoder the weights of a folder or hub id with safetensors; returns where they are from.

    Raises WeightsMissing if they are not here and cannot be fetched, CheckpointError if they do not fit.
    """
    repo = source
    if cfg.encoder.kind == "timm" and not Path(source).expanduser().is_dir():
        import timm

        repo = source.removeprefix("hf-hub:")
        if timm.is_model(source):
            repo = getattr(timm.get_pretrained_cfg(source), "hf_hub_id", None) or source
    folder = local_folder(repo)
    if cfg.encoder.kind == "internvit":
        return f"{source}{start_internvit(cfg, encoder, folder)}"
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} has no weights in safetensors")
    start = start_timm if cfg.encoder.kind == "timm" else start_transformers
    start(cfg, encoder, folder)
    return f"{source} ({cfg.encoder.kind})"


def start_internvit(cfg: ModelConfig, encoder: InternViT, folder: Path) -> str:
    """Weights of an InternViT checkpoint; positions of another grid are resized, which is then said."""
    told, size = read_json(folder / CONFIG_FILE), cfg.encoder
    for name, value in (("num_attention_heads", size.heads), ("layer_norm_eps", size.norm_eps), ("norm_type", size.norm)):
        if told.get(name, value) != value:      # what the shapes do not show
            raise CheckpointError(f"{folder} has {name} {told[name]}, the config's encoder {value}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no weights in safetensors")
    state = {internvit_key(k, folder): v for file in files for k, v in read_weights(file).items()}
    note, name = "", "position_embedding"
    own = getattr(encoder, name).shape
    if name in state and state[name].dim() == 3 and state[name].shape[::2] == own[::2] and state[name].shape != own:
        side, given = cfg.image_size // cfg.patch, round((state[name].shape[1] - 1) ** 0.5)
        state[name] = torch.cat([state[name][:, :1], resize_positions(state[name][:, 1:], side, side)], dim=1)
        note = f" (positions resized from {given} × {given} to {side} × {side})"
    load_weights(encoder, state, str(folder))
    return note


def internvit_key(key: str, source: Any) -> str:
    """Our key of a tensor of InternViT's checkpoints. Raises CheckpointError on another one."""
    for theirs, ours in INTERNVIT_KEYS.items():
        if key.startswith(theirs):
            return re.sub(f"^{re.escape(theirs)}", ours, key)
    raise CheckpointError(f"{source} is no InternViT checkpoint: it has {key}")


def start_timm(cfg: ModelConfig, encoder: Any, folder: Path) -> None:
    """Weights of a folder with timm's config.json; timm itself resizes positions of another grid."""
    try:
        found = create_timm(f"local-dir:{folder}", cfg.encoder, cfg.image_size, pretrained=True)
    except (OSError, RuntimeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder} holds no timm network that can be loaded: {str(error).splitlines()[0][:160]}") from error
    load_weights(encoder.network, found.state_dict(), str(folder))


def start_transformers(cfg: ModelConfig, encoder: Any, folder: Path) -> None:
    """Weights of a folder that transformers saved; the config stays ours."""
    network = encoder.network
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
    try:
        found, info = type(network).from_pretrained(folder, config=network.config, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not fit the encoder: {str(error).splitlines()[0][:160]}") from error
    if info["missing_keys"]:
        raise CheckpointError(f"{folder} does not fit the encoder: it misses {sorted(info['missing_keys'])[0]}")
    load_weights(network, found.state_dict(), str(folder))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
