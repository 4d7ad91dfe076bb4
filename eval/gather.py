"""Rows that processes measured, brought together in an order that does not depend on who measured what."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokenizers_lab.errors import DataError, InputError

BLOCK = 4096       # rows that are sent at a time, which bounds the memory that a GPU backend needs
Result = TypeVar("Result")


def processes() -> tuple[int, int]:
    """(rank, number of processes) of torch.distributed; (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_processes(mine: Result, together: bool = True) -> list[Result]:
    """What each process has, in order of rank. together: false: this process is alone."""
    if not together or processes()[1] == 1:
        return [mine]
    shares: list[Any] = [None] * processes()[1]
    dist.all_gather_object(shares, mine)
    return shares


def in_step(function: Callable[[], Result], together: bool = True) -> Result:
    """function() of each process. An error of one is raised on all: nobody waits for a process that has given up."""
    error: Exception | None = None
    result: Any = None
    try:
        result = function()
    except Exception as raised:      # the others must hear of it, whatever it is
        error = raised
    errors = [one for one in all_processes(error, together) if one is not None]
    if errors:
        raise error or errors[0]
    return result


def gather_rows(
    keys: Sequence[str], tensors: dict[str, Tensor], together: bool = True
) -> tuple[list[str], dict[str, Tensor]] | None:
    """All processes' rows, sorted by key, on the first process; None on the others. Every process must call it.

    keys: names of this process's rows, unique over all processes; tensors: (N, …) each, the same names everywhere (a
    process without rows may pass none). Rows are exact: none is padded, none counted twice.
    together: false: this process is alone, whatever torch.distributed says.
    Raises DataError on a repeated key, InputError where numbers of rows or names differ.
    """
    for name, tensor in tensors.items():
        if len(tensor) != len(keys):
            raise InputError(f"{len(tensor)} rows of {name} for {len(keys)} keys")
    rank, count = processes() if together else (0, 1)
    all_keys, parts = list(keys), [tensors]
    if count > 1:
        heads: list[Any] = [None] * count
        dist.all_gather_object(heads, (list(keys), sorted(tensors)))
        all_keys = [key for head in heads for key in head[0]]
        names = {tuple(head[1]) for head in heads if head[0]}
        if len(names) > 1:
            raise InputError(f"processes measured different things: {sorted(names)}")
        parts = _collect(tensors, max(len(head[0]) for head in heads), rank, count)
    if rank:
        return None
    order = sorted(range(len(all_keys)), key=all_keys.__getitem__)
    sorted_keys = [all_keys[i] for i in order]
    check_names(sorted_keys)
    index = torch.tensor(order, dtype=torch.int64)
    present = [part for part in parts if part]
    names_found = sorted(present[0]) if present else []
    return sorted_keys, {name: torch.cat([part[name] for part in present])[index] for name in names_found}


def check_names(keys: Sequence[str], noun: str = "images") -> None:
    """Raise DataError if two of the sorted names are the same."""
    for one, two in pairwise(keys):
        if one == two:
            raise DataError(f"two {noun} are named '{one}': each must be measured once, under a name of its own")


def _collect(tensors: dict[str, Tensor], longest: int, rank: int, count: int) -> list[dict[str, Tensor]]:
    """Pieces of all processes in order of rank; nothing on ranks other than 0."""
    pieces: list[list[dict[str, Tensor]]] = [[] for _ in range(count)]
    for start in range(0, longest, BLOCK):
        block = {name: tensor[start : start + BLOCK].cpu() for name, tensor in tensors.items()}
        received: list[Any] = [None] * count
        dist.all_gather_object(received, {name: part for name, part in block.items() if len(part)})
        if rank == 0:
            for source, part in enumerate(received):
                pieces[source].append(part)
    return [part for source in pieces for part in source if part]


def on_first(function: Callable[[], Result], together: bool = True) -> Result:
    """What function gives on the first process, on all processes; its error is raised on all of them too."""
    rank, count = processes() if together else (0, 1)
    if count == 1:
        return function()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = function()
        except Exception as error:      # the others wait for a word: an error must reach them, whatever it is
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
