"""The safetensors files that `toklab encode` writes: latents or codes, and in the header the model and what was encoded."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_lab.errors import InputError


@dataclass(frozen=True)
class Encoded:
    """One such file."""

    file: str
    tensors: dict[str, Tensor]
    header: dict[str, str]       # system, model_sha256, file, and the geometry or the sound


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


def write_encoded(target: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write tensors on the CPU with their header."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, target, metadata=header)


def check_maker(encoded: Encoded, sha256: str) -> None:
    """Raise InputError if the file was encoded by other weights than those of that SHA-256."""
    made_by = encoded.header["model_sha256"]
    if made_by != sha256:
        whose = f"{encoded.header['system']}, SHA-256 {made_by[:12]}, not {sha256[:12]}"
        raise InputError(f"{encoded.file} was encoded by other weights ({whose}); --any-model decodes it all the same")
