"""Texts as token ids: normalised by name, then UTF-8 bytes, CLIP's byte pairs or the tokens of a transformers tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.clip_bpe import END, START, VOCABULARY, clip_encoder
from tokenizers_lab.errors import ConfigError, WeightsMissing
from tokenizers_lab.text_normalisers import NORMALISERS, build_normaliser

BYTES, CLIP = "bytes", "clip"
Encode = Callable[[list[str]], list[list[int]]]


@dataclass
class TextConfig:
    """How a text becomes rows of an embedding table."""

    tokenizer: str = BYTES           # bytes (of UTF-8), clip (with start and end), or a transformers tokenizer's hub id or folder
    normaliser: str = "none"         # none: texts as they are; english, basic, letters: Whisper's (docs/evaluation.md)
    vocabulary: int = 257            # rows of the embedding table; at least the greatest id + 1
    pad: int = 256                   # id behind the end of the shorter texts of a batch
    context: int = 0                 # ids of every text; longer ones are cut, but keep an end; 0: as many as the longest has


class TextTokenizer:
    """Made by `build_text_tokenizer`. Tokenizer and normaliser are loaded when the first text comes, not before."""

    def __init__(self, cfg: TextConfig):
        self.cfg = cfg

    def encode(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """(ids (B, L) int64, padded with cfg.pad up to the longest, or to cfg.context; lengths (B,) int64).

        No text, or an empty one, has length 0. No special tokens are added but clip's start and end, which no text has too.
        With a context, a text of clip's is cut so that its end stays, any other so that one padding id stays behind it.
        Raises ConfigError if an id has no row in the table, WeightsMissing if the tokenizer, or the normaliser's list of
        spellings, cannot be had.
        """
        given = [self._normalise(text) if text else "" for text in texts]
        known = [text for text in given if text]
        rows = iter(self._encode(known) if known else [])
        ids = [self._framed(next(rows) if text else []) for text in given]
        lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)
        longest = self.cfg.context or max(map(len, ids), default=0)
        padded = torch.full((len(ids), longest), self.cfg.pad, dtype=torch.int64)     # (B, L)
        for target, row in zip(padded, ids):
            target[: len(row)] = torch.tensor(row, dtype=torch.int64)
        if padded.numel() and int(padded.max()) >= self.cfg.vocabulary:
            raise ConfigError(f"the tokenizer '{self.cfg.tokenizer}' gives the id {int(padded.max())}, but text.vocabulary has "
                              f"{self.cfg.vocabulary} rows")
        return padded, lengths

    def _framed(self, ids: list[int]) -> list[int]:
        """The ids with clip's start and end, cut to the context."""
        frame = ([START], [END]) if self.cfg.tokenizer == CLIP else ([], [])
        room = self.cfg.context - max(len(frame[0]) + len(frame[1]), 1) if self.cfg.context else None
        return frame[0] + ids[:room] + frame[1]

    @cached_property
    def _normalise(self) -> Callable[[str], str]:
        return str if self.cfg.normaliser == "none" else build_normaliser(self.cfg.normaliser)      # str: spaces stay too

    @cached_property
    def _encode(self) -> Encode:
        if self.cfg.tokenizer == BYTES:
            return utf8_bytes
        return clip_encoder() if self.cfg.tokenizer == CLIP else transformers_encoder(self.cfg.tokenizer)


def build_text_tokenizer(cfg: TextConfig) -> TextTokenizer:
    """The tokenizer of a config; nothing is loaded yet. Raises ConfigError as `check_text`."""
    check_text(cfg)
    return TextTokenizer(cfg)


def check_text(cfg: TextConfig) -> None:
    """Raise ConfigError for an unknown normaliser, an impossible padding or context, or too small a vocabulary for clip."""
    if cfg.normaliser not in NORMALISERS:
        raise ConfigError(f"text.normaliser must be one of {', '.join(NORMALISERS)}; not '{cfg.normaliser}'")
    if not 0 <= cfg.pad < cfg.vocabulary:
        raise ConfigError(f"text.pad must be a row of the table, 0 to {cfg.vocabulary - 1}; not {cfg.pad}")
    if cfg.context and cfg.context < 3:
        raise ConfigError(f"text.context must be 0 or at least 3 ids, not {cfg.context}")
    if cfg.tokenizer == CLIP and cfg.vocabulary < VOCABULARY:
        raise ConfigError(f"text.vocabulary must be {VOCABULARY} rows for the tokenizer {CLIP}, not {cfg.vocabulary}")


def utf8_bytes(texts: list[str]) -> list[list[int]]:
    """The UTF-8 bytes of each text, 0 to 255; a lone surrogate becomes a question mark."""
    return [list(text.encode("utf-8", errors="replace")) for text in texts]


def transformers_encoder(source: str) -> Encode:
    """The ids that a transformers tokenizer gives, by hub id or local folder; code from the hub is never run.

    Raises WeightsMissing if it is not here and cannot be fetched (TOKENIZERS_LAB_OFFLINE forbids that).
    """
    from transformers import AutoTokenizer

    from tokenizers_lab.asset_fetch import offline

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=offline())
    except Exception as error:       # OSError and ValueError mostly; a damaged tokenizer.json raises the Rust library's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise WeightsMissing(
            f"the text tokenizer '{source}' is not here and could not be fetched: run `hf download {source} --include "
            f"'tokenizer*' --local-dir FOLDER` where there is a network and set text.tokenizer to that folder ({reason})"
        ) from error
    return lambda texts: tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]
