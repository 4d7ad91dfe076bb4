"""What tokenizers cost: time and memory, measured of all of them in turns on the same items, and the rate of what they store."""

import ctypes
import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer, SpeechTokenizer

from .bitrate import SPEED_SECONDS
from .provenance import processor_name
from .speech_candidates import Clip, network_input

MIB = 2**20
WARM_UP = 2              # rounds before the times count
FLOAT_BITS = 16          # of a stored latent, where rates of codes and of latents are put on one axis
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NOT_TOLD = "this system does not tell the peak of a process's memory"
Metrics = dict[str, dict[str, Any]]


@dataclass
class Job:
    """A model and the items that it is timed on."""

    label: str
    network: torch.nn.Module
    encode: Callable[[], Any]
    decode: Callable[[Any], Any]
    amount: float                     # images, or seconds of sound, that one call handles
    times: dict[str, list[float]] = field(default_factory=lambda: {"encode": [], "decode": []})      # seconds of each call
    growth: int | None = None         # bytes that encode and decode took at most beside the weights
    why: str = ""                     # why there is no number


def image_job(label: str, tokenizer: ImageTokenizer, images: Tensor) -> Job:
    """images: (B, 3, H, W) in [0, 1], encoded and decoded in one forward."""
    parameter = next(tokenizer.parameters())
    images = images.to(parameter.device, parameter.dtype)
    return Job(label, tokenizer, lambda: tokenizer.encode(images).code, tokenizer.decode, len(images))


def speech_job(label: str, tokenizer: SpeechTokenizer, clips: Sequence[Clip]) -> Job:
    """The clips one after another as one clip, at most 10 s of it, resampled to the tokenizer's rate; there is no text."""
    parameter = next(tokenizer.parameters())
    audio = torch.cat([network_input(clip, tokenizer) for clip in clips], dim=1)[None]      # (1, channels, samples)
    audio = audio[..., : round(SPEED_SECONDS * tokenizer.sample_rate)].to(parameter.device, parameter.dtype)
    seconds = audio.shape[-1] / tokenizer.sample_rate
    return Job(label, tokenizer, lambda: tokenizer.encode(audio), lambda made: tokenizer.decode(made.code, made.lengths), seconds)


@torch.inference_mode()
def measure_costs(jobs: Sequence[Job], unit: str, rounds: Iterable[int]) -> dict[str, Metrics]:
    """Speed and memory of each model by label, as metrics of its row. unit: of the speeds, amount a second.

    Every round gives each model one turn, and the next round begins with another model, so that a machine that grows slower
    in the meantime is slow for all. rounds: 0, 1, 2, …: round 0 is not counted, 1 gives the memory, all later ones the times,
    of which the median counts; the interval is their range. A model that cannot take the whole batch has no numbers and the
    reason why.
    """
    for turn in rounds:
        start = turn % max(1, len(jobs))
        for job in (*jobs[start:], *jobs[:start]):
            if not job.why:
                try:
                    _one_turn(job, turn)
                except Exception as error:      # memory that is not there, a kernel that is missing: the other rows go on
                    job.why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return {job.label: _metrics(job, unit) for job in jobs}


def _one_turn(job: Job, turn: int) -> None:
    """Encode and decode once; round 0 warms up, round 1 measures memory."""
    device = next(job.network.parameters()).device
    if turn < WARM_UP:
        job.growth = peak_growth(lambda: job.decode(job.encode()), device)
        return
    began = _now(device)
    code = job.encode()
    between = _now(device)
    job.decode(code)
    job.times["encode"].append(between - began)
    job.times["decode"].append(_now(device) - between)


