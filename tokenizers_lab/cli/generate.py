"""`toklab generate`: draw images from a generator of latents and decode them with its tokenizer."""

import argparse
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import MODEL_HELP, device_of, load_image_tokenizer, process_group, say, show_progress

if TYPE_CHECKING:
    from tokenizers_lab.eval.generation.generator import LatentGenerator, SamplingConfig

help = "draw images from a generator of latents, as the .npz file that FID evaluators read"
description = """Draw images from a generator of latents, decode them with the tokenizer whose latents it learned, and write the
folder OUT: samples.npz (arr_0, uint8 (N, H, W, 3), as ADM's evaluator reads it) or images/*.png, grid.png, and samples.json,
which says all that the images follow from. The tokenizer is the one that the generator names; --tokenizer says where it is now,
and another one is refused.

Sample i has a class and a noise of its own, which follow from i and --seed: neither the batch size nor the number of processes
changes them. An interrupted command goes on where it stopped when it is given again.
torchrun --nproc_per_node 8 -m tokenizers_lab generate GENERATOR --samples 50000 --out OUT --batch-size 125
Then: toklab eval gfid OUT REFERENCE"""
example = "toklab generate runs/lightningdit-tiny --n 64 --out samples --steps 50 --cfg 2"
USER_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Generator, what to draw, how, and where it goes."""
    parser.add_argument("generator", metavar="GENERATOR", help=MODEL_HELP)
    parser.add_argument("--n", "--samples", type=int, required=True, metavar="N",      # torchrun takes --n for one of its own
                        help="number of samples; published gFIDs: 50000")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder of the samples")
    parser.add_argument("--tokenizer", metavar="MODEL", help="where the generator's tokenizer is; default: the name that it had")
    parser.add_argument("--classes", metavar="LIST", help="only these: numbers or names with commas between them, or a file with "
                        "one a line; default: all")
    parser.add_argument("--labels", choices=["balanced", "random", "permuted"], default="balanced",
                        help="class of sample i: balanced, i modulo the classes; permuted, the same shuffled; random, drawn "
                        "uniformly. Results of different rules do not compare; default: balanced")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of noise and classes; default: 0")
    parser.add_argument("--format", default="npz", metavar="F[,F]", help="npz, png, or both; default: npz")
    parser.add_argument("--rounding", choices=["truncate", "nearest", "half_up"], default="truncate",
                        help="to 8 bits: truncate, as most generators' codes do; half_up, VA-VAE's; default: truncate")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images at a time; default: 16")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps; default: a GPU if there is one")
    group = parser.add_argument_group("sampling", "default of each: the generator's own (toklab info GENERATOR)")
    group.add_argument("--solver", metavar="NAME", help="euler, heun, midpoint, dopri5, euler_maruyama")
    group.add_argument("--steps", type=int, metavar="N", help="steps; codes that speak of n grid points take n − 1")
    group.add_argument("--shift", type=float, metavar="S", help="above 1: more steps near noise; 0: by the latents' size")
    group.add_argument("--stop", type=float, metavar="T", help="share of noise at which sampling ends")
    group.add_argument("--cfg", type=float, metavar="W", help="guidance away from no class, or from --guide; 1: none")
    group.add_argument("--cfg-interval", metavar="LO,HI", help="guide between these times of the generator's clock")
    group.add_argument("--cfg-channels", type=int, metavar="C", help="guide the first C channels only (LightningDiT: 3); 0: all")
    group.add_argument("--guide", metavar="GENERATOR", help="autoguidance: away from this weaker generator of the same latents")


def run(args: argparse.Namespace) -> int:
    """Load all, draw in all processes; the first one says what there is."""
    from tokenizers_lab.errors import TokenizersLabError

    with process_group() as rank:
        if rank:
            warnings.simplefilter("ignore")
        try:
            result = generate(args, rank)
        except (TokenizersLabError, OSError):
            if rank:      # the first process has the same error, and says it
                return USER_ERROR
            raise
    if rank == 0:
        out = Path(args.out)
        say(f"{result['n']:,} samples of {result['size'][1]} × {result['size'][0]} px; labels {result['labels']['rule']}; "
            f"tokenizer: {result['tokenizer']['check']}")
        for name in (*result["files"], "grid.png", "samples.json"):
            say(f"{name:>12}  {out / name}")
    return 0


def generate(args: argparse.Namespace, rank: int) -> dict[str, Any]:
    """What samples.json says."""
    from tokenizers_lab.errors import ConfigError
    from tokenizers_lab.eval.gather import in_step
    from tokenizers_lab.eval.generation.sampling import SampleRequest, check_tokenizer, generate_samples
    from tokenizers_lab.hub import weights_sha256

    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {args.batch_size}")
    formats = [word.strip() for word in args.format.split(",") if word.strip()]
    device = in_step(lambda: device_of(args))
    generator = in_step(lambda: load_generator(args.generator, device))
    guide = in_step(lambda: load_generator(args.guide, device)) if args.guide else None
    sampling = sampling_options(args, generator)
    if guide is not None and sampling.guidance == 1:
        raise ConfigError("--guide needs a strength of guidance other than 1: give --cfg")
    request = SampleRequest(args.n, tuple(chosen_classes(args.classes, generator)), args.labels, args.seed, args.rounding)
    name = args.tokenizer or tokenizer_name(generator, args.generator)
    folder = in_step(lambda: find_tokenizer(name, args.tokenizer is None))
    check = check_tokenizer(generator, weights_sha256(folder), name)
    tokenizer = in_step(lambda: load_image_tokenizer(str(folder), device))
    about = {"generator": {"name": args.generator}, "guide": {"name": args.guide}, "tokenizer": {"name": name, "check": check}}

    def progress(batches: Iterable[Any], count: int) -> Iterable[Any]:
        return batches if rank else show_progress(batches, "sampling", count)

    return generate_samples(generator, tokenizer, args.out, request, sampling=sampling, guide=guide, batch_size=args.batch_size,
                            formats=formats, about=about, names=class_names(generator), progress=progress)


def load_generator(name: str, device: str) -> "LatentGenerator":
    """The generator of that name. Raises InputError if it is a tokenizer."""
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.eval.generation.generator import LatentGenerator
    from tokenizers_lab.hub import load

    network = load(name, device=device)
    if not isinstance(network, LatentGenerator):
        raise InputError(f"{name} is a {network.system} tokenizer, not a generator of latents")
    return network


def tokenizer_name(generator: "LatentGenerator", name: str) -> str:
    """What the generator calls its tokenizer. Raises InputError if it names none."""
    from tokenizers_lab.errors import InputError

    about = generator.provenance.get("tokenizer")
    if not isinstance(about, dict) or not about.get("name"):
        raise InputError(f"{name} does not say whose latents it learned: name the tokenizer by --tokenizer")
    return str(about["name"])


def find_tokenizer(name: str, named_by_generator: bool) -> Path:
    """The folder of the tokenizer. Raises CheckpointError if it is not here."""
    from tokenizers_lab.errors import CheckpointError
    from tokenizers_lab.hub import resolve_folder

    try:
        return resolve_folder(name)
    except CheckpointError as error:
        if not named_by_generator:
            raise
        raise CheckpointError(f"the generator's tokenizer is not where it was ({error}): give --tokenizer") from error


def sampling_options(args: argparse.Namespace, generator: "LatentGenerator") -> "SamplingConfig":
    """The generator's own sampling with what was asked for. Raises ConfigError."""
    from dataclasses import replace

    from tokenizers_lab.errors import ConfigError
    from tokenizers_lab.eval.generation.config import check_sampling_config

    names = {"solver": "solver", "steps": "steps", "shift": "shift", "stop": "stop", "cfg": "guidance"}
    asked: dict[str, Any] = {field: getattr(args, option) for option, field in names.items() if getattr(args, option) is not None}
    if args.cfg_channels is not None:
        asked["guided_channels"] = args.cfg_channels or None
    if args.cfg_interval is not None:
        try:
            asked["guidance_low"], asked["guidance_high"] = (float(word) for word in args.cfg_interval.split(","))
        except ValueError:
            raise ConfigError(f"--cfg-interval takes two times, such as 0.1,0.9, not '{args.cfg_interval}'") from None
    sampling = replace(generator.cfg.sampling, **asked)
    check_sampling_config(sampling, "sampling")
    return sampling


def class_names(generator: "LatentGenerator") -> list[str]:
    """Names of the classes by number, where the generator knows them."""
    names = generator.provenance.get("classes")
    return [str(name) for name in names] if isinstance(names, list) else []


def chosen_classes(text: str | None, generator: "LatentGenerator") -> Sequence[int]:
    """The classes that are asked for. text: numbers or names with commas between them, or a file of one a line; none: all.

    Raises InputError on what is no class.
    """
    from tokenizers_lab.errors import InputError

    count = generator.null_class
    if text is None:
        return range(count)
    lines = Path(text).read_text().splitlines() if Path(text).is_file() else text.split(",")
    words = [word.strip() for word in lines if word.strip()]
    if not words:
        raise InputError(f"--classes {text} names no class")
    names = class_names(generator)
    found = []
    for word in words:
        number = int(word) if word.isdecimal() else names.index(word) if word in names else -1
        if not 0 <= number < count:
            known = f"0 to {count - 1}" + (f", or a name such as {names[0]}" if names else "")
            raise InputError(f"--classes: there is no class '{word}'; known: {known}")
        found.append(number)
    return found
