"""What several commands share. Light to import; what is heavy is imported inside."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
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

    if args.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error
    return str(args.device)


def load_image_tokenizer(name: str, device: str) -> "ImageTokenizer":
    """The image tokenizer of that name. Raises InputError if it is for audio."""
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.hub import load
    from tokenizers_lab.tokenizer import ImageTokenizer

    tokenizer = load(name, device=device)
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(f"{name} is a {tokenizer.system} tokenizer, which is not for images")
    return tokenizer


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

    `sample:photos/train` and `sample:photos/val` name the parts of a sample set. Raises ConfigError on a size below 1.
    """
    from tokenizers_lab.errors import ConfigError
    from tokenizers_lab.settings import ImageDataConfig

    if size < 1:
        raise ConfigError(f"--size must be at least 1, not {size}")
    if source.startswith("sample:") and "/" in source:
        from tokenizers_lab.data.sources import sample_path

        name, split = source.removeprefix("sample:").split("/", 1)
        source = str(sample_path(name, split))
    return ImageDataConfig(train=source, val=source, size=size, val_limit=limit, workers=workers)
