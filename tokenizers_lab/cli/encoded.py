"""The safetensors files that `toklab encode` writes: latents or codes, and in the header the model and what was encoded.

The samples that `toklab tokenize` wrote are read in the same form."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_lab.data.tokens import FORMATS, read_token_manifest, read_token_shard, token_shards
from tokenizers_lab.errors import InputError


@dataclass(frozen=True)
class Encoded:
    """One such file."""

    file: str
    tensors: dict[str, Tensor]
    header: dict[str, str]       # system, model_sha256, file, and the geometry or the sound
    key: str | None = None       # its name in a data set that `toklab tokenize` encoded


def read_encoded(file: str) -> Encoded:
    """A file of `toklab encode`. Raises InputError if it is none, or damaged."""
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}      # noqa: SIM118 (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is not a file that toklab encode wrote, or is damaged ({error})") from error
    missing = sorted({"system", "model_sha256", "file"} - header.keys())
    if missing:
        raise InputError(f"{file} is not a file that toklab encode wrote: its header has no {missing[0]}")
    return Encoded(file, tensors, header)


def is_tokenized(source: str) -> bool:
    """Whether that is a folder of `toklab tokenize`, or one of its shards, rather than a file of `toklab encode`."""
    path = Path(source)
    return path.is_dir() or path.suffix in FORMATS.values()


def count_encoded(files: Sequence[str]) -> int:
    """How many samples files and folders hold together. Raises DataError."""
    count = 0
    for file in files:
        if is_tokenized(file):
            folder, shards = _tokenized(file)
            told = read_token_manifest(folder).get("files", {})
            count += sum(told.get(name, {}).get("samples", 1) for name in shards)
        else:
            count += 1
    return count


def read_all(files: Sequence[str]) -> Iterator[Encoded]:
    """What each file of `toklab encode`, and each sample of folders and shards of `toklab tokenize`, holds.

    Raises InputError, DataError.
    """
    for file in files:
        if not is_tokenized(file):
            yield read_encoded(file)
            continue
        folder, shards = _tokenized(file)
        manifest = read_token_manifest(folder)
        made_by = {name: manifest[name] for name in ("system", "model_sha256")}
        for name in shards:
            for sample in read_token_shard(folder / name):
                header = {key: str(value) for key, value in sample.about.items()}
                yield Encoded(f"{folder / name}: {sample.key}", {sample.kind: sample.tensor}, {**header, **made_by}, sample.key)


def _tokenized(source: str) -> tuple[Path, list[str]]:
    """The folder and the shards that are meant."""
    path = Path(source)
    return (path, token_shards(path)) if path.is_dir() else (path.parent, [path.name])


def write_encoded(target: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write tensors on the CPU with their header."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, target, metadata=header)


def check_maker(encoded: Encoded, sha256: str) -> None:
    """Raise InputError if the file was encoded by other weights than those of that SHA-256."""
    made_by = encoded.header["model_sha256"]
    if made_by != sha256:
        whose = f"{encoded.header['system']}, SHA-256 {made_by[:12]}, not {sha256[:12]}"
        raise InputError(f"{encoded.file} was encoded by other weights ({whose}); --any-model decodes it all the same")
