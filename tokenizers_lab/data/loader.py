"""The doors to the data: endless training batches with their state, and ordered validation batches."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, overload

from torch.utils.data import Dataset

from tokenizers_lab.data.batch import ImageBatch, SpeechBatch
from tokenizers_lab.data.buckets import Plan, PlannedBatches, PlannedShardBatches, plan_listing
from tokenizers_lab.data.decode import read_image
from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.images import ImageReader
from tokenizers_lab.data.latents import LatentReader
from tokenizers_lab.data.listed import ListedBatches, ListedValidation
from tokenizers_lab.data.processes import Fetcher
from tokenizers_lab.data.quarantine import Bad, Quarantine
from tokenizers_lab.data.reading import Listing, Reader
from tokenizers_lab.data.sampling import spread
from tokenizers_lab.data.shards import ShardBatches, ShardValidation, fingerprint
from tokenizers_lab.data.sources import Source, resolve_source, sample_path
from tokenizers_lab.data.speech import FixedCrops, SpeechReader
from tokenizers_lab.data.transforms import fit_image
from tokenizers_lab.errors import CheckpointError, ConfigError, DataError
from tokenizers_lab.settings import ImageDataConfig, LatentDataConfig, SpeechDataConfig

__all__ = ["Loader", "build_loader", "fit_image", "fixed_crops", "len_batches", "len_samples", "read_image", "sample_path",
           "validation_batches"]

logger = logging.getLogger(__name__)

DataConfig = ImageDataConfig | SpeechDataConfig
OnBad = Callable[[Bad], None]
READERS: dict[type, Callable[[Any], Reader]] = {
    ImageDataConfig: ImageReader, LatentDataConfig: LatentReader, SpeechDataConfig: SpeechReader}
WORTH_WORKERS = 128      # validation samples below which starting processes costs more than it saves


class Loader:
    """Yields (batch, state) for ever. `state` is JSON-able; build_loader continues after that batch when it is given."""

    def __init__(self, fetcher: Fetcher, quarantine: Quarantine, state: dict[str, Any]):
        self._fetcher, self._quarantine, self._state = fetcher, quarantine, state
        self._waited = 0.0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[Any, dict[str, Any]]:
        """The next batch. Raises DataError if the data ends the run."""
        begin = time.perf_counter()
        fetched = next(self._fetcher)
        try:
            self._quarantine.count(len(fetched.keys), fetched.bad)
            if fetched.error:
                raise DataError(fetched.error)
        except DataError:
            self.close()
            raise
        self._advance(fetched)
        batch = fetched.batch()
        self._waited += time.perf_counter() - begin
        return batch, {**self._state, "positions": list(self._state["positions"])}

    def wait_seconds(self) -> float:
        """Seconds that the consumer waited for batches since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the decoding processes."""
        self._fetcher.close()

    def _advance(self, fetched: Fetched) -> None:
        self._state.update(batches=self._state["batches"] + 1, seen=self._quarantine.seen, bad=self._quarantine.bad)
        if fetched.position is not None:
            self._state["positions"][fetched.stream] = fetched.position


def build_loader(
    cfg: DataConfig,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    state: dict[str, Any] | None = None,
    quarantine: Path | None = None,
) -> Loader:
    """Endless training batches of one rank: ImageBatch, LatentBatch or SpeechBatch, as the config's type and the source say.

    batch_size: samples of a micro-batch of this rank; with data.batch_frames the most that there can be. start_step:
    micro-steps that were already taken. state: as yielded with the last of them; shards need it, for folders it only carries on
    the counts of unreadable samples (and stands in for a start_step of 0). quarantine: JSONL file that lists unreadable
    samples; all ranks may share it.
    Raises ConfigError, DataError if there are no data, CheckpointError if `state` does not fit the data or the processes.
    """
    reader = checked_reader(cfg)
    reader.prepare()
    source = find_source(reader, cfg.train, "train")
    state = dict(state or {})
    dataset: Dataset
    listed = Quarantine(quarantine, cfg.bad_fraction)
    if not source.shards:
        listing = reader.listing(source)
        plan = None if reader.room is None else plan_listing(listing, reader, batch_size)
        state = _listing_state(reader.noun, len(listing), plan, world, start_step, state)
        if plan is None:
            dataset = ListedBatches(listing, reader, batch_size, seed, rank, world)
        else:
            dataset = PlannedBatches(listing, reader, plan, seed, rank, world)
            listed.write_down(_left_out(reader, listing, plan))
        fetcher = Fetcher(dataset, cfg.workers, _Steps(state["batches"]))
    else:
        state = _shard_state(cfg, source.shards, rank, world, start_step, state, reader.room is not None)
        positions = [list(p) for p in state["positions"]]
        kind = ShardBatches if reader.room is None else PlannedShardBatches
        dataset = kind(source.shards, reader, cfg.shuffle_buffer, batch_size, seed, rank, world, positions, state["batches"])
        fetcher = Fetcher(dataset, min(cfg.workers, len(positions)))
    listed.seen, listed.bad = state["seen"], state["bad"]
    return Loader(fetcher, listed, state)


def len_samples(cfg: DataConfig) -> int | None:
    """Number of training samples: counted in folders and manifests, `data.samples` for shards, where it may be unknown
    (shards of latents tell it)."""
    reader = checked_reader(cfg)
    source = find_source(reader, cfg.train, "train")
    return (cfg.samples or source.samples) if source.shards else len(reader.listing(source))


def len_batches(cfg: DataConfig, batch_size: int) -> int | None:
    """Number of micro-batches of an epoch over all ranks where data.batch_frames forms them; None of shards, which do not tell.

    batch_size: the most samples of a micro-batch. Raises ConfigError, DataError.
    """
    reader = checked_reader(cfg)
    source = find_source(reader, cfg.train, "train")
    return None if source.shards else len(plan_listing(reader.listing(source), reader, batch_size))


@overload
def validation_batches(
    cfg: LatentDataConfig, batch_size: int, rank: int = 0, world: int = 1, on_bad: OnBad | None = None,
    reader: Reader | None = None,
) -> Iterator[Any]: ...      # LatentBatch or ImageBatch, as the source says
@overload
def validation_batches(
    cfg: ImageDataConfig, batch_size: int, rank: int = 0, world: int = 1, on_bad: OnBad | None = None,
    reader: Reader | None = None,
) -> Iterator[ImageBatch]: ...
@overload
def validation_batches(
    cfg: SpeechDataConfig, batch_size: int, rank: int = 0, world: int = 1, on_bad: OnBad | None = None,
    reader: Reader | None = None,
) -> Iterator[SpeechBatch]: ...
def validation_batches(
    cfg: DataConfig, batch_size: int, rank: int = 0, world: int = 1, on_bad: OnBad | None = None, reader: Reader | None = None
) -> Iterator[Any]:
    """The held-out samples in order, each exactly once over all ranks; the last batch may be short.

    Images are centre-cropped; clips are whole, or cut to val_seconds. Ranks may get different numbers of batches. With val_limit,
    a folder or manifest gives evenly spaced samples, shards their first ones.
    on_bad: called with each unreadable sample, which is then left out, and may raise. reader: that reads in another way than
    the config's own, such as another crop.
    Raises DataError if a sample is unreadable and there is no `on_bad`, ConfigError if there is no data.val.
    """
    reader = reader or checked_reader(cfg)
    if cfg.val is None:
        raise ConfigError("there is no validation data; name it in data.val")
    source = find_source(reader, cfg.val, "val")
    return _in_order(reader, source, cfg.val_limit, cfg.workers, batch_size, rank, world, on_bad)


def fixed_crops(
    cfg: SpeechDataConfig, batch_size: int, rank: int = 0, world: int = 1, on_bad: OnBad | None = None
) -> Iterator[SpeechBatch]:
    """Every training clip once over all ranks, in order, as the segment that training always hears of it.

    on_bad: see `validation_batches`. Raises ConfigError if data.crop is random, DataError.
    """
    reader = FixedCrops(replace(cfg, features=None))
    reader.check()
    return _in_order(reader, find_source(reader, cfg.train, "train"), None, cfg.workers, batch_size, rank, world, on_bad)


def _in_order(
    reader: Reader, source: Source, limit: int | None, workers: int, batch_size: int, rank: int, world: int, on_bad: OnBad | None
) -> Iterator[Any]:
    """What the reader's `validation` gives of each sample of a rank."""
    if not source.shards:
        listing = reader.listing(source)
        mine = spread(len(listing), limit)[rank::world]
        dataset = ListedValidation(listing, reader, batch_size, mine, on_bad is not None)
        workers = min(workers, len(dataset)) if len(mine) >= WORTH_WORKERS else 0
        return _validate(Fetcher(dataset, workers, range(len(dataset))), on_bad)
    shards = ShardValidation(source.shards, reader, limit, batch_size, rank, world, on_bad is not None)
    return _validate(Fetcher(shards, workers), on_bad)


