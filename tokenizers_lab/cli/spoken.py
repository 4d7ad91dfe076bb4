"""Speech tokenizers whose decoder reads along: the text that was given, or what a recognizer hears, piece by piece."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.data.resample import resample
from tokenizers_lab.errors import InputError
from tokenizers_lab.teachers.asr import ASR, build_asr, quietest_cut
from tokenizers_lab.tokenizer import SpeechPrompt, SpeechTokenizer

from .common import say
from .sound_meter import PairMeter
from .sounds import Advance, Reconstruction, Sound, Wav, read_sound, save_sound, watched

LONGEST = 30.0           # seconds decoded at a time; a longer file is cut at quiet places
SEARCH, QUIET = 5.0, 0.1  # seconds before that in which the quietest stretch of this length is looked for
WITH_TEXT = 40.0         # seconds for which one text can be given: what TaDiCodec was trained with
PROMPT = 20.0            # seconds of a prompt at most
DEFAULT_ASR = "whisper-base"


@dataclass(frozen=True)
class Hearer:
    """Where texts come from."""

    given: str | None                        # the text of all files
    hear: Callable[[Tensor], str]            # audio (1, channels, samples) at the tokenizer's rate -> what is said
    source: str                              # who hears
    prompt: SpeechPrompt | None


def check_text_options(args: argparse.Namespace, tokenizer: SpeechTokenizer) -> None:
    """Raise InputError if a text or a voice is given to a tokenizer that takes none, one text for several files, and so on."""
    for name in ("text", "prompt", "prompt_text", "asr"):
        if getattr(args, name, None) is not None and not tokenizer.takes_texts:
            raise InputError(f"--{name.replace('_', '-')} is for decoders that read along; this {tokenizer.system} tokenizer's "
                             "does not")
    if tokenizer.takes_texts and getattr(args, "channels", None) == "each":
        raise InputError(f"--channels each is not for {tokenizer.system}: what is said is the same in all channels")
    if args.text is not None and len(args.files) > 1:
        raise InputError(f"--text is what is said in one file, but {len(args.files)} were given: go file by file")
    if args.prompt_text is not None and args.prompt is None:
        raise InputError("--prompt-text needs the clip it is said in: give --prompt too")


def hearer(args: argparse.Namespace, tokenizer: SpeechTokenizer) -> Hearer:
    """What the command's options say of texts and voice; the recognizer is loaded when it is first needed."""
    source = args.asr or DEFAULT_ASR
    loaded: list[ASR] = []

    def hear(audio: Tensor) -> str:
        if not loaded:
            loaded.append(build_asr(source, tokenizer.device))
        clip = resample(audio.mean(1), tokenizer.sample_rate, loaded[0].sample_rate)[0]
        return loaded[0].transcribe([clip])[0]

    return Hearer(args.text, hear, source, read_prompt(args, tokenizer, hear, source))


def read_prompt(
    args: argparse.Namespace, tokenizer: SpeechTokenizer, hear: Callable[[Tensor], str] | None, source: str = ""
) -> SpeechPrompt | None:
    """The clip of --prompt with its text: that of --prompt-text, else heard; hear none: not known. Raises InputError."""
    if args.prompt is None:
        return None
    audio = read_audio(args.prompt, tokenizer.sample_rate, tokenizer.channels)[0][None].clamp(-1, 1).to(tokenizer.device)
    seconds = audio.shape[-1] / tokenizer.sample_rate
    if seconds > PROMPT:
        raise InputError(f"{args.prompt} is {seconds:.1f} s long; a prompt has at most {PROMPT:g} s: cut it")
    text = args.prompt_text
    if text is None and hear is not None:
        text = hear(audio)
        say(f"{args.prompt}: text heard by {source}: {text}")
    return SpeechPrompt(audio, [text])


def reconstruct_spoken(
    tokenizer: SpeechTokenizer, sound: Sound, target: Path, wav: Wav, heard: Hearer, advance: Advance
) -> Reconstruction:
    """Encode a file and decode it with its text, and write the WAV; what had to be heard is printed.

    Raises InputError if a text was given for a file above 40 s.
    """
    if heard.given is not None and sound.seconds > WITH_TEXT:
        raise InputError(f"{sound.file} is {sound.seconds:.0f} s long; one text can be given for {WITH_TEXT:g} s at most: cut "
                         "the file, or leave --text out, so that it is heard piece by piece")
    meter = PairMeter(tokenizer.sample_rate, wav.rate)
    spent = {"encode": 0.0, "decode": 0.0}
    decode: Any = tokenizer.decode      # takes texts and more
    options: dict[str, Any] = {**wav.decode, **({"prompt": heard.prompt} if heard.prompt else {})}

    def restored() -> Iterator[Tensor]:
        pieces = watched(read_sound(tokenizer, sound, None), sound.length(tokenizer.sample_rate), advance)
        longest = WITH_TEXT if heard.given is not None else LONGEST
        for piece in utterances(pieces, round(longest * tokenizer.sample_rate), tokenizer.sample_rate):
            meter.push_original(piece[0].cpu())
            text = heard.given
            if text is None:
                text = heard.hear(piece)
                say(f"{sound.file}: text heard by {heard.source}: {text}")
            begin = time.perf_counter()
            with torch.inference_mode():
                encoding = tokenizer.encode(piece)
                middle = time.perf_counter()
                made = decode(encoding.code, encoding.lengths, texts=[text], **options)
            made = made[..., : piece.shape[-1] * wav.rate // tokenizer.sample_rate]
            if tokenizer.device.type == "cuda":
                torch.cuda.synchronize(tokenizer.device)
            spent["encode"] += middle - begin
            spent["decode"] += time.perf_counter() - middle
            meter.push_reconstruction(made[0].cpu())
            yield made[0].cpu()

    save_sound(target, restored(), sound, wav)
    value = meter.result()
    return Reconstruction(value["mel"], value["sisdr"], spent["encode"], spent["decode"])


def decode_spoken(
    tokenizer: SpeechTokenizer, codes: Tensor, sound: Sound, wav: Wav, text: str | None, prompt: SpeechPrompt | None,
    advance: Advance,
) -> Iterator[Tensor]:
    """Audio (channels, n) at `wav.rate` of codes (1, K, T) with their text, in the voice of the prompt.

    Raises InputError if the sound is above 40 s.
    """
    if sound.seconds > WITH_TEXT:
        raise InputError(f"{sound.file} is {sound.seconds:.0f} s long; a text or a prompt can be given for "
                         f"{WITH_TEXT:g} s at most")
    decode: Any = tokenizer.decode      # takes texts and more
    options: dict[str, Any] = {**wav.decode, **({"prompt": prompt} if prompt else {})}
    with torch.inference_mode():
        yield decode(codes.to(tokenizer.device), texts=[text], **options)[0].cpu()
    advance(1.0)


def utterances(pieces: Iterator[Tensor], longest: int, rate: int) -> Iterator[Tensor]:
    """Audio (1, channels, n) in stretches of at most `longest` samples, cut at quiet places. pieces: of any size."""
    quiet = round(QUIET * rate)
    search = min(round(SEARCH / QUIET), longest // (2 * quiet)) * quiet
    held: Tensor | None = None
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], dim=-1)
        while held.shape[-1] > longest:
            cut = quietest_cut(held[0].mean(0), longest, search, quiet)
            yield held[..., :cut]
            held = held[..., cut:]
    if held is not None:
        yield held
