"""Batches of whole samples of similar size that hold about equally much, such as clips for a model with attention over time.

Samples are sorted by size and cut, once, into batches: the number of samples times the size of the largest stays within a
room. What an epoch permutes are the batches. A clip that cannot be read is left out of its batch and no other takes its place.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.listed import ATTEMPTS
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.reading import Listing, Raw, Reader
from tokenizers_lab.data.sampling import view_numbers
from tokenizers_lab.data.shards import MAX_BAD_RUN, MAX_UNWANTED_RUN, ShardBatches, ShardStream, sample_name
from tokenizers_lab.draw import Draw, stable_seed
from tokenizers_lab.errors import DataError


@dataclass
class Plan:
    """Which samples stand together: batch b holds order[ends[b]] … order[ends[b + 1] − 1]."""

    order: np.ndarray        # (N,) int64, numbers of the samples that are used, the smallest first
    ends: np.ndarray         # (batches + 1,) int64
    too_large: int           # samples that alone exceed the room and are left out
    unknown: list[int]       # numbers of the samples whose size is not known, left out too

    def __len__(self) -> int:
        return len(self.ends) - 1

    def batch(self, number: int) -> list[int]:
        """The numbers of the samples of a batch."""
        return self.order[self.ends[number] : self.ends[number + 1]].tolist()


def plan_batches(sizes: np.ndarray, room: float, most: int) -> Plan:
    """Batches of at most `most` samples, filled in the order of size while their number times the largest size is within room.

    sizes: (N,), NaN where unknown. Their thousandths count, so that what a duration in float32 adds does not.
    """
    sizes = np.round(sizes.astype(np.float64), 3)
    usable = np.flatnonzero(sizes <= room)                                     # false for NaN
    order = usable[np.argsort(sizes[usable], kind="stable")]
    ends, first = [0], 0
    for place, size in enumerate(sizes[order].tolist()):
        count = place - first
        if count and (count == most or (count + 1) * size > room):
            ends.append(place)
            first = place
    if len(order):
        ends.append(len(order))
    unknown = np.flatnonzero(np.isnan(sizes)).tolist()
    return Plan(order, np.array(ends), len(sizes) - len(order) - len(unknown), unknown)


def plan_listing(listing: Listing, reader: Reader, most: int) -> Plan:
    """The batches of one epoch of all ranks. Raises DataError if no sample fits into one."""
    assert reader.room is not None
    plan = plan_batches(reader.sizes(listing), reader.room, most)
    if not len(plan):
        raise DataError(f"none of the {len(listing):,} {reader.noun} has a known size of at most {reader.room:g} frames, "
                        "data.batch_frames; make that larger")
    return plan


@lru_cache(maxsize=2)
def batch_order(batches: int, world: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0 … batches − 1 of an epoch, int64: it keeps `world` neighbours together at each step of the ranks.

    Steps go on over the end of an epoch: its first batches complete the step that the epoch before began.
    """
    head = min(-epoch * batches % world, batches)
    steps = (batches - head) // world
    whole = Draw(seed, step=epoch).permutation("batches", steps).numpy()[:, None] * world + np.arange(world)    # (steps, world)
    return np.concatenate([np.arange(head), head + whole.reshape(-1), np.arange(head + steps * world, batches)])


class PlannedBatches(Dataset):
    """Training batches of a rank out of a listing: item m is the batch of micro-step m."""

    def __init__(self, listing: Listing, reader: Reader, plan: Plan, seed: int, rank: int, world: int):
        self.listing, self.reader, self.plan = listing, reader, plan
        self.seed, self.rank, self.world = seed, rank, world

    def __getitem__(self, step: int) -> Fetched:
        position = step * self.world + self.rank                # counts the batches of all ranks from the start of the run
        epoch, place = divmod(position, len(self.plan))
        number, bad = int(batch_order(len(self.plan), self.world, self.seed, epoch)[place]), list[Bad]()
        for attempt in range(ATTEMPTS):
            raws = map(self.listing.raw, self.plan.batch(number))
            fetched = whole_batch(self.reader, raws, self.seed, epoch)
            bad += fetched.bad
            if fetched.keys:
                fetched.bad = bad
                return fetched
            number = stable_seed(self.seed, "substitute", position, attempt) % len(self.plan)
        trouble = f"the {self.reader.noun} of {ATTEMPTS} batches in a row could not be read"
        return Fetched(bad=bad, error=f"{trouble}; the last one: {bad[-1].reason}")


class PlannedShardBatches(ShardBatches):
    """Training batches of a rank out of shards: each block of `shuffle_buffer` samples of a shard has a plan of its own.

    Of the base's batch_size, batches have at most as many samples. A stream's position is epoch, place, index in its shard of
    the block's first sample, and how many of the block's batches are done. To resume, a stream reads that block again.
    """

    def _batches(self, stream: ShardStream, local: int) -> Iterator[Fetched]:
        bad = list[Bad]()       # since the last batch
        without = 0             # samples since the last batch, whole blocks
        *begin, done = self.positions[local]
        for url, epoch, place, index, block in stream.blocks(*begin):
            raws, plan, refused = self._plan(url, block)
            bad += refused if done == 0 else []
            order = Draw(self.seed, step=epoch).within(f"{place}/{index}").permutation("batches", len(plan)).tolist()
            for number in range(done, len(plan)):
                batch = whole_batch(self.reader, (raws[i] for i in plan.batch(order[number])), self.seed, epoch)
                bad += batch.bad
                if batch.keys:
                    batch.bad, batch.stream, batch.position = bad, local, [epoch, place, index, number + 1]
                    yield batch
                    bad, without = [], 0
            done, without = 0, without + len(block)
            if len(bad) >= MAX_BAD_RUN:
                yield Fetched(bad=bad, error=f"{len(bad):,} samples in a row could not be read; the last one: {bad[-1].reason}")
                return
            if without >= MAX_UNWANTED_RUN:
                yield Fetched(bad=bad, error=f"{without:,} {self.reader.noun} in a row are left out; widen the limits")
                return

    def _plan(self, url: str, block: list[dict[str, Any]]) -> tuple[list[Raw], Plan, list[Bad]]:
        """The samples of a block that are wanted and readable so far, their batches, and the unreadable ones."""
        raws, sizes, bad = list[Raw](), list[float](), list[Bad]()
        for sample in block:
            name = sample_name(url, sample)
            try:
                raw = self.reader.from_shard(sample, name)
                if self.reader.wants(raw):
                    sizes.append(self.reader.size(raw))
                    raws.append(raw)
            except DataError as error:
                bad.append(Bad(name, str(error)))
        assert self.reader.room is not None
        return raws, plan_batches(np.array(sizes, np.float64), self.reader.room, self.batch_size), bad


def whole_batch(reader: Reader, raws: Iterable[Raw], seed: int, epoch: int) -> Fetched:
    """Those of the samples that can be read as a training batch, which may be empty, with a list of the others."""
    views, keys, bad = [], [], list[Bad]()
    for raw in raws:
        try:
            views.append(reader.training(raw, view_numbers(seed, epoch, raw.key)))
            keys.append(raw.key)
        except DataError as error:
            bad.append(Bad(raw.key, str(error)))
    fetched = reader.assemble(views, keys) if views else Fetched()
    fetched.bad = bad
    return fetched
