"""Where teachers' networks come from: transformers, timm, bundled assets, or a seeded random initialisation."""

import ast
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import CheckpointError, ConfigError, WeightsMissing

RANDOM_SEED = 0
# transformers' model_type: kind of teacher
TRANSFORMERS_KINDS = {
    "dinov3_vit": "dinov3",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}
ASSET_NETWORKS = {"efficientnet-lite0": "tf_efficientnet_lite0"}     # asset: timm's architecture


@dataclass
class FoundNetwork:
    """A loaded network, its kind of teacher, where its weights come from, and what differs from the kind's preprocessing."""

    network: Any                      # nn.Module
    kind: str
    provenance: str
    spec: dict[str, Any] = field(default_factory=dict)


def load_network(backend: str, source: str, config: dict[str, Any]) -> FoundNetwork:
    """The network of a teacher config. Raises WeightsMissing, ConfigError, CheckpointError."""
    if backend == "transformers":
        return from_transformers(source)
    if backend == "timm":
        return from_timm(source)
    if backend == "asset":
        return from_asset(source)
    if backend == "random":
        return from_random(config)
    raise ConfigError(f"there is no teacher backend '{backend}'; known: transformers, timm, asset, random")


def from_transformers(source: str) -> FoundNetwork:
    """A vision transformer by hub id or local folder; code from the hub is never run."""
    from transformers import AutoConfig, AutoModel, SiglipVisionModel

    folder = local_folder(source)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = transformers_kind(config.model_type)
        loader: Any = SiglipVisionModel if kind == "siglip" else AutoModel
        if config.model_type == "siglip":          # the image half of an image-text model
            config = config.vision_config
        options = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        network, info = loader.from_pretrained(folder, config=config, **options)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error
    if info["missing_keys"]:
        lacking = sorted(info["missing_keys"])[0]
        raise CheckpointError(f"the weights of teacher '{source}' lack {lacking}: not a whole {config.model_type}")
    return FoundNetwork(network, kind, f"{source} (transformers)")


def local_folder(source: str) -> Path:
    """The folder `source`, or the hub cache's folder of that hub id, fetched unless TOKENIZERS_LAB_OFFLINE forbids it.

    Only configs and safetensors files are fetched. Raises WeightsMissing.
    """
    from huggingface_hub import snapshot_download

    from tokenizers_lab.asset_fetch import offline

    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"], local_files_only=offline()))
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error


def from_random(config: dict[str, Any]) -> FoundNetwork:
    """A network of that transformers config, such as {"model_type": "dinov3_vit", "hidden_size": "24"}, seeded."""
    from transformers import AutoConfig, AutoModel

    options = {name: _literal(value) for name, value in config.items()}
    model_type = options.pop("model_type", None)
    kind = transformers_kind(model_type)
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        network = AutoModel.from_config(AutoConfig.for_model(model_type, **options))
    return FoundNetwork(network, kind, f"random weights (seed {RANDOM_SEED})")


def transformers_kind(model_type: str | None) -> str:
    """Kind of teacher of a transformers model_type. Raises ConfigError on one that is not known here."""
    if model_type not in TRANSFORMERS_KINDS:
        known = ", ".join(TRANSFORMERS_KINDS)
        raise ConfigError(f"a teacher cannot be of transformers' model_type '{model_type}'; known: {known}")
    return TRANSFORMERS_KINDS[model_type]


def from_timm(source: str) -> FoundNetwork:
    """A network by timm's name, hf-hub:ORG/NAME, or a local folder with timm's config.json and model.safetensors."""
    import timm

    repo = source.removeprefix("hf-hub:")
    if repo == source and not Path(source).expanduser().is_dir():
        if not timm.is_model(source):
            near = difflib.get_close_matches(source, timm.list_models(), n=1)
            hint = f"; nearest: '{near[0]}'" if near else ""
            raise ConfigError(f"timm has no network '{source}', and there is no such folder{hint}")
        repo = getattr(timm.get_pretrained_cfg(source), "hf_hub_id", None) or source
    folder = local_folder(repo)
    name = f"local-dir:{folder}"
    try:
        try:
            network = timm.create_model(name, pretrained=True, dynamic_img_size=True)     # any size, for vision transformers
        except TypeError:
            network = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no timm network that can be loaded: {_first_line(error)}") from error
    return timm_network(network, f"{source} (timm)")


def from_asset(name: str) -> FoundNetwork:
    """A network of `toklab assets`: a classifier by its file, or a vision transformer by its hub folder."""
    import timm

    from tokenizers_lab.assets import find, find_state_dict, get_asset

    if get_asset(name).hub:
        folder = find(name)
        found = from_transformers(str(folder.path))
        found.provenance = folder.source
        return found
    if name not in ASSET_NETWORKS:
        raise ConfigError(f"the asset '{name}' is no vision teacher; use {' or '.join(ASSET_NETWORKS)} or one from the hub")
    state, source = find_state_dict(name)
    network = timm.create_model(ASSET_NETWORKS[name], pretrained=False)
    load_in_order(network, state, name)
    return timm_network(network, source)


def timm_network(network: Any, provenance: str) -> FoundNetwork:
    """What a timm network's own config says of its kind and its image processing."""
    config = network.pretrained_cfg
    if not hasattr(network, "patch_embed"):
        kind = "cnn"
    else:
        architecture = config.get("architecture") or ""
        kind = next((k for k in ("dinov3", "dinov2") if k in architecture), "siglip")
    spec = {"mean": tuple(config["mean"]), "std": tuple(config["std"])}
    if kind in ("siglip", "cnn"):                   # DINO's published way does not follow timm's setting
        spec["interpolation"] = config["interpolation"]
    return FoundNetwork(network, kind, provenance, spec)


def load_in_order(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load tensors under other names but in the network's own order, as in EfficientNet-Lite0's file.

    Raises CheckpointError if their number or a shape differs.
    """
    own = network.state_dict()
    if [t.shape for t in own.values()] != [t.shape for t in state.values()]:
        raise CheckpointError(f"the weights of {source} do not fit: {len(state)} tensors, {len(own)} expected, of equal shapes")
    network.load_state_dict(dict(zip(own, state.values())), strict=True)


def missing_teacher(source: str, error: Exception) -> WeightsMissing:
    """One line for a teacher that is neither here nor reachable."""
    if source.startswith(("/", "~", ".")):
        return WeightsMissing(f"the folder {source} holds no whole network: set the teacher's `source` ({_first_line(error)})")
    licence = " (accept its licence on the hub first)" if "dinov3" in source else ""
    return WeightsMissing(
        f"teacher '{source}' is not here and could not be fetched: run `hf download {source} --local-dir FOLDER` where there "
        f"is a network{licence} and set the teacher's `source` to that folder ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _literal(value: Any) -> Any:
    """The number, truth value or list that a config's text stands for; other text as it is."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value
