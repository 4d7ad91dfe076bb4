"""What the page does: image or sound in, reconstruction, pictures, numbers and files out. No Gradio here.

Every function takes files by path and the name that a person gave them, and raises one-line TokenizersLabError that tell of
the name alone. What is written goes into the folder that the caller hands over, and deletes.
"""

import math
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenizers_lab.cli.common import check_files, decoder_options
from tokenizers_lab.cli.decode import read_latents
from tokenizers_lab.cli.encoded import Encoded, read_encoded, write_encoded
from tokenizers_lab.cli.pictures import Geometry, fit_picture, save_png
from tokenizers_lab.cli.sounds import (
    Sound,
    Wav,
    bit_rate,
    decode_codes,
    encode_sound,
    find_sounds,
    read_codes,
    save_sound,
)
from tokenizers_lab.cli.spoken import decode_spoken
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.data.decode import read_image
from tokenizers_lab.data.resample import resample
from tokenizers_lab.data.transforms import fit_image
from tokenizers_lab.errors import InputError, TokenizersLabError
from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer

from ..image_metrics import METRICS, PSNR_CAP
from ..speech import measure
from ..speech_candidates import Clip, Rebuilt, SpeechCandidate, network_input
from ..speech_metrics import build_metrics
from .drawings import code_chart, code_image, enlarged, latent_image, mel_chart
from .loaded import LoadedModel

IMAGE_METRICS = ("psnr", "ssim")
SPEECH_METRICS = ("mel", "sisdr", "stoi")
SMALLEST_SSIM = 11         # pixels a side
MOST_STEPS = 200           # of a diffusion decoder
ARROWS = {"higher": "↑", "lower": "↓"}


@dataclass(frozen=True)
class Limits:
    """What the page takes."""

    megabytes: float = 20.0          # of a file
    seconds: float = 60.0            # of a sound
    pixels: int = 50_000_000         # of an image file
    view: int = 1024 * 1024          # pixels that are encoded


@dataclass(frozen=True)
class Sampling:
    """What a diffusion decoder is told; a tokenizer without these options does without. none: the model's own number."""

    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    text: str = ""                   # what is said, for decoders that read along

    def options(self, tokenizer: ImageTokenizer | SpeechTokenizer) -> dict[str, Any]:
        """Those that this tokenizer's `decode` has. Raises InputError on numbers out of range."""
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise InputError(f"sampling steps must be 1 to {MOST_STEPS}, not {self.steps}")
        known = tokenizer.decode_options
        return decoder_options(Namespace(
            steps=self.steps if "steps" in known else None, cfg=self.guidance if "guidance" in known else None,
            seed=self.seed if known else None), tokenizer)


@dataclass
class ImageResult:
    """What a model made of an image."""

    original: Image.Image | None        # the view that was encoded; none: not known, as only latents were given
    made: Image.Image
    picture: Image.Image                # of the latents or codes
    facts: dict[str, str]               # for people: name to value, in order
    files: list[Path] = field(default_factory=list)


@dataclass
class SoundResult:
    """What a model made of a sound."""

    made: Path                          # WAV
    picture: Image.Image                # of the codes or latents
    facts: dict[str, str]
    audio: tuple[Tensor, int]           # (channels, samples) of the WAV, Hz
    files: list[Path] = field(default_factory=list)


# --- images ---------------------------------------------------------------------------------------------------------------

