"""`toklab eval`: measure a model on images."""

import argparse
from pathlib import Path

from .common import add_model, data_config, device_of, load_image_tokenizer, say, show_progress

help = "measure a model's reconstructions"
description = """Reconstruct every image of DATA and measure it beside two baselines: the same network untrained, and each
patch replaced by its mean colour. DATA is a folder, webdataset shards, or sample:photos (its held-out part).
The JSON holds every value."""
example = "toklab eval runs/rectok-tiny sample:photos --size 64 --out results.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, metrics, output."""
    add_model(parser, option=False)
    parser.add_argument("data", metavar="DATA", help="a folder of images, shards, or sample:photos")
    parser.add_argument("--metrics", default="psnr,ssim,lpips", help="comma-separated; default: psnr,ssim,lpips")
    parser.add_argument("--size", type=int, metavar="N", help="centre crop, scaled to N × N pixels; default: the training size")
    parser.add_argument("--limit", type=int, metavar="K", help="at most K images")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images at a time; default: 16")
    parser.add_argument("--no-baselines", action="store_true", help="measure the model alone")
    parser.add_argument("--allow-missing", action="store_true", help="go on without a metric whose weights are not here")
    parser.add_argument("--out", metavar="JSON", help="write the result to this file")


def run(args: argparse.Namespace) -> int:
    """Print a table; write the JSON."""
    from tokenizers_lab.data.loader import validation_batches
    from tokenizers_lab.eval.image_metrics import expand_names
    from tokenizers_lab.eval.images import data_protocol, evaluate_images
    from tokenizers_lab.eval.provenance import write_json
    from tokenizers_lab.eval.summary import format_value

    metrics = expand_names([m.strip() for m in args.metrics.split(",") if m.strip()])
    tokenizer = load_image_tokenizer(args.model, device_of(args))
    data = data_config(args.data, args.size or int(getattr(tokenizer.cfg, "image_size", 256)), args.limit)
    batches = show_progress(validation_batches(data, args.batch_size), "evaluating")
    result = evaluate_images(
        tokenizer, batches, metrics, label=args.model, data=data_protocol(data), baselines=not args.no_baselines,
        forward_batch=args.batch_size, allow_missing=args.allow_missing)
    say(f"{result['n']} images of {args.data}, {data.size} px (95 % intervals)")
    for row in result["rows"]:
        say(row["label"])
        for name, value in row["metrics"].items():
            say(f"  {value.get('title', name):<18} {format_value(value)}{' ' + value['unit'] if value.get('unit') else ''}")
    if args.out:
        say(f"result: {write_json(result, Path(args.out))}")
    return 0
