"""The TaDiCodec tokenizer (arXiv 2508.16790): mel encoder, binary spherical codes, flow decoder with text, vocoder."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.diffusion.flow import FlowPath, frame_mask
from tokenizers_lab.diffusion.guidance import conditioned, guided
from tokenizers_lab.diffusion.mel_flow import FlowDecoder, MelEncoder, init_weights
from tokenizers_lab.diffusion.noise import start_noise
from tokenizers_lab.diffusion.samplers import euler_midpoint
from tokenizers_lab.errors import InputError
from tokenizers_lab.nn.dac import zero_behind
from tokenizers_lab.nn.mel import griffin_lim, vocoder_mel
from tokenizers_lab.nn.streams import InTurn, Pointwise, Stream, WindowStream
from tokenizers_lab.nn.vocos import Vocos
from tokenizers_lab.quantizers.bsq import BinaryQuantizer
from tokenizers_lab.text import build_text_tokenizer
from tokenizers_lab.tokenizer import (
    CONTEXT_SECONDS,
    SpeechEncoding,
    SpeechPrompt,
    SpeechTokenizer,
    check_lengths,
    equal_lengths,
)

from .config import ModelConfig, check_model

Texts = Sequence[str | None]


class TaDiCodec(SpeechTokenizer):
    """TaDiCodec: mono audio (B, 1, samples) to codes (B, 1, T) of one codebook, 6.25 a second in the release, and back.

    The decoder is a flow: it starts from noise, the same at each call unless `decode` gets a generator. It reads texts where
    `decode` gets any; a network that was trained with texts alone is told too little without them.
    With `codec=False` in its config it is the vocoder alone: latents are normalised mel frames (B, bands, T).
    Both transformers see the whole clip: nothing is local.
    """

    system = "tadicodec"
    decode_options: tuple[str, ...] = ("texts", "prompt", "steps", "guidance", "rescale", "generator")
    cfg: ModelConfig

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        check_model(cfg)
        self.sample_rate = cfg.sample_rate
        if cfg.codec:
            self.hop, self.codebooks, self.codebook_size = cfg.mel.hop * cfg.downsample, 1, 2**cfg.bits
            self.takes_texts = cfg.text_condition
            self.path = FlowPath("data", cfg.sigma)
            self.times = sampling_times(self.path, cfg.steps)      # as numbers, which an export can follow
            self.encoder = MelEncoder(cfg.mel.bands, cfg.width, cfg.encoder_layers, cfg.heads)
            self.to_code = nn.Linear(cfg.width, cfg.bits)
            self.quantizer = BinaryQuantizer(cfg.bits)
            self.from_code = nn.Linear(cfg.bits, cfg.width)
            self.decoder = FlowDecoder(cfg.mel.bands, cfg.width, cfg.decoder_layers, cfg.heads, cfg.text_condition,
                                       cfg.norm_init == "identity")
            if cfg.text_condition:
                self.text_embedding = nn.Embedding(cfg.text.vocabulary, cfg.width)
                self.text_tokenizer = build_text_tokenizer(cfg.text)
                self.text_embedding.apply(init_weights)
            self.to_code.apply(init_weights)
            self.from_code.apply(init_weights)
            if cfg.condition_gain:      # else a narrow network's condition is 10,000 times smaller than the frames it is added to
                for layer in (self.from_code, *self.decoder.condition_mlp):
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=cfg.condition_gain * layer.in_features**-0.5)
        else:
            self.hop, self.codebooks, self.codebook_size = cfg.mel.hop, 0, 0
            self.decode_options = ()
        if cfg.vocoder.kind == "vocos":
            sizes = cfg.vocoder
            self.vocoder = Vocos(cfg.mel.bands, sizes.width, sizes.hidden, sizes.layers, cfg.mel.n_fft, cfg.mel.hop)

    # --- the public way ---------------------------------------------------------------------------------------------------

    def encode(self, audio: Tensor, lengths: Tensor | None = None) -> SpeechEncoding:
        """Codes (B, 1, T), T = ⌈samples / hop⌉; the vocoder alone: latents (B, bands, T). Raises InputError on unusable audio.

        lengths: (B,) samples of each item in a padded batch. The last frame of an item is filled with zeros.
        """
        self.check_audio(audio, lengths)
        frames = None if lengths is None else -(-lengths.to(audio.device) // self.hop)
        mel = self.mel(audio, lengths)                                                       # (B, bands, T)
        if not self.cfg.codec:
            return SpeechEncoding(latents=mel if frames is None else zero_behind(mel, frames), lengths=frames)
        mask = None if frames is None else frame_mask(frames * self.cfg.downsample, mel.shape[2])
        codes = self.quantizer.encode(self.analyse(mel.transpose(1, 2), mask))
        return SpeechEncoding(codes=codes if frames is None else zero_behind(codes, frames), lengths=frames)

    @torch.no_grad()
    def decode(
        self, codes: Tensor, lengths: Tensor | None = None, texts: Texts | None = None, prompt: SpeechPrompt | None = None,
        steps: int | None = None, guidance: float | None = None, rescale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Audio (B, 1, T · hop) in [−1, 1] from codes (B, 1, T); the vocoder alone: from latents (B, bands, T), without options.

        lengths: (B,) frames of each item; behind them the audio is 0. See `decode_mel` for the options. Raises InputError.
        """
        if self.cfg.codec:
            mel = self.decode_mel(codes, lengths, texts, prompt, steps, guidance, rescale, generator).transpose(1, 2)
            frames = None if lengths is None else lengths.to(mel.device) * self.cfg.downsample
            return self.vocode(mel, frames).clamp(-1, 1)
        if any(option is not None for option in (texts, prompt, steps, guidance, rescale, generator)):
            raise InputError("a vocoder alone takes no texts, prompt, steps, guidance, rescale or generator")
        self.check_latents(codes, lengths)
        return self.vocode(codes, None if lengths is None else lengths.to(codes.device)).clamp(-1, 1)

    @torch.no_grad()
    def decode_mel(
        self, codes: Tensor, lengths: Tensor | None = None, texts: Texts | None = None, prompt: SpeechPrompt | None = None,
        steps: int | None = None, guidance: float | None = None, rescale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normalised mel frames (B, T · downsample, bands), float32, from codes (B, 1, T).

        texts: what each item says; None, for one or for all: it is decoded without. prompt: speech that comes before, its text
        before the item's without a space between; it is not part of the result. steps, guidance (0 or 1: none, which takes one
        pass a step instead of two), rescale: the config's if not given. generator: of the noise to start from; none: always the
        same. Raises InputError on what does not fit.
        """
        self.check_codes(codes, lengths)
        before = None if prompt is None else self.check_prompt(prompt, codes.shape[0])
        frames = None if lengths is None else lengths.to(codes.device)
        noise = start_noise((codes.shape[0], codes.shape[2] * self.cfg.downsample, self.cfg.mel.bands), codes.device, generator)
        clean = None
        if prompt is not None:
            heard = prompt.audio.to(codes.device).expand(codes.shape[0], -1, -1)
            clean = self.mel(heard).transpose(1, 2)                                          # (B, P · downsample, bands)
            lead = self.quantizer.encode(self.analyse(clean))                                # (B, 1, P)
            codes = torch.cat([lead, codes], dim=2)
            frames = None if frames is None else frames + lead.shape[2]
        condition = self.condition(self.quantizer.decode(codes), lengths=frames)
        mask = None if frames is None else frame_mask(frames * self.cfg.downsample, condition.shape[1])
        text = None if texts is None else self.read(self.join(before, texts, codes.shape[0]))
        return self.sample(condition, noise, clean, mask, text, steps, guidance, rescale)

    def decode_stream(self, context: float = CONTEXT_SECONDS, **options: Any) -> Stream:
        """See SpeechTokenizer. options: of `decode`, for all windows alike, so that texts and prompt are of short audio only.

        A codec is decoded in windows that overlap: as nothing in it is local, they are not what the whole would be. The vocoder
        alone is exact, if its lengths of silence at both ends are.
        """
        if self.cfg.codec:
            return WindowStream(partial(self.decode, **options), 1, self.hop, self._frames_of(context))
        limited = Pointwise(lambda audio: audio.float().clamp(-1, 1))
        return InTurn([Pointwise(lambda mel: mel.to(self.dtype)), self.vocoder.stream(), limited])

    # --- parts, which training and parity call too ------------------------------------------------------------------------

    def mel(self, audio: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Normalised mel frames (B, bands, T) of audio (B, 1, samples), each item filled with zeros to whole hops."""
        samples = self.frames(audio.shape[2]) * self.hop
        ends = None if lengths is None else -(-lengths.to(audio.device) // self.hop) * self.hop
        audio = audio if lengths is None else zero_behind(audio, lengths.to(audio.device))
        audio = F.pad(audio[:, 0], (0, samples - audio.shape[2]))
        return vocoder_mel(audio, self.cfg.mel, self.sample_rate, ends)

    def analyse(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """The quantizer's input (B, bits, T // downsample) on the unit sphere, of mel frames (B, T, bands).

        mask: (B, T) bool, true where a frame is sound. If T is no multiple of the factor, the frames are laid on the shorter
        axis evenly, as in the authors' training. Raises InputError if T is below it.
        """
        if mel.shape[1] < self.cfg.downsample:
            raise InputError(f"{mel.shape[1]} mel frames make no code, which takes {self.cfg.downsample}")
        hidden = self.encoder(mel.to(self.dtype), mask)                                      # (B, T, width)
        down = resized(hidden, mel.shape[1] // self.cfg.downsample)
        return self.quantizer.place(self.to_code(down).transpose(1, 2))

    def condition(self, quantized: Tensor, frames: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """What the decoder gets for each mel frame, (B, frames, width), of quantized vectors (B, bits, T).

        frames: none means T · downsample. lengths: (B,) codes of each item of a padded batch; its last one goes on behind it,
        so that the interpolation at its end is the one that it has alone.
        """
        vectors = self.from_code(quantized.transpose(1, 2).to(self.dtype))                   # (B, T, width)
        if lengths is not None:
            place = torch.arange(vectors.shape[1], device=vectors.device).minimum(lengths[:, None] - 1)      # (B, T)
            vectors = vectors.gather(1, place[..., None].expand_as(vectors))
        return resized(vectors, frames or vectors.shape[1] * self.cfg.downsample)

    def read(self, texts: Texts | None) -> dict[str, Tensor]:
        """The decoder's arguments `text` (B, L, width) and `text_lengths` (B,); none where nobody says anything."""
        if texts is None or not any(text is not None for text in texts) or not self.cfg.text_condition:
            return {}
        ids, lengths = (t.to(self.device) for t in self.text_tokenizer.encode(list(texts)))
        return {"text": self.text_embedding(ids), "text_lengths": lengths} if ids.shape[1] else {}

    def sample(
        self, condition: Tensor, noise: Tensor, prompt: Tensor | None = None, mask: Tensor | None = None,
        text: dict[str, Tensor] | None = None, steps: int | None = None, guidance: float | None = None,
        rescale: float | None = None, batch_as_released: bool = False,
    ) -> Tensor:
        """Mel frames (B, N, bands) of the flow from noise (B, N, bands); 0 where they are masked.

        prompt: (B, P, bands) clean frames before them. condition: (B, P + N, width), mask (B, P + N) bool and text (of `read`)
        are of both. batch_as_released: text padding moves the frames, masked frames count in the rescaling, which takes one
        deviation for the batch, and they are left as they come: items then depend on their batch.
        Guidance leaves out text and codes, but not the prompt; a network without text has none (as in the authors' code).
        """
        times = self.times if steps is None else sampling_times(self.path, steps)
        guidance = self.cfg.guidance if guidance is None else guidance
        rescale = self.cfg.rescale if rescale is None else rescale
        if guidance < 0:
            raise InputError(f"guidance must not be negative, but is {guidance:g}")
        lead = 0 if prompt is None else prompt.shape[1]

        def network(x: Tensor, time: Tensor, condition: Tensor, text: dict[str, Tensor]) -> Tensor:
            whole = x if prompt is None else torch.cat([prompt.to(x), x], dim=1)
            made = self.decoder(whole.to(self.dtype), time, condition, mask, text_padding_counts=batch_as_released, **text)
            return made[:, lead:].float()

        target = None if mask is None or batch_as_released else mask[:, lead:]
        velocity = conditioned(network, condition, text or {})
        if guidance not in (0, 1) and self.cfg.text_condition:
            without = conditioned(network, torch.zeros_like(condition), {})
            velocity = guided(velocity, without, guidance, rescale=rescale, together=batch_as_released, mask=target)
        mel = euler_midpoint(velocity, noise, times)
        return mel if target is None else mel * target[..., None]

    def vocode(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Audio (B, 1, T · hop of the mel) of normalised mel frames (B, bands, T), float32, not limited in range."""
        if self.cfg.vocoder.kind == "vocos":
            return self.vocoder(mel.to(self.dtype), lengths).float()
        audio = torch.zeros(mel.shape[0], 1, mel.shape[2] * self.cfg.mel.hop, device=mel.device)
        for items, frames in equal_lengths(lengths, mel.shape[2], mel.shape[0]):
            audio[items, :, : frames * self.cfg.mel.hop] = griffin_lim(
                mel[items, :, :frames], self.cfg.mel, self.sample_rate, self.cfg.vocoder.iterations)
        return audio

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    # --- checks -----------------------------------------------------------------------------------------------------------

    def check_codes(self, codes: Tensor, lengths: Tensor | None = None) -> None:
        """See SpeechTokenizer; of the vocoder alone, `check_latents`."""
        if self.cfg.codec:
            super().check_codes(codes, lengths)
        else:
            self.check_latents(codes, lengths)

    def check_latents(self, latents: Any, lengths: Tensor | None) -> None:
        """Raise InputError unless latents are floats (B, bands, T), not empty, and lengths fit them."""
        bands = self.cfg.mel.bands
        if not torch.is_floating_point(latents) or latents.dim() != 3 or latents.shape[1] != bands or 0 in latents.shape:
            raise InputError(f"a vocoder's latents must be float (B, {bands}, T), not {latents.dtype} {tuple(latents.shape)}")
        check_lengths(lengths, latents.shape[0], latents.shape[2], "frames")

    def check_prompt(self, prompt: SpeechPrompt, items: int) -> Texts:
        """The prompt's texts, one an item. Raises InputError unless there are 1 or `items` of audio and of texts."""
        self.check_audio(prompt.audio)
        texts: list[str | None] = [None] if prompt.texts is None else list(prompt.texts)
        for what, count in (("audio", len(prompt.audio)), ("texts", len(texts))):
            if count not in (1, items):
                raise InputError(f"a prompt has one {what} for all, or one for each of the {items} items, not {count}")
        return texts * items if len(texts) == 1 else texts

    def join(self, before: Texts | None, texts: Texts, items: int) -> Texts:
        """The prompt's texts with the items' behind them; None where an item's own is not known. Raises InputError."""
        if isinstance(texts, str) or len(texts) != items:
            raise InputError(f"texts must be a list of one text, or None, for each of the {items} items")
        return [None if text is None else (lead or "") + text for lead, text in zip(before or [None] * items, texts)]


def sampling_times(path: FlowPath, steps: int) -> list[float]:
    """The steps + 1 times from noise to mel frames. Raises InputError on no steps."""
    with torch.device("cpu"):      # also where networks are built without memory
        return path.times(steps).tolist()


def resized(x: Tensor, frames: int) -> Tensor:
    """x (B, T, C) interpolated linearly along time to (B, frames, C); at a ratio of 8, frames 8i + 3 and 8i + 4 are averaged."""
    return F.interpolate(x.transpose(1, 2), size=frames, mode="linear", align_corners=False).transpose(1, 2)
