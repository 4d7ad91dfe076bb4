"""Computes every tensor of an XY-Tokenizer parity folder, by the functions that train and infer."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.nn.mel import WHISPER_HOP, whisper_filters, whisper_log_mel
from tokenizers_lab.nn.whisper import STRIDE
from tokenizers_lab.parity import RowDraw
from tokenizers_lab.quantizers.masked import MaskedResidualVQ
from tokenizers_lab.quantizers.result import QuantizerResult

from .config import QuantizerConfig, window_codes
from .convert import QUANTIZER, from_official, official_config, official_name
from .model import XYTokenizer, build_quantizer

CODES_OF = 10.0               # seconds of overlap of the long codes that are decoded
EDGE, HEAD_FRAMES = 640, 16   # samples, frames that the folder keeps of longer tensors
TRAINED = ("semantic_encoder_adapter", "acoustic_encoder", "pre_rvq_adapter", "downsample", "quantizer", "post_rvq_adapter",
           "upsample", "acoustic_decoder", "vocoder")


class Probe:
    """Keeps what modules are given and what they return, by name, while it is entered."""

    def __init__(self, root: nn.Module, names: list[str]):
        self.root, self.names = root, names
        self.given: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}
        self.hooks = ExitStack()

    def __enter__(self) -> "Probe":
        for name in self.names:
            self.hooks.callback(self.root.get_submodule(name).register_forward_hook(self.keep(name)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.close()

    def keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """A hook for the module of that name."""
        def hook(module: nn.Module, given: Any, made: Any) -> None:
            self.given[name], self.made[name] = given[0], made

        return hook


def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs."""
    config = json.loads((folder / "config.json").read_text())
    codec = build(folder, config)
    audio, lengths = given["wav"][:, None], given["wav_lengths"]
    result, latents, frames = encoder_tensors(codec, audio, lengths)
    found, codes = quantizer_tensors(codec, latents, frames)
    result |= found | decoder_tensors(codec, codes, frames)
    result |= probe_tensors(codec, audio, lengths)
    encoded = codec.encode(audio, lengths, CODES_OF, "ahead", pad=False)
    result |= {f"encode.codes.{i}": item for i, item in enumerate(items_of(encoded.codes, encoded.lengths))}
    result |= long_tensors(codec, [given[f"long.wav.{i}"] for i in range(2)], [float(o) for o in config["overlaps"]])
    result["istft_head.wav"] = codec.vocoder.head(given["istft_head.in"].transpose(1, 2))[:, 0]
    result |= training_tensors(codec, config, given)
    return {name: value.detach() for name, value in result.items()}


def build(folder: Path, config: dict[str, Any]) -> XYTokenizer:
    """The codec with the folder's weights, in eval mode; its semantic encoder does not train."""
    converted = from_official(read_weights(folder / "weights.safetensors"), config)
    codec = XYTokenizer(converted.model)
    load_weights(codec, converted.tokenizer, "weights.safetensors")
    codec.semantic_encoder.requires_grad_(False)
    return codec.eval()


def items_of(codes: Tensor | None, lengths: Tensor | None) -> list[Tensor]:
    """The codes (K, T) of each item of a padded batch (B, K, T)."""
    assert codes is not None and lengths is not None
    return [item[:, :frames] for item, frames in zip(codes, lengths.tolist())]