def reconstruct_image(
    model: LoadedModel, file: Path, name: str, size: int | None, sampling: Sampling, limits: Limits, folder: Path
) -> ImageResult:
    """Encode and decode an image, or with `size` its centre crop scaled to size × size.

    Writes the latents or codes as `toklab encode` does, and the reconstruction as PNG, into the folder.
    Raises DataError on a file that is no image or too large, InputError on one that is too large to be encoded.
    """
    tokenizer = _image_tokenizer(model)
    check_file(file, name, False, limits)
    image = read_image(file, limits.pixels, name)
    pixels_wanted = image.width * image.height if size is None else size * size
    if size is not None and size < 1:
        raise InputError(f"the view must be at least 1 pixel wide, not {size}")
    if pixels_wanted > limits.view:
        raise InputError(f"{name}: {pixels_wanted:,} pixels are more than {limits.view:,}, which this page encodes: choose a "
                         "centre crop, or start it with --max-view")
    pixels, geometry = _view(image, tokenizer.downsample, size)
    decode: Any = tokenizer.decode      # a diffusion decoder takes more
    options = sampling.options(tokenizer)
    with torch.inference_mode():
        start = time.perf_counter()
        encoding = tokenizer.encode(pixels.to(tokenizer.device))
        middle = time.perf_counter()
        images = decode(encoding.code, **options).float().cpu()
        end = time.perf_counter()
    made, original = _finite(geometry.undo(images), model).clamp(0, 1), geometry.undo(pixels)
    stored = {key: value[0].cpu() for key, value in (("latents", encoding.latents), ("codes", encoding.codes))
              if value is not None}
    encoded = folder / f"{_stem(name)}.safetensors"
    header = {"system": tokenizer.system, "model_sha256": model.sha256, "file": name, **geometry.texts()}
    write_encoded(encoded, stored, header)
    return ImageResult(
        _to_image(original), _to_image(made), _picture(stored, tokenizer),
        {**_view_facts(geometry), **_image_rate(stored, tokenizer, geometry), **_image_quality(made, original),
         "computing time": f"encode {short(middle - start)} s, decode {short(end - middle)} s", **_model_facts(model, options)},
        [encoded, _png(made, folder / f"{_stem(name)}-reconstructed.png")])


def decode_image(model: LoadedModel, encoded: Encoded, sampling: Sampling, limits: Limits, folder: Path) -> ImageResult:
    """The image of a file that `toklab encode` wrote. Raises InputError."""
    tokenizer = _image_tokenizer(model)
    stored, geometry = read_latents(encoded, tokenizer)
    if stored.dim() != 3:
        raise InputError(f"{encoded.file}: latents of shape {tuple(stored.shape)} are none of an image (C, h, w)")
    height, width = (n * tokenizer.downsample for n in stored.shape[1:])
    if height * width > limits.view + 2 * tokenizer.downsample * (height + width):      # padding may exceed the view
        raise InputError(f"{encoded.file}: {width} × {height} pixels are more than {limits.view:,}, which this page decodes")
    inside = all(start >= 0 and length > 0 and start + length <= whole for start, length, whole in (
        (geometry.top, geometry.height, height), (geometry.left, geometry.width, width)))
    if not inside or (stored.is_floating_point() and not stored.isfinite().all()):
        raise InputError(f"{encoded.file}: its {' × '.join(map(str, stored.shape))} numbers do not fit its header or this model, "
                         "or are not finite; encode the image again")
    decode: Any = tokenizer.decode
    options = sampling.options(tokenizer)
    with torch.inference_mode():
        start = time.perf_counter()
        images = decode(stored[None].to(tokenizer.device), **options).float().cpu()
        seconds = time.perf_counter() - start
    made = _finite(geometry.undo(images), model).clamp(0, 1)
    kept = {key: value for key, value in encoded.tensors.items() if value is stored}
    return ImageResult(
        None, _to_image(made), _picture(kept, tokenizer),
        {**_view_facts(geometry), **_image_rate(kept, tokenizer, geometry), "computing time": f"decode {short(seconds)} s",
         **_model_facts(model, options)},
        [_png(made, folder / f"{_stem(encoded.file)}-decoded.png")])


def _image_tokenizer(model: LoadedModel) -> ImageTokenizer:
    if not isinstance(model.tokenizer, ImageTokenizer):
        raise InputError(f"{model.title} is a tokenizer for speech, not for images")
    return model.tokenizer


def _view(image: Image.Image, multiple: int, size: int | None) -> tuple[Tensor, Geometry]:
    """The image, or its centre crop, as float (1, 3, H, W), padded by reflection to multiples: every model sees the same view."""
    view = image if size is None else fit_image(image, size)
    pixels, geometry = fit_picture(view, multiple, None)
    whole = replace(geometry, file_height=image.height, file_width=image.width, crop=size or 0)
    return pixels.float() / 255, whole


def _view_facts(geometry: Geometry) -> dict[str, str]:
    size = f"{geometry.width} × {geometry.height} pixels"
    whole = f"{geometry.file_width} × {geometry.file_height}"
    return {"image": f"{size}, the centre of {whole}" if geometry.crop else size}