def checked_reader(cfg: DataConfig) -> Reader:
    """What reads the data of a config. Raises ConfigError if its options contradict each other."""
    reader = READERS[type(cfg)](cfg)
    reader.check()
    if cfg.workers < 0 or cfg.shuffle_buffer < 1 or not 0 <= cfg.bad_fraction <= 1:
        raise ConfigError("data.workers must be at least 0, data.shuffle_buffer at least 1, data.bad_fraction within [0, 1]")
    return reader


def find_source(reader: Reader, source: str, split: str) -> Source:
    """What a config's train or val names. Raises DataError."""
    return reader.locate(resolve_source(source, split, reader.noun, reader.sample, reader.manifests), split)


def _validate(fetcher: Fetcher, on_bad: OnBad | None) -> Iterator[Any]:
    try:
        for fetched in fetcher:
            if fetched.error:
                raise DataError(fetched.error)
            if on_bad is not None:
                for bad in fetched.bad:
                    on_bad(bad)
            if fetched.keys:
                yield fetched.batch()
    finally:
        fetcher.close()


def _left_out(reader: Reader, listing: Listing, plan: Plan) -> list[Bad]:
    """The samples whose size is not known, with the reason; how many these and the too large ones are is logged."""
    if plan.too_large or plan.unknown:
        logger.warning("left out: %s %s larger than data.batch_frames, %s of unknown length", f"{plan.too_large:,}", reader.noun,
                       f"{len(plan.unknown):,}")
    bad = []
    for raw in map(listing.raw, plan.unknown):
        try:
            reader.size(raw)
            bad.append(Bad(raw.key, f"{raw.name}: its listed length is no number"))
        except DataError as error:
            bad.append(Bad(raw.key, str(error)))
    return bad


