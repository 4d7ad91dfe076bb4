"""Metrics of a clip and its reconstruction, by name: the table that `toklab eval` and `toklab compare` read."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_lab.errors import InputError, WeightsMissing
from tokenizers_lab.losses.spectral import stft_magnitude
from tokenizers_lab.metrics import MEL_RATE, mel_distance, si_sdr

from .asr_metrics import ErrorRate, summarise
from .mos import DNSMOS, UTMOS, DistillMOS, ViSQOL, means_of, optional_package
from .speaker import Similarity, against_prompts

Value = float | dict[str, Any] | None
Measure = Callable[[Tensor, Tensor, dict[str, Any]], Value]
NETWORK_RATE = 16_000  # Hz of all recognizers, speaker encoders and predictors of scores
NEEDS = ("pair", "reconstruction", "text")
SI_SDR_CAP = 100.0     # dB, given to identical clips, whose ratio is infinite and would make every mean infinite
STFT_RATE, STFT_WINDOWS = 16_000, (512, 1024, 2048)     # Hz, samples
PESQ_SHORTEST, PESQ_LONGEST = 0.25, 40.0     # seconds: shorter is refused by P.862; ITU's code keeps 50 utterances at most
STOI_RATE, STOI_TOO_SHORT = 16_000, 1e-5     # Hz; what pystoi gives for fewer than 30 frames that are not silent
_numpy_generator = threading.Lock()


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
        if silent(original) or silent(made):
            return unmeasured("the original or the reconstruction is silent")
        return min(float(si_sdr(made[None, None], original[None, None])[0]), SI_SDR_CAP)

    return measure


def _stft(options: MetricOptions) -> Measure:
    return lambda original, made, about: stft_distance(made, original)


def stft_distance(made: Tensor, original: Tensor) -> float:
    """Mean absolute difference of natural log magnitudes (from 1e-5) of STFTs with Hann windows of 512, 1024 and 2048 samples.

    The hop is a quarter of the window; the mean of the three windows. made, original: (samples,) at 16 kHz, shorter ones are
    filled with zeros to 2048.
    """
    distances = []
    for size in STFT_WINDOWS:
        window = torch.hann_window(size)
        pair = [F.pad(x[None], (0, max(0, STFT_WINDOWS[-1] - len(x)))) for x in (made, original)]
        one, two = (stft_magnitude(x, size, size // 4, window).clamp_min(1e-5).log() for x in pair)
        distances.append(float(F.l1_loss(one, two)))
    return sum(distances) / len(distances)


def _pesq(mode: str) -> Callable[[MetricOptions], Measure]:
    """ITU-T P.862 (nb) and P.862.2 (wb) as MOS-LQO."""
    rate = 16_000 if mode == "wb" else 8_000

    def build(options: MetricOptions) -> Measure:
        package = optional_package("pesq", f"PESQ ({mode})")
        failures = {
            package.PesqError.NO_UTTERANCES_DETECTED: "PESQ hears no utterance in it",
            package.PesqError.BUFFER_TOO_SHORT: f"it is shorter than PESQ's {PESQ_SHORTEST:g} s",
        }

        def measure(original: Tensor, made: Tensor, about: dict[str, Any]) -> Value:
            seconds = len(original) / rate
            if seconds < PESQ_SHORTEST:
                return unmeasured(f"it is shorter than PESQ's {PESQ_SHORTEST:g} s")
            if seconds > PESQ_LONGEST:      # beyond 50 utterances the package writes behind its arrays
                return unmeasured(f"it is longer than PESQ's {PESQ_LONGEST:g} s: cut it (--seconds)")
            if silent(original) or silent(made):
                return unmeasured("the original or the reconstruction is silent")
            value = float(package.pesq(rate, original.numpy(), made.numpy(), mode, on_error=package.PesqError.RETURN_VALUES))
            return unmeasured(failures.get(int(value), f"PESQ gives up on it ({value:g})")) if value < 0 else value

        return measure

    return build


def _stoi(extended: bool) -> Callable[[MetricOptions], Measure]:
    """Taal et al. 2011; extended: Jensen and Taal 2016."""

    def build(options: MetricOptions) -> Measure:
        package = optional_package("pystoi", "STOI")

        def measure(original: Tensor, made: Tensor, about: dict[str, Any]) -> Value:
            if silent(original):
                return unmeasured("the original is silent")
            if len(original) < STOI_RATE * 0.4:      # 30 frames of 12.8 ms; pystoi fails on less than one frame
                return unmeasured("it is shorter than STOI's 0.4 s")
            one, two = original.numpy().astype(np.float64), made.numpy().astype(np.float64)
            with _numpy_generator:      # ESTOI adds noise of numpy's global generator, which fills bands that are silent
                before = np.random.get_state()
                np.random.seed(0)
                try:
                    value = float(package.stoi(one, two, STOI_RATE, extended=extended))
                finally:
                    np.random.set_state(before)
            if value == STOI_TOO_SHORT:
                return unmeasured("less than STOI's 0.4 s of it is not silent")
            return value

        return measure

    return build


def silent(audio: Tensor) -> bool:
    """Whether all samples are the same."""
    return not bool((audio != audio[0]).any())


def unmeasured(reason: str) -> dict[str, Any]:
    """The value of a clip that a metric cannot measure."""
    return {"value": None, "reason": reason}


def _error_rate(units: str, against: str) -> Callable[[MetricOptions], Measure]:
    return lambda options: ErrorRate(units, against, options.asr, options.device)


SPEECH_METRICS = {metric.name: metric for metric in (
    SpeechMetric("mel", "mel distance", "", "lower", MEL_RATE, "pair", _mel),
    SpeechMetric("stft", "STFT distance", "", "lower", STFT_RATE, "pair", _stft),
    SpeechMetric("sisdr", "SI-SDR", "dB", "higher", None, "pair", _sisdr),
    SpeechMetric("wer", "WER", "%", "lower", NETWORK_RATE, "text", _error_rate("words", "text"), summarise),
    SpeechMetric("cer", "CER", "%", "lower", NETWORK_RATE, "text", _error_rate("characters", "text"), summarise),
    SpeechMetric("wer_asr", "WER against the ASR of the original", "%", "lower", NETWORK_RATE, "pair",
                 _error_rate("words", "original"), summarise),
    SpeechMetric("cer_asr", "CER against the ASR of the original", "%", "lower", NETWORK_RATE, "pair",
                 _error_rate("characters", "original"), summarise),
    SpeechMetric("sim", "speaker similarity", "", "higher", NETWORK_RATE, "pair",
                 lambda o: Similarity(o.speaker, o.device), against_prompts),
    SpeechMetric("dnsmos", "DNSMOS (overall)", "", "higher", NETWORK_RATE, "reconstruction", lambda o: DNSMOS(),
                 means_of("sig", "bak")),
    SpeechMetric("distillmos", "DistillMOS", "", "higher", NETWORK_RATE, "reconstruction", lambda o: DistillMOS(o.device)),
    SpeechMetric("visqol", "ViSQOL", "", "higher", NETWORK_RATE, "pair", lambda o: ViSQOL(), means_of("nsim")),
    SpeechMetric("utmos", "UTMOS", "", "higher", NETWORK_RATE, "reconstruction", lambda o: UTMOS(o.utmos, o.device)),
    SpeechMetric("pesq_wb", "PESQ (wide band)", "MOS", "higher", 16_000, "pair", _pesq("wb")),
    SpeechMetric("pesq_nb", "PESQ (narrow band)", "MOS", "higher", 8_000, "pair", _pesq("nb")),
    SpeechMetric("stoi", "STOI", "", "higher", STOI_RATE, "pair", _stoi(False)),
    SpeechMetric("estoi", "ESTOI", "", "higher", STOI_RATE, "pair", _stoi(True)),
)}
ALIASES = {"pesq": ("pesq_wb", "pesq_nb")}


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
