"""Several tokenizers of one kind under one protocol: quality, rate, speed and memory in one table, as data."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenizers_lab.errors import DataError, InputError, TokenizersLabError, WeightsMissing
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer, Tokenizer

from . import harness
from .bootstrap import mean_summary
from .compare_costs import (
    WARM_UP,
    Job,
    Metrics,
    costs_protocol,
    image_job,
    image_rates,
    measure_costs,
    parameter_metric,
    speech_job,
    speech_rates,
)
from .compare_examples import Examples, Keeper, Kept, first_by_hash, write_examples
from .compare_text import COST, QUALITY, RATE, markdown
from .gather import all_processes, on_first
from .provenance import write_json
from .speech import SPEED_METRIC, plan_metrics
from .speech_candidates import mean_mel_candidate
from .speech_data import evaluate_speech_data, speech_data_config

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
Model = Tokenizer | Exception          # an exception: why it could not be loaded
RANDOM = "random weights"
SPEED_BATCH = 8                        # images of a forward that is timed
REPEATS = 5
RATES = ("bitrate", "entropy_bitrate", "bits", "floats", "stored", "frame_rate", "usage")      # names of columns, in order
COSTS = ("encode_speed", "decode_speed", "memory", "parameters")


def compare_models(
    models: Sequence[tuple[str, Model]], source: str, metrics: Sequence[str], *, device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """`compare_speech` or `compare_images`, by the kind of the models; see `_joined` for the result.

    models: labels and tokenizers; in the place of one that could not be loaded the exception. It, and a model that cannot be
    measured, has a row that says why (`failed`). Under torch.distributed every process calls this with the same models, each
    item is measured once, and every process gets the whole result; the first one alone measures speed and memory.
    Raises InputError if there are both kinds, or something that is no tokenizer; the first model's error if no model is left.
    """
    _check_labels([label for label, _ in models])
    kinds = {label: _kind_of(model) for label, model in models if not isinstance(model, Exception)}
    if not kinds:
        raise next(model for _, model in models if isinstance(model, Exception))
    if len(set(kinds.values())) > 1 or "" in kinds.values():
        said = ", ".join(f"{label} is {f'for {kind}' if kind else 'no tokenizer'}" for label, kind in kinds.items())
        raise InputError(f"one table is for tokenizers of one kind: {said}")
    if "speech" in kinds.values():
        return compare_speech(models, source, metrics, device=device, **options)
    return compare_images(models, source, metrics, device=device, **options)


def _kind_of(model: Any) -> str:
    return "speech" if isinstance(model, SpeechTokenizer) else "images" if isinstance(model, ImageTokenizer) else ""


def compare_speech(
    models: Sequence[tuple[str, Model]], source: str, metrics: Sequence[str], *, limit: int | None = None,
    seconds: float | None = None, rate: int | None = None, workers: int = 0, allow_skips: int = 0, allow_missing: bool = False,
    repeats: int = REPEATS, examples: Examples | None = None, device: torch.device | str = "cpu",
    progress: Progress | None = None, **options: Any,
) -> dict[str, Any]:
    """Each (label, tokenizer) measured on the same held-out clips by `evaluate_speech_data`; see `_joined` for the result.

    Below the models stand the originals, where a metric needs no original, and the clips' mean mel, where `mel` is asked for.
    rate: Hz at which the clips are read; none: the highest of the models, so that none of them hears less than it takes.
    metrics, options: of `evaluate_speech`; codes and speed are always measured. repeats: of the timing, on up to 10 s of the
    examples; 0: none. examples: is filled with the items to show. Raises TokenizersLabError of every kind.
    """
    names = [name for name in metrics if name != SPEED_METRIC]      # our own speed, measured in turns, stands in its place
    plan = plan_metrics(names)
    known = [model for _, model in models if isinstance(model, SpeechTokenizer)]
    rate = rate or max(tokenizer.sample_rate for tokenizer in known)
    widest = max(known, key=lambda tokenizer: tokenizer.channels)
    data = speech_data_config(source, widest, limit, seconds, rate, workers)
    wanted = Examples().count if examples is None else max(1, examples.count)

    def measure(model: Any, which: Sequence[str], label: str, baselines: bool = False, **more: Any) -> dict[str, Any]:
        return evaluate_speech_data(
            model, data, list(which), allow_skips=allow_skips, allow_missing=allow_missing, label=label, baselines=baselines,
            progress=_named(progress, label), **more, **options)

    def one(label: str, tokenizer: Any) -> tuple[dict[str, Any], Kept]:
        keeper = Keeper(wanted)
        result = measure(tokenizer, [*names, "bitrate"], label, observe=keeper.clip)
        row = result["rows"][0]
        row |= {name: result[name] for name in ("codes", "latents") if name in result}
        row["metrics"] |= speech_rates(result)
        return result, keeper.of_all_processes()

    results, kept, failed = _measure_each(models, one)
    clips = [clip for clip, _ in next(iter(kept.values())).values()]
    tokenizers = dict(models)
    seconds_timed = min(10.0, sum(clip.seconds for clip in clips))
    costs = _costs(
        lambda: [speech_job(label, tokenizers[label], clips) for label in results], "× real time", repeats,      # type: ignore[arg-type]
        f"one clip of {seconds_timed:.3g} s, at each model's sample rate", device, progress)
    if examples is not None:
        examples.fill(kept, speech=True)
    joined = _joined(models, results, failed, costs, "per_clip", list(metrics))
    references = measure(mean_mel_candidate(), plan.clips, "references", baselines=True) if plan.clips else {"rows": []}
    joined["rows"] += [row for row in references["rows"] if row["metrics"]]
    return joined


def compare_images(
    models: Sequence[tuple[str, Model]], source: str, metrics: Sequence[str], *, size: int | None = None,
    limit: int | None = None, workers: int = 0, repeats: int = REPEATS, speed_batch: int = SPEED_BATCH,
    examples: Examples | None = None, device: torch.device | str = "cpu", progress: Progress | None = None, **options: Any,
) -> dict[str, Any]:
    """Each (label, tokenizer) measured on the same images by `harness.evaluate`; see `_joined` for the result.

    size: pixels a side of the crop; none: the training size, which must then be the same for all. repeats: of the timing, on
    `speed_batch` images in one forward; 0: none. examples: is filled with the items to show. options: of `evaluate`.
    Raises TokenizersLabError of every kind.
    """
    harness.plan_metrics(metrics, options.get("reference") is not None)
    known = [model for _, model in models if isinstance(model, ImageTokenizer)]
    sizes = {int(getattr(tokenizer.cfg, "image_size", 256)) for tokenizer in known}
    if size is None and len(sizes) > 1:
        raise InputError(f"these models were trained at {', '.join(map(str, sorted(sizes)))} pixels: say at which size to "
                         "compare them (--size)")
    side = size or sizes.pop()
    data = ImageDataConfig(train=source, val=source, size=side, val_limit=limit, workers=workers)

    def one(label: str, tokenizer: Any) -> tuple[dict[str, Any], Kept]:
        keeper = Keeper(max(speed_batch, 0 if examples is None else examples.count))
        result = harness.evaluate(
            tokenizer, data, list(metrics), label=label, baselines=False, device=device, observe=keeper.image,
            progress=_named(progress, label), **options)
        return result, keeper.of_all_processes()

    results, kept, failed = _measure_each(models, one)
    first = next(iter(kept.values()))
    arrays = [original for original, _ in first_by_hash(first, speed_batch).values()]
    images = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays]).float() / 255      # (B, 3, H, W)
    tokenizers: dict[str, Any] = dict(models)
    costs = _costs(
        lambda: [image_job(label, tokenizers[label], images) for label in results], "images/s", repeats,
        f"{len(images)} images of {side} × {side} px in one forward", device, progress)
    for label, result in results.items():
        tokenizer = tokenizers[label]
        parameter = next(tokenizer.parameters())
        with torch.inference_mode():
            encoding = tokenizer.encode(images[:1].to(parameter.device, parameter.dtype))
        result["rows"][0]["metrics"] |= image_rates(tokenizer, encoding, images[0, 0].numel())
    if examples is not None:
        examples.fill(kept, speech=False)
    return _joined(models, results, failed, costs, "per_image", list(metrics))


def _measure_each(
    models: Sequence[tuple[str, Model]], measure: Callable[[str, Any], tuple[dict[str, Any], Kept]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Kept], dict[str, str]]:
    """measure(label, tokenizer) of each, one after another: results and kept items by label, and why there are none by label.

    Raises what is not a model's fault (data, a metric's network), and the first error where no model could be measured.
    """
    results: dict[str, dict[str, Any]] = {}
    kept: dict[str, Kept] = {}
    failed: dict[str, str] = {}
    first_error: Exception | None = None
    for label, model in models:
        error = model if isinstance(model, Exception) else None
        if error is None:
            assert isinstance(model, Tokenizer)
            try:
                results[label], kept[label] = measure(label, model.eval())
            except Exception as raised:      # whatever a network can do wrong: the other rows go on
                error = raised
            errors = [one for one in all_processes(error) if one is not None]      # all must agree on what comes next
            blameless = [one for one in errors if isinstance(one, DataError | WeightsMissing)]
            if blameless:
                raise blameless[0]
            error = errors[0] if errors else None
        if error is not None:
            first_error = first_error or error
            failed[label] = reason_of(error)
            results.pop(label, None)
            kept.pop(label, None)
    if first_error is not None and not results:
        raise first_error
    return results, kept, failed


def reason_of(error: Exception) -> str:
    """An error in one line; one that is not meant for people with its kind."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, TokenizersLabError) else f"{type(error).__name__}: {text}"


