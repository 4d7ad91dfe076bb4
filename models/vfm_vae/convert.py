"""Maps the authors' released VFM-VAE weights onto ours and back. Sizes come from their arguments, never from the weights."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import check_fit

from .config import ModelConfig, QuantizerConfig, VFMConfig
from .model import VFMVAE
from .vfm import FoundationModel

RELEASE = "the official VFM-VAE checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "tiancibi/VFM-VAE",
    "revision": "main",
    "files": ["vfm_vae_f16d32_siglip2_44m_after_stage_3_patchgan_fine_tuning_legacy.pth"],
    "licence": "research and education only; in part NVIDIA's non-commercial licence",
    "source": "https://huggingface.co/tiancibi/VFM-VAE",
}
# the release's arguments, as far as the network depends on them
RELEASED: dict[str, Any] = {
    "conditional": False, "compression_mode": "continuous", "how_to_compress": "attnproj", "how_to_decompress": "attnproj",
    "attnproj_quant_layers": 1, "attnproj_post_quant_layers": 1, "z_pooled_resolution": 1, "how_to_process_concat_z": "unshuffle",
    "activation_for_concat_z": "lrelu", "use_self_attn": True, "use_cross_attn": False, "use_convnext": True,
    "use_gaussian_blur": True, "add_additional_convnext": True, "use_multiscale_output": True, "img_channels": 3, "legacy": True,
    "vfm_name": "google/siglip2-large-patch16-512", "scale_factor": 2.0, "patch_from_layers": [0, 12, -1],
    "patch_in_dimensions": [1024, 1024, 1024], "patch_out_dimensions": [64, 64, 64], "decompress_factor": 16,
    "resolution_compression_factor": 16, "z_dimension": 32, "z_dim_for_mapping_mlp_output": 512,
    "concat_z_block_indices": [0, 1, 2, 3], "concat_z_mapped_dims": [512, 256, 128, 128], "attn_block_indices": [0, 1, 2],
    "attn_depths": [2, 2, 2], "img_resolution": 256, "num_blocks": 6,
    "synthesis_kwargs": {"channel_base": 32768, "channel_max": 512, "num_res_blocks": 2},
}
# what only this value is supported of
FIXED = {"conditional": False, "use_cross_attn": False, "use_convnext": True, "use_multiscale_output": True, "img_channels": 3,
         "how_to_process_concat_z": "unshuffle"}
PROJECTIONS = {"attnproj": "attention", "conv": "conv"}
# SigLIP2 of fixed resolution by the size in its name: width, feed-forward, layers, heads
SIGLIP_SIZES = {"base": (768, 3072, 12, 12), "large": (1024, 4096, 24, 16), "so400m": (1152, 4304, 27, 16),
                "giant-opt": (1536, 6144, 40, 16)}
VFM_PREFIX, HEAD = "vfm_encoder.", "ldm_adapter.linear_proj.weight"
VFM_NETWORK = "vfm_encoder.encoder.vision_model."
OURS_ONLY = ("latent_mean", "latent_std")              # statistics: the authors keep them outside the weights
# ours → official, applied in order to whole dotted keys; the branches' positions depend on their kind
RENAMES = [
    (r"^vfm\.network\.", VFM_NETWORK),
    (r"^encoder\.layers\.(\d+)\.", r"ldm_adapter.patch_quants.\1.0."),
    (r"^encoder\.fuse\.", "ldm_adapter.final_quant."),
    (r"^decoder\.decompress\.project\.", "ldm_adapter.post_quant."),
    (r"^decoder\.mapping\.average$", "mapping.x_avg"),
    (r"^decoder\.mapping\.", "mapping.mlp."),
    (r"^decoder\.synthesis\.", "synthesis."),
    (r"\.upsample_sum\.", ".last_upsample_conv."),
    (r"\.upsample\.", ".seperate_upsample_conv."),
    (r"\.to_image\.conv\.", ".torgb."),
    (r"\.to_image\.", ".torgb."),
    (r"(blocks\.\d+)\.layers\.0\.", r"\1.conv0."),
    (r"(blocks\.\d+)\.attention\.", r"\1.self_attns."),
    (r"\.affine\.proj\.", ".affine_pw1.proj."),
    (r"\.torgb\.affine_pw1\.", ".torgb.affine."),
]
BRANCH = {"depthwise": (0, 0), "pointwise": (0, 1), "norm": (0, 2), "out": (1, 0), "out_norm": (1, 1)}


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]                # for VFMVAE(model), latent statistics 0 and 1
    heads: dict[str, Tensor]                    # for VFMVAEObjective.heads: vf, where the checkpoint has it


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None, fetch: bool = True) -> Converted:
    """Our tokenizer and alignment head from an official checkpoint, or from the state dict inside it.

    config: the authors' arguments (`constructor_args`, and `vfm` where the foundation model is no released one); none: the
    release's. A checkpoint without the foundation model is completed with its published weights, or with `fetch` false returned
    without them. Raises CheckpointError on a key that is missing, left over or of another shape, ConfigError on options that we
    do not have, WeightsMissing if the foundation model is nowhere.
    """
    state = official_state(checkpoint)
    told = RELEASED if config is None else dict(config.get("constructor_args", config))
    model = model_config(told, (config or {}).get("vfm"))
    with torch.device("meta"):
        ours = VFMVAE(model).state_dict()
    heads = {"vf.weight": state.pop(HEAD)} if HEAD in state else {}
    if told.get("use_vf_loss") and not heads:
        raise CheckpointError(f"{RELEASE} misses {HEAD}, which its arguments promise (use_vf_loss)")
    given = {k for k in state if k.startswith(VFM_PREFIX)}
    wanted = {k: v for k, v in ours.items() if k not in OURS_ONLY and (given or not k.startswith("vfm."))}
    check_fit(official_shapes(wanted, model), state, RELEASE)
    found = {}
    for key, own in wanted.items():
        parts = [state[name] for name in official_names(key, model)]
        found[key] = (torch.stack(parts) if key == "quantizer.weight" else parts[0]).reshape(own.shape)
    if not given and fetch:
        vfm = FoundationModel(model.vfm)
        vfm.start(told["vfm_name"])
        found |= {f"vfm.{k}": v for k, v in vfm.state_dict().items()}
    statistics = {"latent_mean": torch.zeros(model.latent_channels), "latent_std": torch.ones(model.latent_channels)}
    return Converted(model, found | statistics, heads)


def to_official(
    tokenizer: Mapping[str, Tensor], model: ModelConfig, heads: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`. Latent statistics are dropped."""
    result: dict[str, Tensor] = {}
    kept = {k: v for k, v in tokenizer.items() if k not in OURS_ONLY}
    shapes = official_shapes(kept, model)
    for key, value in kept.items():
        names = official_names(key, model)
        if key == "quantizer.weight":
            result |= dict(zip(names, value.unbind(0)))
        else:
            result[names[0]] = value.reshape(shapes[names[0]])
    result |= {name: torch.zeros(shape) for name, shape in shapes.items() if name not in result}      # usage counters
    return result | ({HEAD: heads["vf.weight"]} if heads and "vf.weight" in heads else {})


