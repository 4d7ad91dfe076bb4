"""The items that a comparison shows: the same few for every model, whatever the number of processes that measure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tokenizers_lab.data.audio import encode_audio
from tokenizers_lab.draw import stable_seed

from .candidates import Candidate
from .gather import all_processes
from .speech_candidates import Clip, Rebuilt, SpeechCandidate

ORIGINAL = "the original"
FOLDER = "examples"
Kept = dict[str, tuple[Any, Any]]      # key -> (original, reconstruction)


@dataclass
class Keeper:
    """Sees every item of one model and keeps `count` of them: those whose names have the smallest hashes.

    So which ones does not depend on the order of the items or on who measures them.
    """

    count: int
    kept: Kept = field(default_factory=dict)

    def image(self, candidate: Candidate, originals: Tensor, made: Tensor, keys: Sequence[str]) -> None:
        """`observe` of `evaluate_images`: keeps uint8 arrays (H, W, 3)."""
        for key, original, output in zip(keys, originals, made):
            if candidate.role == "model" and self._wants(key):
                self.kept[key] = (_to_uint8(original), _to_uint8(output))
                self.kept = first_by_hash(self.kept, self.count)

    def clip(self, candidate: SpeechCandidate, clip: Clip, made: Rebuilt) -> None:
        """`observe` of `evaluate_speech`: keeps the clip and its reconstruction."""
        if candidate.role == "model" and self._wants(clip.key):
            self.kept[clip.key] = (clip, Rebuilt(made.audio.cpu(), made.sample_rate))
            self.kept = first_by_hash(self.kept, self.count)

    def _wants(self, key: str) -> bool:
        return self.count > 0 and (len(self.kept) < self.count or _rank(key) < max(map(_rank, self.kept)))

    def of_all_processes(self) -> Kept:
        """What all processes have seen; every one must call it."""
        shares = all_processes(self.kept)
        return first_by_hash({key: pair for share in shares for key, pair in share.items()}, self.count)


def _rank(key: str) -> tuple[int, str]:
    return stable_seed("example", key), key


def first_by_hash(kept: Kept, count: int) -> Kept:
    """The first `count` items in the order of the hashes of their names."""
    return {key: kept[key] for key in sorted(kept, key=_rank)[:count]}


def _to_uint8(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] to (H, W, 3)."""
    return (image.float().cpu() * 255).round().byte().permute(1, 2, 0).numpy()


@dataclass
class Example:
    """An item with what each model made of it. Images: uint8 (H, W, 3); sounds: ((channels, samples), Hz)."""

    key: str
    original: Any
    made: dict[str, Any]                                     # label -> reconstruction
    about: dict[str, Any] = field(default_factory=dict)      # of a clip: seconds, text, speaker


@dataclass
class Examples:
    """Filled by `compare_models`: at most `count` items, shown by the page and written beside the JSON."""

    count: int = 8
    items: list[Example] = field(default_factory=list)

    def fill(self, kept: dict[str, Kept], speech: bool) -> None:
        """Take the items from what each model's keeper has: label -> key -> pair. All have the same keys."""
        first = next(iter(kept.values()))
        for key in sorted(list(first)[: self.count]):
            pairs = {label: found[key] for label, found in kept.items() if key in found}
            original = first[key][0]
            if speech:
                about = {"seconds": round(original.seconds, 3), "text": original.text, "speaker": original.speaker}
                sounds = {label: (made.audio, made.sample_rate) for label, (_, made) in pairs.items()}
                self.items.append(Example(key, (original.audio.cpu(), original.sample_rate), sounds, about))
            else:
                self.items.append(Example(key, original, {label: made for label, (_, made) in pairs.items()}))


def write_examples(examples: Examples, folder: Path) -> list[dict[str, Any]]:
    """PNG or WAV files in the folder `examples`; what they are, as the JSON names them: key, about, files by label."""
    entries = []
    for number, item in enumerate(examples.items):
        files = {}
        for column, (label, what) in enumerate({ORIGINAL: item.original, **item.made}.items()):
            suffix = "wav" if isinstance(what, tuple) else "png"
            file = folder / FOLDER / f"{number:02d}_{column}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(what, tuple):
                audio, rate = what
                file.write_bytes(encode_audio(audio, rate, "WAV"))
            else:
                Image.fromarray(what).save(file)
            files[label] = f"{FOLDER}/{file.name}"
        entries.append({"key": item.key, **item.about, "files": files})
    return entries
