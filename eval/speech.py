"""Reconstruction quality of speech tokenizers: one streaming pass over the clips, each counted exactly once, each as if alone."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.data.batch import SpeechBatch
from tokenizers_lab.data.resample import resample
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.settings import SpeechDataConfig
from tokenizers_lab.tokenizer import SpeechTokenizer

from .bitrate import SPEED_SECONDS, CodeTally, LatentTally, code_statistics, latent_rates, measure_speed
from .bootstrap import mean_summary
from .candidates import decoder_protocol, step_options
from .deterministic import exact_convolutions, map_in_order
from .gather import all_processes, check_names, in_step, on_first
from .provenance import environment, samples_sha256, text_sha256
from .speech_candidates import Clip, Rebuilt, SpeechCandidate, all_candidates, network_input, samples_at, takes_texts
from .speech_metrics import SPEECH_METRICS, BuiltMetric, MetricOptions, build_metrics, expand_names

CHANNELS = ("mixed", "each")
CODE_METRICS, SPEED_METRIC = ("usage", "bitrate"), "rtf"
Observe = Callable[[SpeechCandidate, Clip, Rebuilt], None]
Cell = dict[str, Any] | None      # a clip's value: {"value": number or None, …}; None: the row has no such metric


@dataclass(frozen=True)
class Record:
    """What was measured of a clip."""

    key: str
    digest: str                        # SHA-256 of its samples
    about: dict[str, Any]              # text, speaker, language, seconds
    cells: list[list[Cell]]            # [candidate][metric]


@dataclass
class Measured:
    """What one process, or all of them, measured."""

    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def data_protocol(cfg: SpeechDataConfig) -> dict[str, Any]:
    """How validation clips of a data config are prepared, for the result."""
    return {
        "source": cfg.val, "limit": cfg.val_limit, "seconds": cfg.val_seconds, "min_seconds": cfg.min_seconds,
        "max_seconds": cfg.max_seconds, "resample": "windowed sinc (torchaudio's, 6 lobes)",
    }


def evaluate_speech(
    model: SpeechTokenizer | SpeechCandidate,
    batches: Iterable[SpeechBatch],
    metrics: Sequence[str] = ("mel", "sisdr"),
    *,
    label: str = "model",
    data: dict[str, Any] | None = None,
    baselines: bool = True,
    sample_rate: int | None = None,
    channels: str = "mixed",
    decoding: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    allow_missing: bool = False,
    options: MetricOptions | None = None,
    skipped: Sequence[str] = (),
    together: bool = True,
    observe: Observe | None = None,
) -> dict[str, Any]:
    """Reconstruct every clip and measure it; the result is JSON data of the shape of `evaluate_images`.

    model: a tokenizer, or a candidate, which is measured without an untrained copy and a mean mel.
    batches: SpeechBatch at `sample_rate` (Hz; none: the model's); under torch.distributed each process passes its own share and
        gets the whole result (unless not `together`). The network and every metric see one clip at a time, without padding:
        batch sizes, shares and threads do not change a value.
    metrics: names of `speech_metrics.SPEECH_METRICS`; usage and bitrate, which both give `codes` (`code_statistics`), or of a
        tokenizer without codes `latents` (`latent_rates`); rtf, which gives `speed` (`measure_speed`; like `environment` another
        one in every run). With `allow_missing`, one whose weights or package are not here becomes a row that says why.
        options: the networks that they use.
    baselines: also measure the same network with random weights, the clip's mean mel held still (its `mel` alone) and, where
        a metric needs no original, the originals.
    channels: of clips with several: measure their mean (mixed) or `each` and average. decoding: one of the model's further ways
    to decode. steps: of a decoder that samples; none: its own number (`steps.sweep_speech` compares several). A tokenizer that
    takes texts is given those of the data, and the protocol says so. data: the protocol of the clips (`data_protocol`).
    skipped: clips that were left out, read when the pass has ended. observe: called with (candidate, clip, its reconstruction)
    for each row that makes sound, in order.
    Each metric of a row has title, unit, better, network, n (clips with a value), value, uncertainty (interval over clips),
    per_clip (in the order of `keys`; None without a value), and where there are any unmeasured {key: reason} and details (of
    each clip, what the metric keeps beside its number).
    Raises DataError without clips or on two of one name, InputError on non-finite output, WeightsMissing. What one process
    raises, all raise.
    """
    if channels not in CHANNELS:
        raise InputError(f"channels must be one of {', '.join(CHANNELS)}, not '{channels}'")
    plan = plan_metrics(metrics)
    tokenizer = None if isinstance(model, SpeechCandidate) else model
    rate = sample_rate or (0 if tokenizer is None else tokenizer.sample_rate)
    if tokenizer is None and (plan.codes or plan.speed or not rate):
        raise InputError("a candidate has no usage, bitrate or rtf, and must be told its clips' sample rate (sample_rate)")
    watch = _Watch(tokenizer, plan, observe)

    def share() -> tuple[list[SpeechCandidate], list[BuiltMetric], dict[str, str], Measured]:
        built, missing = build_metrics(plan.clips, allow_missing, options)
        absolute = any(metric.spec.needs != "pair" for metric in built)
        candidates = all_candidates(model, label, baselines, seed, absolute, decoding, steps)
        records = measure(candidates, built, clips_of(batches, rate), channels, watch)
        return candidates, built, missing, Measured(records, list(skipped))

    candidates, built, missing, mine = in_step(share, together)
    found = gather_measured(mine, together)
    records = found.records
    result: dict[str, Any] = {
        "kind": "speech reconstruction", "n": len(records), "keys": [record.key for record in records],
        "clips": [record.about for record in records], "skipped": found.skipped,
        "rows": [result_row(candidate, i, built, missing, records, seed) for i, candidate in enumerate(candidates)],
        "margins": _margins(candidates, built, records, seed),
        "protocol": {
            **(data or {"source": "given batches"}), **_protocol(records, built, rate), "channels": channels,
            "dtype": candidates[0].description.get("dtype"), "seed": seed,
            **({} if tokenizer is None else decoding_protocol(tokenizer, steps, [record.about for record in records])),
        },
        "environment": environment(candidates[0].device),
    }
    if tokenizer is not None and plan.codes:
        latents = reduce(LatentTally.merge, all_processes(watch.latents, together))
        codes = reduce(CodeTally.merge, all_processes(watch.tally, together))
        if latents.frames and not codes.counts:
            result["latents"] = latent_rates(latents, tokenizer)
        else:
            result["codes"] = code_statistics(codes, tokenizer)
    if tokenizer is not None and plan.speed:
        told = step_options(tokenizer, steps)
        result["speed"] = on_first(lambda: measure_speed(tokenizer, torch.cat(watch.start, dim=1)[None], **told), together)
    return result


@dataclass(frozen=True)
class Plan:
    """Metric names by what they are computed from."""

    clips: tuple[str, ...]         # a clip and its reconstruction
    codes: bool
    speed: bool


@dataclass
class _Watch:
    """Sees each row's sound of each clip: keeps what the model's codes and speed are computed from, and tells the observer."""

    tokenizer: SpeechTokenizer | None
    plan: Plan
    observe: Observe | None
    tally: CodeTally = field(default_factory=CodeTally)
    latents: LatentTally = field(default_factory=LatentTally)
    start: list[Tensor] = field(default_factory=list)      # what the network was given first, up to SPEED_SECONDS

    def __call__(self, candidate: SpeechCandidate, clip: Clip, made: Rebuilt) -> None:
        if self.tokenizer is not None and candidate.role == "model":
            if self.plan.codes and made.codes is not None:
                self.tally.add(made.codes, self.tokenizer.codebook_sizes, samples_at(clip, self.tokenizer.sample_rate))
            elif self.plan.codes and made.latents is not None:
                self.latents.add(made.latents, samples_at(clip, self.tokenizer.sample_rate))
            if self.plan.speed and sum(audio.shape[1] for audio in self.start) < SPEED_SECONDS * self.tokenizer.sample_rate:
                self.start.append(network_input(clip, self.tokenizer))
        if self.observe is not None:
            self.observe(candidate, clip, made)


def plan_metrics(names: Sequence[str]) -> Plan:
    """Sort metric names. Raises InputError for an unknown one."""
    others = (*CODE_METRICS, SPEED_METRIC)
    clips = [name for name in names if name not in others]
    try:
        return Plan(tuple(expand_names(clips)), any(name in names for name in CODE_METRICS), SPEED_METRIC in names)
    except InputError as error:
        raise InputError(f"{error}, {', '.join(others)}") from None


def _protocol(records: list[Record], metrics: list[BuiltMetric], rate: int) -> dict[str, Any]:
    """What was measured, in which form."""
    return {
        "audio_sha256": text_sha256([record.digest for record in records]),
        "sample_rate": rate, "seconds_total": math.fsum(record.about["seconds"] for record in records),
        "metric_rates": {metric.spec.name: metric.spec.sample_rate or rate for metric in metrics},
        "range": "[-1, 1], clamped", "forward_batch": 1,
        "intervals": "over clips, as if independent; clips of one speaker are not",
    }


def decoding_protocol(tokenizer: SpeechTokenizer, steps: int | None, about: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How a decoder of sampling steps is run, and whether one that takes texts had them. about: what is known of each clip."""
    said = decoder_protocol(tokenizer, steps)
    if takes_texts(tokenizer):
        known = sum(1 for clip in about if clip["text"])
        all_of_them = "the data's" if known == len(about) else f"the data's, of {known} of {len(about)} clips"
        said["texts"] = all_of_them if known else "none"
    return said


def clips_of(batches: Iterable[SpeechBatch], sample_rate: int) -> Iterator[Clip]:
    """Each clip of the batches, without its padding. Raises InputError on values that are not finite."""
    for batch in batches:
        for i, key in enumerate(batch.keys):
            audio = batch.audio[i, :, : int(batch.lengths[i])].float()
            if not torch.isfinite(audio).all():
                raise InputError(f"{key} holds NaN or infinite samples")
            yield Clip(key, audio.clamp(-1, 1), sample_rate, batch.texts[i], batch.speakers[i], batch.languages[i])


def measure(
    candidates: Sequence[SpeechCandidate], metrics: Sequence[BuiltMetric], clips: Iterable[Clip], channels: str = "mixed",
    observe: Observe | None = None,
) -> list[Record]:
    """Every clip's values; on the CPU each clip is the work of one thread, several at once. `observe` is called in order."""
    records = []

    @torch.inference_mode()      # thread-local: it must be entered where the work is done
    def one(clip: Clip) -> tuple[Clip, list[Rebuilt | None], Record]:
        made = [None if candidate.reconstruct is None else candidate.reconstruct(clip) for candidate in candidates]
        cells = [_cells(candidate, rebuilt, metrics, clip, channels) for candidate, rebuilt in zip(candidates, made)]
        about = {**clip.about(), "seconds": clip.seconds}
        return clip, made, Record(clip.key, samples_sha256(clip.audio), about, cells)

    with exact_convolutions():
        for clip, made, record in map_in_order(one, clips) if candidates[0].device.type == "cpu" else map(one, clips):
            records.append(record)
            for candidate, rebuilt in zip(candidates, made):
                if observe is not None and rebuilt is not None:
                    observe(candidate, clip, rebuilt)
    return records


def _cells(
    candidate: SpeechCandidate, made: Rebuilt | None, metrics: Sequence[BuiltMetric], clip: Clip, channels: str
) -> list[Cell]:
    """A candidate's value of each metric of one clip."""
    cells: list[Cell] = []
    for metric in metrics:
        spec = metric.spec
        if spec.name in candidate.numbers:
            cells.append(_cell(candidate.numbers[spec.name](clip)))
        elif made is None or (candidate.role == "originals" and spec.needs == "pair"):
            cells.append(None)
        elif spec.needs == "text" and clip.text is None:
            cells.append({"value": None, "reason": "its text is not known"})
        else:
            rate = spec.sample_rate or clip.sample_rate
            one = _signals(clip.audio, clip.sample_rate, rate, channels)
            two = _signals(made.audio, made.sample_rate, rate, channels)
            if len(one) != len(two):
                raise InputError(f"{candidate.label} gave {len(two)} channels for {len(one)} of {clip.key}: measure them mixed")
            cells.append(_mean_cell([_cell(metric.measure(*_same_length(a, b), clip.about())) for a, b in zip(one, two)]))
    return cells


def _signals(audio: Tensor, rate: int, wanted: int, channels: str) -> list[Tensor]:
    """The signals (samples,) that are measured, on the CPU, at the wanted rate."""
    audio = audio.float().cpu()
    return list(resample(audio.mean(0, keepdim=True) if channels == "mixed" else audio, rate, wanted))


def _same_length(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Both cut to the shorter: resampling between odd rates may differ by a sample."""
    samples = min(len(one), len(two))
    return one[:samples], two[:samples]


def _cell(value: Any) -> dict[str, Any]:
    """What a metric gave, as a dict with a value that is a finite number or None."""
    cell = dict(value) if isinstance(value, dict) else {"value": value}
    if cell["value"] is not None:
        cell["value"] = float(cell["value"])
        if not math.isfinite(cell["value"]):
            cell |= {"value": None, "reason": "the metric gave no finite number"}
    return cell


def _mean_cell(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over channels; that of one is itself. Without a value of each channel there is none."""
    if len(cells) == 1:
        return cells[0]
    bad = [cell for cell in cells if cell["value"] is None]
    return bad[0] if bad else {"value": math.fsum(cell["value"] for cell in cells) / len(cells), "channels": cells}


def gather_measured(mine: Measured, together: bool) -> Measured:
    """What all processes measured, in the order of the keys. Raises DataError."""
    shares = all_processes(mine, together)
    records = sorted((record for share in shares for record in share.records), key=lambda record: record.key)
    skipped = sorted(text for share in shares for text in share.skipped)
    if not records:
        raise DataError("there are no clips to evaluate" + (f": all {len(skipped)} were skipped" if skipped else ""))
    check_names([record.key for record in records], "clips")
    return Measured(records, skipped)


def result_row(
    candidate: SpeechCandidate, index: int, metrics: list[BuiltMetric], missing: dict[str, str], records: list[Record], seed: int
) -> dict[str, Any]:
    """A candidate's results by metric, with the value of every clip in the order of `keys`."""
    results: dict[str, Any] = {}
    for m, metric in enumerate(metrics):
        cells = {record.key: record.cells[index][m] for record in records}
        measured = {key: cell for key, cell in cells.items() if cell is not None}
        if measured:
            results[metric.spec.name] = _result(metric, measured, seed)
    if candidate.role in ("model", "untrained"):
        results |= {name: {"title": SPEECH_METRICS[name].title, "value": None, "missing": why} for name, why in missing.items()}
    return {"label": candidate.label, "role": candidate.role, **candidate.description, "metrics": results}


def _result(metric: BuiltMetric, cells: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    """A metric of a row."""
    spec = metric.spec
    result: dict[str, Any] = {"title": spec.title, "unit": spec.unit, "better": spec.better, "network": metric.network}
    unmeasured = {key: str(cell.get("reason", "it cannot be measured")) for key, cell in cells.items() if cell["value"] is None}
    good = [cell for cell in cells.values() if cell["value"] is not None]
    result["n"] = len(good)
    if good:
        result |= mean_summary([cell["value"] for cell in good], seed)
        if spec.summary is not None:
            result |= spec.summary(good, seed)
    else:
        result |= {"value": None, "uncertainty": None, "missing": f"no clip could be measured: {next(iter(unmeasured.values()))}"}
    result["per_clip"] = [cell["value"] for cell in cells.values()]
    if unmeasured:
        result["unmeasured"] = unmeasured
    details = [_shown(cell, ("value", "reason")) for cell in cells.values()]
    if any(details):
        result["details"] = details
    return result


def _shown(cell: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the result keeps of a clip's value: all but what is for the summary alone."""
    shown = {name: value for name, value in cell.items() if name not in without and not name.startswith("_")}
    return shown | {"channels": [_shown(one) for one in shown["channels"]]} if "channels" in shown else shown


def _margins(
    candidates: list[SpeechCandidate], metrics: list[BuiltMetric], records: list[Record], seed: int
) -> list[dict[str, Any]]:
    """How much better the model is than each other row, over the clips that both have a value of: positive is better."""
    margins = []
    for c, other in enumerate(candidates[1:], start=1):
        for m, metric in enumerate(metrics):
            sign = 1 if metric.spec.better == "higher" else -1
            pairs = [(record.cells[0][m], record.cells[c][m]) for record in records]
            values = [
                sign * (mine["value"] - theirs["value"]) for mine, theirs in pairs
                if mine and theirs and mine["value"] is not None and theirs["value"] is not None
            ]
            if values:
                over = {"over": other.label, "role": other.role}
                margins.append({"metric": metric.spec.name, **over, **mean_summary(values, seed)})
    return margins