def official_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint: its moving average if it has one. transformers 4 nests `vision_model` once more."""
    state = checkpoint["G_ema"] if isinstance(checkpoint.get("G_ema"), Mapping) else checkpoint
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError("this is no VFM-VAE checkpoint: it has no 'G_ema', and is no state dict")
    nested = VFM_NETWORK + "vision_model."
    return {VFM_NETWORK + k.removeprefix(nested) if k.startswith(nested) else k: v for k, v in state.items()}


def official_names(key: str, model: ModelConfig) -> list[str]:
    """The official keys of one of ours: one, but of the codebooks, which are one each there."""
    if key == "quantizer.weight":
        return [f"ldm_adapter.quantizer.codebooks.{k}.codebook.weight" for k in range(model.quantizer.codebooks)]
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    key = re.sub(r"(blocks\.\d+)\.layers\.(\d+)\.", lambda m: f"{m[1]}.convs1.{int(m[2]) - 1}.", key)
    return [re.sub(r"^synthesis\.branches\.(\d+)\.(\w+)\.", lambda m: branch_name(int(m[1]), m[2], model), key)]


def branch_name(block: int, part: str, model: ModelConfig) -> str:
    """Official prefix of a part of a block's latent branch: positions count the (un)shuffle, which has no tensors."""
    entering = model.image_size // 2 ** (model.blocks - 1) * 2**block // 2
    grid = model.image_size // model.downsample
    layer, place = BRANCH[part]
    before = (grid > entering) + (layer == 1 and grid < entering)
    return f"synthesis.z_convs.{block}.{layer + before}.{place}."


def official_shapes(ours: Mapping[str, Tensor], model: ModelConfig) -> dict[str, torch.Size]:
    """Shapes of all official tensors that ours stand for. Projections by 1 × 1 convolutions are linear maps here."""
    shapes: dict[str, torch.Size] = {}
    convolutions = {"encoder": model.compress == "conv", "decoder": model.decompress == "conv"}
    for key, value in ours.items():
        names = official_names(key, model)
        shape = value.shape[1:] if key == "quantizer.weight" else value.shape
        if re.fullmatch(r"encoder\.(layers\.\d+|fuse)\.weight|decoder\.decompress\.project\.weight", key):
            shape = torch.Size((*shape, 1, 1)) if convolutions[key.split(".")[0]] else shape
        shapes |= dict.fromkeys(names, shape)
        if key == "quantizer.weight":
            shapes |= {name.replace("codebook.weight", "vocab_usage"): shape[:1] for name in names}
    return shapes


