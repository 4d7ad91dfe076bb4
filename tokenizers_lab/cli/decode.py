"""`toklab decode`: latents or codes back to images or sounds."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    add_diffusion,
    add_model,
    add_speech_text,
    add_wav,
    check_options,
    decoder_options,
    device_of,
    load_tokenizer,
    output_folder,
    progress_bar,
    say,
    show_progress,
    unique_names,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer

    from .encoded import Encoded
    from .pictures import Geometry

help = "decode files of toklab encode, or folders of toklab tokenize, to images or sounds"
description = """Decode the safetensors files that toklab encode wrote, or the folders or shards of toklab tokenize: images
to PNG, in the size of the original image (or of its crop); sounds to WAV, of exactly the original's duration, at
the codec's sample rate or the original's. A decoder that reads along (TaDiCodec) takes what is said from --text,
for sounds of at most 40 s; it does without, but less well."""
example = "toklab decode latents/*.safetensors --model runs/rectok-tiny --out decoded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, model, folder."""
    parser.add_argument("files", metavar="FILE", nargs="+",
                        help="files that toklab encode wrote, folders or shards of toklab tokenize")
    add_model(parser)
    parser.add_argument("--out", default="decoded", help="folder for the PNG or WAV files; default: decoded")
    parser.add_argument("--any-model", action="store_true", help="decode what another model encoded, too")
    add_wav(parser)
    add_diffusion(parser)
    add_speech_text(parser, asr=False)


def run(args: argparse.Namespace) -> int:
    """Write one PNG or WAV for each file."""
    from tokenizers_lab.hub import resolve_folder, weights_sha256
    from tokenizers_lab.tokenizer import SpeechTokenizer

    tokenizer = load_tokenizer(args.model, device_of(args))
    for_speech = ["rate", "float", "decoding", "text", "prompt", "prompt_text"]
    check_options(args, isinstance(tokenizer, SpeechTokenizer), [], for_speech)
    sha256 = None if args.any_model else weights_sha256(resolve_folder(args.model))
    if isinstance(tokenizer, SpeechTokenizer):
        decode_sounds(args, tokenizer, sha256)
    else:
        decode_images(args, tokenizer, sha256)
    return 0


def decode_images(args: argparse.Namespace, tokenizer: "ImageTokenizer", sha256: str | None) -> None:
    """A PNG of each file."""
    import torch

    from .encoded import check_maker, count_encoded, read_all
    from .pictures import save_png

    decode: Any = tokenizer.decode      # a diffusion decoder takes more
    options = decoder_options(args, tokenizer)
    target_of = targets(args, ".png")
    for encoded in show_progress(read_all(args.files), "decoding", count_encoded(args.files)):
        stored, geometry = read_latents(encoded, tokenizer)
        target = target_of(encoded)
        if sha256:
            check_maker(encoded, sha256)
        with torch.inference_mode():
            images = decode(stored[None].to(tokenizer.device), **options)
        save_png(geometry.undo(images), target)
        say(f"{encoded.file} -> {target}")


def targets(args: argparse.Namespace, suffix: str) -> "Callable[[Encoded], Path]":
    """Gives the output of each input, asked for in order: by its file's stem, or, in a data set, its key. Raises InputError."""
    from tokenizers_lab.tokenizing.plan import member_name

    from .encoded import is_tokenized

    folder = output_folder(args.out)
    named = unique_names([file for file in args.files if not is_tokenized(file)], folder, suffix)
    taken = {target.name.removesuffix(suffix) for target in named}
    in_turn = iter(named)

    def target_of(encoded: "Encoded") -> Path:
        if encoded.key is None:
            return next(in_turn)
        target = folder / (member_name(encoded.key, taken) + suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    return target_of


def read_latents(encoded: "Encoded", tokenizer: "ImageTokenizer") -> "tuple[Tensor, Geometry]":
    """(latents (C, h, w) or codes (K, h, w), geometry) of an image's file. Raises InputError if it is none."""
    from dataclasses import fields

    from tokenizers_lab.errors import InputError

    from .pictures import Geometry

    stored = encoded.tensors.get("latents", encoded.tensors.get("codes"))
    if "file_height" not in encoded.header or stored is None:
        raise InputError(f"{encoded.file} does not hold an image, which this {tokenizer.system} tokenizer decodes")
    try:
        return stored, Geometry(**{f.name: int(encoded.header[f.name]) for f in fields(Geometry)})
    except (KeyError, ValueError) as error:
        raise InputError(f"{encoded.file}: its header is damaged ({error}); encode the image again") from error


def decode_sounds(args: argparse.Namespace, tokenizer: "SpeechTokenizer", sha256: str | None) -> None:
    """A WAV of each file."""
    from .encoded import check_maker, count_encoded, read_all
    from .sounds import decode_codes, read_codes, save_sound, wav_options
    from .spoken import check_text_options, decode_spoken, read_prompt

    wav = wav_options(args, tokenizer)
    check_text_options(args, tokenizer)
    prompt = read_prompt(args, tokenizer, hear=None)
    target_of = targets(args, ".wav")
    with progress_bar("decoding", count_encoded(args.files)) as advance:
        for encoded in read_all(args.files):
            if sha256 and "original_rate" in encoded.header:
                check_maker(encoded, sha256)
            codes, sound = read_codes(encoded, tokenizer)
            target = target_of(encoded)
            if args.text is None and prompt is None:
                made = decode_codes(tokenizer, codes, wav, advance)
            else:
                made = decode_spoken(tokenizer, codes, sound, wav, args.text, prompt, advance)
            save_sound(target, made, sound, wav)
            say(f"{encoded.file}: {sound.seconds:.2f} s -> {target}")
