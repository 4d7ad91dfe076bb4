"""Published speech collections as one stream of clips with transcripts; what is no use is given too, with the reason.

Each function takes the folder in which a collection was unpacked and yields `Clip`s and `Refused`s in natural order.
"""

import gzip
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenizers_lab.data.audio import EXTENSIONS
from tokenizers_lab.data.manifest import read_manifest
from tokenizers_lab.data.shards import sample_name, shard_samples
from tokenizers_lab.data.sources import natural_key
from tokenizers_lab.data.speech import SpeechReader
from tokenizers_lab.errors import DataError
from tokenizers_lab.settings import SpeechDataConfig

_STRING = r'"((?:[^"\\]|\\.)*)"'
_DIALOG = re.compile(rf'dialogId\(\s*{_STRING}\s*,\s*"(?:font_)?(\w*)"\s*,\s*{_STRING}\s*\)\s*dialogStr\(\s*{_STRING}\s*\)')
_DESCRIPTION = re.compile(r"^(.*)_desc(?:_([A-Za-z_]+))?$")


@dataclass(frozen=True)
class Clip:
    """One utterance. `source` is a file, or a file's bytes."""

    key: str                        # unique in its collection, without an ending; may hold folders
    source: Path | bytes
    text: str | None = None
    speaker: str | None = None
    language: str | None = None
    duration: float | None = None   # seconds, where the collection says so


@dataclass(frozen=True)
class Refused:
    """What was not taken, and why."""

    key: str
    reason: str


Found = Iterator[Clip | Refused]


