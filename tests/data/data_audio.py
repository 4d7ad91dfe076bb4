"""Sounds that the data tests make for themselves."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile

from tokenizers_lab.settings import SpeechDataConfig


def sound(samples: int, channels: int = 1, seed: int = 0, rate: int = 16_000) -> np.ndarray:
    """A few sines of random pitch, below 0.9: float32 (samples, channels)."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples)[:, None] / rate
    parts = [np.sin(2 * np.pi * (rng.uniform(80, 3000, channels) * t + rng.uniform(size=channels))) for _ in range(3)]
    return (0.3 * np.sum(parts, axis=0)).astype(np.float32)


def encoded(values: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """The bytes of a file of this kind."""
    buffer = io.BytesIO()
    soundfile.write(buffer, values, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def write_clips(root: Path, n: int, bad: tuple[int, ...] = (), rate: int = 16_000, lengths: tuple[int, ...] = (8000,)) -> Path:
    """n clips 0.flac … of which those in `bad` are no sound; their lengths follow one another in a circle."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        data = encoded(sound(lengths[i % len(lengths)], seed=i, rate=rate), rate, "FLAC")
        (root / f"{i}.flac").write_bytes(b"no sound" if i in bad else data)
    return root


def write_manifest(path: Path, rows: list[dict[str, object]]) -> Path:
    """A JSONL manifest."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_shards(root: Path, sizes: list[int], bad: tuple[int, ...] = (), kind: str = "MP3", rate: int = 24_000) -> Path:
    """Shards 0.tar … in Emilia's layout: a JSON file and a sound file for each clip, numbered through all shards."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for _ in range(size):
                key = f"EN_B00000_S{number:05d}_W000000"
                about = {"id": key, "wav": f"EN_B00000/{key}.mp3", "text": f"Clip {number}.", "duration": 0.5,
                         "speaker": f"EN_B00000_S{number % 3:05d}", "language": "en", "dnsmos": 3.3}
                audio = b"no sound" if number in bad else encoded(sound(rate // 2, seed=number, rate=rate), rate, kind)
                for ending, data in (("json", json.dumps(about).encode()), (kind.lower(), audio)):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return root


def speech_config(train: object, **options: object) -> SpeechDataConfig:
    """A small training config over a source."""
    return SpeechDataConfig(**{"train": str(train), "segment_seconds": 0.25, "workers": 0, "shuffle_buffer": 5, **options})   # type: ignore[arg-type]
