"""`toklab probe linear`: how well a linear classifier on an image tokenizer's frozen features tells classes apart."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .common import add_model, device_of, say, show_progress

help = "a linear classifier on an image tokenizer's frozen features"
description = """Fit a linear classifier to frozen features of the training images of DATA, and give its accuracy on held-out
ones, with 95 % intervals, beside the same network untrained, 8 × 8 pixels, and the most frequent class.
DATA has a folder for each class, or a manifest with labels; a folder that holds train/ and val/ is both parts. Without --val,
one image in five of each class is held out, always the same ones.
Features: of a tokenizer that is trained with captions (VTP) class and mean patch token of its last block, before the bottleneck;
of every other the mean of its latents over positions. --grid G keeps G × G positions of the latents. --features blocks takes
those of an encoder's layers of any tokenizer that has them (of VFM-VAE: of its frozen network), --layers or --blocks say which.
Solvers: lbfgs (logistic regression, float64; the penalty is chosen on a fifth of the training images), sgd (DINOv2's and VTP's
thirteen learning rates, on features of images without augmentation; what the held-out images would choose is given too)."""
example = "toklab probe linear runs/vtp-tiny data/tuxpaint --out linear.json"
PARTS = ("train", "val")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, features, solver, output."""
    add_model(parser, option=False)
    parser.add_argument("data", metavar="DATA", help="the training images, or a folder that holds train/ and val/")
    parser.add_argument("--val", metavar="DATA", help="the images to measure on; default: DATA's val/, or a fixed fifth of DATA")
    parser.add_argument("--features", choices=["auto", "blocks", "latents"], default="auto",
                        help="default: of blocks where the model is trained with captions, else latents")
    parser.add_argument("--blocks", type=int, metavar="N", help="class tokens of the last N blocks; default: 1")
    parser.add_argument("--layers", metavar="N,N", help="of these layers, from 0, or from the end: --layers=-4,-1")
    parser.add_argument("--grid", type=int, metavar="G", help="latents: average to G × G positions; default: 1, their mean")
    parser.add_argument("--teacher", metavar="NET", help="also probe a frozen network, as of toklab eval --teacher")
    parser.add_argument("--solver", choices=["lbfgs", "sgd"], help="default: lbfgs")
    parser.add_argument("--iterations", type=int, metavar="N", help="of lbfgs (default: 500 at most), or steps of sgd (12,500)")
    add_probe_data(parser, "5 where there is no --val")


def add_probe_data(parser: argparse.ArgumentParser, holdout: str) -> None:
    """What both probes of images take."""
    parser.add_argument("--holdout", type=int, metavar="N", help=f"hold out one image in N of each class; default: {holdout}")
    parser.add_argument("--size", type=int, metavar="N", help="pixels a side; default: the training size")
    parser.add_argument("--limit", type=int, metavar="K", help="at most K images of each part, evenly spaced in a folder")
    parser.add_argument("--forward-batch", type=int, default=1, metavar="B", help="images the network sees at a time; default: 1")
    parser.add_argument("--no-baselines", action="store_true", help="probe the model alone")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of random weights and of sgd; default: 0")
    parser.add_argument("--out", metavar="JSON", help="write the result to this file")


def run(args: argparse.Namespace) -> int:
    """Fit, measure, print a table."""
    from tokenizers_lab.errors import ConfigError
    from tokenizers_lab.eval.images import data_protocol
    from tokenizers_lab.eval.labelled import class_namer
    from tokenizers_lab.eval.probe_linear import LinearSettings, probe_linear

    if args.val is not None and args.holdout is not None:
        raise ConfigError("--val names the held-out images: it does not go with --holdout")
    given = {name: getattr(args, name) for name in ("solver", "iterations", "seed") if getattr(args, name) is not None}
    settings = LinearSettings(**given)
    train, held_out = parts_of(args.data, args.val, args.holdout)
    model = load_images(args)
    sources = sources_of(args, model)
    configs = [image_data(args, model, source) for source in (train, held_out) if source is not None]
    whats = ("reading the training images", "reading the held-out images")
    train_images, *held_out_images = (read(cfg, what) for cfg, what in zip(configs, whats))
    result = probe_linear(
        sources, train_images, held_out_images[0] if held_out_images else None, settings,
        holdout=5 if args.holdout is None else args.holdout, majority=not args.no_baselines,
        names=(class_namer(configs[0]), class_namer(configs[-1])), forward_batch=args.forward_batch,
        data={name: data_protocol(cfg) for name, cfg in zip(("training", "held_out"), configs)})
    protocol = result["protocol"]
    say(f"{result['n']} held-out images, {len(result['classes'])} classes, classifiers fitted to {protocol['training_images']} "
        f"({protocol['solver']}; 95 % intervals)")
    notes = []
    for row in result["rows"]:
        if "best_on_held_out" in row:
            notes.append(f"{row['label']}: the best of {len(row['curve'])} learning rates by the held-out images themselves, as "
                         f"papers report, is {row['best_on_held_out']:.2f} %")
    if protocol["same_as_held_out"]:
        notes.append(f"{protocol['same_as_held_out']} training images are left out: held-out ones have the same pixels")
    if protocol["classes_never_seen"]:
        notes.append(f"held-out classes without a training image: {', '.join(protocol['classes_never_seen'])}")
    show_probe(args, result, notes)
    return 0


