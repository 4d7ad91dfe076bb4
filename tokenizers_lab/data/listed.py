"""Batches of samples that can be reached by their number: a pure function of the step, whoever computes it and whenever."""

from collections.abc import Iterable, Sequence

from torch.utils.data import Dataset

from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.reading import Listing, Raw, Reader
from tokenizers_lab.data.sampling import batch_positions, sample_index, substitute_index, view_numbers
from tokenizers_lab.errors import DataError

ATTEMPTS = 100   # substitutes that are tried for one unreadable sample


class ListedBatches(Dataset):
    """Training batches of a rank: item m is the batch of micro-step m."""

    def __init__(self, listing: Listing, reader: Reader, batch_size: int, seed: int, rank: int, world: int):
        self.listing, self.reader, self.batch_size = listing, reader, batch_size
        self.seed, self.rank, self.world = seed, rank, world

    def __getitem__(self, step: int) -> Fetched:
        views, keys, bad = [], [], list[Bad]()
        for position in batch_positions(step, self.batch_size, self.rank, self.world):
            index = sample_index(position, len(self.listing), self.seed)
            for attempt in range(ATTEMPTS):
                raw = self.listing.raw(index)
                try:
                    views.append(self.reader.training(raw, view_numbers(self.seed, position)))
                    break
                except DataError as error:
                    bad.append(Bad(raw.key, str(error)))
                    index = substitute_index(position, attempt, len(self.listing), self.seed)
            else:
                trouble = f"{ATTEMPTS} {self.reader.noun} in a row could not be read"
                return Fetched(bad=bad, error=f"{trouble}; the last one: {bad[-1].reason}")
            keys.append(raw.key)
        batch = self.reader.assemble(views, keys)
        batch.bad = bad
        return batch


class ListedValidation(Dataset):
    """Validation batches of a rank, in order: the samples of the numbers in `chosen`. The last batch may be short.

    skip: an unreadable sample is left out of its batch and listed there, instead of ending the pass.
    """

    def __init__(self, listing: Listing, reader: Reader, batch_size: int, chosen: Sequence[int], skip: bool = False):
        self.listing, self.reader, self.batch_size, self.chosen, self.skip = listing, reader, batch_size, chosen, skip

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.batch_size)

    def __getitem__(self, number: int) -> Fetched:
        chosen = self.chosen[number * self.batch_size : (number + 1) * self.batch_size]
        return validation_batch(self.reader, map(self.listing.raw, chosen), self.skip)


def validation_batch(reader: Reader, raws: Iterable[Raw], skip: bool) -> Fetched:
    """The held-out samples as a batch; with an unreadable one the error, or, with `skip`, the others and a list of those."""
    views, keys, bad = [], [], list[Bad]()
    for raw in raws:
        try:
            views.append(reader.validation(raw))
            keys.append(raw.key)
        except DataError as error:
            if not skip:
                return Fetched(error=str(error))
            bad.append(Bad(raw.key, str(error)))
    batch = reader.assemble(views, keys) if views else Fetched()
    batch.bad = bad
    return batch
