"""Several tokenizers of one kind under one protocol: one table, as data and as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenizers_lab.errors import InputError
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer, Tokenizer

from .bootstrap import mean_summary
from .harness import evaluate
from .provenance import write_json
from .speech import plan_metrics
from .speech_candidates import mean_mel_candidate
from .speech_data import evaluate_speech_data, speech_data_config
from .summary_lines import format_value

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
RANDOM = "random weights"
CODE_COLUMNS = {      # of what `evaluate_speech` says of codes: title, unit, better, factor
    "bitrate": ("bitrate", "kbit/s", "", 1e-3), "entropy_bitrate": ("entropy bitrate", "kbit/s", "", 1e-3),
    "frame_rate": ("frame rate", "Hz", "", 1.0), "usage": ("codes used", "%", "higher", 100.0),
}
SPEED_COLUMNS = {"encode_rtf": "encode, real-time factor", "decode_rtf": "decode, real-time factor"}


def compare_speech(
    models: Sequence[tuple[str, SpeechTokenizer]], source: str, metrics: Sequence[str], *, limit: int | None = None,
    seconds: float | None = None, rate: int | None = None, workers: int = 0, allow_skips: int = 0, allow_missing: bool = False,
    progress: Progress | None = None, **options: Any,
) -> dict[str, Any]:
    """Each (label, tokenizer) measured on the same held-out clips by `evaluate_speech_data`; see `_joined` for the result.

    Below the models stand the originals, where a metric needs no original, and the clips' mean mel, where `mel` is asked for.
    rate: Hz at which the clips are read; none: the highest of the models, so that none of them hears less than it takes.
    metrics, options: of `evaluate_speech`. Raises TokenizersLabError of every kind.
    """
    _check_labels([label for label, _ in models])
    plan = plan_metrics(metrics)
    widest = max((tokenizer for _, tokenizer in models), key=lambda tokenizer: tokenizer.channels)
    rate = rate or max(tokenizer.sample_rate for _, tokenizer in models)
    data = speech_data_config(source, widest, limit, seconds, rate, workers)

    def measure(model: Any, names: Sequence[str], label: str, baselines: bool = False) -> dict[str, Any]:
        return evaluate_speech_data(
            model, data, list(names), allow_skips=allow_skips, allow_missing=allow_missing, label=label, baselines=baselines,
            progress=_named(progress, label), **options)

    results = [measure(tokenizer.eval(), metrics, label) for label, tokenizer in models]
    for result in results:
        row = result["rows"][0]
        row |= {name: result[name] for name in ("codes", "speed") if name in result}
        row["metrics"] |= _code_columns(result.get("codes")) | _speed_columns(result.get("speed"))
    joined = _joined(results, "per_clip", list(metrics))
    references = measure(mean_mel_candidate(), plan.clips, "references", baselines=True)
    joined["rows"] += [row for row in references["rows"] if row["metrics"]]
    return joined


def compare_images(
    models: Sequence[tuple[str, ImageTokenizer]], source: str, metrics: Sequence[str], *, size: int | None = None,
    limit: int | None = None, workers: int = 0, progress: Progress | None = None, **options: Any,
) -> dict[str, Any]:
    """Each (label, tokenizer) measured on the same images by `harness.evaluate`; see `_joined` for the result.

    size: pixels a side of the crop; none: the training size, which must then be the same for all. options: of `evaluate`.
    Raises TokenizersLabError of every kind.
    """
    _check_labels([label for label, _ in models])
    sizes = {int(getattr(tokenizer.cfg, "image_size", 256)) for _, tokenizer in models}
    if size is None and len(sizes) > 1:
        raise InputError(f"these models were trained at {', '.join(map(str, sorted(sizes)))} pixels: say at which size to "
                         "compare them (--size)")
    size = size or sizes.pop()
    data = ImageDataConfig(train=source, val=source, size=size, val_limit=limit, workers=workers)
    results = [
        evaluate(tokenizer.eval(), data, list(metrics), label=label, baselines=False, progress=_named(progress, label), **options)
        for label, tokenizer in models
    ]
    return _joined(results, "per_image", list(metrics))


def _joined(results: list[dict[str, Any]], values: str, metrics: list[str]) -> dict[str, Any]:
    """One result of the first row of each: JSON data with n, keys, rows, columns, margins, protocol, environment, skipped.

    Rows are those of `evaluate_speech` or `evaluate_images`, each with `random`, whether its weights are random. columns: name,
    title, unit and better of each metric that a row has. best: label of the best of those whose weights are not random, by
    metric. margins: by how much each row is better than the first, mean over clips or images. Raises InputError if the models
    did not see the same data.
    """
    first = results[0]
    digest = "audio_sha256" if values == "per_clip" else "images_sha256"
    if any(result["keys"] != first["keys"] or result["protocol"][digest] != first["protocol"][digest] for result in results):
        raise InputError("the models did not see the same data: files changed while they were measured")
    rows = [{**result["rows"][0], "random": is_random(result["rows"][0])} for result in results]
    columns: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name, metric in row["metrics"].items():
            found = {key: metric.get(key, "") for key in ("title", "unit", "better")}
            columns.setdefault(name, {"name": name, **found})
            columns[name] |= {key: value for key, value in found.items() if value}
    protocol = {key: value for key, value in first["protocol"].items() if key != "dtype"}      # a row says its own
    return {
        "kind": f"comparison of {first['kind']}", "n": first["n"], "keys": first["keys"], "metrics": metrics, "rows": rows,
        "columns": list(columns.values()), "best": _best(rows, columns), "margins": _margins(rows, columns, values),
        "warnings": sorted({text for result in results for text in _warnings(result)}),
        "skipped": first["skipped"], "protocol": protocol, "environment": first["environment"],
    }


def is_random(row: dict[str, Any]) -> bool:
    """Whether a row says that its weights are random."""
    weights = row.get("weights", {})
    return RANDOM in (weights if isinstance(weights, str) else str(weights.get("source", "")))


def _code_columns(codes: dict[str, Any] | None) -> dict[str, Any]:
    """Bitrates and use of the codebooks as metrics without an interval."""
    if codes is None:
        return {}
    return {
        name: {"title": title, "unit": unit, "better": better, "value": codes[name] * factor, "uncertainty": None}
        for name, (title, unit, better, factor) in CODE_COLUMNS.items()
    }


def _speed_columns(speed: dict[str, Any] | None) -> dict[str, Any]:
    """Real-time factors as metrics without an interval."""
    if speed is None:
        return {}
    return {name: {"title": title, "unit": "", "better": "lower", "value": speed[name], "uncertainty": None}
            for name, title in SPEED_COLUMNS.items()}


def _best(rows: list[dict[str, Any]], columns: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Metric: the label of the best trained model; none of a metric where there are fewer than two, or that is no merit."""
    best = {}
    for name, column in columns.items():
        sign = {"higher": 1, "lower": -1}.get(column["better"], 0)
        known = {row["label"]: row["metrics"][name]["value"] for row in rows
                 if not row["random"] and row["metrics"].get(name, {}).get("value") is not None}
        if sign and len(known) > 1:
            best[name] = max(known, key=lambda label: sign * known[label])
    return best


