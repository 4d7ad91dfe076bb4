"""`toklab encode`: images to latents or codes, sounds to codes."""

import argparse
from typing import TYPE_CHECKING

from .common import (
    add_model,
    check_files,
    check_options,
    device_of,
    load_tokenizer,
    output_folder,
    progress_bar,
    say,
    show_progress,
    unique_names,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer

help = "encode images or sounds to latents or codes"
description = """Encode images of any size: each is padded by reflection to a multiple of the patch, or with --size N
centre-cropped and scaled to N × N. Encode sounds (WAV, FLAC, OGG, MP3, …) of any sample rate, number of channels
and length: each is resampled, and mixed down or coded channel by channel, in constant memory. One safetensors file
for each holds latents (C, h, w) or codes (K, h, w) of an image, codes (K, T) or (channels, K, T) of a sound; its
header tells the model and what toklab decode must know."""
example = "toklab encode photo.jpg --model runs/rectok-tiny --out latents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, model, folder."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="images or sounds, as the model takes them")
    add_model(parser)
    parser.add_argument("--out", default="latents", help="folder for the safetensors files; default: latents")
    parser.add_argument("--size", type=int, metavar="N", help="images: centre crop, scaled to N × N pixels")
    parser.add_argument("--channels", choices=["mix", "each"], help="speech: mix the channels down, or code each; default: mix")


def run(args: argparse.Namespace) -> int:
    """Write one file for each input."""
    from tokenizers_lab.hub import resolve_folder, weights_sha256
    from tokenizers_lab.tokenizer import SpeechTokenizer

    tokenizer = load_tokenizer(args.model, device_of(args))
    speech = isinstance(tokenizer, SpeechTokenizer)
    check_options(args, speech, ["size"], ["channels"])
    check_files(args.files, speech, args.model)
    origin = {"system": tokenizer.system, "model_sha256": weights_sha256(resolve_folder(args.model))}
    targets = unique_names(args.files, output_folder(args.out), ".safetensors")
    if isinstance(tokenizer, SpeechTokenizer):
        encode_sounds(args, tokenizer, origin, targets)
    else:
        encode_images(args, tokenizer, origin, targets)
    return 0


def encode_images(
    args: argparse.Namespace, tokenizer: "ImageTokenizer", origin: dict[str, str], targets: "list[Path]"
) -> None:
    """Latents or codes of each image."""
    import torch

    from .encoded import write_encoded
    from .pictures import open_picture

    for file, target in show_progress(zip(args.files, targets), "encoding", len(targets)):
        pixels, geometry = open_picture(file, tokenizer.downsample, args.size)
        with torch.inference_mode():
            encoding = tokenizer.encode(pixels.to(tokenizer.device))
        both = {"latents": encoding.latents, "codes": encoding.codes}
        tensors = {name: value[0].cpu() for name, value in both.items() if value is not None}
        write_encoded(target, tensors, {**origin, "file": file, **geometry.texts()})
        say(f"{file}: " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in tensors.items()) + f" -> {target}")


def encode_sounds(
    args: argparse.Namespace, tokenizer: "SpeechTokenizer", origin: dict[str, str], targets: "list[Path]"
) -> None:
    """Codes of each sound."""
    from .encoded import write_encoded
    from .sounds import encode_sound, find_sounds, rate_text

    sounds = find_sounds(args.files, tokenizer, args.channels or "mix")
    with progress_bar("encoding", len(sounds)) as advance:
        for sound, target in zip(sounds, targets):
            codes = encode_sound(tokenizer, sound, advance)
            name = "codes" if tokenizer.codebooks else "latents"
            write_encoded(target, {name: codes}, {**origin, **sound.texts()})
            rate = rate_text(tokenizer, len(sound.picks))
            say(f"{sound.file}: {name} {tuple(codes.shape)}, {sound.seconds:.2f} s, {rate} -> {target}")
