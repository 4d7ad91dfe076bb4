"""Metrics of a clip and its reconstruction, by name: the table that `toklab eval` and `toklab compare` read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.errors import InputError, WeightsMissing
from tokenizers_lab.metrics import MEL_RATE, mel_distance, si_sdr

Value = float | dict[str, Any] | None
Measure = Callable[[Tensor, Tensor, dict[str, Any]], Value]
NEEDS = ("pair", "reconstruction", "text")
SI_SDR_CAP = 100.0     # dB, given to identical clips, whose ratio is infinite and would make every mean infinite


@dataclass(frozen=True)
class MetricOptions:
    """Which networks metrics use, where there is a choice, and where they run."""

    asr: str = "whisper-tiny.en"                 # recognizer of wer and cer: an asset, a hub id or a folder
    speaker: str = "resemblyzer"                 # encoder of sim: resemblyzer, or a hub id or folder of a WavLMForXVector
    utmos: str | None = None                     # TorchScript file of UTMOS
    device: torch.device | str = "cpu"           # where these networks run


@dataclass(frozen=True)
class SpeechMetric:
    """A metric's name, how to read it, and how to make it.

    `build(options)` gives measure(original (samples,), reconstruction (samples,), about) of one clip: both mono float32 on the
    CPU at `sample_rate`, of one length; about: its key, text, speaker and language, None where unknown. It may be called from
    several threads at once. It returns a number; or None, or {"value": None, "reason": …}, for a clip that it cannot measure,
    which is then counted and listed; or {"value": number, …} with more to keep of the clip (JSON data; what begins with _ is for
    `summary` alone). A `provenance` attribute of it names its network in the result. `build` raises WeightsMissing or
    ConfigError in one line where something is not here.
    """

    name: str
    title: str
    unit: str
    better: str                             # higher or lower
    sample_rate: int | None                 # Hz to which both are resampled; none: the rate at which the clips are read
    needs: str                              # pair: both; reconstruction: it alone; text: it and the clip's text
    build: Callable[[MetricOptions], Measure]
    # Of all clips' values (the dicts or numbers that measure gave, none of them None): fields that join or replace the mean's.
    summary: Callable[[Sequence[Any], int], dict[str, Any]] | None = None     # (values, seed) -> {"value", "uncertainty", …}


def _mel(options: MetricOptions) -> Measure:
    return lambda original, made, about: float(mel_distance(made[None, None], original[None, None], MEL_RATE)[0])


def _sisdr(options: MetricOptions) -> Measure:
    def measure(original: Tensor, made: Tensor, about: dict[str, Any]) -> Value:
        if not torch.any(original != original.mean()):
            return {"value": None, "reason": "the original is silent"}
        return min(float(si_sdr(made[None, None], original[None, None])[0]), SI_SDR_CAP)

    return measure


SPEECH_METRICS = {metric.name: metric for metric in (
    SpeechMetric("mel", "mel distance", "", "lower", MEL_RATE, "pair", _mel),
    SpeechMetric("sisdr", "SI-SDR", "dB", "higher", None, "pair", _sisdr),
)}
ALIASES: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class BuiltMetric:
    """A metric ready to use."""

    spec: SpeechMetric
    measure: Measure
    network: str | None = None     # provenance of the pretrained network that it needs


def expand_names(names: Sequence[str]) -> list[str]:
    """Metric names with aliases replaced, each once. Raises InputError on an unknown name."""
    expanded = [part for name in names for part in ALIASES.get(name, (name,))]
    for name in expanded:
        if name not in SPEECH_METRICS:
            raise InputError(f"there is no speech metric '{name}'; known: {', '.join([*SPEECH_METRICS, *ALIASES])}")
    return list(dict.fromkeys(expanded))


def build_metrics(
    names: Sequence[str], allow_missing: bool = False, options: MetricOptions | None = None
) -> tuple[list[BuiltMetric], dict[str, str]]:
    """The metrics of these names, and for those whose weights or package are not here the reason.

    Raises InputError on an unknown name; WeightsMissing where something is missing, unless `allow_missing`.
    """
    built, missing = [], {}
    for name in expand_names(names):
        try:
            measure = SPEECH_METRICS[name].build(options or MetricOptions())
        except WeightsMissing as error:
            if not allow_missing:
                raise
            missing[name] = str(error)
            continue
        provenance = getattr(measure, "provenance", None)
        built.append(BuiltMetric(SPEECH_METRICS[name], measure, None if provenance is None else str(provenance)))
    return built, missing