def _image_rate(stored: dict[str, Tensor], tokenizer: ImageTokenizer, geometry: Geometry) -> dict[str, str]:
    """Shape of what is stored, and what it costs a pixel of the view."""
    pixels = geometry.height * geometry.width
    latents, codes = stored.get("latents"), stored.get("codes")
    if latents is not None:
        floats = latents.numel()
        return {"latents": f"{' × '.join(map(str, latents.shape))} (channels, height, width)",
                "rate": f"{short(floats / pixels)} floats a pixel: {floats:,} in all, {short(3 * pixels / floats)} times fewer "
                        "than colour values"}
    assert codes is not None
    size = getattr(tokenizer, "codebook_size", None)
    bits = codes.numel() * math.log2(size) if size else None
    return {"codes": f"{' × '.join(map(str, codes.shape))} (codebooks, height, width)",
            "rate": f"{short(bits / pixels)} bits a pixel: {bits:,.0f} bits" if bits else f"{codes.numel():,} codes"}


def _image_quality(made: Tensor, original: Tensor) -> dict[str, str]:
    """PSNR and SSIM of images (1, 3, H, W) as an 8-bit file holds them."""
    made, facts = (made * 255).round() / 255, {}
    for name in IMAGE_METRICS:
        spec = METRICS[name]
        if name == "ssim" and min(made.shape[2:]) < SMALLEST_SSIM:
            continue
        value = spec.build(made.device).compute(made, original).item()
        exact = " (identical)" if name == "psnr" and value >= PSNR_CAP else ""
        facts[f"{spec.title} {ARROWS[spec.better]}"] = f"{value:.{2 if spec.unit else 3}f} {spec.unit}".strip() + exact
    return facts


def _picture(stored: dict[str, Tensor], tokenizer: ImageTokenizer) -> Image.Image:
    """The latents in their principal colours, or the codes."""
    if "latents" in stored:
        return enlarged(latent_image(stored["latents"]))
    return enlarged(code_image(stored["codes"], getattr(tokenizer, "codebook_size", None)))


def _to_image(images: Tensor) -> Image.Image:
    """The first of (B, 3, H, W) in [0, 1], enlarged if it is small."""
    array = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    return enlarged(Image.fromarray(array))


def _png(images: Tensor, path: Path) -> Path:
    save_png(images, path)
    return path


# --- sounds ---------------------------------------------------------------------------------------------------------------

def reconstruct_sound(
    model: LoadedModel, file: Path, name: str, sampling: Sampling, limits: Limits, folder: Path,
    advance: Callable[[float], None] = lambda share: None,
) -> SoundResult:
    """Encode a sound, channels mixed down, and decode its codes.

    Writes the codes as `toklab encode` does and the reconstruction as WAV into the folder. advance is told shares of the work.
    Raises DataError on a file that is no sound, damaged or not finite, InputError on one that is too long.
    """
    tokenizer = _speech_tokenizer(model)
    check_file(file, name, True, limits)
    with _called(file, name):
        sound = find_sounds([str(file)], tokenizer, "mix")[0]
    if sound.seconds > limits.seconds:
        raise InputError(f"{name}: {sound.seconds:.1f} s are more than {limits.seconds:g} s, which this page takes: cut it, or "
                         "start it with --max-seconds")
    options = sampling.options(tokenizer)
    start = time.perf_counter()
    with _called(file, name):
        stored = encode_sound(tokenizer, sound, lambda share: advance(share / 2))
    middle = time.perf_counter()
    encoded = folder / f"{_stem(name)}.safetensors"
    sound = replace(sound, file=name)
    kind = "codes" if tokenizer.codebooks else "latents"
    header = {"system": tokenizer.system, "model_sha256": model.sha256, **sound.texts()}
    write_encoded(encoded, {kind: stored}, header)
    codes, _ = read_codes(Encoded(name, {kind: stored}, header), tokenizer)
    wav = folder / f"{_stem(name)}-reconstructed.wav"
    audio = _write_sound(tokenizer, codes, sound, options, sampling.text, wav, lambda share: advance(share / 2))
    end = time.perf_counter()
    original, rate = read_audio(file, name=name)
    clip = Clip(name, original, rate)
    heard = Clip(name, network_input(clip, tokenizer), tokenizer.sample_rate)
    times = [seconds / sound.seconds for seconds in (middle - start, end - middle)]
    return SoundResult(
        wav, code_chart(stored, tokenizer.codebook_sizes if tokenizer.codebooks else [], sound.seconds),
        {"sound": f"{sound.seconds:.2f} s, {rate:,} Hz, {len(original)} channel{'s' if len(original) > 1 else ''}",
         **_sound_rate(stored, tokenizer), **_sound_quality(heard, *audio, model),
         "computing time": f"encode {short(times[0])}, decode {short(times[1])} of the duration",
         **_model_facts(model, options, sampling.text)},
        audio, [encoded, wav])