def _now(device: torch.device) -> float:
    """Seconds, when all that a GPU was told is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def peak_growth(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which memory in use exceeded, at most, what was in use before, while function ran; none where nobody tells.

    A GPU: torch's allocator. Linux: resident memory of this process (VmHWM, set back before), after the C library's free
    memory was handed back, so that what an earlier model has left is no gift; it counts whole pages and is good to about 1 MiB.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - allocated
    before = _set_peak_back() if device.type == "cpu" else None
    function()
    return None if before is None else max(0, _resident("VmHWM") - before)


def _set_peak_back() -> int | None:
    """Give free memory back and forget the peak; bytes resident now, or none where that is impossible."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError, TypeError):      # no glibc, no Linux, no right to
        return None


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def weight_bytes(network: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


def _metrics(job: Job, unit: str) -> Metrics:
    """A job's numbers in the shape of a row's metrics."""
    found: Metrics = {}
    for what, times in job.times.items():
        speeds = sorted(job.amount / max(time, 1e-9) for time in times)
        entry = {"title": what, "unit": unit, "better": "higher"}
        if job.why or not speeds:
            found[f"{what}_speed"] = {**entry, "value": None, "uncertainty": None, "missing": job.why}
        else:
            method = f"range of {len(times)} repeats"
            found[f"{what}_speed"] = {
                **entry, "value": median(speeds), "uncertainty": {"low": speeds[0], "high": speeds[-1], "method": method},
                "seconds": times}
    weights = weight_bytes(job.network)
    memory = {"title": "peak memory", "unit": "MiB", "better": "lower", "uncertainty": None, "weights_bytes": weights}
    if job.why or job.growth is None:
        found["memory"] = {**memory, "value": None, "missing": job.why or NOT_TOLD}
    else:
        found["memory"] = {**memory, "value": (weights + job.growth) / MIB, "growth_bytes": job.growth}
    return found


def costs_protocol(batch: str, repeats: int, device: torch.device | str) -> dict[str, Any]:
    """How time and memory were measured, and where."""
    where = "torch's allocator" if torch.device(device).type == "cuda" else "resident memory of the process (VmHWM)"
    return {
        "batch": batch, "repeats": repeats, "order": "the models in turns, each round from another one on; median",
        "memory": f"weights and buffers, and what encode and decode of the batch took at most beside them: {where}",
        "threads": torch.get_num_threads(), "processor": processor_name(device),
    }


def parameter_metric(network: torch.nn.Module) -> Metrics:
    """Millions of parameters."""
    count = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": {"title": "parameters", "unit": "M", "better": "", "value": count / 1e6, "uncertainty": None}}


def _rate(title: str, unit: str, value: float) -> dict[str, Any]:
    return {"title": title, "unit": unit, "better": "", "value": value, "uncertainty": None}


def image_rates(tokenizer: ImageTokenizer, encoding: ImageEncoding, pixels: int) -> Metrics:
    """Rate of what is stored of an image of that many pixels: `encoding` is its own. Codes of unknown size have none."""
    code = encoding.code[0]
    if encoding.latents is not None:
        floats = code.numel() / pixels
        return {"floats": _rate("rate", "floats/pixel", floats),
                "stored": _rate(f"rate, a float as {FLOAT_BITS} bits", "bit/pixel", FLOAT_BITS * floats)}
    size = getattr(tokenizer, "codebook_size", None)
    if not size:
        return {}
    bits = code.numel() * math.log2(size) / pixels
    return {"bits": _rate("rate", "bit/pixel", bits),
            "stored": _rate(f"rate, a float as {FLOAT_BITS} bits", "bit/pixel", bits)}


def speech_rates(result: dict[str, Any]) -> Metrics:
    """Rates and use of the codebooks from `codes` or `latents` of a result of `evaluate_speech`."""
    title = f"rate, a float as {FLOAT_BITS} bits"
    if "latents" in result:
        latents = result["latents"]
        floats = latents["floats_per_second"]
        return {"floats": _rate("rate", "floats/s", floats), "stored": _rate(title, "kbit/s", FLOAT_BITS * floats / 1000),
                "frame_rate": _rate("frame rate", "Hz", latents["frame_rate"])}
    if "codes" not in result:
        return {}
    codes = result["codes"]
    return {
        "bitrate": _rate("bitrate", "kbit/s", codes["bitrate"] / 1000),
        "entropy_bitrate": _rate("entropy bitrate", "kbit/s", codes["entropy_bitrate"] / 1000),
        "stored": _rate(title, "kbit/s", codes["bitrate"] / 1000),
        "frame_rate": _rate("frame rate", "Hz", codes["frame_rate"]),
        "usage": _rate("codes used", "%", 100 * codes["usage"]) | {"better": "higher"},
    }
