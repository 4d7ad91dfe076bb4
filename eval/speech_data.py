"""Evaluation of a speech tokenizer on clips that a data config names, and its results clip by clip as a table."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers_lab.data.batch import SpeechBatch
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.settings import SpeechDataConfig
from tokenizers_lab.tokenizer import SpeechTokenizer

from .gather import processes
from .skips import Skips
from .speech import data_protocol, evaluate_speech, plan_metrics
from .speech_metrics import SPEECH_METRICS
from .steps import split_steps, sweep_speech

Batches = Iterable[SpeechBatch]
ABOUT = ("key", "speaker", "language", "text", "seconds")     # columns of a clip


def speech_data_config(
    source: str, tokenizer: SpeechTokenizer, limit: int | None = None, seconds: float | None = None, rate: int | None = None,
    workers: int = 0,
) -> SpeechDataConfig:
    """A data config that reads `source` in order as held-out clips, in the tokenizer's channels.

    limit: at most so many clips; seconds: each cut to that length; rate: Hz at which they are read, by default the tokenizer's.
    Raises ConfigError on values that are not positive.
    """
    for option, value in (("--limit", limit), ("--seconds", seconds), ("--rate", rate)):
        if value is not None and value <= 0:
            raise ConfigError(f"{option} must be positive, not {value}")
    return SpeechDataConfig(
        train=source, val=source, sample_rate=rate or tokenizer.sample_rate, channels=tokenizer.channels, val_limit=limit,
        val_seconds=seconds, workers=workers)


def evaluate_speech_data(
    model: SpeechTokenizer,
    data: SpeechDataConfig,
    metrics: list[str],
    *,
    batch_size: int = 8,
    allow_skips: int = 0,
    progress: Callable[[Batches, str], Batches] | None = None,
    steps: Sequence[int] = (),
    **options: Any,
) -> dict[str, Any]:
    """The result of `evaluate_speech` on the held-out clips of a data config.

    Under torch.distributed each process reads its own share of the clips, every clip once, and gets the whole result.
    allow_skips: so many clips may be unreadable; they are left out and listed in `skipped`. progress: wraps batches.
    steps: of a diffusion decoder: one number for the whole evaluation, or several that are compared (`steps.sweep_speech`) by
    the metrics of a clip and its reconstruction, the mel distance if there are none.
    options: of `evaluate_speech`. Raises TokenizersLabError of every kind.
    """
    whole, compared = split_steps(model, steps)
    skips = Skips(allow_skips)
    mine: Batches = validation_batches(data, batch_size, *processes(), on_bad=skips)
    mine = mine if progress is None else progress(mine, "evaluating")
    result = evaluate_speech(model, mine, metrics, data=data_protocol(data), skipped=skips.reasons,
                             sample_rate=data.sample_rate, steps=whole, **options)
    skips.check(result["skipped"])      # of all processes
    if compared:
        again = validation_batches(data, batch_size, *processes(), on_bad=lambda bad: None)      # counted the first time
        names = [name for name in plan_metrics(metrics).clips if SPEECH_METRICS[name].needs == "pair"]
        given = {name: options[name] for name in ("decoding", "options", "seed", "together") if name in options}
        result["steps"] = sweep_speech(model, again, result, names or ("mel",), compared, **given)
    return result


def clip_table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A result clip by clip: one dict for each clip and row that makes sound, with every metric's value and what it keeps
    beside it (`wer.hypothesis`, `wer.insertions`, …); None where there is no value."""
    lines = []
    for row in result["rows"]:
        measured = {name: metric for name, metric in row["metrics"].items() if "per_clip" in metric}
        for i, about in enumerate(result["clips"]):
            line = {**{name: about[name] for name in ABOUT}, "row": row["label"]}
            for name, metric in measured.items():
                line[name] = metric["per_clip"][i]
                details = metric["details"][i] if "details" in metric else {}
                line |= {f"{name}.{part}": value for part, value in details.items() if not isinstance(value, list | dict)}
            lines.append(line)
    return lines


def write_clip_table(result: dict[str, Any], path: Path) -> Path:
    """`clip_table` as CSV with a header line, UTF-8; what is not known is empty. Returns the path."""
    lines = clip_table(result)
    columns = list(dict.fromkeys(name for line in lines for name in line))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path
