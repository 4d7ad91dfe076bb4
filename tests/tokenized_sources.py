"""Small networks and sources for the tests of `toklab tokenize`."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from speech_networks import LM, network

from tokenizers_lab.cli import main as cli
from tokenizers_lab.hub import build_tokenizer
from tokenizers_lab.models.rectok.config import ModelConfig, ViTConfig

IMAGES = ModelConfig(image_size=16, patch=8, latent_channels=6, encoder=ViTConfig(48, 1, 4), decoder=ViTConfig(64, 2, 4))
NAMES = {"lm_spt": "12.5 Hz", "dm_codec": "no LSTM"}      # of speech_networks


def save_network(system: str, folder: Path) -> str:
    """A saved folder of a small network whose codes vary."""
    torch.manual_seed(0)
    tokenizer = network(system, NAMES[system]) if system in NAMES else build_tokenizer(system, IMAGES)
    return str(tokenizer.save_pretrained(folder))


def save_other(folder: Path) -> str:
    """Another LM-SPT."""
    torch.manual_seed(1)
    return str(build_tokenizer("lm_spt", LM).save_pretrained(folder))


def clip(samples: int, seed: int, rate: int = 16_000, kind: str = "FLAC", channels: int = 1) -> bytes:
    """A file of noise that rises and falls."""
    rng = np.random.default_rng(seed)
    wave = rng.normal(0, 0.1, (samples, channels)) * np.sin(np.arange(samples) / 3000)[:, None]
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.clip(-1, 1), rate, format=kind)
    return buffer.getvalue()


def picture(seed: int, width: int = 24, height: int = 20) -> bytes:
    """A PNG of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(root: Path, n: int, bad: tuple[int, ...] = ()) -> Path:
    """n images in two class folders; those in `bad` are no images."""
    for i in range(n):
        path = root / f"class {i % 2}" / f"{i}.v1.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image" if i in bad else picture(i))
    return root


def write_clips(root: Path, lengths: list[int], rate: int = 16_000) -> Path:
    """Clips of these many samples, and a manifest of them."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, samples in enumerate(lengths):
        (root / f"{i}.flac").write_bytes(clip(samples, i, rate))
        said = {"text": f"Clip {i}, é.", "speaker": f"s{i % 2}", "language": "en", "label": f"w{i % 3}"}
        rows.append({"file": f"{i}.flac", **said})
    manifest = root / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def write_shards(root: Path, sizes: list[int], speech: bool, bad: tuple[int, ...] = ()) -> Path:
    """Shards 0.tar … of so many samples each, numbered through all of them."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for _ in range(size):
                good = clip(3000 + 700 * (number % 5), number) if speech else picture(number)
                parts = {"flac" if speech else "png": b"nothing" if number in bad else good}
                parts["json"] = json.dumps({"text": f"Sample {number}.", "speaker": f"s{number % 2}", "dnsmos": 3.5}).encode()
                parts["cls"] = str(number % 3).encode()
                for ending, content in parts.items():
                    info = tarfile.TarInfo(f"set/{number:05d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    return root


def tokenize(*words: object) -> int:
    """Run the command in this process."""
    return cli.call(["tokenize", *map(str, words), "--device", "cpu"])


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their relative names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