def _costs(
    jobs: Callable[[], list[Job]], unit: str, repeats: int, batch: str, device: torch.device | str, progress: Progress | None
) -> dict[str, Any]:
    """{"protocol": how, "rows": metrics by label}, measured by the first process while the others wait."""
    def measured() -> dict[str, Any]:
        made = jobs()
        rows: dict[str, Metrics] = {}
        if repeats > 0:
            rounds: Iterable[int] = range(repeats + WARM_UP)
            rows = measure_costs(made, unit, rounds if progress is None else progress(rounds, "timing"))
        for job in made:
            rows[job.label] = rows.get(job.label, {}) | parameter_metric(job.network)
        return {"protocol": costs_protocol(batch, repeats, device) if repeats > 0 else None, "rows": rows}

    return on_first(measured)


def _joined(
    models: Sequence[tuple[str, Model]], results: dict[str, dict[str, Any]], failed: dict[str, str], costs: dict[str, Any],
    values: str, metrics: list[str],
) -> dict[str, Any]:
    """One result of the first row of each: JSON data with n, keys, rows, columns, best, margins, costs, protocol, environment,
    skipped, warnings.

    Rows are those of `evaluate_speech` or `evaluate_images` in the order of the models, each with `random`, whether its weights
    are random; a row with `failed` has no metrics. columns: name, title, unit, better and group (quality, rate or cost) of each
    metric that a row has. best: label of the best of those whose weights are not random, by metric. margins: by how much each
    row is better than the first, mean over clips or images. costs: how speed and memory were measured; none: they were not.
    Raises InputError if the models did not see the same data.
    """
    first = next(iter(results.values()))
    digest = "audio_sha256" if values == "per_clip" else "images_sha256"
    if any(one["keys"] != first["keys"] or one["protocol"][digest] != first["protocol"][digest] for one in results.values()):
        raise InputError("the models did not see the same data: files changed while they were measured")
    rows = []
    for label, _ in models:
        if label in failed:
            rows.append({"label": label, "role": "model", "random": False, "failed": failed[label], "metrics": {}})
        else:
            row = results[label]["rows"][0]
            row["metrics"] |= costs["rows"][label]
            rows.append({**row, "random": is_random(row)})
    columns = _columns(rows)
    protocol = {key: value for key, value in first["protocol"].items() if key != "dtype"}      # a row says its own
    return {
        "kind": f"comparison of {first['kind']}", "n": first["n"], "keys": first["keys"], "metrics": metrics, "rows": rows,
        "columns": columns, "best": _best(rows, columns), "margins": _margins(rows, columns, values),
        "warnings": sorted({text for result in results.values() for text in _warnings(result)}),
        "skipped": first["skipped"], "costs": costs["protocol"], "protocol": protocol, "environment": first["environment"],
    }


