"""What `toklab tokenize` makes of a data set: shards of codes or latents, and how they are read back.

A folder holds manifest.json (model, source, options, counts, skipped samples, hashes), the shards, and records/ with a small
JSON file for each finished shard. A shard is either

- webdataset's tar: for each sample NAME.codes.npy or NAME.latents.npy and NAME.json, or
- Parquet: for each sample a row with the column codes or latents (nested lists), its shape, and the columns of `FIELDS`.

Codes are (K, T) of a clip or (K, h, w) of an image, uint16 where the codebooks allow it, else int32; latents are (C, T) or
(C, h, w), float32 or float16.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_lab.errors import ConfigError, DataError

MANIFEST, RECORDS = "manifest.json", "records"
FORMATS = {"webdataset": ".tar", "parquet": ".parquet"}
KINDS = ("codes", "latents")
FIELDS: dict[bool, dict[str, type]] = {      # of images (False) and clips (True): what is told of a sample, where it is known
    False: {
        "key": str, "file": str, "text": str, "label": int, "class": str, "speaker": str, "language": str, "source": dict,
        "file_height": int, "file_width": int, "height": int, "width": int, "crop": int, "top": int, "left": int},
    True: {
        "key": str, "file": str, "text": str, "label": int, "class": str, "speaker": str, "language": str, "source": dict,
        "seconds": float, "samples": int, "original_rate": int, "sample_rate": int, "channels": int, "each": int},
}


@dataclass(frozen=True)
class TokenSample:
    """One sample of a shard."""

    kind: str              # codes or latents
    value: np.ndarray      # (K, T), (K, h, w), (C, T) or (C, h, w), in the type that it is stored in
    about: dict[str, Any]  # key, file, and what else of `FIELDS` is known

    @property
    def key(self) -> str:
        """Its name in the source: a path, or the key in a shard."""
        return self.about["key"]

    @property
    def tensor(self) -> Tensor:
        """What a tokenizer's `decode` takes, without the axis of the batch: codes as int64, latents as float32."""
        return torch.from_numpy(self.value.astype(np.int64 if self.kind == "codes" else np.float32))


def read_tokens(
    folder: str | Path, shards: Sequence[str] | None = None, unfinished: bool = False
) -> Iterator[TokenSample]:
    """The samples of a folder that `toklab tokenize` made, in the order of its source.

    shards: only those of these file names. unfinished: read what there is of an interrupted run. Raises DataError if the folder
    is none, is unfinished, or a shard is damaged.
    """
    folder = Path(folder)
    manifest = read_token_manifest(folder)
    if manifest["state"] != "finished" and not unfinished:
        raise DataError(f"{folder} is unfinished: run the same toklab tokenize again, or read it with unfinished=True")
    for name in token_shards(folder) if shards is None else shards:
        yield from read_token_shard(folder / name)


def read_token_manifest(folder: str | Path) -> dict[str, Any]:
    """manifest.json of such a folder. Raises DataError if it is none."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["made_by"] == "toklab tokenize" and manifest["state"] in ("finished", "unfinished"):
            return manifest
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    raise DataError(f"{folder} is not a folder that toklab tokenize made")


def token_shards(folder: str | Path) -> list[str]:
    """File names of the finished shards, in order. Raises DataError."""
    manifest = read_token_manifest(folder)
    if manifest["state"] == "finished":
        return list(manifest["files"])
    return sorted(json.loads(path.read_text())["file"] for path in (Path(folder) / RECORDS).glob("*.json"))


def read_token_shard(path: str | Path) -> Iterator[TokenSample]:
    """The samples of one shard, .tar or .parquet. Raises DataError if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no shard {path}")
    read = _read_parquet if path.suffix == FORMATS["parquet"] else _read_tar
    try:
        yield from read(path)
    except (OSError, tarfile.TarError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path} is damaged, or no shard of toklab tokenize ({type(error).__name__}: {error})") from error


def _read_tar(path: Path) -> Iterator[TokenSample]:
    with open(path, "rb") as file:      # a truncated archive would seem to end early
        file.seek(max(0, path.stat().st_size - 1024))
        if file.read() != bytes(1024):
            raise ValueError("it is truncated")
    with tarfile.open(path, "r|") as tar:
        name, kind, value = "", "", np.empty(0)
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                raise ValueError(f"{member.name} is no file")
            stem, _, ending = member.name.removesuffix(".npy").rpartition(".")
            if ending in KINDS:
                name, kind, value = stem, ending, np.load(io.BytesIO(content.read()), allow_pickle=False)
            elif ending == "json" and stem == name:
                yield TokenSample(kind, value, json.loads(content.read()))
            else:
                raise ValueError(f"{member.name} was not expected")


def _read_parquet(path: Path) -> Iterator[TokenSample]:
    pa, pq = import_parquet()
    try:
        with pq.ParquetFile(path) as file:
            kind = next(kind for kind in KINDS if kind in file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=64):
                rows = batch.drop_columns([kind]).to_pylist()
                for values, row in zip(batch.column(kind), rows):
                    flat = values.values
                    while pa.types.is_list(flat.type):
                        flat = flat.flatten()
                    value = flat.to_numpy(zero_copy_only=False).reshape(row.pop("shape"))
                    about = {name: said for name, said in row.items() if said is not None}
                    if "source" in about:
                        about["source"] = json.loads(about["source"])
                    yield TokenSample(kind, value, about)
    except (StopIteration, pa.ArrowException) as error:
        raise ValueError(str(error) or "it has neither codes nor latents") from error


def import_parquet() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises ConfigError that says how to install them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'tokenizers-lab[parquet]'") from None
    return pyarrow, pyarrow.parquet