def asterisk_prompts(root: Path) -> Found:
    """The Debian packages asterisk-core-sounds-LANG (texts) and -LANG-g722 (sounds): the sentences of a telephone exchange.

    One speaker a language, named by the folder, such as en_US_f_Allison. Texts in brackets describe tones and silence.
    """
    for folder in _sorted(root.glob("usr/share/asterisk/sounds/*_*_*_*")):
        language = folder.name.split("_")[0]
        texts = _prompt_texts(root / f"usr/share/doc/asterisk-core-sounds-{language}", language)
        for path in _sorted(folder.rglob("*.g722")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            key, text = f"{folder.name}/{name}", texts.get(name)
            if text is None:
                yield Refused(key, "no transcript")
            elif re.search(r"[\[\]<>]", text):
                yield Refused(key, f"no plain speech: {text}")
            else:
                yield Clip(key, path, text, folder.name, language)


def tuxpaint_descriptions(root: Path) -> Found:
    """The Debian package tuxpaint-stamps-default: spoken descriptions of pictures; their readers are not named."""
    stamps = root / "usr/share/tuxpaint/stamps"
    for path in _sorted(p for p in stamps.rglob("*_desc*") if p.suffix.lower().lstrip(".") in EXTENSIONS):
        found = _DESCRIPTION.match(path.stem)
        if found is None:
            continue
        picture, language = found[1], found[2] or "en"
        key = path.relative_to(stamps).with_suffix("").as_posix()
        text = stamp_text(path.parent / f"{picture}.txt", found[2])
        if text:
            yield Clip(key, path, text, f"tuxpaint_{language}", language)
        else:
            yield Refused(key, f"no transcript in '{language}'")


def fillets_dialogues(root: Path, language: str) -> Found:
    """The Debian packages fillets-ng-data (texts) and fillets-ng-data-cs or -nl (sounds): the acted dialogues of a game.

    The colour of a role's subtitles stands for its speaker, over all levels.
    """
    game = root / "usr/share/games/fillets-ng"
    for script in _sorted((game / "script").glob(f"*/dialogs_{language}.lua")):
        level = script.parent.name
        texts = {d[0]: (d[1], _unescaped(d[3])) for d in _DIALOG.findall(script.read_text(encoding="utf-8", errors="replace"))}
        for path in _sorted((game / "sound" / level / language).glob("*.ogg")):
            key = f"{level}/{language}/{path.stem}"
            role, text = texts.get(path.stem, ("", ""))
            if not text:
                yield Refused(key, "no transcript")
            elif role in ("", "both"):
                yield Refused(key, "no single role")
            else:
                yield Clip(key, path, text, f"fillets_{language}_{role}", language)


def librispeech(root: Path) -> Found:
    """A folder of LibriSpeech (any part): SPEAKER/CHAPTER/ID.flac with ID and sentence in *.trans.txt beside them."""
    transcripts = _sorted(root.rglob("*.trans.txt"))
    if not transcripts:
        raise DataError(f"{root}: holds no *.trans.txt, so it is no folder of LibriSpeech")
    for transcript in transcripts:
        texts = dict(line.split(" ", 1) for line in transcript.read_text(encoding="utf-8").splitlines() if " " in line)
        sounds = {p.stem: p for p in transcript.parent.iterdir() if p.suffix.lower().lstrip(".") in EXTENSIONS}
        for name in sorted(texts.keys() | sounds.keys(), key=natural_key):
            key = (transcript.parent / name).relative_to(root).as_posix()
            if name not in sounds:
                yield Refused(key, "no sound file")
            elif name not in texts:
                yield Refused(key, "no transcript")
            else:
                yield Clip(key, sounds[name], texts[name].strip(), name.split("-")[0], "en")


def listed_clips(manifest: Path) -> Found:
    """The clips of a manifest in CSV, TSV or JSON lines (`data.manifest`)."""
    for row in read_manifest(manifest):
        path = manifest.parent / row.file
        key = Path(row.file).with_suffix("").as_posix().lstrip("/")
        if path.is_file():
            yield Clip(key, path, row.text, row.speaker, row.language, row.duration)
        else:
            yield Refused(key, "no sound file")


def emilia(shards: Sequence[str]) -> Found:
    """Webdataset shards of Emilia, or alike: for each clip a sound file, and a JSON file with text, speaker and language."""
    reader = SpeechReader(SpeechDataConfig())
    for url in shards:
        for sample in shard_samples(url, parts=reader.parts):
            key = sample["__key__"]
            try:
                raw = reader.from_shard(sample, sample_name(url, sample))
            except DataError as error:
                yield Refused(key, str(error))
                continue
            assert isinstance(raw.content, bytes)
            yield Clip(key, raw.content, **raw.about)


def read_g722(path: Path) -> tuple[Tensor, int]:
    """A raw G.722 file at 64 kbit/s: float32 (1, samples), and its sample rate, 16000. Raises DataError.

    Needs the package `av` (`pip install tokenizers-lab[samples]`): libsndfile does not know the format.
    """
    try:
        import av
    except ImportError:
        raise DataError(f"{path}: G.722 is read with the package av; pip install tokenizers-lab[samples]") from None
    try:
        with av.open(str(path), format="g722") as container:
            frames = [torch.from_numpy(frame.to_ndarray()) for frame in container.decode(audio=0)]
    except Exception as error:   # av has an exception for each error of FFmpeg
        raise DataError(f"{path}: is no G.722 ({error})") from error
    if not frames:
        raise DataError(f"{path}: holds no samples")
    return torch.cat(frames, dim=1).float() / 32768, 16_000


def _prompt_texts(folder: Path, language: str) -> dict[str, str]:
    texts = {}
    for path in sorted(folder.glob(f"core-sounds-{language}.txt*")):
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        for line in content.decode("utf-8", errors="replace").splitlines():
            name, colon, text = line.partition(":")
            if colon and not line.startswith(";"):
                texts[name.strip()] = " ".join(text.split())
    return texts


def stamp_text(path: Path, language: str | None = None) -> str | None:
    """The text of a picture of Tux Paint: its first line is English, then come LANG.utf8=text; a dialect falls back on its
    language."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    if language is None:
        return lines[0].strip() if lines and "=" not in lines[0] else None
    known = {name.removesuffix(".utf8"): text.strip() for name, _, text in (line.partition("=") for line in lines[1:])}
    return known.get(language) or known.get(language.split("_")[0])


def _unescaped(text: str) -> str:
    return " ".join(re.sub(r"\\(.)", lambda m: {"n": " "}.get(m[1], m[1]), text).split())


def _sorted(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda p: natural_key(p.as_posix()))