def model_config(arguments: Mapping[str, Any], vfm: Mapping[str, Any] | None = None) -> ModelConfig:
    """Our model config from the authors' arguments. Raises ConfigError on a missing one, or on a network that we do not have."""
    for name, value in FIXED.items():
        if arguments.get(name, value) != value:
            raise ConfigError(f"a VFM-VAE with {name} {arguments[name]} is not supported: only {value} was released")
    try:
        discrete = arguments["compression_mode"] == "discrete"
        synthesis = arguments["synthesis_kwargs"]
        attention = list(arguments["attn_block_indices"]) if arguments["use_self_attn"] else []
        own = vfm_config(arguments, vfm)
        model = ModelConfig(
            image_size=arguments["img_resolution"],
            downsample=arguments["resolution_compression_factor"],
            latent="vq" if discrete else "gaussian",
            latent_channels=arguments.get("vocab_width", 64) if discrete else arguments["z_dimension"],
            vfm=own,
            widths=list(arguments["patch_out_dimensions"]),
            compress=PROJECTIONS[arguments["how_to_compress"]],
            compress_layers=arguments["attnproj_quant_layers"],
            decompress=PROJECTIONS[arguments["how_to_decompress"]],
            decompress_layers=arguments["attnproj_post_quant_layers"],
            expansion=arguments["decompress_factor"],
            pooled=arguments["z_pooled_resolution"],
            code=arguments["z_dim_for_mapping_mlp_output"],
            blocks=arguments["num_blocks"],
            channel_base=synthesis["channel_base"],
            channel_max=synthesis["channel_max"],
            res_blocks=synthesis["num_res_blocks"],
            deep=arguments["add_additional_convnext"],
            blur=arguments["use_gaussian_blur"],
            legacy_noise=arguments.get("legacy", False),
            latent_blocks=list(arguments["concat_z_block_indices"]),
            latent_widths=list(arguments["concat_z_mapped_dims"]),
            latent_activation=arguments["activation_for_concat_z"],
            attention_blocks=attention,
            attention_depths=list(arguments["attn_depths"])[: len(attention)],
        )
        if discrete:
            model.quantizer = QuantizerConfig(arguments.get("num_codebooks", 8), arguments["vocab_size"])
    except KeyError as error:
        raise ConfigError(f"the arguments of this VFM-VAE lack or have an unknown {error.args[0]}") from error
    with torch.device("meta"):
        widths = FoundationModel(own).widths
    if "patch_in_dimensions" in arguments and list(arguments["patch_in_dimensions"]) != widths:
        raise ConfigError(f"patch_in_dimensions are {arguments['patch_in_dimensions']}, but the foundation model has {widths}")
    return model


def vfm_config(arguments: Mapping[str, Any], vfm: Mapping[str, Any] | None) -> VFMConfig:
    """The foundation model of the authors' arguments: as `vfm` describes it, or a released SigLIP2 by its name."""
    scale, layers = float(arguments["scale_factor"]), list(arguments["patch_from_layers"])
    name = str(arguments["vfm_name"]).lower()
    if vfm is not None:
        import transformers

        network: Any = getattr(transformers, str(vfm["kind"]).split()[-1], None)
        if network is None:
            raise ConfigError(f"transformers has no network '{vfm['kind']}'")
        config = {k: v for k, v in vfm.items() if k != "kind"} | {"model_type": network.config_class.model_type}
        return VFMConfig(config=config, scale=scale, layers=layers)
    found = re.search(rf"siglip2-({'|'.join(SIGLIP_SIZES)})-patch(\d+)-(\d+)", name)
    if found is None:
        raise ConfigError(f"the foundation model '{name}' is not known: describe it under 'vfm' in the config")
    width, hidden, depth, heads = SIGLIP_SIZES[found[1]]
    config = {"model_type": "siglip_vision_model", "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": depth,
              "num_attention_heads": heads, "image_size": int(found[3]), "patch_size": int(found[2])}
    return VFMConfig(config=config, scale=scale, layers=layers)


# --- discriminators: parity needs them; no release has them ---------------------------------------------------------------

def official_patchgan_name(key: str, layers: int) -> str:
    """The official key of one of `MultiScalePatchGAN`'s; layers: of stride 2."""
    key = re.sub(r"^members\.(\d+)\.first\.", r"scale\1_layer0.0.", key)
    key = re.sub(r"^members\.(\d+)\.last\.", rf"scale\1_layer{layers + 1}.0.", key)
    return re.sub(r"^members\.(\d+)\.middle\.(\d+)\.", lambda m: f"scale{m[1]}_layer{int(m[2]) + 1}.", key)


def official_head_name(key: str) -> str:
    """The official key of one of `DiscriminatorHead`'s."""
    for pattern, replacement in [
        (r"^point\.conv\.", "main.0.0."), (r"^point\.norm\.", "main.0.1."), (r"^wide\.conv\.", "main.1.fn.0."),
        (r"^wide\.norm\.", "main.1.fn.1."), (r"^out\.", "cls."), (r"parametrizations\.weight\.original$", "weight_orig"),
        (r"parametrizations\.weight\.0\.([uv])$", r"weight_\1"),
    ]:
        key = re.sub(pattern, replacement, key)
    return key
