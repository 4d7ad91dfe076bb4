"""One output shard, written aside: the same samples give the same bytes, whenever and wherever."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokenizers_lab.data.tokens import FIELDS, TokenSample, import_parquet
from tokenizers_lab.tokenizing.plan import member_name

ROWS, BYTES = 1000, 64 << 20      # of a row group of Parquet: as soon as one of both is reached


class ShardWriter(Protocol):
    """Writes a shard under the draft's name."""

    def add(self, samples: Sequence[TokenSample]) -> None:
        """Append samples. Raises OSError."""

    def close(self) -> None:
        """Write what is left, and sync it to the disk. Raises OSError."""

    def discard(self) -> None:
        """Close without an error, whatever has happened."""


def open_writer(draft: Path, form: str, kind: str, speech: bool, dtype: str, depth: int, notes: dict[str, str]) -> ShardWriter:
    """A writer of that format: webdataset or parquet.

    kind, dtype, depth: of the values (codes or latents, numpy's name, axes). notes: Parquet's own metadata.
    Raises ConfigError where Parquet is not installed.
    """
    return TarShard(draft) if form == "webdataset" else ParquetShard(draft, kind, speech, dtype, depth, notes)


class TarShard:
    """webdataset's tar."""

    def __init__(self, draft: Path):
        self.file = open(draft, "wb")      # noqa: SIM115 open until `close`
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.PAX_FORMAT)      # noqa: SIM115
        self.taken: set[str] = set()

    def add(self, samples: Sequence[TokenSample]) -> None:
        """See ShardWriter."""
        for sample in samples:
            name = member_name(sample.key, self.taken)
            values = io.BytesIO()
            np.save(values, sample.value, allow_pickle=False)
            self.put(f"{name}.{sample.kind}.npy", values.getvalue())
            self.put(f"{name}.json", json.dumps(sample.about, sort_keys=True).encode())

    def put(self, name: str, content: bytes) -> None:
        """One file, with nothing in its header that depends on who writes it, or when."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self.tar.addfile(info, io.BytesIO(content))

    def close(self) -> None:
        """See ShardWriter."""
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def discard(self) -> None:
        """See ShardWriter."""
        with suppress(OSError):
            self.file.close()


class ParquetShard:
    """Parquet: what is told of a sample in columns, its values as lists of lists."""

    def __init__(self, draft: Path, kind: str, speech: bool, dtype: str, depth: int, notes: dict[str, str]):
        self.pa, pq = import_parquet()
        self.kind, self.dtype, self.fields = kind, np.dtype(dtype), FIELDS[speech]
        nested = self.pa.from_numpy_dtype(self.dtype)
        for _ in range(depth):
            nested = self.pa.list_(nested)
        types = {str: self.pa.string(), int: self.pa.int64(), float: self.pa.float64(), dict: self.pa.string()}
        columns = [(name, types[type_]) for name, type_ in self.fields.items()]
        self.schema = self.pa.schema([columns[0], (kind, nested), ("shape", self.pa.list_(self.pa.int32())), *columns[1:]], notes)
        self.depth = depth
        self.file = open(draft, "wb")      # noqa: SIM115 open until `close`
        self.writer = pq.ParquetWriter(self.file, self.schema, compression="zstd")
        self.held: list[TokenSample] = []
        self.bytes = 0

    def add(self, samples: Sequence[TokenSample]) -> None:
        """See ShardWriter."""
        for sample in samples:
            self.held.append(sample)
            self.bytes += sample.value.nbytes
            if len(self.held) == ROWS or self.bytes >= BYTES:
                self.write_group()

    def write_group(self) -> None:
        """What is held as a row group."""
        columns: dict[str, Any] = {
            self.kind: nested_lists(self.pa, [sample.value for sample in self.held], self.depth),
            "shape": [list(sample.value.shape) for sample in self.held]}
        for name, type_ in self.fields.items():
            values = [sample.about.get(name) for sample in self.held]
            columns[name] = [column_value(value, type_) for value in values]
        self.writer.write_table(self.pa.Table.from_pydict(columns, schema=self.schema))
        self.held, self.bytes = [], 0

    def close(self) -> None:
        """See ShardWriter."""
        if self.held:
            self.write_group()
        self.writer.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def discard(self) -> None:
        """See ShardWriter."""
        with suppress(OSError, ValueError):
            self.writer.close()
        with suppress(OSError):
            self.file.close()


def nested_lists(pa: Any, values: list[np.ndarray], depth: int) -> Any:
    """Arrays of `depth` axes, of any shapes, as one Arrow array of nested lists, without a Python object for each number."""
    made = pa.array(np.concatenate([value.reshape(-1) for value in values]))
    for axis in reversed(range(depth)):
        sizes = np.concatenate([np.full(int(np.prod(value.shape[:axis])), value.shape[axis]) for value in values])
        made = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), made)
    return made


def column_value(value: Any, type_: type) -> Any:
    """A value as its column takes it; names of files may hold bytes that are no text."""
    if type_ is dict:
        return None if value is None else json.dumps(value, sort_keys=True)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
