"""Intelligibility: error rates of what a recognizer hears in a reconstruction, against a transcript, for the table of metrics."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.teachers.asr import ASR, WhisperASR, build_asr
from tokenizers_lab.teachers.whisper import Whisper
from tokenizers_lab.text_normalisers import normaliser_for

from .wer import EditCounts, character_edits, summarise_edits, word_edits

EDITS: dict[str, Callable[[str, str], EditCounts]] = {"words": word_edits, "characters": character_edits}
COUNTS = tuple(field.name for field in fields(EditCounts))


class Transcriber:
    """What a recognizer hears in a clip. A clip is heard once: wer, cer and the row of the originals ask for the same ones.

    `provenance`: the recognizer's. May be called from several threads at once.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        """source: see `teachers.asr.build_asr`. Raises WeightsMissing, ConfigError."""
        self._recognizers: dict[str | None, ASR] = {None: build_asr(source, device)}
        self.provenance = self._recognizers[None].provenance
        self._device = device
        self._heard: dict[tuple[str | None, bytes], str] = {}
        self._lock = threading.Lock()

    def __call__(self, audio: Tensor, language: str | None = None) -> str:
        """The text of audio (samples,) at 16 kHz. language: what is spoken; none: the recognizer's own, or what it detects.

        Raises ConfigError if the recognizer does not know the language.
        """
        code = None if language is None else language.replace("_", "-").split("-")[0].lower()
        recognizer = self._recognizer(code)
        place = (code, hashlib.sha256(audio.contiguous().numpy().tobytes()).digest())
        if place not in self._heard:
            self._heard[place] = recognizer.transcribe([audio])[0]
        return self._heard[place]

    def _recognizer(self, code: str | None) -> ASR:
        """The same network, told the language. A CTC network cannot be told: it has its own."""
        first = self._recognizers[None]
        if not isinstance(first, WhisperASR):
            return first
        with self._lock:
            if code not in self._recognizers:
                whisper = Whisper(first.network, first.tokenizer, first.provenance)
                self._recognizers[code] = WhisperASR(whisper, code).to(self._device)
            return self._recognizers[code]


transcriber = lru_cache(maxsize=2)(Transcriber)      # one for all metrics of an evaluation


class ErrorRate:
    """Error rate in % of a reconstruction's words or characters, as the table of metrics wants it.

    The reference is the clip's text, or what the recognizer hears in the original. `provenance` names the recognizer.
    """

    def __init__(self, units: str, against: str, asr: str, device: torch.device | str = "cpu"):
        """units: words or characters; against: text or original; asr: see `teachers.asr.build_asr`."""
        self.units, self.against = units, against
        self.transcriber = transcriber(asr, device)
        normaliser_for("en")      # what is missing is said before anything slow
        self.provenance = self.transcriber.provenance

    def __call__(self, original: Tensor, made: Tensor, about: dict[str, Any]) -> dict[str, Any]:
        """A clip's rate, counts and, of words, both texts as they were compared."""
        language = about.get("language")
        normalise = normaliser_for(language)
        try:
            reference = about["text"] if self.against == "text" else self.transcriber(original, language)
            hypothesis = normalise(self.transcriber(made, language))
        except ConfigError as error:
            return {"value": None, "reason": str(error)}
        if reference is None:
            return {"value": None, "reason": "its text is not known"}
        reference = normalise(reference)
        if not reference:
            return {"value": None, "reason": "nothing is left of its text once it is normalised"}
        counts = EDITS[self.units](reference, hypothesis)
        texts = {"reference": reference, "hypothesis": hypothesis} if self.units == "words" else {}
        return {"value": 100 * counts.rate, **vars(counts), **texts, "normaliser": normalise.name}


def summarise(values: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Of all clips: the corpus rate as the value, its interval, and what `summarise_edits` says beside; the normalisers' names.

    A clip that was measured channel by channel counts with the edits of all its channels.
    """
    each = [cell for value in values for cell in value.get("channels", [value])]
    summary = summarise_edits([EditCounts(**{name: cell[name] for name in COUNTS}) for cell in each], seed)
    if "hypothesis" not in each[0]:
        del summary["wil"]      # a measure of words
    return {**summary, "normalisers": sorted({cell["normaliser"] for cell in each})}
