"""Webdataset shards: reading them from anywhere, and endless, deterministic, resumable streams of their samples.

All streams of a run (ranks × workers) share one endless sequence of shards, epoch after epoch, each epoch in an order of its own.
Counted from the start of the run, its shards are turns: turn = epoch × shards + place. Stream s of S takes the turns s, s + S,
s + 2S, …, so that every shard is read once an epoch and no stream gets ahead. A stream stands at (epoch, place, index inside the
shard). Inside a shard, blocks of `shuffle_buffer` samples are permuted. To resume, a stream skips, without decoding, inside the
one shard where it stood.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.listed import validation_batch
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.reading import Raw, Reader
from tokenizers_lab.data.sampling import view_numbers
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import DataError

ATTEMPTS = 4             # times that a remote shard is opened before the run ends
MAX_BAD_RUN = 1000       # unreadable samples in a row that end the run whatever bad_fraction says
MAX_UNWANTED_RUN = 1_000_000   # samples in a row that the config leaves out that end the run
READ_TIMEOUT = 60.0      # seconds without a byte from an HTTP server

T = TypeVar("T")


def shard_samples(url: str, start: int = 0, parts: tuple[str, ...] | None = None) -> Iterator[dict[str, Any]]:
    """The raw samples of a shard from index `start` on: {"__key__", "jpg", "cls", …}, by the endings in `parts`; values bytes.

    A remote shard whose connection breaks is opened again and skipped to where it broke. Raises DataError if it is missing or
    damaged.
    """
    remote = "://" in url and not url.startswith("file://")
    done = 0
    for attempt in range(ATTEMPTS):
        try:
            for index, sample in enumerate(_read_tar(url, parts)):
                if index >= done:
                    done = index + 1
                    if index >= start:
                        yield sample
            return
        except ImportError as error:
            raise DataError(f"shard {url}: {error}") from error
        except Exception as error:   # tarfile's, zlib's, and those of each remote store
            cause: BaseException = error
            while cause.__cause__ is not None:   # fsspec raises FileNotFoundError for every refusal, from the real one
                cause = cause.__cause__
            if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
                raise DataError(f"shard {url}: there is no such file") from error
            if not remote or attempt + 1 == ATTEMPTS:
                advice = "check the connection and the file" if remote else "copy it again"
                trouble = f"is damaged or unreachable after sample {done} ({_text(cause)})"
                raise DataError(f"shard {url} {trouble}; {advice}") from error
            time.sleep(0.5 * 4**attempt)


def sample_name(url: str, sample: dict[str, Any]) -> str:
    """What batches and the quarantine list call a sample: shard and key."""
    return f"{_basename(url)}/{sample['__key__']}"


class ShardStream:
    """One of the run's streams: its samples from a position on, for ever."""

    def __init__(
        self, urls: Sequence[str], seed: int, shuffle_buffer: int, stream: int, streams: int, parts: tuple[str, ...] | None = None
    ):
        self.urls, self.seed, self.buffer, self.stream, self.streams = urls, seed, shuffle_buffer, stream, streams
        self.parts = parts

    def samples(self, epoch: int, place: int, index: int) -> Iterator[tuple[str, dict[str, Any], list[int]]]:
        """From a position on: the shard, the raw sample, and the position after it. Raises DataError."""
        first = index % self.buffer
        for url, now, at, start, block in self.blocks(epoch, place, index - first):
            order = Draw(self.seed, step=now).within(f"{at}/{start}").permutation("block", len(block)).tolist()
            for i in range(first, len(block)):
                yield url, block[order[i]], [now, at, start + i + 1]
            first = 0

    def blocks(self, epoch: int, place: int, index: int) -> Iterator[tuple[str, int, int, int, list[dict[str, Any]]]]:
        """From the first sample of a block on: shard, epoch, place, index of the first sample, and samples. Raises DataError."""
        for url, turn, start, block in read_ahead(self._blocks(epoch * len(self.urls) + place, index)):
            yield url, *divmod(turn, len(self.urls)), start, block

    def _blocks(self, turn: int, start: int) -> Iterator[tuple[str, int, int, list[dict[str, Any]]]]:
        """Shard, turn, index of its first sample, and samples of each block from a position on."""
        n, in_epoch, order = len(self.urls), -1, list[int]()
        empty = 0
        while empty < n:
            epoch, place = divmod(turn, n)
            if epoch != in_epoch:
                in_epoch, order = epoch, Draw(self.seed, step=epoch).permutation("shards", n).tolist()
            url = self.urls[order[place]]
            empty += start == 0
            reader = shard_samples(url, start, self.parts)
            while block := list(islice(reader, self.buffer)):
                yield url, turn, start, block
                start += len(block)
                empty = 0
            turn, start = turn + self.streams, 0
        raise DataError(f"{n} shards in a row hold no sample; what is read of them: {', '.join(self.parts or ('all',))}")


