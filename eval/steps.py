"""What a diffusion decoder gains by more sampling steps, and what they cost: the same codes, decoded at each number of steps."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from tokenizers_lab.data.batch import ImageBatch, SpeechBatch
from tokenizers_lab.data.sampling import spread
from tokenizers_lab.errors import InputError
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer, SpeechTokenizer

from . import images, speech
from .candidates import Candidate, Reconstruction, decoder_protocol, default_option, step_options, takes_steps
from .gather import all_processes, in_step
from .image_metrics import build_metrics as build_image_metrics
from .measure import measure
from .provenance import processor_name
from .speech_candidates import Clip, Rebuilt, SpeechCandidate, checked_audio, network_input, rebuilt, text_options
from .speech_metrics import MetricOptions
from .speech_metrics import build_metrics as build_speech_metrics

STEPS = {"image": (1, 4, 16), "speech": (1, 2, 4, 8, 16, 32)}      # what a run's evaluation compares, beside the model's own
FEWEST = {"image": 16, "speech": 4}      # items that are measured even where they cost more than the main evaluation
UNITS = {"image": "image", "speech": "second of sound"}


@dataclass
class Times:
    """How long each encoding and decoding of this process took, in seconds an image or a second of sound."""

    encode: list[float] = field(default_factory=list)
    decode: dict[int, list[float]] = field(default_factory=dict)      # steps: one for each item


class OneEncoding:
    """The encoding of the item that a thread is at work on: made once, for all numbers of steps."""

    def __init__(self) -> None:
        self.mine = threading.local()

    def of(self, key: str, encode: Callable[[], Any]) -> Any:
        """What `encode` gave for this key."""
        if getattr(self.mine, "key", None) != key:
            self.mine.encoding, self.mine.key = encode(), key
        return self.mine.encoding


def step_counts(tokenizer: torch.nn.Module, counts: Sequence[int] | None = None) -> list[int]:
    """The numbers of steps to compare, smallest first: `counts`, or STEPS and the model's own.

    Raises InputError where the decoder takes none, or on one below 1.
    """
    kind = "image" if isinstance(tokenizer, ImageTokenizer) else "speech"
    own = default_option(tokenizer, "steps")
    wanted = set(counts) if counts else {*STEPS[kind], *([] if own is None else [int(own)])}
    for count in wanted:
        step_options(tokenizer, count)
    return sorted(wanted)


def split_steps(tokenizer: Any, counts: Sequence[int]) -> tuple[int | None, list[int]]:
    """(steps of the whole evaluation, steps that are compared): one number is for the whole, several are compared.

    Raises InputError for a model without steps.
    """
    if not counts:
        return None, []
    if not takes_steps(tokenizer):
        raise InputError("--steps is for diffusion decoders: this model decodes in one go")
    found = step_counts(tokenizer, counts)
    return (found[0], []) if len(found) == 1 else (None, found)


def affordable(result: dict[str, Any], own: int, counts: Sequence[int], fewest: int) -> list[str]:
    """Keys of the items to decode at all counts, evenly spaced in the result's: as many as cost no more than the result did.

    A network that encodes and decodes in n steps is taken to cost n + 1; `fewest` items are taken anyway.
    """
    networks = sum(row["role"] in ("model", "untrained") for row in result["rows"])
    main, each = len(result["keys"]) * networks * (1 + own), 1 + sum(counts)
    return [result["keys"][i] for i in spread(len(result["keys"]), max(fewest, main // each))]


def sweep_images(
    tokenizer: ImageTokenizer, batches: Iterable[ImageBatch], result: dict[str, Any], metrics: Sequence[str] = ("psnr",),
    counts: Sequence[int] | None = None, *, round_uint8: bool = True, seed: int = 0, together: bool = True,
) -> dict[str, Any]:
    """Quality and time of decoding in each number of steps: JSON data, the `steps` of a result.

    batches: the data again that `result` (of `evaluate_images`) was measured on; of them `affordable` images are taken.
    metrics: of single images; one whose weights are not here is left out. counts: none: `step_counts`.
    Every image is encoded once (the mode) and starts from the same fixed noise. Each row has steps, n, seconds (of decoding an
    image, median; on a CPU the time of one thread's processor, else by the clock) and metrics as in a row of `result`.
    Under torch.distributed as `evaluate_images`. Raises InputError where the decoder takes no steps.
    """
    counts = step_counts(tokenizer, counts)
    keys = affordable(result, _own(tokenizer), counts, FEWEST["image"])
    parameter, times, once = next(tokenizer.parameters()), Times(), OneEncoding()
    tokenizer.eval()

    def candidate(steps: int) -> Candidate:
        told = step_options(tokenizer, steps)

        def reconstruct(batch: torch.Tensor, names: Sequence[str]) -> Reconstruction:
            def encode() -> ImageEncoding:
                return _timed(lambda: tokenizer.encode(batch.to(parameter.dtype)), batch.device, times.encode)

            encoding: ImageEncoding = once.of(names[0], encode)
            made = _timed(lambda: tokenizer.decode(encoding.code, **told), batch.device, times.decode.setdefault(steps, []))
            return Reconstruction(made.float(), encoding)

        return Candidate(f"{steps} steps", "model", reconstruct, {}, parameter.device)

    candidates = [candidate(steps) for steps in counts]

    def share() -> tuple[Any, Any]:
        built, _ = build_image_metrics(metrics, parameter.device, allow_missing=True)
        return built, measure(candidates, built, _chosen_images(batches, keys), 1, round_uint8)

    built, mine = in_step(share, together)
    records = images.gather_measured(mine, together).records
    rows = [images.result_row(one, i, built, {}, records, seed)["metrics"] for i, one in enumerate(candidates)]
    return _summary(tokenizer, "image", result, keys, counts, rows, times, together)


def sweep_speech(
    tokenizer: SpeechTokenizer, batches: Iterable[SpeechBatch], result: dict[str, Any], metrics: Sequence[str] = ("mel",),
    counts: Sequence[int] | None = None, *, decoding: str | None = None, options: MetricOptions | None = None, seed: int = 0,
    together: bool = True,
) -> dict[str, Any]:
    """As `sweep_images`, of clips one at a time; seconds are those of decoding a second of sound.

    result: of `evaluate_speech`, whose sample rate and channels count. A tokenizer that takes texts is given those of the data.
    """
    counts = step_counts(tokenizer, counts)
    keys = affordable(result, _own(tokenizer), counts, FEWEST["speech"])
    protocol = result["protocol"]
    parameter, times, once = next(tokenizer.parameters()), Times(), OneEncoding()
    way = {} if decoding is None else {"decoding": decoding}
    rate = tokenizer.output_rate(**way)
    tokenizer.eval()

    def candidate(steps: int) -> SpeechCandidate:
        label, told = f"{steps} steps", {**way, **step_options(tokenizer, steps)}

        def reconstruct(clip: Clip) -> Rebuilt:
            def encode() -> Any:
                audio = network_input(clip, tokenizer)[None].to(parameter.device, parameter.dtype)
                return _timed(lambda: tokenizer.encode(audio), parameter.device, times.encode, clip.seconds)

            encoding = once.of(clip.key, encode)
            made = _timed(lambda: tokenizer.decode(encoding.code, encoding.lengths, **told, **text_options(tokenizer, clip)),
                          parameter.device, times.decode.setdefault(steps, []), clip.seconds)
            return rebuilt(checked_audio(made[0].float(), rate, clip, label), rate, encoding)

        return SpeechCandidate(label, "model", {}, reconstruct, device=parameter.device)

    candidates = [candidate(steps) for steps in counts]

    def share() -> tuple[Any, Any]:
        built, _ = build_speech_metrics(metrics, True, options)
        clips = _chosen_clips(speech.clips_of(batches, protocol["sample_rate"]), keys)
        return built, speech.Measured(speech.measure(candidates, built, clips, protocol["channels"]))

    built, mine = in_step(share, together)
    records = speech.gather_measured(mine, together).records
    rows = [speech.result_row(one, i, built, {}, records, seed)["metrics"] for i, one in enumerate(candidates)]
    found = _summary(tokenizer, "speech", result, keys, counts, rows, times, together)
    about = [record.about for record in records]
    return {**found, "protocol": {**found["protocol"], **_without_steps(speech.decoding_protocol(tokenizer, None, about))}}


def _summary(
    tokenizer: torch.nn.Module, kind: str, result: dict[str, Any], keys: list[str], counts: Sequence[int],
    rows: list[dict[str, Any]], times: Times, together: bool,
) -> dict[str, Any]:
    """The result of a sweep. rows: the metrics at each count."""
    shares = all_processes(times, together)
    device = next(tokenizer.parameters()).device
    decode = {steps: median(t for share in shares for t in share.decode.get(steps, [])) for steps in counts}
    return {
        "kind": kind, "counts": list(counts), "own": default_option(tokenizer, "steps"), "n": len(keys), "of": result["n"],
        "keys": sorted(keys), "per": UNITS[kind], "encode_seconds": median(t for share in shares for t in share.encode),
        "device": processor_name(device), "clock": "processor time of one thread" if device.type == "cpu" else "wall clock",
        "protocol": _without_steps(decoder_protocol(tokenizer)),
        "rows": [{"steps": steps, "n": len(keys), "seconds": decode[steps], "metrics": row} for steps, row in zip(counts, rows)],
    }


def _without_steps(protocol: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in protocol.items() if name != "decoder_steps"}


def _own(tokenizer: torch.nn.Module) -> int:
    """The model's own number of steps; 1 where it is not known, so that no more is spent than was."""
    return int(default_option(tokenizer, "steps") or 1)


def _chosen_images(batches: Iterable[ImageBatch], keys: Sequence[str]) -> Iterator[ImageBatch]:
    """The images of those keys; no batch is read after the last of them."""
    left = set(keys)
    for batch in batches:
        places = [i for i, key in enumerate(batch.keys) if key in left]
        if places:
            yield ImageBatch(batch.images[places], [batch.keys[i] for i in places])
        left -= set(batch.keys)
        if not left:
            return


def _chosen_clips(clips: Iterable[Clip], keys: Sequence[str]) -> Iterator[Clip]:
    """The clips of those keys; none is read after the last of them."""
    left = set(keys)
    for clip in clips:
        if clip.key in left:
            yield clip
            left.remove(clip.key)
        if not left:
            return


def _timed(function: Callable[[], Any], device: torch.device, times: list[float], of: float = 1.0) -> Any:
    """What the function gives; its duration, divided by `of`, is added to the times."""
    if device.type == "cpu":
        began = time.thread_time()      # other items are at work beside this one, each on one thread
        made = function()
        times.append((time.thread_time() - began) / of)
        return made
    _finish(device)
    began = time.perf_counter()
    made = function()
    _finish(device)
    times.append((time.perf_counter() - began) / of)
    return made


def _finish(device: torch.device) -> None:
    """Wait for what a GPU still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