def load_images(args: argparse.Namespace) -> Any:
    """The model. Raises InputError if it is for speech, ConfigError on a number below 1."""
    from tokenizers_lab.errors import ConfigError, InputError
    from tokenizers_lab.tokenizer import ImageTokenizer

    from .eval import load_model

    for name in ("size", "limit", "forward_batch", "blocks", "grid"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    model = load_model(args.model, device_of(args))
    if not isinstance(model, ImageTokenizer):
        raise InputError(f"{args.model} is a tokenizer for speech: it has no images to classify (toklab probe asr)")
    return model.eval()


def sources_of(args: argparse.Namespace, model: Any) -> list[Any]:
    """Rows: the model, untrained, the teacher, pixels. Raises InputError where an option does not fit the features."""
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.eval import image_features as features
    from tokenizers_lab.eval.candidates import UNTRAINED_LABEL, untrained_copy

    given = [name for name in ("blocks", "layers") if getattr(args, name) is not None]
    has = {name: callable(getattr(model, name, None)) for name in ("features", "text_embedding")}
    wanted = has["features"] and (has["text_embedding"] or bool(given))
    blocks = args.features == "blocks" or (args.features == "auto" and args.grid is None and wanted)
    if blocks and args.grid is not None:
        raise InputError("--grid is for latents: give --features latents")
    if not blocks and given:
        raise InputError(f"--{given[0]} is for features of blocks, and these are latents")
    if len(given) == 2:
        raise InputError("--blocks and --layers both say which layers: give one of them")
    layers = layer_numbers(args.layers) if args.layers is not None else list(range(-(args.blocks or 1), 0))

    def of(network: Any, label: str, role: str) -> Any:
        if blocks:
            return features.layer_features(network, label, role, layers)
        return features.latent_features(network, label, role, args.grid or 0)

    sources = [of(model, args.model, "model")]
    if not args.no_baselines and hasattr(model, "cfg"):
        sources.append(of(untrained_copy(model, args.seed), UNTRAINED_LABEL, "untrained"))
    if args.teacher is not None:
        teacher = features.load_teacher(args.teacher, device_of(args))
        random = " (random weights)" if "random weights" in teacher.provenance else ""
        sources.append(features.teacher_features(teacher, f"teacher {args.teacher}{random}"))
    return sources if args.no_baselines else [*sources, features.pixel_features()]


def layer_numbers(text: str) -> list[int]:
    """Of "-4,-1" or "0, 5". Raises InputError on anything else."""
    from tokenizers_lab.errors import InputError

    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"--layers takes numbers such as 0,5 or, from the end, --layers=-4,-1, not '{text}'") from None


def parts_of(data: str, val: str | None, holdout: int | None) -> tuple[str, str | None]:
    """(training source, held-out source or none): a folder that holds train/ and val/ is both, unless told otherwise."""
    both = [Path(data).expanduser() / part for part in PARTS]
    if val is None and holdout is None and all(folder.is_dir() for folder in both):
        return str(both[0]), str(both[1])
    return data, val


def image_data(args: argparse.Namespace, model: Any, source: str) -> Any:
    """The config of images of one part."""
    from .common import data_config

    return data_config(source, args.size or int(getattr(model.cfg, "image_size", 256)), args.limit)


def read(cfg: Any, what: str, reader: Any = None) -> Iterable[Any]:
    """Batches of a config's images, with a bar."""
    from tokenizers_lab.data.loader import validation_batches

    return show_progress(validation_batches(cfg, 16, reader=reader), what)


def show_probe(args: argparse.Namespace, result: dict[str, Any], notes: list[str]) -> None:
    """Print rows, margins and notes; write the JSON."""
    from tokenizers_lab.eval.provenance import write_json

    from .eval_table import show_rows

    notes = [*show_rows(result["rows"]), *notes]
    for margin in result["margins"]:
        bounds = margin["uncertainty"]
        interval = "" if bounds is None else f" [{bounds['low']:.2f}, {bounds['high']:.2f}]"
        say(f"better than {margin['over']} by {margin['value']:.2f}{interval} points of accuracy")
    for row in result["rows"]:
        if "answer" in row:
            notes.append(f"{row['label']}: always '{row['answer']}'")
        else:
            notes.append(f"{row['label']}: {row['features']}, {row['width']} numbers")
    for note in notes:
        say(f"note: {note}")
    if args.out:
        say(f"result: {write_json(result, Path(args.out))}")
