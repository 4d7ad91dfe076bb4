"""`toklab eval`: measure a model on images."""

import argparse
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_model, data_config, device_of, load_image_tokenizer, process_group, say, show_progress

if TYPE_CHECKING:
    from tokenizers_lab.eval.candidates import Candidate
    from tokenizers_lab.tokenizer import ImageTokenizer

help = "measure a model's reconstructions"
description = """Reconstruct every image of DATA and measure it beside two baselines: the same network untrained, and each
patch replaced by its mean colour. DATA is a folder, webdataset shards, or sample:photos (its held-out part).
The JSON holds every value, its interval, and the protocol.

MODEL is besides those of ours a peer or finished reconstructions:
  diffusers:X   AutoencoderKL or AutoencoderDC: X is a folder that diffusers saved, a pipeline's folder, or a hub id
  FOLDER        of images, one for each of DATA with the same name (the extension may differ). A folder with config.json is a
                saved tokenizer, one with config.yaml or checkpoints a run; any other folder of images is reconstructions

Metrics of an image and its reconstruction: psnr, ssim, ms_ssim, lpips (both backbones), lpips_alex, lpips_vgg.
Of sets of images, by --features: rfid (against the originals), fid (against --reference), sfid, kid, is, precision, recall.
Of the latents: latents (statistics of each channel, active units, size in floats or bits).
Values do not depend on --batch-size, on threads or on the number of processes. On several GPUs:
torchrun --nproc_per_node 8 -m tokenizers_lab eval MODEL DATA …, or accelerate launch -m tokenizers_lab eval MODEL DATA …"""
example = "toklab eval runs/rectok-tiny sample:photos --size 64 --out results.json"
DECODERS = 4         # processes that decode images, where there are enough to be worth starting them
PICTURES = 8         # images in the grid
USER_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, metrics, protocol, output."""
    add_model(parser, option=False)
    parser.add_argument("data", metavar="DATA", help="a folder of images, shards, or sample:photos")
    parser.add_argument("--metrics", default="psnr,ssim,lpips", help="comma-separated; default: psnr,ssim,lpips")
    parser.add_argument("--features", default="inception", metavar="NET",
                        help="network of rfid and its kin: inception (FID's), or a stand-in whose results are named after it and "
                        "never FID: random, teacher, or a file of Inception's weights; default: inception")
    parser.add_argument("--reference", metavar="REF",
                        help="compare features with this instead of the originals: a .npz of statistics (ADM's or ours), or a "
                        "folder of images")
    parser.add_argument("--size", type=int, metavar="N",
                        help="centre crop, scaled to N × N pixels; default: the training size, or that of the reconstructions")
    parser.add_argument("--limit", type=int, metavar="K", help="at most K images, evenly spaced in a folder")
    parser.add_argument("--sample", action="store_true", help="draw latents from the posterior instead of taking its mode")
    parser.add_argument("--no-uint8", action="store_true",
                        help="measure pairs without rounding to 8 bits (features are always of 8-bit images)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images decoded at a time; default: 16")
    parser.add_argument("--forward-batch", type=int, default=1, metavar="B",
                        help="images the network sees at a time; more than 1 is faster on a GPU and may change last "
                        "digits; not with --sample")
    parser.add_argument("--no-baselines", action="store_true", help="measure the model alone")
    parser.add_argument("--allow-missing", action="store_true", help="go on without a metric whose weights are not here")
    parser.add_argument("--out", metavar="JSON", help="write the result to this file")
    parser.add_argument("--pictures", metavar="PNG",
                        help=f"also write a grid of {PICTURES} originals, reconstructions, and latents as colours (PCA)")


def run(args: argparse.Namespace) -> int:
    """Measure in all processes; the first one prints a table and writes the JSON."""
    from tokenizers_lab.errors import ConfigError, TokenizersLabError

    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {args.batch_size}")
    with process_group() as rank:
        if rank:
            warnings.simplefilter("ignore")
        try:
            result, model, data = measure(args, rank)
        except (TokenizersLabError, OSError):
            if rank:      # the first process has the same error, and says it
                return USER_ERROR
            raise
    if rank:
        return 0
    show(result, args.data, data.size)
    if args.out:
        from tokenizers_lab.eval.provenance import write_json

        say(f"result: {write_json(result, Path(args.out))}")
    if args.pictures:
        from tokenizers_lab.eval.pictures import save_pictures

        say(f"pictures: {save_pictures(model, data, Path(args.pictures), PICTURES)}")
    return 0


def measure(args: argparse.Namespace, rank: int) -> tuple[dict[str, Any], "ImageTokenizer | Candidate", Any]:
    """The result, the model and the data config."""
    from tokenizers_lab.eval.candidates import check_sampling
    from tokenizers_lab.eval.gather import in_step, processes
    from tokenizers_lab.eval.harness import evaluate, plan_metrics
    from tokenizers_lab.eval.reconstructions import folder_candidate, is_reconstructions, reconstruction_size

    names = [name.strip() for name in args.metrics.split(",") if name.strip()]
    plan_metrics(names, args.reference is not None)      # before anything slow
    check_sampling(args.sample, args.forward_batch)
    workers = min(DECODERS, os.cpu_count() or 1)
    device = in_step(lambda: device_of(args))
    model: ImageTokenizer | Candidate
    if is_reconstructions(args.model):
        size = args.size or in_step(lambda: reconstruction_size(args.model))
        data = data_config(args.data, size, args.limit, workers)
        model = folder_candidate(args.model, data)
    else:
        tokenizer = in_step(lambda: load_model(args.model, device))
        data = data_config(args.data, args.size or int(getattr(tokenizer.cfg, "image_size", 256)), args.limit, workers)
        model = tokenizer

    def progress(batches: Iterable[Any], what: str) -> Iterable[Any]:
        total = None if what == "reference" else count_batches(data, args.batch_size, processes()[1])
        return batches if rank else show_progress(batches, what, total)

    result = evaluate(
        model, data, names, features=args.features, reference=args.reference, batch_size=args.batch_size, device=device,
        allow_missing=args.allow_missing, progress=progress, label=args.model, baselines=not args.no_baselines,
        forward_batch=args.forward_batch, round_uint8=not args.no_uint8, sample=args.sample)
    return result, model, data


def load_model(name: str, device: str) -> "ImageTokenizer":
    """A tokenizer of ours or a peer's."""
    from tokenizers_lab.eval.peers import PREFIX, load_peer

    return load_peer(name.removeprefix(PREFIX), device) if name.startswith(PREFIX) else load_image_tokenizer(name, device)


