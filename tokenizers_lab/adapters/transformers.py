"""A speech tokenizer as a codec of transformers, for code that was written for its MimiModel, EncodecModel or DacModel."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import ModelOutput

from tokenizers_lab.errors import InputError
from tokenizers_lab.tokenizer import SpeechTokenizer


class CodecConfig(PreTrainedConfig):
    """What transformers' codecs say of themselves, under the names that Mimi, EnCodec and DAC have for it."""

    model_type = "tokenizers_lab_codec"

    def __init__(
        self, sampling_rate: int = 16_000, hop_length: int = 320, num_quantizers: int = 8, codebook_size: int = 1024,
        audio_channels: int = 1, **kwargs: Any,
    ):
        """sampling_rate: Hz; hop_length: samples of a frame; num_quantizers: codes of a frame; codebook_size: entries of each."""
        super().__init__(**kwargs)
        self.sampling_rate, self.audio_channels, self.codebook_size = sampling_rate, audio_channels, codebook_size
        self.hop_length = self.frame_size = hop_length
        self.num_quantizers = self.num_codebooks = self.n_codebooks = num_quantizers
        self.frame_rate = sampling_rate / hop_length      # Hz, not rounded, as Mimi has it
        self.downsampling_ratios = [hop_length]           # whose product callers of DAC compute


@dataclass
class CodecOutput(ModelOutput):
    """What `encode`, `decode` and `forward` give."""

    audio_codes: Tensor | None = None      # (B, K, T) int64
    audio_values: Tensor | None = None     # (B, channels, samples)


class TransformersCodec(PreTrainedAudioTokenizerBase):
    """Answers the protocol of transformers' codecs in Mimi's shapes: codes (B, K, T), audio (B, channels, samples).

    Items of a padded batch are encoded and decoded as if they were alone (Mimi's padding counts as sound). Saved, its folder
    is an ordinary saved tokenizer. Raises InputError if the tokenizer's output has another sample rate than its input, for
    which the protocol has no name.
    """

    config_class = CodecConfig
    base_model_prefix = "tokenizer"
    main_input_name = "input_values"

    def __init__(self, tokenizer: SpeechTokenizer):
        if tokenizer.output_rate() != tokenizer.sample_rate:
            raise InputError(f"transformers' codecs have one sample rate; this {tokenizer.system} tokenizer takes audio at "
                             f"{tokenizer.sample_rate} Hz and gives {tokenizer.output_rate()} Hz")
        super().__init__(CodecConfig(
            tokenizer.sample_rate, tokenizer.hop, tokenizer.codebooks, tokenizer.codebook_size, tokenizer.channels))
        self.tokenizer = tokenizer

    def encode(
        self, input_values: Tensor, padding_mask: Tensor | None = None, num_quantizers: int | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """input_values: (B, channels, samples) in [−1, 1]; padding_mask: (B, samples) or (B, channels, samples), 1 for sound.

        num_quantizers: only the first so many codes of a frame. Returns CodecOutput with `audio_codes` (B, K, T), 0 behind an
        item's `get_encoded_length`, or a 1-tuple. Raises InputError on unusable audio, or on a mask whose padding is not on
        the right.
        """
        codes = self.tokenizer.encode(input_values, mask_lengths(padding_mask)).codes
        assert codes is not None      # a codec has codes
        if num_quantizers is not None and not 1 <= num_quantizers <= codes.shape[1]:
            raise InputError(f"num_quantizers must be 1 to {codes.shape[1]}, not {num_quantizers}")
        return self._output(return_dict, audio_codes=codes[:, :num_quantizers])

    def decode(self, audio_codes: Tensor, padding_mask: Tensor | None = None, return_dict: bool | None = None) -> Any:
        """audio_codes: (B, k, T), k at most K; padding_mask: of the audio that was encoded: where items end, and the length.

        Returns CodecOutput with `audio_values` (B, channels, samples of the mask, or T · hop), or a 1-tuple.
        Raises InputError on unusable codes.
        """
        lengths = mask_lengths(padding_mask)
        frames = None if lengths is None else self.get_encoded_length(lengths)
        values = self.tokenizer.decode(audio_codes, frames)
        if padding_mask is not None:
            values = values[..., : padding_mask.shape[-1]]
        return self._output(return_dict, audio_values=values.to(self.dtype))

    def forward(
        self, input_values: Tensor, padding_mask: Tensor | None = None, num_quantizers: int | None = None,
        audio_codes: Tensor | None = None, return_dict: bool | None = None,
    ) -> Any:
        """Codes of the audio (unless they are given) and what they decode to, as long as the audio."""
        if audio_codes is None:
            audio_codes = self.encode(input_values, padding_mask, num_quantizers).audio_codes
        values = self.decode(audio_codes, padding_mask).audio_values[..., : input_values.shape[-1]]
        return self._output(return_dict, audio_codes=audio_codes, audio_values=values)

    def get_encoded_length(self, input_length: Tensor) -> Tensor:
        """Frames of so many samples, as Mimi's method of that name."""
        return -(-input_length // self.tokenizer.hop)

    def get_audio_codes_mask(self, padding_mask: Tensor) -> Tensor:
        """(B, T) bool, where codes are of sound, as Mimi's method of that name."""
        lengths = mask_lengths(padding_mask)
        assert lengths is not None
        frames = self.get_encoded_length(lengths)
        return torch.arange(int(frames.max()), device=frames.device) < frames[:, None]

    def _output(self, return_dict: bool | None, **tensors: Tensor) -> Any:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return CodecOutput(**tensors) if wanted else tuple(tensors.values())

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:      # type: ignore[override]
        """Save the tokenizer as `tokenizer.save_pretrained` does; transformers' options of file formats do not apply."""
        self.tokenizer.save_pretrained(os.fspath(save_directory))

    @classmethod
    def from_pretrained(      # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], dtype: torch.dtype | None = None, **options: Any
    ) -> "TransformersCodec":
        """The adapter of whatever `tokenizers_lab.load` takes. Raises as it does, InputError on a tokenizer of images, and
        on any other option of transformers that is not None: none is silently left out."""
        from tokenizers_lab.hub import load

        given = [name for name, value in options.items() if value is not None]
        if given:
            raise InputError(f"from_pretrained cannot honour {', '.join(given)}: leave it out, and load a folder with that")
        tokenizer = load(pretrained_model_name_or_path)
        if not isinstance(tokenizer, SpeechTokenizer):
            raise InputError(f"{pretrained_model_name_or_path} is a {tokenizer.system} tokenizer: a codec needs one of speech")
        adapter = cls(tokenizer).eval()
        return adapter if dtype is None else adapter.to(dtype)


def mask_lengths(mask: Tensor | None) -> Tensor | None:
    """Samples of each item (B,) of a padding mask (B, samples) or (B, channels, samples), None without one.

    Raises InputError unless each row is ones, then zeros, and equal over the channels.
    """
    if mask is None:
        return None
    if mask.dim() not in (2, 3):
        raise InputError(f"padding_mask must be (B, samples) or (B, channels, samples), not {tuple(mask.shape)}")
    rows = mask.bool() if mask.dim() == 2 else mask[:, 0].bool()
    lengths = rows.sum(-1)
    wanted = torch.arange(mask.shape[-1], device=mask.device) < lengths[:, None]
    if not torch.equal(rows, wanted) or (mask.dim() == 3 and not torch.equal(mask.bool(), rows[:, None].expand_as(mask))):
        raise InputError("padding_mask must be 1 on sound and 0 behind it, in all channels alike: pad on the right")
    return lengths