def _columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns of all metrics that some row has: quality first, then rates, then costs.

    The rate that counts a float as bits is left out where all rows have the same kind of rate, which says the same.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name, metric in row["metrics"].items():
            about = {key: metric.get(key, "") for key in ("title", "unit", "better")}
            found.setdefault(name, {"name": name, **about})
            found[name] |= {key: value for key, value in about.items() if value}
    if "floats" not in found or not {"bits", "bitrate"} & found.keys():
        found.pop("stored", None)
    quality = [column | {"group": QUALITY} for name, column in found.items() if name not in (*RATES, *COSTS)]
    rates = [found[name] | {"group": RATE} for name in RATES if name in found]
    return quality + rates + [found[name] | {"group": COST} for name in COSTS if name in found]


def is_random(row: dict[str, Any]) -> bool:
    """Whether a row says that its weights are random."""
    weights = row.get("weights", {})
    return RANDOM in (weights if isinstance(weights, str) else str(weights.get("source", "")))


def _best(rows: list[dict[str, Any]], columns: list[dict[str, Any]]) -> dict[str, str]:
    """Metric: the label of the best trained model; none of a metric where there are fewer than two, or that is no merit."""
    best = {}
    for column in columns:
        name, sign = column["name"], {"higher": 1, "lower": -1}.get(column["better"], 0)
        known = {row["label"]: row["metrics"][name]["value"] for row in rows
                 if not row["random"] and row["metrics"].get(name, {}).get("value") is not None}
        if sign and len(known) > 1:
            best[name] = max(known, key=lambda label: sign * known[label])
    return best


