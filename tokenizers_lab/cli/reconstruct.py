"""`toklab reconstruct`: images beside what the model makes of them."""

import argparse

from .common import add_model, device_of, load_image_tokenizer, output_folder, say, show_progress, unique_names

help = "reconstruct images and show them side by side"
description = """Encode and decode images of any size (padded by reflection to a multiple of the patch; or with --size N
centre-cropped and scaled to N × N). One PNG for each shows the original at the left, the reconstruction at the
right; the PSNR is printed."""
example = "toklab reconstruct photo.jpg --model runs/rectok-tiny --out reconstructed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, model, folder."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    add_model(parser)
    parser.add_argument("--out", default="reconstructed", help="folder for the PNG files; default: reconstructed")
    parser.add_argument("--size", type=int, metavar="N", help="centre crop, scaled to N × N pixels")


def run(args: argparse.Namespace) -> int:
    """Write one PNG for each image and print its PSNR."""
    import torch

    from tokenizers_lab.metrics import psnr

    from .pictures import open_picture, save_png

    tokenizer = load_image_tokenizer(args.model, device_of(args))
    targets = unique_names(args.images, output_folder(args.out), ".png")
    values = []
    for file, target in show_progress(zip(args.images, targets), "reconstructing", len(targets)):
        pixels, geometry = open_picture(file, tokenizer.downsample, args.size)
        output = geometry.undo(tokenizer.reconstruct(pixels.to(tokenizer.device)).float().cpu())
        original = geometry.undo(pixels)
        values.append(psnr((output.clamp(0, 1) * 255).round() / 255, original).item())      # as the PNG holds it
        save_png(torch.cat([original, output], dim=3), target)
        say(f"{file}: PSNR {values[-1]:.2f} dB -> {target}")
    if len(values) > 1:
        say(f"mean PSNR of {len(values)} images: {sum(values) / len(values):.2f} dB")
    return 0
