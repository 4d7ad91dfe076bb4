"""What several commands share. Light to import; what is heavy is imported inside."""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tokenizers_lab.tokenizer import ImageTokenizer

T = TypeVar("T")
MODEL_HELP = "a run, a checkpoint, a saved folder, SYSTEM/official or a hub id"


def add_model(parser: argparse.ArgumentParser, option: bool = True) -> None:
    """The model and the device that it runs on."""
    if option:
        parser.add_argument("--model", required=True, help=MODEL_HELP)
    else:
        parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--device", default=None, help="cpu, cuda, mps; default: a GPU if there is one")


def device_of(args: argparse.Namespace) -> str:
    """The device that was asked for, or the best there is. Raises ConfigError if it does not exist."""
    import torch

    from tokenizers_lab.errors import ConfigError

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:      # one of several processes: each takes a GPU of its own
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error
    return str(name)


def load_image_tokenizer(name: str, device: str) -> "ImageTokenizer":
    """The image tokenizer of that name. Raises InputError if it is for audio."""
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.hub import load
    from tokenizers_lab.tokenizer import ImageTokenizer

    tokenizer = load(name, device=device)
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(f"{name} is a {tokenizer.system} tokenizer, which is not for images")
    return tokenizer


@contextmanager
def process_group() -> Iterator[int]:
    """The processes that torchrun or accelerate launch started work together inside; gives this process's rank."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    # Only JSON data and features are exchanged, from the CPU; while the first process computes, the others wait.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def say(text: str = "") -> None:
    """One line on stdout, whole however narrow the terminal is, with no markup."""
    print(text)


def show_progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    yield from track(items, what, total=total, console=console, transient=True)


def unique_names(files: Sequence[str], folder: Path, suffix: str) -> list[Path]:
    """An output path for each input file, by its stem; files that share a stem keep their extension, or get a number."""
    stems = [Path(f).stem for f in files]
    names, taken = [], set()
    for file, stem in zip(files, stems):
        base = stem if stems.count(stem) == 1 else Path(file).name.replace(".", "_")
        name, number = base, 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name)
        names.append(folder / f"{name}{suffix}")
    return names


def output_folder(path: str) -> Path:
    """Make the folder for results. Raises InputError if it cannot be made."""
    from tokenizers_lab.errors import InputError

    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path} cannot be made: {error.strerror}") from error
    return folder


def data_config(source: str, size: int, limit: int | None = None, workers: int = 0) -> Any:
    """A data config that reads `source` in order as validation data, centre-cropped to size × size pixels.

    Raises ConfigError on a size below 1 or a limit below 1.
    """
    from tokenizers_lab.errors import ConfigError
    from tokenizers_lab.settings import ImageDataConfig

    if size < 1:
        raise ConfigError(f"--size must be at least 1, not {size}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}")
    return ImageDataConfig(train=source, val=source, size=size, val_limit=limit, workers=workers)
