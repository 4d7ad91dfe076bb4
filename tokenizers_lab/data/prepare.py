"""Turns a stream of clips into data to train on: sound files with a manifest, or webdataset shards, and a list of refusals.

Every clip is decoded once, so that what training would refuse is refused here, with its reason.
"""

import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenizers_lab.data.audio import encode_audio, open_audio, read_audio
from tokenizers_lab.data.corpora import Clip, Refused, read_g722
from tokenizers_lab.data.manifest import Row
from tokenizers_lab.data.resample import resample
from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import DataError

FORMS = ("manifest", "shards", "both")
SILENT = 1e-4          # a clip whose peak is lower holds nothing


@dataclass
class Report:
    """What was taken and what was refused."""

    clips: Counter[str] = field(default_factory=Counter)                       # by split
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    speakers: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))     # seconds of each
    languages: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    refused: Counter[str] = field(default_factory=Counter)                     # by reason, without what is particular

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON data, seconds rounded to milliseconds."""
        return {name: {k: round(v, 3) for k, v in sorted(counts.items())} for name, counts in vars(self).items()}


@dataclass
class Limits:
    """What is taken and how it is stored."""

    min_seconds: float = 0.3
    max_seconds: float = 3600.0
    sample_rate: int | None = None     # re-encode to FLAC at this rate, one channel; none: as it is, where training can read it
    val_share: float = 0.0             # share of the sentences that go into val/; 0: no split
    need_text: bool = False            # refuse clips without a transcript


def prepare(
    found: Iterable[Clip | Refused],
    out: Path,
    limits: Limits,
    form: str = "manifest",
    per_shard: int = 1000,
    in_place: bool = False,
) -> Report:
    """Write clips into `out`: manifest.jsonl with clips/…, shard-000000.tar …, or both; refused.jsonl and report.json.

    With limits.val_share, the same goes into out/train and out/val; equal sentences stay together. in_place: the manifest names
    the files where they are, if they are not encoded anew. Raises DataError if `out` is not empty, or nothing could be taken.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    report, used = Report(), set[str]()
    with open(out / "refused.jsonl", "w", encoding="utf-8") as refusals, Writers(out, form, per_shard) as writers:
        for item in found:
            try:
                if isinstance(item, Refused):
                    raise _Refusal(item.reason)
                split = _split(item, limits.val_share)
                content, ending, seconds = _checked(item, limits)
                writers.of(split).write(_unique(item.key, used), item, content, ending, seconds, in_place)
            except (_Refusal, DataError) as error:
                refusals.write(json.dumps({"key": item.key, "reason": str(error)}, ensure_ascii=False) + "\n")
                report.refused[_kind(str(error))] += 1
                continue
            report.clips[split or "all"] += 1
            report.seconds[split or "all"] += seconds
            report.speakers[item.speaker or "unknown"] += seconds
            report.languages[item.language or "unknown"] += seconds
    (out / "report.json").write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")
    if not report.clips:
        raise DataError(f"no clip could be taken; {out}/refused.jsonl says why")
    return report


class Writer:
    """Writes the clips of one split."""

    def __init__(self, folder: Path, form: str, per_shard: int):
        self.folder, self.form, self.per_shard = folder, form, per_shard
        folder.mkdir(parents=True, exist_ok=True)
        self._clips = 0
        self._tar: tarfile.TarFile | None = None
        self._manifest = None if form == "shards" else (folder / "manifest.jsonl").open("w", encoding="utf-8")

    def write(self, key: str, clip: Clip, content: bytes, ending: str, seconds: float, in_place: bool) -> None:
        """One clip, into the manifest, the shard, or both. content: empty, if the clip's file is kept as it is."""
        about = Row("", clip.text, clip.speaker, clip.language, round(seconds, 4))
        if self._manifest is not None:
            if in_place and not content and isinstance(clip.source, Path):
                file = str(clip.source.absolute())
            else:
                file = f"clips/{key}.{ending}"
                (self.folder / "clips").mkdir(exist_ok=True)
                (self.folder / file).write_bytes(content or _bytes(clip))
            self._manifest.write(_line({**vars(about), "file": file}) + "\n")
        if self.form != "manifest":
            if self._clips % self.per_shard == 0:
                self._close_shard()
                self._tar = tarfile.open(self.folder / f"shard-{self._clips // self.per_shard:06d}.tar", "w")   # noqa: SIM115
            assert self._tar is not None
            parts = {ending: content or _bytes(clip), "json": _line({**vars(about), "file": None}).encode()}
            for part, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{part}")      # no times or owners: the same clips give the same shards
                info.size = len(data)
                self._tar.addfile(info, io.BytesIO(data))
        self._clips += 1

    def close(self) -> None:
        """Finish the files."""
        self._close_shard()
        if self._manifest is not None:
            self._manifest.close()

    def _close_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()


