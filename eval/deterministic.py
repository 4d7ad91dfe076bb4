"""Work on all cores whose result does not depend on how many there are.

Matrix products, convolutions and eigenvalues may change in their last digits with the number of threads (measured: LAPACK's
`syevd` and oneDNN's convolutions differ between one thread and two). So the pieces of a computation are fixed by its sizes
alone, each is done by one thread, and results come back in order; threads only decide how many pieces run at once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[int]:
    """torch's operators on the CPU run on one thread inside; gives the number of threads they had before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item, in order, each on one thread, as many at once as torch had threads.

    At most twice as many results as threads are held. `function` must not depend on thread-local state such as
    `torch.inference_mode`. The caller's own torch operators run on one thread until the iterator is used up.
    """
    with one_thread() as threads:
        if threads == 1:
            yield from map(function, items)
            return
        waiting: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def exact_convolutions() -> AbstractContextManager[None]:
    """On a GPU: float32 convolutions without TF32 (whose 10-bit mantissa would make "float32" a lie) by repeatable algorithms."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
