"""`toklab reconstruct`: what the model makes of images and of sounds."""

import argparse
from typing import TYPE_CHECKING

from .common import (
    add_diffusion,
    add_model,
    add_speech_text,
    add_wav,
    check_files,
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
    from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer

help = "reconstruct images, side by side, or sounds"
description = """Encode and decode. Images of any size (padded by reflection to a multiple of the patch; or with --size N
centre-cropped and scaled to N × N): one PNG for each shows the original at the left, the reconstruction at the
right; the PSNR is printed. Sounds (WAV, FLAC, OGG, MP3, …) of any sample rate, number of channels and length, in
constant memory: one WAV for each, of exactly the original's duration; printed are the mel distance and SI-SDR to
the original as the network heard it, the bit rate, and computing time as a share of the duration. A decoder that
reads along (TaDiCodec) takes what is said from --text; without it a recognizer hears it, and it is printed."""
example = "toklab reconstruct photo.jpg --model runs/rectok-tiny --out reconstructed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, model, folder."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="images or sounds, as the model takes them")
    add_model(parser)
    parser.add_argument("--out", default="reconstructed", help="folder for the PNG or WAV files; default: reconstructed")
    parser.add_argument("--size", type=int, metavar="N", help="images: centre crop, scaled to N × N pixels")
    parser.add_argument("--channels", choices=["mix", "each"], help="speech: mix the channels down, or code each; default: mix")
    add_wav(parser)
    add_diffusion(parser)
    add_speech_text(parser, asr=True)


def run(args: argparse.Namespace) -> int:
    """Write one PNG or WAV for each file and print how close it is."""
    from tokenizers_lab.tokenizer import SpeechTokenizer

    tokenizer = load_tokenizer(args.model, device_of(args))
    speech = isinstance(tokenizer, SpeechTokenizer)
    check_options(args, speech, ["size"], ["channels", "rate", "float", "decoding", "text", "prompt", "prompt_text", "asr"])
    check_files(args.files, speech, args.model)
    if isinstance(tokenizer, SpeechTokenizer):
        reconstruct_sounds(args, tokenizer)
    else:
        reconstruct_images(args, tokenizer)
    return 0


def reconstruct_images(args: argparse.Namespace, tokenizer: "ImageTokenizer") -> None:
    """A PNG of each image, and its PSNR."""
    import torch

    from tokenizers_lab.metrics import psnr

    from .pictures import open_picture, save_png

    options = decoder_options(args, tokenizer)
    targets = unique_names(args.files, output_folder(args.out), ".png")
    values = []
    for file, target in show_progress(zip(args.files, targets), "reconstructing", len(targets)):
        pixels, geometry = open_picture(file, tokenizer.downsample, args.size)
        output = geometry.undo(tokenizer.reconstruct(pixels.to(tokenizer.device), **options).float().cpu())
        original = geometry.undo(pixels)
        values.append(psnr((output.clamp(0, 1) * 255).round() / 255, original).item())      # as the PNG holds it
        save_png(torch.cat([original, output], dim=3), target)
        say(f"{file}: PSNR {values[-1]:.2f} dB -> {target}")
    if len(values) > 1:
        say(f"mean PSNR of {len(values)} images: {sum(values) / len(values):.2f} dB")


def reconstruct_sounds(args: argparse.Namespace, tokenizer: "SpeechTokenizer") -> None:
    """A WAV of each sound, and how close it is."""
    from .sounds import find_sounds, rate_text, reconstruct_sound, wav_options
    from .spoken import check_text_options, hearer, reconstruct_spoken

    wav = wav_options(args, tokenizer)
    check_text_options(args, tokenizer)
    targets = unique_names(args.files, output_folder(args.out), ".wav")
    sounds = find_sounds(args.files, tokenizer, args.channels or "mix")
    heard = hearer(args, tokenizer) if tokenizer.takes_texts else None
    made = []
    with progress_bar("reconstructing", len(sounds)) as advance:
        for sound, target in zip(sounds, targets):
            if heard is None:
                made.append(reconstruct_sound(tokenizer, sound, target, wav, advance))
            else:
                made.append(reconstruct_spoken(tokenizer, sound, target, wav, heard, advance))
            rate = rate_text(tokenizer, len(sound.picks))
            times = [seconds / sound.seconds for seconds in (made[-1].encode_seconds, made[-1].decode_seconds)]
            say(f"{sound.file}: mel distance {made[-1].mel:.3f}, SI-SDR {made[-1].sisdr:.2f} dB, {rate}, real-time "
                f"factor {sum(times):.3f} (encode {times[0]:.3f}, decode {times[1]:.3f}) -> {target}")
    if len(made) > 1:
        mel, sisdr = (sum(getattr(one, name) for one in made) / len(made) for name in ("mel", "sisdr"))
        say(f"mean of {len(made)} sounds: mel distance {mel:.3f}, SI-SDR {sisdr:.2f} dB")