def _listing_state(
    noun: str, samples: int, plan: Plan | None, world: int, start_step: int, state: dict[str, Any]
) -> dict[str, Any]:
    """That of the start or of the given step, with the counts of the given state, if that fits."""
    step = start_step or state.get("batches", 0)
    fresh: dict[str, Any] = {"kind": "folder", "samples": samples, "batches": step, "positions": []}
    _compare(state, fresh, {"kind": "data.train is now a {now}, was a {was}; name the same source",
                            "samples": f"data.train holds {{now}} {noun}, held {{was}}; restore them"})
    if plan is not None:
        fresh |= {"world": world, "plan": len(plan)}
        _compare(state, fresh, {
            "world": "resume with {was} processes (now {now}): each takes a batch of data.batch_frames at a step",
            "plan": f"the {noun} of data.train make {{now}} batches, made {{was}}; restore them",
        })   # fmt: skip
    return {**fresh, "seen": state.get("seen", 0), "bad": state.get("bad", 0)}


def _shard_state(
    cfg: DataConfig, urls: tuple[str, ...], rank: int, world: int, start_step: int, state: dict[str, Any], planned: bool
) -> dict[str, Any]:
    """The given state, if it fits, or that of the start: each stream at its first shard."""
    if len(urls) < world:
        raise DataError(f"{len(urls)} shards cannot feed {world} processes; write {world} shards or more, or use fewer processes")
    workers = min(max(cfg.workers, 1), len(urls) // world)   # each stream needs a shard of its own
    if workers < cfg.workers:
        logger.warning("%d shards over %d processes keep %d of data.workers=%d busy", len(urls), world, workers, cfg.workers)
    positions = [[0, rank * workers + w, 0, *[0] * planned] for w in range(workers)]
    fresh = {
        "kind": "shards", "samples": len(urls), "names": fingerprint(urls), "world": world, "workers": workers, "rank": rank,
        "shuffle_buffer": cfg.shuffle_buffer, "batches": 0, "positions": positions, "seen": 0, "bad": 0,
    }   # fmt: skip
    if not state:
        if start_step:
            raise CheckpointError("shards cannot be resumed from a step alone; give the loader's saved state too")
        return fresh
    _compare(state, fresh, {
        "kind": "data.train is now {now}, was a {was}; name the same source",
        "world": "resume with {was} processes (now {now}): the shards are divided among them",
        "workers": "resume with data.workers={was} (now {now}): the shards are divided among them",
        "rank": "this is the state of rank {was}, not of rank {now}",
        "shuffle_buffer": "resume with data.shuffle_buffer={was} (now {now})",
        "samples": "data.train names {now} shards, named {was}; name the same ones",
        "names": "data.train names other shards than those that the run was trained on; name the same ones",
    })   # fmt: skip
    return {**state, "positions": [list(p) for p in state["positions"]]}   # the loader changes its own copy


def _compare(state: dict[str, Any], now: dict[str, Any], advice: dict[str, str]) -> None:
    for key, text in advice.items():
        if key in state and state[key] != now[key]:
            raise CheckpointError(
                f"the data differ from those of the checkpoint: {text.format(was=state[key], now=now[key])}, "
                "or start a new run with init_from"
            )


class _Steps:
    """The micro-steps from a first one on, for ever."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return count(self.start)
