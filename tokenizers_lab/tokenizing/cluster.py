"""Tokenizing on a Ray cluster by Ray Data: decoding in tasks on the CPUs, networks in actors, shards written by this process.

What crosses the cluster are blocks. Ray runs again what a dead worker was at; a block is the same wherever it is made, and the
shards are put together here in the order of their blocks, so that they are those of a run on one machine. Codes are small beside
what they are of, so that one writer keeps up. Sources and the model must be at the same path on every node, or remote.
"""

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.errors import ConfigError, TokenizersLabError
from tokenizers_lab.tokenizing.decoding import View, decode_block
from tokenizers_lab.tokenizing.encoding import Made, Settings, encode_block, load_network
from tokenizers_lab.tokenizing.folder import ShardSink
from tokenizers_lab.tokenizing.local import Job
from tokenizers_lab.tokenizing.plan import Block, Plan

MOST_BLOCKS = 1000        # of Ray's, into which the list of the work is cut
BLOCK_BYTES = 32 << 20    # of Ray's blocks of decoded samples: a task hands over what it has as soon as it has so much
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "ERROR", "RAY_BACKEND_LOG_LEVEL": "fatal"}
TIMEOUT = 10.0            # seconds in which the head of a cluster must answer
Row = dict[str, Any]


def import_ray() -> Any:
    """ray, with ray.data. Raises ConfigError that says how to install it."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'tokenizers-lab[ray]'") from None
    return ray


def run_ray(
    job: Job, shards: Sequence[int], address: str, processes: int | None, device: str | None,
    note: Callable[[int, list[Bad], float, bool], None],
) -> None:
    """Make these shards on the cluster at `address`: HOST:PORT, auto, or local. processes: actors; none: one a GPU, else half
    the CPUs. Raises TokenizersLabError."""
    with connected(address) as ray:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if device != "cpu" else 0
        cpus = int(resources.get("CPU", 1))
        actors = processes or gpus or max(1, cpus // 2)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = BLOCK_BYTES
        work = units(job.plan, shards)
        rows = ray.data.from_items(work, override_num_blocks=min(len(work), MOST_BLOCKS))
        rows = rows.flat_map(decode_unit, fn_kwargs={"view": job.view})
        rows = rows.map(
            Network, fn_constructor_kwargs={"settings": job.settings, "device": device or ("cuda" if gpus else "cpu")},
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors), num_gpus=1 if gpus else None,
            num_cpus=0 if cpus < 2 else None,      # else nothing would be left to decode on
            # over the nodes; also what keeps Ray from decoding inside of the actors
            scheduling_strategy="SPREAD")
        with errors_of(ray):
            write_shards(job, rows.iter_rows(), note)


def units(plan: Plan, shards: Sequence[int]) -> list[Row]:
    """What decoding tasks start from: a block of a listing, or a whole webdataset shard."""
    if plan.listing is None:
        return [{"work": pickle.dumps((plan, shard))} for shard in shards]
    return [{"work": pickle.dumps(block)} for shard in shards for block in plan.blocks(shard)]


def decode_unit(row: Row, view: View) -> Iterator[Row]:
    """Decoded blocks, or the error that ends the run. In a task on a CPU."""
    work = pickle.loads(row["work"])
    try:
        for block in [work] if isinstance(work, Block) else work[0].blocks(work[1]):
            yield {"work": pickle.dumps(decode_block(block, view))}
    except TokenizersLabError as error:
        yield {"work": pickle.dumps(error)}


class Network:
    """A network in an actor: decoded blocks in, codes or latents out."""

    def __init__(self, settings: Settings, device: str):
        self.settings = settings
        self.tokenizer: Any = None
        self.error: TokenizersLabError | None = None
        try:
            self.tokenizer = load_network(settings, device)
        except TokenizersLabError as error:      # raised here, Ray would try again for ever
            self.error = error

    def __call__(self, row: Row) -> Row:
        """One block, or the error that ends the run."""
        work: Any = pickle.loads(row["work"])
        if self.error is not None or isinstance(work, TokenizersLabError):
            return {"work": pickle.dumps(self.error or work)}
        try:
            return {"work": pickle.dumps(encode_block(self.tokenizer, work, self.settings))}
        except TokenizersLabError as error:
            return {"work": pickle.dumps(error)}


def write_shards(job: Job, rows: Iterator[Row], note: Callable[[int, list[Bad], float, bool], None]) -> None:
    """Write each shard as soon as all its blocks are here, in whatever order they come."""
    waiting: dict[int, dict[int, Made]] = {}
    for row in rows:
        made = pickle.loads(row["work"])
        if isinstance(made, TokenizersLabError):
            raise made
        there = waiting.setdefault(made.shard, {})
        there[made.number] = made
        finished = any(block.last and block.number + 1 == len(there) for block in there.values())
        if finished:
            sink = ShardSink(job.folder, made.shard)
            for number in range(len(there)):
                sink.add(there[number])
            del waiting[made.shard]
        note(len(made.samples), made.bad, sum(sample.about.get("seconds", 0.0) for sample in made.samples), finished)
    if waiting:
        raise TokenizersLabError(f"Ray gave back only some blocks of {len(waiting)} shards: run the same command again")


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster; left again in the end, unless it was connected before."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    if address not in ("local", "auto"):
        check_address(address)
    where: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise no_cluster(address, str(error).splitlines()[0]) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raise ConfigError unless something answers there: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--ray {address}: write HOST:PORT of a cluster's head, auto, or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise no_cluster(address, str(error)) from error


def no_cluster(address: str, reason: str) -> ConfigError:
    """The error of a cluster that cannot be reached."""
    return ConfigError(f"--ray {address}: no Ray cluster answers ({reason}); start one with ray start --head, or use --ray local")


@contextmanager
def errors_of(ray: Any) -> Iterator[None]:
    """Ray's errors as one line."""
    try:
        yield
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TokenizersLabError(f"Ray: {lines[-1] if lines else type(error).__name__}. Finished shards are whole: run the same "
                                 "command again") from error