class Writers:
    """The writers of the splits, opened when they are first needed."""

    def __init__(self, out: Path, form: str, per_shard: int):
        self.out, self.form, self.per_shard = out, form, per_shard
        self._writers: dict[str, Writer] = {}

    def of(self, split: str) -> Writer:
        """The writer of a split; of the empty one, out itself."""
        if split not in self._writers:
            self._writers[split] = Writer(self.out / split, self.form, self.per_shard)
        return self._writers[split]

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.close()


class _Refusal(Exception):
    """Why a clip is not taken."""


def _checked(clip: Clip, limits: Limits) -> tuple[bytes, str, float]:
    """New content (empty: keep the file), its ending, and the length in seconds, of a clip that was decoded to its end."""
    if limits.need_text and not clip.text:
        raise _Refusal("no transcript")
    if isinstance(clip.source, Path) and clip.source.suffix == ".g722":
        audio, rate = read_g722(clip.source)
        _admit(audio.shape[1] / rate, float(audio.abs().max()), limits)
        to = limits.sample_rate or rate
        return encode_audio(resample(audio, rate, to), to), "flac", audio.shape[1] / rate
    with open_audio(clip.source, clip.key) as file:
        seconds = file.info.seconds
        _admit(seconds, 1.0, limits)
        _admit(seconds, max(float(block.abs().max()) for block in file.blocks()), limits)
        ending = {"MPEG": "mp3", "MP3": "mp3", "OGG": "ogg", "FLAC": "flac", "WAV": "wav", "WAVEX": "wav"}.get(file.format)
    if limits.sample_rate is None and ending is not None:
        return b"", ending, seconds
    audio, rate = read_audio(clip.source, limits.sample_rate, None if limits.sample_rate is None else 1, name=clip.key)
    return encode_audio(audio, rate), "flac", seconds


def _admit(seconds: float, peak: float, limits: Limits) -> None:
    if seconds < limits.min_seconds:
        raise _Refusal(f"too short: {seconds:.2f} s")
    if seconds > limits.max_seconds:
        raise _Refusal(f"too long: {seconds:.1f} s")
    if peak < SILENT:
        raise _Refusal("silent")


def _split(clip: Clip, share: float) -> str:
    if share <= 0:
        return ""
    words = "".join(filter(str.isalnum, (clip.text or clip.key).lower()))
    return "val" if stable_seed("split", words) / 2**63 < share else "train"


def _unique(key: str, used: set[str]) -> str:
    """The key as a file's name: shards part it from its ending at the first dot."""
    plain = key.replace("/", "_").replace(".", "-")
    name, number = plain, 1
    while name in used:
        number += 1
        name = f"{plain}_{number}"
    used.add(name)
    return name


def _kind(reason: str) -> str:
    """A reason without the clip's name and numbers."""
    for known in ("no transcript", "no plain speech", "too short", "too long"):
        if reason.startswith(known):
            return known
    return reason.split(": ", 1)[-1].split(" (")[0].split(";")[0]


def _bytes(clip: Clip) -> bytes:
    return clip.source if isinstance(clip.source, bytes) else clip.source.read_bytes()


def _line(values: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in values.items() if v is not None}, ensure_ascii=False)
