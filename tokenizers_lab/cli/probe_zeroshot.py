"""`toklab probe zeroshot`: classes of images by texts alone, for tokenizers that compare images with texts."""

import argparse
from functools import partial

from .common import add_model, say
from .probe_linear import add_probe_data, image_data, load_images, parts_of, read, show_probe

help = "classes of images by their names alone, for tokenizers trained with captions"
description = """Give each image of DATA the class whose name, put into templates, is closest to it, and say how often that is
right, with a 95 % interval, beside the same network untrained and the images' most frequent class. For tokenizers that compare
images with texts (VTP). Images are scaled to a square without keeping their aspect, as VTP's authors do.
DATA has a folder for each class, or a manifest with labels; of a folder that holds train/ and val/, val/ is measured.
--classes FILE: lines label<TAB>name, or one name a line in the order of the classes; default: the folders' names. With | between
them a class has several names, of which the closest counts.
--templates FILE: one a line, with {} where the name goes; default: twelve plain ones (CLIP's eighty come from such a file)."""
example = "toklab probe zeroshot runs/vtp-tiny data/tuxpaint --out zeroshot.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, texts, output."""
    add_model(parser, option=False)
    parser.add_argument("data", metavar="DATA", help="the images to classify, or a folder that holds train/ and val/")
    parser.add_argument("--classes", metavar="FILE", help="what classes are called")
    parser.add_argument("--templates", metavar="FILE", help="sentences that names are put into")
    add_probe_data(parser, "all images are measured")


def run(args: argparse.Namespace) -> int:
    """Classify, print a table."""
    from tokenizers_lab.eval import probe_zeroshot as probe
    from tokenizers_lab.eval.images import data_protocol
    from tokenizers_lab.eval.labelled import SQUASH, SquashReader, class_namer

    templates = probe.read_templates(args.templates) if args.templates else list(probe.TEMPLATES)
    train, val = parts_of(args.data, None, args.holdout)
    model = load_images(args)
    probe.check_model(model, args.model)
    cfg = image_data(args, model, val or train)
    result = probe.probe_zeroshot(
        model, read(cfg, "reading images", SquashReader(cfg)), templates, holdout=args.holdout, label=args.model,
        class_names=partial(probe.read_classes, args.classes) if args.classes else probe.plain_names, name_of=class_namer(cfg),
        baselines=not args.no_baselines, forward_batch=args.forward_batch, seed=args.seed,
        data={**data_protocol(cfg), "resize": SQUASH, "crop": "none"})
    say(f"{result['n']} images, {len(result['classes'])} classes, {len(templates)} templates (95 % intervals)")
    show_probe(args, result, [])
    return 0
