"""Small networks of every speech system, and real speech, for the tests of what must hold for all of them."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

import tokenizers_lab
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.draw import Draw
from tokenizers_lab.models.dm_codec.config import ModelConfig as DMCodecConfig
from tokenizers_lab.models.dm_codec.model import DMCodec
from tokenizers_lab.models.lm_spt.config import AuxiliaryConfig
from tokenizers_lab.models.lm_spt.config import ModelConfig as LMSPTConfig
from tokenizers_lab.models.lm_spt.model import LMSPT
from tokenizers_lab.models.tadicodec.config import ModelConfig as TaDiCodecConfig
from tokenizers_lab.models.tadicodec.config import VocoderConfig
from tokenizers_lab.models.tadicodec.model import TaDiCodec
from tokenizers_lab.models.xy_tokenizer import config as xy
from tokenizers_lab.models.xy_tokenizer.model import XYTokenizer
from tokenizers_lab.nn.mel import MelConfig
from tokenizers_lab.text import TextConfig

CLIPS = Path(tokenizers_lab.__file__).parent / "data" / "samples" / "speech" / "val"
DM = DMCodecConfig(filters=4, width=16, codebooks=3, codebook_size=64, kmeans_iterations=5)
LM = LMSPTConfig(
    semantic_width=2, acoustic_width=2, decoder_width=64, latent=8, semantic_size=64, semantic_dim=4, acoustic_size=32,
    acoustic_dim=4, codebooks=4, auxiliary=AuxiliaryConfig(width=32))
LM_25 = replace(
    LM, strides=[4, 5, 6, 8], decoder_strides=[8, 6, 5, 4], auxiliary=AuxiliaryConfig(width=32, strides=[8, 5, 4, 4]))
LM_6 = replace(
    LM, strides=[4, 5, 6, 8, 4], decoder_strides=[4, 8, 6, 5, 4], auxiliary=AuxiliaryConfig(width=32, strides=[8, 8, 5, 8]))
STACK, ADAPTER = {"width": 24, "layers": 2, "heads": 3, "hidden": 32}, {"width": 16, "layers": 1, "heads": 2, "hidden": 24}
XY = xy.ModelConfig(
    window_seconds=2.0, overlap_seconds=0.8, semantic=xy.StackConfig(**STACK), semantic_adapter=xy.AdapterConfig(**ADAPTER),
    acoustic=xy.StackConfig(**STACK), pre_adapter=xy.AdapterConfig(**ADAPTER), post_adapter=xy.AdapterConfig(**ADAPTER),
    decoder=xy.StackConfig(**STACK), decoder_bands=12, quantizer=xy.QuantizerConfig(3, 64, 8),
    vocoder=xy.VocoderConfig(width=24, hidden=32, layers=3))
TA = TaDiCodecConfig(
    width=16, encoder_layers=1, decoder_layers=2, heads=2, bits=8, norm_init="identity", text=TextConfig(), steps=2,
    vocoder=VocoderConfig("vocos", 16, 24, 2))
CAUSAL = replace(LM_25, causal=True, auxiliary=replace(LM_25.auxiliary, causal=True))
NETWORKS = {      # by system: (config, whether it is local)
    "lm_spt": {
        "12.5 Hz": (LM, True), "25 Hz": (LM_25, True), "6.25 Hz": (LM_6, True), "25 Hz causal": (CAUSAL, True),
        "12.5 Hz causal": (replace(LM, causal=True, auxiliary=replace(LM.auxiliary, causal=True)), True),
        "6.25 Hz causal": (replace(LM_6, causal=True, auxiliary=replace(LM_6.auxiliary, causal=True)), True),
        "FSQ, one encoder": (replace(LM_25, shared_encoder=True, fsq_levels=[5, 4], kernel=5, dilations=[1, 2]), True),
        "no subtraction, 48 kHz": (
            replace(LM_25, subtract=False, decoder_strides=[8, 6, 5, 8], output_sample_rate=48_000), True),
        "8 kHz": (replace(
            LM, sample_rate=8000, strides=[8, 8, 5], decoder_strides=[5, 8, 8], decoder_width=16, dilations=[1, 3],
            auxiliary=AuxiliaryConfig(width=16, strides=[8, 8, 5], sample_rate=8000)), True),
    },
    "dm_codec": {
        "no LSTM": (replace(DM, lstm_layers=0), True),
        "no LSTM, snake, odd strides": (
            replace(DM, lstm_layers=0, activation="snake", residual_layers=2, strides=[5, 3], residual_kernel=5), True),
        "LSTM": (DM, False),
        "LSTM, 8 kHz": (replace(DM, sample_rate=8000, filters=2, strides=[8, 5], lstm_layers=1), False),
        "LSTM of one direction": (replace(DM, bidirectional=False), False),
    },
    "tadicodec": {
        "6.25 Hz": (TA, False),
        "8 kHz, no text": (replace(
            TA, sample_rate=8000, mel=MelConfig(bands=40, n_fft=640, hop=160, high=None), downsample=4, text_condition=False),
            False),
    },
    "xy_tokenizer": {
        "12.5 Hz": (XY, False),
        "25 Hz, to 24 kHz": (replace(XY, pool=2, output_rate=24_000, quantizer=replace(XY.quantizer, width=32, out=20)), False),
    },
}
LOCAL = [(system, name) for system, named in NETWORKS.items() for name, (_, local) in named.items() if local]
CAUSAL_NAMES = [name for name in NETWORKS["lm_spt"] if "causal" in name]


@cache
def speech(seconds: float = 8.0, rate: int = 24_000) -> torch.Tensor:
    """(1, 1, samples) of held-out clips one after another."""
    clips = [read_audio(path, rate, 1)[0] for path in sorted(CLIPS.rglob("*.flac"))[: max(4, int(seconds / 2))]]
    return torch.cat(clips, -1)[None, :, : int(seconds * rate)]


@cache
def network(system: str, name: str):
    """The network in eval mode, with weights of which its codes and outputs vary."""
    cfg = NETWORKS[system][name][0]
    torch.manual_seed(0)
    if system == "dm_codec":
        tokenizer = DMCodec(cfg).train()
        with torch.no_grad():
            tokenizer.quantizer(tokenizer.encoder(speech(8.0, cfg.sample_rate)), Draw(0))      # starts the codebooks
        return tokenizer.eval()
    if system == "xy_tokenizer":
        tokenizer = XYTokenizer(cfg).train()
        with torch.no_grad():
            tokenizer(speech(8.0, cfg.sample_rate).view(4, 1, -1), draw=Draw(0))      # starts the codebooks
        return tokenizer.eval()
    if system == "tadicodec":
        tokenizer = TaDiCodec(cfg).eval()
        with torch.no_grad():
            for part in (tokenizer.encoder, tokenizer.to_code, tokenizer.from_code, tokenizer.decoder.condition_mlp):
                for parameter in part.parameters():
                    parameter.normal_(0, 0.2)
        return tokenizer
    tokenizer = LMSPT(cfg).eval()
    with torch.no_grad():
        for key, parameter in tokenizer.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.05)
            elif key.endswith("original0") and "encoder" in key:      # louder latents, so that the codes vary
                parameter.mul_(1.3)
    return tokenizer


def cut(x: torch.Tensor, *sizes: int) -> list[torch.Tensor]:
    """x in pieces of these sizes, again and again."""
    pieces, start = [], 0
    while start < x.shape[-1]:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(x[..., start : start + size])
        start += size
    return pieces
