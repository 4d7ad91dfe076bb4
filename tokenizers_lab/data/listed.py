"""Batches of samples that can be reached by their number: a pure function of the step, whoever computes it and whenever."""

from collections.abc import Sequence

from torch.utils.data import Dataset

from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.reading import Listing, Reader
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
    """Validation batches of a rank, in order: the samples of the numbers in `chosen`. The last batch may be short."""

    def __init__(self, listing: Listing, reader: Reader, batch_size: int, chosen: Sequence[int]):
        self.listing, self.reader, self.batch_size, self.chosen = listing, reader, batch_size, chosen

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.batch_size)

    def __getitem__(self, number: int) -> Fetched:
        views, keys = [], []
        for index in self.chosen[number * self.batch_size : (number + 1) * self.batch_size]:
            raw = self.listing.raw(index)
            try:
                views.append(self.reader.validation(raw))
            except DataError as error:
                return Fetched(error=str(error))
            keys.append(raw.key)
        return self.reader.assemble(views, keys)
