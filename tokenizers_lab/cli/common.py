"""What several commands share. Light to import; what is heavy is imported inside."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

    from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer

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


def load_tokenizer(name: str, device: str, fuse: bool = True) -> "ImageTokenizer | SpeechTokenizer":
    """The tokenizer of that name, for images or for speech. fuse: the latter with its weight norms folded, for inference.

    Raises InputError if it is no tokenizer but a generator.
    """
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.hub import load
    from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer

    tokenizer = load(name, device=device)
    if not isinstance(tokenizer, ImageTokenizer | SpeechTokenizer):
        raise InputError(f"{name} is a {tokenizer.system} generator, not a tokenizer: toklab generate samples it")
    return tokenizer.fuse() if fuse and isinstance(tokenizer, SpeechTokenizer) else tokenizer


def check_files(files: Sequence[str], speech: bool, model: str) -> None:
    """Raise InputError on a file whose name says that it is of the other kind: an image for a speech tokenizer, or a sound."""
    from tokenizers_lab.data import audio, decode
    from tokenizers_lab.errors import InputError

    others, what, kind = (decode.EXTENSIONS, "an image", "speech") if speech else (audio.EXTENSIONS, "a sound", "images")
    for file in files:
        if Path(file).suffix.lower().lstrip(".") in others:
            raise InputError(f"{file} is {what}, but {model} is a tokenizer for {kind}")


def check_options(args: argparse.Namespace, speech: bool, for_images: Sequence[str], for_speech: Sequence[str]) -> None:
    """Raise InputError if an option was given that is for the other kind of tokenizer. Names of attributes; none: not given."""
    from tokenizers_lab.errors import InputError

    for name in for_images if speech else for_speech:
        if getattr(args, name) is not None and getattr(args, name) is not False:      # 0 was given
            kind, other = ("speech", "images") if speech else ("images", "speech")
            raise InputError(f"--{name.replace('_', '-')} is for {other}; {args.model} is a tokenizer for {kind}")


def add_wav(parser: argparse.ArgumentParser) -> None:
    """How sounds are decoded and written."""
    parser.add_argument("--rate", choices=["codec", "original"], help="speech: sample rate of the WAV; default: codec")
    parser.add_argument("--float", action="store_true", help="speech: 32-bit floats instead of 16-bit integers")
    parser.add_argument("--decoding", metavar="WAY", help="speech: one of the model's ways to decode, where it has several")


def add_diffusion(parser: argparse.ArgumentParser) -> None:
    """How a diffusion decoder samples."""
    parser.add_argument("--steps", type=int, metavar="N", help="diffusion decoders: sampling steps; default: the model's")
    parser.add_argument("--cfg", type=float, metavar="W", help="diffusion decoders: guidance, 1 is none; default: the model's")
    parser.add_argument("--seed", type=int, metavar="S", help="diffusion decoders: draw other noise than the usual one")


def add_speech_text(parser: argparse.ArgumentParser, asr: bool) -> None:
    """What a text-aware speech decoder is told. asr: whether a missing text is heard."""
    heard = "; default: heard by --asr" if asr else ""
    parser.add_argument("--text", help=f"text-aware speech decoders: what is said{heard}")
    parser.add_argument("--prompt", metavar="CLIP", help="text-aware speech decoders: a clip of the voice to decode in")
    parser.add_argument("--prompt-text", metavar="TEXT", help=f"what is said in --prompt{heard}")
    if asr:
        parser.add_argument("--asr", metavar="NAME", help="who hears a missing text: whisper-base (default), whisper-tiny.en, "
                            "a hub id or folder")


def decoder_options(args: argparse.Namespace, tokenizer: "ImageTokenizer | SpeechTokenizer") -> dict[str, Any]:
    """What --steps, --cfg and --seed say, as options of the tokenizer's `decode`. Raises InputError if it has no such option."""
    import torch

    from tokenizers_lab.errors import InputError

    found: dict[str, Any] = {}
    for flag, name in (("steps", "steps"), ("cfg", "guidance"), ("seed", "generator")):
        value = getattr(args, flag)
        if value is None:
            continue
        if name not in ("generator", *tokenizer.decode_options) or not tokenizer.decode_options:
            raise InputError(f"--{flag} is for diffusion decoders; this {tokenizer.system} tokenizer has no such option")
        found[name] = torch.Generator(tokenizer.device).manual_seed(value) if name == "generator" else value
    if found.get("steps", 1) < 1:
        raise InputError(f"--steps must be at least 1, not {found['steps']}")
    return found


@contextmanager
def process_group() -> Iterator[int]:
    """The processes that torchrun or accelerate launch started work together inside; gives this process's rank."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    # Its functions have the group as a default argument, taken when it is imported. Imported inside, it would keep the group, and
    # gloo's threads, alive beyond destroy_process_group, and the process would abort at its exit now and then ("terminate called
    # without an active exception").
    import torch.distributed.nn.functional  # noqa: F401

    # Only JSON data and features are exchanged, from the CPU; while the first process computes, the others wait.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def say(text: str = "") -> None:
    """One line on stdout, whole however narrow the terminal is, with no markup."""
    print(text)


def terminal_bar() -> "Progress":
    """A bar on stderr that is seen only where that is a terminal, and is gone in the end."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # Lines on stdout go past the bar, and through it only where both are the same terminal: a pipe must get them.
    return Progress(console=console, transient=True, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty())


def show_progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on stderr where that is a terminal."""
    with terminal_bar() as bar:
        yield from bar.track(items, total=total, description=what)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, where that is a terminal, over `total` files; gives a function that adds a share of a file."""
    with terminal_bar() as bar:
        task = bar.add_task(what, total=total)
        yield lambda share: bar.advance(task, share)


def unique_names(files: Sequence[str], folder: Path, suffix: str) -> list[Path]:
    """An output path for each input file, by its stem; files that share a stem keep their extension, or get a number.

    Raises InputError if an output would replace an input.
    """
    from tokenizers_lab.errors import InputError

    stems = [Path(f).stem for f in files]
    names, taken = [], set()
    for file, stem in zip(files, stems):
        base = stem if stems.count(stem) == 1 else Path(file).name.replace(".", "_")
        name, number = base, 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name)
        names.append(folder / f"{name}{suffix}")
    inputs = {Path(file).resolve() for file in files}
    for path in names:
        if path.exists() and path.resolve() in inputs:
            raise InputError(f"--out {folder} would replace {path}: give another folder")
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