# --- inference --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encoder_tensors(codec: XYTokenizer, audio: Tensor, lengths: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(tensors up to the quantizer, its input (B, channels, T), frames of each item)."""
    depth = codec.cfg.semantic.layers
    names = ["semantic_encoder", "semantic_encoder.layer_norm", "semantic_encoder.layers.0.self_attn", "semantic_encoder_adapter",
             "semantic_encoder_adapter.layers.0", "acoustic_encoder", "acoustic_encoder.layers.0", "pre_rvq_adapter",
             "pre_rvq_adapter.layers.0", "downsample", "downsample.gate_proj"]
    with Probe(codec, names + [f"semantic_encoder.layers.{i}" for i in range(depth)]) as probe:
        latents, frames = codec.latents(audio, lengths, pad=False)
    assert frames is not None
    whole = window_codes(codec.cfg) * codec.hop
    heard = torch.arange(audio.shape[2]) < lengths[:, None]
    mel = whisper_log_mel(audio[:, 0] * heard, codec.cfg.bands, whole)
    mel_frames = codec.log_mel(audio, lengths, pad=False)[1]
    tokens = mel_frames // STRIDE

    def rows(x: Tensor) -> Tensor:      # (B, T, D), only valid tokens
        x = x[:, : int(tokens.max())]
        return x * (torch.arange(x.shape[1]) < tokens[:, None])[..., None]

    def coded(x: Tensor) -> Tensor:     # (B, D, T), only valid frames
        return (x * (torch.arange(x.shape[2]) < frames[:, None])[:, None])[..., : int(frames.max())]

    result = {
        "fe.input_features_head": mel[..., : int(mel_frames.max()) + 8], "fe.floor": mel[:, 0, -1], "fe.lengths": mel_frames,
        "fe.total_frames": torch.tensor(whole // WHISPER_HOP), "fe.mel_filters": whisper_filters(codec.cfg.bands).T,
        "semantic_encoder.out_lengths": tokens, "downsample.out_lengths": frames,
        f"semantic_encoder.hidden.{depth}": rows(probe.made["semantic_encoder.layer_norm"]),
        "semantic_encoder.layer0.self_attn.out": rows(probe.made["semantic_encoder.layers.0.self_attn"]),
        "acoustic_encoder.layer0.out": rows(probe.made["acoustic_encoder.layers.0"]),
        "downsample.gate": coded(probe.made["downsample.gate_proj"]), "downsample.out": coded(latents),
    }
    result |= {f"semantic_encoder.hidden.{i}": rows(probe.given[f"semantic_encoder.layers.{i}"]) for i in range(depth)}
    for name in ("semantic_encoder", "semantic_encoder_adapter", "acoustic_encoder", "pre_rvq_adapter"):
        result[f"{name}.out"] = rows(probe.made[name]).transpose(1, 2)
    for name in ("semantic_encoder_adapter", "pre_rvq_adapter"):
        result[f"{name}.hidden.0"] = rows(probe.given[f"{name}.layers.0"])
    return result, latents, frames


def as_released(codec: XYTokenizer, latents: Tensor, frames: Tensor, last: int | None = None) -> QuantizerResult:
    """The quantizer's result in eval mode, of a batch that is padded to a whole window, whose padding counts."""
    padded = F.pad(latents, (0, window_codes(codec.cfg) - latents.shape[2]))
    return codec.quantizer(padded, last=last, lengths=frames, padding_counts=True)


@torch.no_grad()
def quantizer_tensors(codec: XYTokenizer, latents: Tensor, frames: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors of the quantizer in eval mode, codes (B, K, T) with 0 behind each item)."""
    mask = torch.arange(int(frames.max())) < frames[:, None]      # (B, T)
    count = mask.shape[1]
    whole, two = as_released(codec, latents, frames), as_released(codec, latents, frames, last=2)
    codes = whole.codes[..., :count] * mask[:, None]
    return {
        "quantizer.input_proj": codec.quantizer.input_proj(latents)[..., :count] * mask[:, None],
        "quantizer.codes": codes.transpose(0, 1), "quantizer.commit_loss": whole.layer_losses["commitment"],
        "quantizer.zq": whole.quantized[..., :count] * mask[:, None],
        "quantizer.quantized_each": torch.stack(whole.layers)[..., :count] * mask[:, None],
        "quantizer.n2.zq": two.quantized[..., :count] * mask[:, None],
        "quantizer.n2.commit_loss": two.layer_losses["commitment"],
    }, codes


@torch.no_grad()
def decoder_tensors(codec: XYTokenizer, codes: Tensor, frames: Tensor) -> dict[str, Tensor]:
    """Tensors from codes (B, K, T) to audio; the authors' vocoder takes padding for sound."""
    names = ["post_rvq_adapter", "upsample", "acoustic_decoder", "acoustic_decoder.layer_norm", "acoustic_decoder.deconv1",
             "vocoder.backbone", "vocoder.backbone.blocks.0", "vocoder.head.out"]
    with Probe(codec, names) as probe:
        made = codec.synthesise(codes, frames, padding_counts=True)
    shorter = int(frames.argmin())
    mask = torch.arange(codes.shape[2] * codec.cfg.pool) < codec.cfg.pool * frames[:, None]
    return {
        "decode.codes": codes.transpose(0, 1), "decode.code_lengths": frames, "decode.emb": codec.quantizer.decode(codes),
        "post_rvq_adapter.out": probe.made["post_rvq_adapter"].transpose(1, 2),
        "upsample.out": probe.made["upsample"].transpose(1, 2),
        "acoustic_decoder.layer_norm.out": probe.made["acoustic_decoder.layer_norm"] * mask[..., None],
        "acoustic_decoder.deconv1.out": probe.made["acoustic_decoder.deconv1"],
        "acoustic_decoder.out": probe.made["acoustic_decoder"],
        "acoustic_decoder.out_lengths": frames * codec.cfg.pool * STRIDE,
        "vocos.backbone.convnext.0.out": probe.made["vocoder.backbone.blocks.0"],
        "vocos.backbone.out": probe.made["vocoder.backbone"].transpose(1, 2),
        "vocos.head.linear": probe.made["vocoder.head.out"][:, :HEAD_FRAMES],
        "decode.wav": made, "decode.out_lengths": frames * codec.frame_samples(),
        "decode.n2.wav": codec.synthesise(codes[:, :2], frames, padding_counts=True),
        "decode.single.wav": codec.synthesise(codes[shorter : shorter + 1, :, : int(frames[shorter])]),
    }


@torch.no_grad()
def long_tensors(codec: XYTokenizer, waves: list[Tensor], overlaps: list[float]) -> dict[str, Tensor]:
    """Codes of two long clips in the authors' windows, and parts of what is decoded."""
    lengths = torch.tensor([len(wave) for wave in waves])
    audio = nn.utils.rnn.pad_sequence([wave.float() / 32768 for wave in waves], batch_first=True)[:, None]
    coded = {overlap: codec.encode(audio, lengths, overlap, "ahead", pad=False) for overlap in {*overlaps, CODES_OF}}
    result: dict[str, Tensor] = {}
    for overlap in overlaps:
        items = items_of(coded[overlap].codes, coded[overlap].lengths)
        result |= {f"long.codes_overlap{overlap:g}.{i}": item for i, item in enumerate(items)}
        codes, frames = coded[CODES_OF].codes, coded[CODES_OF].lengths
        assert codes is not None and frames is not None
        made = codec.synthesise(codes, frames, overlap, "ahead", padding_counts=True)
        block, seam = codec.frame_samples(), codec.plan(overlap, "ahead").step * codec.frame_samples()
        for i, count in enumerate(frames.tolist()):
            wave, name = made[i, 0, : count * block], f"long.decode_overlap{overlap:g}"
            result |= {
                f"{name}.num_samples.{i}": torch.tensor(len(wave)),
                f"{name}.head.{i}": wave[:EDGE], f"{name}.tail.{i}": wave[-EDGE:],
                f"{name}.seam.{i}": wave[seam - EDGE : seam + EDGE],
                f"{name}.block_rms.{i}": wave.unflatten(0, (-1, block)).square().mean(1).sqrt(),
            }
    return result


# --- training ---------------------------------------------------------------------------------------------------------------

def probe_tensors(codec: XYTokenizer, audio: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """The folder's own loss and its gradients: L1 of the waveform plus the commitments, the quantizer in eval mode."""
    latents, frames = codec.latents(audio, lengths, pad=False)
    assert frames is not None
    quantized, count = as_released(codec, latents, frames), int(frames.max())
    features = codec.features(quantized.quantized[..., :count], frames)
    made = codec.voice(features, frames, padding_counts=True)
    target = F.pad(audio, (0, made.shape[2] - audio.shape[2]))
    distance, commitment = (made - target).abs().mean(), quantized.losses["commitment"]
    codec.zero_grad()
    (distance + commitment).backward()
    result = {"probe.loss_l1": distance, "probe.loss_commit": commitment, "probe.loss_total": distance + commitment}
    for part in TRAINED:
        norms = [p.grad.norm() for p in codec.get_submodule(part).parameters() if p.grad is not None]
        result["grad_norm." + official_name(part + ".").rstrip(".")] = torch.stack(norms).norm()
    result |= {f"grad.{official_name(name)}": p.grad for name, p in codec.named_parameters() if p.grad is not None}
    return result


def training_tensors(codec: XYTokenizer, config: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Steps of the quantizer alone, with the authors' faults."""
    own = replace(official_config(config).quantizer, released_start=True, released_replacement=True)
    fresh = replace(own, **{QUANTIZER[theirs]: value for theirs, value in config["vq_init_overrides"].items()})
    result = quantizer_step(codec, own, given, "vq_train", "vq_train")
    result |= quantizer_step(codec, replace(own, dead_threshold=0.0), given, "vq_train", "vq_train_nodead")
    result |= quantizer_step(codec, fresh, given, "vq_init", "vq_init")
    # averages that stand still are those of the k-means start
    still = quantizer_step(codec, replace(fresh, decay=1.0, dead_threshold=0.0), given, "vq_init", "still")
    result |= {"vq_init.kmeans.codebook": still["still.after.embed_avg"],
               "vq_init.kmeans.cluster_size": still["still.after.cluster_size"]}
    x, lengths = given["vq_train.in"].clone().requires_grad_(), given["vq_train.lengths"]
    found = codec.quantizer(x, lengths=lengths, padding_counts=True)
    losses = found.layer_losses["commitment"]
    grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    return result | {
        "vq_grad.commit_loss": losses, "vq_grad.commit_grad_norms": torch.stack([grad.norm() for grad in grads]),
        "vq_grad.ste_grad": torch.autograd.grad(found.quantized.square().sum(), x)[0],
    }


def quantizer_step(
    codec: XYTokenizer, cfg: QuantizerConfig, given: dict[str, Tensor], source: str, name: str
) -> dict[str, Tensor]:
    """One training forward of a quantizer with the codec's projections and, in the same sizes, its codebooks."""
    quantizer = build_quantizer(cfg, codec.quantizer_channels)
    state = codec.quantizer.state_dict()
    if cfg.codebook_size != codec.cfg.quantizer.codebook_size:
        state |= {key: value for key, value in quantizer.state_dict().items() if key.startswith("codebooks.")}
    load_weights(quantizer, state, "the codec's quantizer")
    purposes = {f"{ours}.{i}": rows for ours, theirs in (("kmeans", "kmeans"), ("replace", "dead"))
                for i, rows in enumerate(given.get(f"{source}.rand_{theirs}", ()))}
    draw = RowDraw(purposes | {"dropout": given[f"{source}.rand_dropout"]}, {key: (key,) for key in (*purposes, "dropout")})
    with torch.no_grad():
        made = quantizer.train()(given[f"{source}.in"], draw, lengths=given[f"{source}.lengths"], padding_counts=True)
    return {
        f"{name}.out": made.quantized, f"{name}.codes": made.codes.transpose(0, 1),
        f"{name}.commit_loss": made.layer_losses["commitment"],
        f"{name}.after.codebook": stacked(quantizer, "embed"), f"{name}.after.embed_avg": stacked(quantizer, "embed_sum"),
        f"{name}.after.cluster_size": stacked(quantizer, "cluster_size"),
    }


def stacked(quantizer: MaskedResidualVQ, buffer: str) -> Tensor:
    """That buffer of all codebooks, (K, ...)."""
    return torch.stack([getattr(quantizer.book(i), buffer) for i in range(len(quantizer.codebooks))])
