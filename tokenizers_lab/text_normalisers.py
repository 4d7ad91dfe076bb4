"""What is done to texts before they are compared or tokenised: Whisper's two normalisers, as transformers has them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers_lab.errors import CheckpointError, InputError

NORMALISERS = ("english", "basic", "letters", "none")
SPELLINGS_ASSET = "whisper-spellings"
# Whisper's evaluation splits what is written without spaces into letters, so that its "words" are letters (Radford et al. 2022,
# sec. C).
UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my"})


@dataclass(frozen=True)
class Normaliser:
    """A function from text to comparable text, and how results name it."""

    name: str
    apply: Callable[[str], str]

    def __call__(self, text: str) -> str:
        """The text with single spaces between words and none around them."""
        return " ".join(self.apply(text).split())


@cache
def build_normaliser(name: str) -> Normaliser:
    """english: Whisper's English one (numbers, contractions, British spellings); basic: lower case, no punctuation or remarks in
    brackets; letters: basic, with every letter a word of its own; none: only spaces.

    Raises InputError for another name, WeightsMissing or CheckpointError if the list of spellings cannot be had.
    """
    if name not in NORMALISERS:
        raise InputError(f"there is no text normaliser '{name}'; known: {', '.join(NORMALISERS)}")
    if name == "none":
        return Normaliser("none", str)
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if name == "english":
        return Normaliser("Whisper's English", EnglishTextNormalizer(spellings()))
    if name == "basic":
        return Normaliser("Whisper's basic", BasicTextNormalizer())
    return Normaliser("Whisper's basic, letter by letter", BasicTextNormalizer(split_letters=True))


def normaliser_for(language: str | None) -> Normaliser:
    """Whisper's for a language ("en", "en-US", "fr", …): English also where it is not known; see `build_normaliser`."""
    code = (language or "en").replace("_", "-").split("-")[0].lower()
    if code in ("en", "eng", "english"):
        return build_normaliser("english")
    return build_normaliser("letters" if code in UNSPACED_LANGUAGES else "basic")


@cache
def spellings() -> dict[str, str]:
    """British to American spellings, a list of Whisper's that transformers takes but does not have. Raises WeightsMissing."""
    from tokenizers_lab.assets import find

    file = find(SPELLINGS_ASSET).path
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(word, str) for pair in found.items() for word in pair):
        raise CheckpointError(f"{file} holds no list of spellings: an object of words was expected")
    return found
