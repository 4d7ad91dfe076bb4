"""`toklab encode`: images to latents or codes."""

import argparse

from .common import add_model, device_of, load_image_tokenizer, output_folder, say, show_progress, unique_names

help = "encode images to latents or codes"
description = """Encode images of any size: each is padded by reflection to a multiple of the patch, or with --size N
centre-cropped and scaled to N × N. One safetensors file for each image holds its latents (C, h, w) or codes
(K, h, w); its header tells the model and the geometry, which toklab decode needs."""
example = "toklab encode photo.jpg --model runs/rectok-tiny --out latents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, model, folder."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    add_model(parser)
    parser.add_argument("--out", default="latents", help="folder for the safetensors files; default: latents")
    parser.add_argument("--size", type=int, metavar="N", help="centre crop, scaled to N × N pixels")


def run(args: argparse.Namespace) -> int:
    """Write one file for each image."""
    import torch
    from safetensors.torch import save_file

    from tokenizers_lab.hub import resolve_folder, weights_sha256

    from .pictures import open_picture

    tokenizer = load_image_tokenizer(args.model, device_of(args))
    sha256 = weights_sha256(resolve_folder(args.model))
    targets = unique_names(args.images, output_folder(args.out), ".safetensors")
    for file, target in show_progress(zip(args.images, targets), "encoding", len(targets)):
        pixels, geometry = open_picture(file, tokenizer.downsample, args.size)
        with torch.inference_mode():
            encoding = tokenizer.encode(pixels.to(tokenizer.device))
        both = {"latents": encoding.latents, "codes": encoding.codes}
        tensors = {name: value[0].cpu().contiguous() for name, value in both.items() if value is not None}
        header = {"system": tokenizer.system, "model_sha256": sha256, "file": file, **geometry.texts()}
        save_file(tensors, target, metadata=header)
        say(f"{file}: " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in tensors.items()) + f" -> {target}")
    return 0
