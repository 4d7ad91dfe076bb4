"""Teachers' features on disk: computed once by `toklab features`, read by the loader in place of running the teachers.

A folder holds features.json and, for each name (such as sm, lm), a folder <name>-<hash of its teacher> with one safetensors file
a crop: .../<two digits>/<hash of clip, start, length, rate, text>.safetensors. Another teacher, another crop or another text is
another key, so that nothing is overwritten and an old folder stays of use.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.errors import ConfigError, DataError

INDEX = "features.json"
FORMAT = 1
PARTS = 8            # parts of a crop whose loudness tells whether the audio is still the same
RELATIVE, ABSOLUTE = 2e-2, 2e-4      # differences of it that count as the same: resamplers of other versions differ by less


@dataclass(frozen=True)
class Crop:
    """A stretch of a clip, as training hears it."""

    key: str             # the clip's, as batches have it
    start: int           # samples at `rate`
    samples: int         # its length with the zeros behind a shorter clip
    rate: int            # Hz
    text: str | None     # the clip's transcript, where it is known

    def name(self) -> str:
        """The hash by which its features are stored."""
        return digest([self.key, self.start, self.samples, self.rate, self.text])


@dataclass
class FeatureSource:
    """What decides the features of one name: an objective's `feature_sources` gives it for each name of its `precompute`."""

    settings: dict[str, Any]                                      # of the config, JSON-able: source, layer, hop
    networks: Sequence[nn.Module] = field(default_factory=list)   # whose weights count, with `provenance` where they have it

    def identity(self) -> dict[str, Any]:
        """The settings with the SHA-256 of the weights and where these are from."""
        found = [getattr(network, "provenance", type(network).__name__) for network in self.networks]
        return {"settings": self.settings, "weights_sha256": [network_sha256(network) for network in self.networks],
                "provenance": [str(p) for p in found]}


class FeatureFolder:
    """Features of one teacher."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path

    def file(self, crop: Crop) -> Path:
        """Where the features of a crop are, or would be."""
        digits = crop.name()
        return self.path / digits[:2] / f"{digits[2:]}.safetensors"

    def read(self, crop: Crop, audio: Tensor) -> Tensor:
        """Features (frames, D) float32 of a crop, whose audio is (channels, ≤ crop.samples).

        Raises DataError if they are not there, damaged, or were made of another sound.
        """
        path = self.file(crop)
        where = f"'{self.name}' of {crop.key} from sample {crop.start} on"
        try:
            with safe_open(path, "pt") as file:
                about, features = file.metadata() or {}, file.get_tensor("features")
            loudness = torch.tensor(json.loads(about["loudness"]))
            whole = checksum(features) == int(about["checksum"])
        except FileNotFoundError:
            raise DataError(f"there are no features {where} in {self.path}: run `toklab features` with this config") from None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DataError(f"the features {where} are damaged ({error}): run `toklab features` again") from None
        if not whole:
            raise DataError(f"the features {where} are damaged (another checksum): run `toklab features` again")
        if not torch.allclose(loudness_of(audio, crop.samples), loudness, RELATIVE, ABSOLUTE):
            raise DataError(f"the features {where} were made of another sound: run `toklab features` again")
        return features.float()

    def whole(self, crop: Crop, audio: Tensor) -> bool | None:
        """Whether a crop's features are there and of this audio; None if they are there but cannot be used."""
        if not self.file(crop).exists():
            return False
        try:
            self.read(crop, audio)
        except DataError:
            return None
        return True

    def write(self, crop: Crop, audio: Tensor, features: Tensor) -> None:
        """Store features (frames, D), under another name first: nobody ever sees half a file. Raises DataError."""
        path = self.file(crop)
        features = features.detach().cpu().contiguous()
        about = {"key": crop.key, "start": str(crop.start), "samples": str(crop.samples), "rate": str(crop.rate),
                 "checksum": str(checksum(features)), "loudness": json.dumps(loudness_of(audio, crop.samples).tolist())}
        write_whole(path, save({"features": features}, about))


def digest(value: Any) -> str:
    """32 hexadecimal digits of a JSON-able value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def checksum(features: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)


def network_sha256(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a network's parameters and buffers."""
    made = hashlib.sha256()
    for name, value in sorted({**dict(network.named_parameters()), **dict(network.named_buffers())}.items()):
        made.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        made.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()


def loudness_of(audio: Tensor, samples: int) -> Tensor:
    """(PARTS,) root mean square of the parts of audio (channels, n), with zeros behind it up to `samples`."""
    padded = F.pad(audio.float().mean(0), (0, max(samples - audio.shape[-1], 0)))
    return torch.stack([part.square().mean().sqrt() if len(part) else part.sum() for part in padded.tensor_split(PARTS)])


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all. Raises DataError if it cannot be written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({error.strerror or error})") from error


def make_features(folder: Path, sources: Mapping[str, FeatureSource], data: dict[str, Any]) -> dict[str, FeatureFolder]:
    """Folders for the features of these teachers, and the index that names them from now on. data: how the crops are made."""
    identities = {name: source.identity() for name, source in sources.items()}
    entries = {name: {"folder": f"{name}-{digest(identity)[:12]}", **identity} for name, identity in identities.items()}
    content = {"format": FORMAT, "data": data, "features": entries}
    write_whole(folder / INDEX, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return {name: FeatureFolder(name, folder / str(entry["folder"])) for name, entry in entries.items()}


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of features. Raises ConfigError if it holds none."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConfigError(f"{folder / INDEX} has the format {content['format']}, this version reads {FORMAT}: make it anew")
        return content
    except FileNotFoundError:
        raise ConfigError(f"data.features: {folder} holds no features; make them by `toklab features CONFIG --out DIR`") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"data.features: {folder / INDEX} cannot be read ({error}): run `toklab features` again") from None


def open_features(folder: Path, data: dict[str, Any]) -> dict[str, FeatureFolder]:
    """The folders of a folder of features by name. Raises ConfigError if there is none, or for crops made otherwise."""
    index = read_index(folder)
    for option, now in data.items():
        if index["data"].get(option) != now:
            raise ConfigError(f"the features in {folder} are for data.{option}={index['data'].get(option)}, not {now}: "
                              "change the option, or run `toklab features` with this config")
    return {name: FeatureFolder(name, folder / entry["folder"]) for name, entry in index["features"].items()}


def cached_provenance(folder: Path) -> dict[str, str]:
    """Where the teachers of a folder's features are from, by name. Raises ConfigError if it holds none."""
    return {name: "; ".join(entry["provenance"]) for name, entry in read_index(folder)["features"].items()}


def check_sources(folder: Path, sources: Mapping[str, FeatureSource]) -> None:
    """Raise ConfigError unless the features in a folder are those that the config's teachers would give, as far as their
    settings tell; weights are compared too where the networks are built."""
    index = read_index(folder)["features"]
    for name, source in sources.items():
        if name not in index:
            raise ConfigError(f"{folder} holds no features '{name}', which this config needs: run `toklab features` with it")
        for option, now in source.settings.items():
            was = index[name]["settings"].get(option)
            if was != now:
                raise ConfigError(f"the features '{name}' in {folder} were made with {option} {was}, the config has {now}: "
                                  "run `toklab features` with this config")
        if source.networks and [network_sha256(n) for n in source.networks] != index[name]["weights_sha256"]:
            raise ConfigError(f"the features '{name}' in {folder} are of other weights than those of the config's teacher: "
                              "run `toklab features` with this config")


def folder_bytes(folder: Path) -> int:
    """Bytes of the files under a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