def count_batches(data: Any, batch_size: int, world: int) -> int | None:
    """Batches of this process's share; None for shards, whose samples are not counted."""
    from tokenizers_lab.data.folder import open_folder
    from tokenizers_lab.data.sampling import spread
    from tokenizers_lab.data.sources import resolve_source

    folder = resolve_source(data.val, "val").folder
    return None if folder is None else -(-len(spread(len(open_folder(folder)), data.val_limit)) // (batch_size * world))


def show(result: dict[str, Any], data: str, size: int) -> None:
    """Print every row's values, then what to be wary of."""
    from tokenizers_lab.eval.summary import format_value

    say(f"{result['n']} images of {data}, {size} px (95 % intervals)")
    notes: list[str] = list(result.get("warnings", []))
    for row in result["rows"]:
        say(row["label"])
        for name, value in row["metrics"].items():
            title = value.get("title", name) + (f" to {value['reference']}" if "reference" in value else "")
            say(f"  {title:<18} {format_value(value)}{' ' + value['unit'] if value.get('unit') else ''}")
            notes += [f"{title}: {note}" for note in [*value.get("warnings", []), *filter(None, [value.get("missing")])]]
    if "latents" in result:
        show_latents(result["latents"])
    for which, files in result["converted"].items():
        kinds = sorted(set(files.values()))
        notes += [f"{list(files.values()).count(kind)} of the {which} were converted to 8-bit RGB from: {kind}" for kind in kinds]
    for note in dict.fromkeys(notes):
        say(f"note: {note}")


def show_latents(latents: dict[str, Any]) -> None:
    """Print the size and use of the latents."""
    shape = " × ".join(map(str, latents["shape"]))
    if latents["kind"] == "codes":
        say(f"latents: {shape} codes, {latents['bits_per_image']} bits an image, perplexity {latents['perplexity']}")
        return
    say(f"latents: {shape}, {latents['floats_per_image']} floats an image ({latents['values_per_float']:.1f} pixel values each), "
        f"{latents['active_units']} of {latents['shape'][0]} channels active")
    for name in ("mean", "std"):
        say(f"  {name} of channels: {min(latents[name]):.3f} to {max(latents[name]):.3f}")
    if latents["kl_bits_per_image"] is not None:
        say(f"  KL to N(0, I): {latents['kl_bits_per_image']:.1f} bits an image")
