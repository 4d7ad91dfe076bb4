"""Tokenizing on one machine: a process for each device, each with decoding processes of its own."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from tokenizers_lab.data.processes import Fetcher
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.shards import read_ahead
from tokenizers_lab.errors import TokenizersLabError
from tokenizers_lab.tokenizing.decoding import Decoder, View
from tokenizers_lab.tokenizing.encoding import Settings, encode_block, load_network
from tokenizers_lab.tokenizing.folder import ShardSink, TokenFolder
from tokenizers_lab.tokenizing.plan import Block, Plan

Note = Callable[[int, list[Bad], float, bool], None]      # of a block: samples, skipped ones, seconds of audio, shard finished


@dataclass(frozen=True)
class Job:
    """All that a process must know."""

    plan: Plan
    view: View
    settings: Settings
    folder: TokenFolder
    workers: int             # decoding processes for each network; 0: in its own


def run_local(job: Job, shards: Sequence[int], devices: Sequence[str], note: Note) -> None:
    """Make these shards, divided among the devices. Raises TokenizersLabError if one of the processes fails or dies."""
    devices = devices[: max(1, len(shards))]
    if len(devices) == 1:
        make_shards(job, shards, devices[0], note)
        return
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, Any] = {}
    try:
        for rank, device in enumerate(devices):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(job, shards[rank :: len(devices)], device, there))
            process.start()
            there.close()
            running[here] = process
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                try:
                    told = pipe.recv()
                except EOFError:
                    process = running.pop(pipe)
                    process.join()
                    if process.exitcode:
                        raise TokenizersLabError(
                            f"a process that runs the network died (exit status {process.exitcode}), mostly for lack of memory; "
                            "finished shards are whole: run the same command again") from None
                    continue
                if isinstance(told, TokenizersLabError):
                    raise told
                note(*told)
    finally:
        for process in running.values():
            process.kill()
        for process in running.values():
            process.join()


def make_shards(job: Job, shards: Sequence[int], device: str, note: Note) -> None:
    """Make these shards in this process, one after another. Raises TokenizersLabError."""
    tokenizer = load_network(job.settings, device)
    fetcher = Fetcher(Decoder(job.view), job.workers, _Blocks(job.plan, shards))
    sink: ShardSink | None = None
    try:
        for decoded in fetcher:
            made = encode_block(tokenizer, decoded, job.settings)      # type: ignore[arg-type]
            sink = sink or ShardSink(job.folder, made.shard)
            sink.add(made)
            note(len(made.samples), made.bad, sum(s.about.get("seconds", 0.0) for s in made.samples), made.last)
            sink = None if made.last else sink
    finally:
        fetcher.close()
        if sink is not None:
            sink.discard()


class _Blocks:
    """The blocks of these shards, read ahead by a thread. DataLoader takes them as the numbers of what is to be fetched."""

    def __init__(self, plan: Plan, shards: Sequence[int]):
        self.plan, self.shards = plan, shards

    def __iter__(self) -> Iterator[Block]:
        return read_ahead(block for shard in self.shards for block in self.plan.blocks(shard))


def _child(job: Job, shards: Sequence[int], device: str, pipe: Connection) -> None:
    """A process of its own, which ends when the one that started it does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        make_shards(job, shards, device, lambda *told: pipe.send(told))
    except (TokenizersLabError, OSError) as error:
        pipe.send(error if isinstance(error, TokenizersLabError) else TokenizersLabError(f"{device}: {error}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