def _margins(rows: list[dict[str, Any]], columns: list[dict[str, Any]], values: str) -> list[dict[str, Any]]:
    """By how much each later row is better than the first one measured, item by item: positive is better than it."""
    margins = []
    first, *others = [row for row in rows if "failed" not in row]
    for row in others:
        for column in columns:
            name, sign = column["name"], 1 if column["better"] == "higher" else -1
            pair = [entry["metrics"].get(name, {}).get(values) for entry in (first, row)]
            if None in pair:
                continue
            items = [sign * (b - a) for a, b in zip(*pair) if a is not None and b is not None]
            if items:
                about = {"metric": name, "row": row["label"], "over": first["label"], "n": len(items)}
                margins.append({**about, **mean_summary(items)})
    return margins


def _warnings(result: dict[str, Any]) -> list[str]:
    """What to be wary of, with the row that it is about."""
    row = result["rows"][0]
    found = [*result.get("warnings", []), *result.get("codes", {}).get("warnings", [])]
    for metric in row["metrics"].values():
        found += [f"{metric['title']}: {text}" for text in [*metric.get("warnings", []), *filter(None, [metric.get("missing")])]]
        if metric.get("unmeasured"):
            found.append(f"{metric['title']}: {len(metric['unmeasured'])} clips have no value")
    return [f"{row['label']}: {text}" for text in found]


def _named(progress: Progress | None, label: str) -> Progress | None:
    return None if progress is None else lambda batches, what: progress(batches, f"{what} {label}")


def _check_labels(labels: list[str]) -> None:
    """Raise InputError on fewer than two models, or two of one name."""
    if len(labels) < 2:
        raise InputError("a comparison needs two models or more")
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label} is named twice: each model is compared once")


def write_comparison(result: dict[str, Any], folder: Path, examples: Examples | None = None) -> list[Path]:
    """Write compare.json, compare.md, compare.html and, if there are any, the examples into a folder; returns the three.

    The JSON then names the files of the examples.
    """
    from .compare_page import comparison_page

    written = result if examples is None else {**result, "examples": write_examples(examples, folder)}
    paths = [write_json(written, folder / "compare.json"), folder / "compare.md", folder / "compare.html"]
    paths[1].write_text(markdown(result), encoding="utf-8")
    paths[2].write_text(comparison_page(result, examples), encoding="utf-8")
    return paths