def decode_sound(
    model: LoadedModel, encoded: Encoded, sampling: Sampling, limits: Limits, folder: Path,
    advance: Callable[[float], None] = lambda share: None,
) -> SoundResult:
    """The sound of a file that `toklab encode` wrote. Raises InputError."""
    tokenizer = _speech_tokenizer(model)
    codes, sound = read_codes(encoded, tokenizer)
    if sound.seconds * len(codes) > limits.seconds:
        seconds = sound.seconds * len(codes)
        raise InputError(f"{encoded.file}: {seconds:.1f} s are more than {limits.seconds:g} s, which this page decodes")
    if codes.is_floating_point() and not codes.isfinite().all():
        raise InputError(f"{encoded.file}: its latents are not finite; encode the sound again")
    options = sampling.options(tokenizer)
    wav = folder / f"{_stem(encoded.file)}-decoded.wav"
    start = time.perf_counter()
    audio = _write_sound(tokenizer, codes, sound, options, sampling.text, wav, advance)
    seconds = time.perf_counter() - start
    flat = codes.flatten(0, 1)
    return SoundResult(
        wav, code_chart(flat, tokenizer.codebook_sizes * len(codes) if tokenizer.codebooks else [], sound.seconds),
        {"sound": f"{sound.seconds:.2f} s", **_sound_rate(codes[0], tokenizer),
         "computing time": f"decode {short(seconds / sound.seconds)} of the duration",
         **_model_facts(model, options, sampling.text)},
        audio, [wav])


def mel_picture(original: tuple[Path, str] | None, made: dict[str, SoundResult], folder: Path) -> Image.Image:
    """Mel spectrograms of the original (path, name), if there is one, and of what each model made of it."""
    sounds = {} if original is None else {"original": read_audio(original[0], name=original[1])}
    sounds |= {title: result.audio for title, result in made.items()}
    return mel_chart(sounds, folder)


def _write_sound(
    tokenizer: SpeechTokenizer, codes: Tensor, sound: Sound, options: dict[str, Any], text: str, path: Path,
    advance: Callable[[float], None],
) -> tuple[Tensor, int]:
    """Decode codes (streams, K, T) into a WAV of the sound's duration; returns what it holds, and its rate."""
    wav = Wav(options, tokenizer.output_rate(), original_rate=False, floats=False)
    if text and tokenizer.takes_texts:
        pieces = decode_spoken(tokenizer, codes, sound, wav, text, None, advance)
    else:
        pieces = decode_codes(tokenizer, codes, wav, advance)
    save_sound(path, pieces, sound, wav)
    return read_audio(path)


def _speech_tokenizer(model: LoadedModel) -> SpeechTokenizer:
    if not isinstance(model.tokenizer, SpeechTokenizer):
        raise InputError(f"{model.title} is a tokenizer for images, not for speech")
    return model.tokenizer


def _sound_rate(stored: Tensor, tokenizer: SpeechTokenizer) -> dict[str, str]:
    """Shape of what is stored, and what it costs a second."""
    frames = tokenizer.sample_rate / tokenizer.hop
    if tokenizer.codebooks:
        return {"codes": f"{stored.shape[0]} × {stored.shape[1]:,} (codebooks, frames), {short(frames)} frames a second",
                "rate": f"{bit_rate(tokenizer):,.0f} bit/s"}
    return {"latents": f"{stored.shape[0]} × {stored.shape[1]:,} (channels, frames), {short(frames)} frames a second",
            "rate": f"{frames * stored.shape[0]:,.0f} floats/s"}