def _margins(rows: list[dict[str, Any]], columns: dict[str, dict[str, Any]], values: str) -> list[dict[str, Any]]:
    """By how much each later row is better than the first, item by item: positive is better than the first."""
    margins, first = [], rows[0]
    for row in rows[1:]:
        for name, column in columns.items():
            sign = 1 if column["better"] == "higher" else -1
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


def compare_models(
    models: Sequence[tuple[str, Tokenizer]], source: str, metrics: Sequence[str], *, device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """`compare_speech` or `compare_images`, by the kind of the models. Raises InputError if there are both."""
    if all(isinstance(tokenizer, SpeechTokenizer) for _, tokenizer in models):
        return compare_speech(models, source, metrics, **options)      # type: ignore[arg-type]
    if all(isinstance(tokenizer, ImageTokenizer) for _, tokenizer in models):
        return compare_images(models, source, metrics, device=device, **options)      # type: ignore[arg-type]
    kinds = {label: "speech" if isinstance(tokenizer, SpeechTokenizer) else "images" for label, tokenizer in models}
    raise InputError(f"one table is for one kind: {', '.join(f'{label} is for {kind}' for label, kind in kinds.items())}")


# --- what a person reads ------------------------------------------------------------------------------------------------

def label_of(row: dict[str, Any]) -> str:
    """A row's name, with a warning behind it where its weights are random."""
    return f"{row['label']} ({RANDOM})" if row.get("random") else row["label"]


def heading(column: dict[str, Any]) -> str:
    """A column's title with its unit and an arrow to the better side."""
    arrow = {"higher": " ↑", "lower": " ↓"}.get(column["better"], "")
    return column["title"] + (f", {column['unit']}" if column["unit"] else "") + arrow


def protocol_lines(result: dict[str, Any]) -> list[str]:
    """What was measured, how and where, in words."""
    protocol, environment = result["protocol"], result["environment"]
    hidden = ("audio_sha256", "images_sha256", "metric_rates")
    said = "; ".join(f"{name}: {value}" for name, value in protocol.items() if name not in hidden and value is not None)
    networks = {metric["network"] for row in result["rows"] for metric in row["metrics"].values() if metric.get("network")}
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    speeds = {f"{speed['threads']} threads, one model after another" for row in result["rows"] if (speed := row.get("speed"))}
    digest = protocol.get("audio_sha256") or protocol.get("images_sha256")
    return [
        f"{result['n']} {'clips' if 'speech' in result['kind'] else 'images'}. Protocol: {said}.",
        f"SHA-256 of the data: {digest}.",
        *(f"Network: {network}." for network in sorted(map(str, networks))),
        f"Machine: {environment['processor']}, {environment['cpu_count']} cores, {environment['platform']}; commit "
        f"{environment['commit']}; {versions}.",
        "Intervals are at 95 %. ↑: higher is better, ↓: lower is better. Bold: the best of the models whose weights are not "
        "random.",
        *(f"Real-time factors: computation for each second of sound, {text}." for text in sorted(speeds)),
        *(f"Note: {text}" for text in result["warnings"]),
        *(f"Left out: {text}" for text in result["skipped"]),
    ]


def markdown(result: dict[str, Any]) -> str:
    """The table, the margins to the first model, and the protocol."""
    columns = result["columns"]
    lines = [f"| | {' | '.join(_cell_text(heading(column)) for column in columns)} |", "|---|" + "---:|" * len(columns)]
    for row in result["rows"]:
        cells = []
        for column in columns:
            text = format_value(row["metrics"].get(column["name"]))
            cells.append(f"**{text}**" if result["best"].get(column["name"]) == row["label"] else text)
        lines.append(f"| {_cell_text(label_of(row))} | {' | '.join(cells)} |")
    if result["margins"]:
        first = result["rows"][0]["label"]
        lines += ["", f"Better than {first} by (mean of the differences, item by item):", ""]
        names = list(dict.fromkeys(margin["metric"] for margin in result["margins"]))
        titles = {column["name"]: column["title"] for column in columns}
        lines += [f"| | {' | '.join(_cell_text(titles[name]) for name in names)} |", "|---|" + "---:|" * len(names)]
        for label in dict.fromkeys(margin["row"] for margin in result["margins"]):
            found = {margin["metric"]: margin for margin in result["margins"] if margin["row"] == label}
            lines.append(f"| {_cell_text(label)} | {' | '.join(margin_text(found.get(name)) for name in names)} |")
    return "\n".join([f"# {result['kind'][0].upper()}{result['kind'][1:]}", "", *lines, "",
                      *(f"- {line}" for line in protocol_lines(result))]) + "\n"


def margin_text(margin: dict[str, Any] | None) -> str:
    """A difference with its sign and interval."""
    if margin is None:
        return "–"
    bounds = margin["uncertainty"]
    return f"{margin['value']:+.4g}" + (f" [{bounds['low']:+.3g}, {bounds['high']:+.3g}]" if bounds else "")


def _cell_text(text: str) -> str:
    return text.replace("|", "\\|")


def write_comparison(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write compare.json, compare.md and compare.html into a folder; returns them."""
    from .compare_page import comparison_page

    paths = [write_json(result, folder / "compare.json"), folder / "compare.md", folder / "compare.html"]
    paths[1].write_text(markdown(result), encoding="utf-8")
    paths[2].write_text(comparison_page(result), encoding="utf-8")
    return paths
