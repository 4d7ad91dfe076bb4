"""Losses of TaDiCodec (arXiv 2508.16790, sec. 3): the flow from noise to mel frames, and the quantizer's entropies.

The vocoder's, which is trained apart, are in `vocoder.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.diffusion.flow import TimeConfig, draw_times, flow_loss, frame_mask
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.nn.mel import vocoder_mel
from tokenizers_lab.quantizers.result import QuantizerResult
from tokenizers_lab.training.objective import Judge, Losses, Objective

from .config import ModelConfig, ObjectiveConfig, check_objective
from .model import TaDiCodec
from .vocoder_config import VOCODER_TERMS

SMALLEST_TIME = 1e-5
PROMPT_FRAMES, PROMPT_SHARE = 5, 0.4      # a prompt has at least min(T // 4, 5) frames, and less than 0.4 · T


@dataclass
class Coded:
    """A batch on its way to the decoder."""

    mel: Tensor                   # (B, T, bands), normalised
    lengths: Tensor               # (B,) frames of each item
    mask: Tensor                  # (B, T) bool, true where a frame is sound
    quantized: QuantizerResult    # of vectors (B, bits, T // downsample)
    condition: Tensor             # (B, T, width)


@dataclass
class Flow:
    """A point of the flow and what the decoder says there."""

    time: Tensor                  # (B,)
    prompt: Tensor                # (B,) int64, frames that stay clean
    x: Tensor                     # (B, T, bands), the decoder's input
    condition: Tensor             # (B, T, width), zeros where it was dropped
    counted: Tensor               # (B, T) bool, sound behind the prompt
    target: Tensor                # (B, T, bands)
    predicted: Tensor             # (B, T, bands)


class TaDiCodecObjective(Objective):
    """The paper's losses: L1 of the flow on what is neither prompt nor padding, and the quantizer's entropies and commitment.

    Batches are best of whole clips. Discriminators are built only for stages that train the vocoder
    (`objective.vocoder.enabled`). build_frozen makes no difference: no teacher is needed.
    """

    cfg: ObjectiveConfig
    discriminators_first = True

    def __init__(self, cfg: ObjectiveConfig, model: ModelConfig, build_frozen: bool = True):
        super().__init__(cfg)
        check_objective(cfg)
        self.model = model
        self.voice: Any = None      # the vocoder's losses
        if cfg.vocoder.enabled:
            from .vocoder import VocoderLosses

            self.voice = VocoderLosses(cfg.vocoder, model.sample_rate)
            self.discriminators = self.voice.discriminators
            self.frozen["mel"] = self.voice.mel_loss

    # --- the codec --------------------------------------------------------------------------------------------------------

    def code(self, tokenizer: TaDiCodec, batch: Any) -> Coded:
        """Mel frames, codes and the decoder's condition of a batch.

        Each item is filled with zeros to whole codes, as `encode` does, and these count as sound. batch_as_released: it ends
        with its last whole mel frame; its frames near the end hear the batch's padding instead of their own reflection, codes
        are laid evenly on the batch's length, and padding counts in the entropies.
        """
        factor, hop = self.model.downsample, self.model.mel.hop
        if self.cfg.batch_as_released:
            mel = vocoder_mel(batch.audio[:, 0], self.model.mel, self.model.sample_rate).transpose(1, 2)
            lengths, counted = batch.lengths // hop, None
        else:
            mel = tokenizer.mel(batch.audio, batch.lengths).transpose(1, 2)                  # (B, T, bands)
            frames = -(-batch.lengths // tokenizer.hop)
            lengths, counted = frames * factor, frame_mask(frames, mel.shape[1] // factor)
        mask = frame_mask(lengths, mel.shape[1])
        quantized = tokenizer.quantizer.quantize(tokenizer.analyse(mel, mask), counted)
        ends = None if self.cfg.batch_as_released else lengths // factor
        return Coded(mel, lengths, mask, quantized, tokenizer.condition(quantized.quantized, mel.shape[1], ends))

    def prompt_lengths(self, items: int, frames: int, draw: Draw, device: torch.device) -> Tensor:
        """(B,) int64: frames of each item that stay clean; none in a share of the batches."""
        if float(draw.uniform("context", (1,))) <= self.cfg.prompt_drop:
            return torch.zeros(items, dtype=torch.int64, device=device)
        low = min(frames // 4, PROMPT_FRAMES)
        return draw.integers("prompt_length", low, max(int(PROMPT_SHARE * frames), low + 1), (items,)).to(device)

    def flow(self, tokenizer: TaDiCodec, coded: Coded, texts: Any, draw: Draw) -> Flow:
        """A point of the flow at a random time, and the decoder's velocity there."""
        mel, condition, path = coded.mel, coded.condition, tokenizer.path
        items, frames, _ = mel.shape
        time = draw_times(TimeConfig(), draw, (items,)).to(mel.device).clamp(SMALLEST_TIME, 1.0)
        noise = draw.normal("noise", tuple(mel.shape)).to(mel.device)
        prompt = self.prompt_lengths(items, frames, draw, mel.device)
        clean = frame_mask(prompt, frames)
        x = torch.where(clean[..., None], mel, path.at(mel, noise, time))
        if float(draw.uniform("condition", (1,))) < self.cfg.condition_drop:
            condition = torch.zeros_like(condition)
        if self.cfg.text_drop and float(draw.uniform("text", (1,))) < self.cfg.text_drop:
            texts = None
        predicted = tokenizer.decoder(
            x.to(tokenizer.dtype), time, condition, coded.mask, text_padding_counts=self.cfg.batch_as_released,
            **tokenizer.read(texts))
        counted = frame_mask(coded.lengths, frames, prompt)
        return Flow(time, prompt, x, condition, counted, path.velocity(mel, noise), predicted)

    def codec_losses(self, coded: Coded, flow: Flow | None, active: frozenset[str]) -> Losses:
        """The active ones of flow, entropy and commitment."""
        found, terms = coded.quantized.losses, {}
        if "flow" in active:
            assert flow is not None
            terms["flow"] = flow_loss(flow.predicted, flow.target, "l1", flow.counted)
        if "entropy" in active:
            terms["entropy"] = found["sample_entropy"] - found["codebook_entropy"]
        if "commitment" in active:
            terms["commitment"] = found["commitment"]
        logs = {f"{name}_logged" if name in terms else name: value.detach() for name, value in found.items()}
        logs |= {name: value.detach() for name, value in coded.quantized.health.items()}
        return Losses(terms, logs=logs)

    # --- the loop's two methods -------------------------------------------------------------------------------------------

    def generator_losses(
        self, tokenizer: nn.Module, batch: Any, draw: Draw, active: frozenset[str], judge: Judge | None = None
    ) -> Losses:
        """The active terms: flow, entropy and commitment of the codec, or mel, gan, feature_matching and
        spectral_feature_matching of the vocoder."""
        assert isinstance(tokenizer, TaDiCodec)
        if active & set(VOCODER_TERMS):
            hop = self.model.mel.hop
            audio = F.pad(batch.audio, (0, -batch.audio.shape[2] % hop))
            mel = vocoder_mel(audio[:, 0], self.model.mel, self.model.sample_rate)           # (B, bands, T)
            return self.losses_of_voice().generator_terms(tokenizer.vocoder, audio, mel, active, judge)
        coded = self.code(tokenizer, batch)
        flow = self.flow(tokenizer, coded, batch.texts, draw) if "flow" in active else None
        return self.codec_losses(coded, flow, active)

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Losses:
        """The vocoder's discriminators."""
        return self.losses_of_voice().discriminator_losses(real, fake)

    def losses_of_voice(self) -> Any:
        """The vocoder's losses. Raises ConfigError if they were not built."""
        if self.voice is None:
            raise ConfigError("objective.vocoder.enabled must be true to train the vocoder")
        return self.voice