def _sound_quality(heard: Clip, audio: Tensor, rate: int, model: LoadedModel) -> dict[str, str]:
    """Metrics of a reconstruction against what the network heard; those whose package is here."""
    built, _ = build_metrics(SPEECH_METRICS, allow_missing=True)
    if rate > heard.sample_rate:      # SI-SDR then is of the rate at which a person hears, as toklab reconstruct has it
        heard = Clip(heard.key, resample(heard.audio, heard.sample_rate, rate), rate)
    row = SpeechCandidate(model.title, "model", {}, lambda clip: Rebuilt(audio, rate))
    cells = measure([row], built, [heard])[0].cells[0]
    facts = {}
    for metric, cell in zip(built, cells):
        assert cell is not None      # the row makes sound
        shown = "not measured: " + str(cell["reason"]) if cell["value"] is None else f"{cell['value']:.3g}"
        facts[f"{metric.spec.title} {ARROWS[metric.spec.better]}"] = f"{shown} {metric.spec.unit}".strip()
    return facts


# --- both -----------------------------------------------------------------------------------------------------------------

def open_encoded(file: Path, name: str, limits: Limits) -> Encoded:
    """A file that `toklab encode` wrote, called by its name. Raises InputError, DataError."""
    check_size(file, name, limits)
    with _called(file, name):
        return replace(read_encoded(str(file)), file=name)


def choose_model(models: list[LoadedModel], encoded: Encoded, chosen: LoadedModel | None, any_model: bool) -> LoadedModel:
    """Who decodes a file: the model whose weights encoded it; or the chosen one, if it is that or `any_model` is meant.

    Raises InputError.
    """
    maker, system = encoded.header["model_sha256"], encoded.header["system"]
    if chosen is not None and (any_model or chosen.sha256 == maker):
        return chosen
    made = next((model for model in models if model.sha256 == maker), None)
    if chosen is None and made is not None:
        return made
    if chosen is not None:
        raise InputError(f"{encoded.file} was encoded by other weights ({system}, SHA-256 {maker[:12]}) than those of "
                         f"{chosen.title} ({chosen.sha256[:12]}): choose its model, or allow another")
    raise InputError(f"{encoded.file} was encoded by weights that are not on this page ({system}, SHA-256 {maker[:12]}): start "
                     "toklab app with that model, or choose a model and allow another")


def check_file(file: Path, name: str, speech: bool, limits: Limits) -> None:
    """Raise InputError on a file of the other kind by its name, or one that is too large."""
    check_files([name], speech, "the chosen model")
    if Path(name).suffix.lower() == ".safetensors":
        raise InputError(f"{name} holds codes or latents: drop it at “Decode a file”")
    check_size(file, name, limits)


def check_size(file: Path, name: str, limits: Limits) -> None:
    """Raise InputError on a file that is too large."""
    size = file.stat().st_size / 1e6
    if size > limits.megabytes:
        raise InputError(f"{name}: {size:.1f} MB are more than {limits.megabytes:g} MB, which this page takes (--max-mb)")


def _model_facts(model: LoadedModel, options: dict[str, Any], text: str = "") -> dict[str, str]:
    """Whose result it is."""
    told = [f"{name} {value:g}" for name, value in options.items() if name != "generator"]
    told += ["other noise"] if "generator" in options else []
    tokenizer = model.tokenizer
    reads = isinstance(tokenizer, SpeechTokenizer) and tokenizer.takes_texts
    told += [("with" if text else "without") + " text"] if reads else []
    sampling = {"decoder": ", ".join(told)} if told else {}
    return {**sampling, "parameters": f"{model.parameters / 1e6:.2f} M", "weights": model.origin}


@contextmanager
def _called(file: Path, name: str) -> Iterator[None]:
    """Errors and warnings call a file by the name that its owner knows."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
    except TokenizersLabError as error:
        raise type(error)(str(error).replace(str(file), name)) from error
    for warning in caught:
        warnings.warn(str(warning.message).replace(str(file), name), warning.category, stacklevel=3)


def _finite(images: Tensor, model: LoadedModel) -> Tensor:
    """The images; InputError if they are not finite."""
    if not images.isfinite().all():
        raise InputError(f"{model.title} gave NaN or infinite pixels: its weights or its precision are broken")
    return images


def short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _stem(name: str) -> str:
    """A file's name without its extension, for the names of what is made of it."""
    return Path(name).stem[:80] or "unnamed"
