"""The decoding processes: started with our signal handling, and ended whenever their user ends."""

import atexit
import signal
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.errors import DataError

STOPPING = (signal.SIGINT, signal.SIGTERM)
SIGTERM_GRACE = 120   # seconds that a decoding process outlives a SIGTERM, so that the step in progress can end


class Fetcher:
    """Iterates over what a data set's items or iterator give, in order, fetched by `workers` processes (0: by this one)."""

    def __init__(self, dataset: Dataset, workers: int, sampler: Any = None):
        self._source: DataLoader | None = DataLoader(
            dataset,
            batch_size=None,   # the data sets make whole batches
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_is,   # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),   # else it would draw from the global one
        )
        self._iterator: Iterator[Fetched] | None = None
        _open.add(self)

    def __iter__(self) -> "Fetcher":
        return self

    def __next__(self) -> Fetched:
        """The next batch. Raises DataError, and ends the processes, if it is an error or if a process died."""
        if self._iterator is None:
            if self._source is None:
                raise DataError("this loader was closed; build another one")
            self._iterator = _quiet_iterator(self._source)
        try:
            return next(self._iterator)
        except RuntimeError as error:
            self.close()
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a decoding process died, mostly for lack of memory or of shared memory (/dev/shm); "
                f"lower data.workers or data.shuffle_buffer ({str(error).splitlines()[0]})"
            ) from error

    def close(self) -> None:
        """End the processes."""
        self._source = self._iterator = None


_open: "weakref.WeakSet[Fetcher]" = weakref.WeakSet()


@atexit.register   # before multiprocessing's own, which would send SIGTERM and wait as long as _linger allows
def _close_all() -> None:
    for fetcher in list(_open):
        fetcher.close()


def _quiet_iterator(source: DataLoader) -> Iterator[Fetched]:
    """The iterator, without the SIGCHLD handler that torch installs with it, and with processes that no signal ends while they
    start: signals are held back until `_start_worker`.

    That handler raises RuntimeError wherever the training process stands when a worker dies, in the middle of a save too.
    Without it the next fetch notices, within 5 seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(source)
    before = signal.getsignal(signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)      # the processes inherit it
    try:
        iterator = iter(source)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    after = signal.getsignal(signal.SIGCHLD)
    if getattr(after, "__module__", None) == "torch.utils.data._utils.signal_handling":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before in (after, None) else before)
    return iterator


def _as_is(fetched: Fetched) -> Fetched:
    return fetched


def _start_worker(worker: int) -> None:
    """Signals are for the training process, which saves at the next step and needs its data until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _linger)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    warnings.filterwarnings("ignore", module="PIL")   # remarks on odd metadata would tear the progress bar


def _linger(*_: Any) -> None:
    """The first SIGTERM may come from a scheduler, which sends it to all processes at once; the next one ends this one."""
    signal.alarm(SIGTERM_GRACE)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