class ShardBatches(IterableDataset):
    """Training batches of a rank. Worker w continues the stream whose batch is due, so that the order survives a resume.

    positions: epoch, place and index of each of the rank's streams; batches: how many all of them have given together.
    """

    def __init__(
        self,
        urls: Sequence[str],
        reader: Reader,
        shuffle_buffer: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        positions: list[list[int]],
        batches: int,
    ):
        self.urls, self.reader, self.shuffle_buffer, self.batch_size, self.seed = urls, reader, shuffle_buffer, batch_size, seed
        self.rank, self.world, self.positions, self.batches = rank, world, positions, batches

    def __iter__(self) -> Iterator[Fetched]:
        info = get_worker_info()
        workers = len(self.positions)
        local = ((info.id if info else 0) + self.batches) % workers
        number, streams = self.rank * workers + local, self.world * workers
        stream = ShardStream(self.urls, self.seed, self.shuffle_buffer, number, streams, self.reader.parts)
        try:
            yield from self._batches(stream, local)
        except DataError as error:
            yield Fetched(error=str(error))

    def _batches(self, stream: ShardStream, local: int) -> Iterator[Fetched]:
        views, keys, bad = [], [], list[Bad]()
        in_a_row = unwanted = 0
        for url, sample, position in stream.samples(*self.positions[local]):
            name = sample_name(url, sample)
            try:
                raw = self.reader.from_shard(sample, name)
                if not self.reader.wants(raw):
                    unwanted += 1
                    if unwanted == MAX_UNWANTED_RUN:
                        yield Fetched(bad=bad, error=f"{unwanted:,} {self.reader.noun} in a row are left out; widen the limits")
                        return
                    continue
                views.append(self.reader.training(raw, view_numbers(self.seed, position[0], name)))
            except DataError as error:
                bad.append(Bad(name, str(error)))
                in_a_row += 1
                if in_a_row == MAX_BAD_RUN:
                    yield Fetched(bad=bad, error=f"{MAX_BAD_RUN} samples in a row could not be read; the last one: {error}")
                    return
                continue
            in_a_row = unwanted = 0
            keys.append(name)
            if len(views) == self.batch_size:
                batch = self.reader.assemble(views, keys)
                batch.bad, batch.stream, batch.position = bad, local, position
                yield batch
                views, keys, bad = [], [], []


class ShardValidation(IterableDataset):
    """Validation batches of a rank, in order: the samples whose place is rank modulo world. No padding.

    The number of samples is not known beforehand: every worker reads all shards and decodes only its own samples.
    """

    def __init__(
        self, urls: Sequence[str], reader: Reader, limit: int | None, batch_size: int, rank: int, world: int, skip: bool = False
    ):
        """skip: see `ListedValidation`."""
        self.urls, self.reader, self.limit, self.batch_size, self.rank, self.world = urls, reader, limit, batch_size, rank, world
        self.skip = skip

    def __iter__(self) -> Iterator[Fetched]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            mine = islice(islice(self._everything(), self.limit), self.rank, None, self.world)
            number = 0
            while raw := list(islice(mine, self.batch_size)):
                if number % workers == worker:   # DataLoader takes from its workers in turn
                    yield validation_batch(self.reader, raw, self.skip)
                number += 1
        except DataError as error:
            yield Fetched(error=str(error))

    def _everything(self) -> Iterator[Raw]:
        empty = True
        for url in self.urls:
            for sample in shard_samples(url, parts=self.reader.parts):
                raw = self.reader.from_shard(sample, sample_name(url, sample))
                if self.reader.wants(raw):
                    empty = False
                    yield raw
        if empty:
            raise DataError(f"the validation shards hold no sample; what is read of them: {', '.join(self.reader.parts)}")


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread fetches the next one while this one is in use."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item   # type: ignore[misc]


def fingerprint(urls: Sequence[str]) -> str:
    """A hash of the shards' names, without their folders: moving them all to another place is no change."""
    return blake2b("\n".join(map(_basename, urls)).encode(), digest_size=8).hexdigest()


def _read_tar(url: str, parts: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    import fsspec
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def wanted(name: str) -> bool:
        return parts is None or name.rpartition(".")[2].lower() in parts

    with fsspec.open(url, "rb", **_options(url)) as stream:
        files = tar_file_expander(iter([{"url": url, "stream": stream}]), select_files=wanted)
        yield from group_by_keys(files)


def _options(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    # fsspec's default ends a request after 5 minutes, but training reads a shard as slowly as it learns from it.
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT, sock_read=READ_TIMEOUT)}}


def _text(error: BaseException) -> str:
    # webdataset appends the stream and the URL to an exception's arguments
    message = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return f"{type(error).__name__}: {' '.join(message.split())}"


def _basename(url: str) -> str:
    return url.split("?")[0].rpartition("/")[2]
