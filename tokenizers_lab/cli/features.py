"""`toklab features`: what teachers say of the training clips, computed once."""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import device_of, say, show_progress

if TYPE_CHECKING:
    from torch import Tensor

    from tokenizers_lab.data.batch import SpeechBatch
    from tokenizers_lab.settings import RunConfig
    from tokenizers_lab.teachers.cache import Crop, FeatureFolder

help = "compute the teachers' features of the training clips once, for data.features"
description = """Compute what the teachers of a recipe say of every training clip and store it in a folder, so that training with
data.features=DIR need not run them. Clips without a transcript are transcribed where the recipe names a recognizer.
The segment of a clip must be known: data.crop=fixed or data.crop=start. What is there already is kept, so an interrupted
command goes on where it stopped; damaged files are made anew. torchrun -m tokenizers_lab features … divides the clips."""
example = "toklab features dm_codec/tiny data.crop=fixed --out features"
TRANSCRIPTS = "transcripts.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, overrides, output."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe's name such as dm_codec/tiny")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="options that differ from the config")
    parser.add_argument("--out", metavar="DIR", help="folder of the features; default: features/SYSTEM-NAME")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="clips at a time; default: 8")
    parser.add_argument("--half", action="store_true", help="store float16: half the space, a relative error up to 5e-4")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps; default: a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """Build the teachers, go through the clips, say what was done."""
    from tokenizers_lab.config import load_config
    from tokenizers_lab.data.loader import fixed_crops, len_samples
    from tokenizers_lab.data.quarantine import Quarantine
    from tokenizers_lab.errors import ConfigError
    from tokenizers_lab.teachers.cache import folder_bytes

    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {args.batch_size}")
    cfg = load_config(args.config, args.overrides)
    check_data(cfg)
    out = Path(args.out or f"features/{cfg.system}-{cfg.name}")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = device_of(args)
    objective, folders = build(cfg, out, device)
    quarantine = Quarantine(out / "unreadable.jsonl", cfg.data.bad_fraction)
    clips = fixed_crops(cfg.data, args.batch_size, rank, world, on_bad=lambda bad: quarantine.count(0, [bad]))
    counts: Counter[str] = Counter()
    samples = len_samples(cfg.data)
    total = None if samples is None else -(-samples // (args.batch_size * world))
    for batch in show_progress(clips, "features", total) if rank == 0 else clips:
        quarantine.count(len(batch), [])
        counts.update(store(objective, folders, batch.to(device), out, args.half, cfg.data.sample_rate))
    say(f"{counts['made']} clips computed, {counts['there']} were there, {counts['damaged']} were damaged and made anew, "
        f"{quarantine.bad} could not be read")
    for name, folder in folders.items():
        say(f"{name}: {folder_bytes(folder.path) / 1e6:.1f} MB in {folder.path}")
    say(f"train with: toklab train {' '.join([args.config, *args.overrides])} data.features={out}")
    return 0


def check_data(cfg: "RunConfig") -> None:
    """Raise ConfigError unless the training data are speech whose segments are known."""
    from tokenizers_lab.errors import ConfigError
    from tokenizers_lab.settings import SpeechDataConfig

    if not isinstance(cfg.data, SpeechDataConfig):
        raise ConfigError(f"{cfg.system} trains with images: only features of speech are computed beforehand")
    if cfg.data.crop == "random":
        raise ConfigError("features can only be stored of known segments: set data.crop=fixed (one stretch of each clip) or "
                          "data.crop=start, here and in training; data.crop=random hears another stretch each time")


def build(cfg: "RunConfig", out: Path, device: str) -> "tuple[Any, dict[str, FeatureFolder]]":
    """The objective with its teachers, and the folder of each teacher. Raises ConfigError if it has nothing to precompute."""
    from tokenizers_lab.data.speech import crop_options
    from tokenizers_lab.errors import ConfigError
    from tokenizers_lab.registry import get_system
    from tokenizers_lab.teachers.cache import make_features

    objective = get_system(cfg.system).resolve("objective")(cfg.objective, cfg.model)
    sources = objective.feature_sources() if hasattr(objective, "precompute") else {}
    if not sources:
        raise ConfigError(f"{cfg.system} has no features that could be computed beforehand")
    lacking = [name for name, source in sources.items() if not source.networks]
    if lacking:
        raise ConfigError(f"the teacher '{lacking[0]}' is not built by this config: give its backend and source")
    return objective.to(device).eval(), make_features(out, sources, crop_options(cfg.data))


def store(
    objective: Any, folders: "dict[str, FeatureFolder]", batch: "SpeechBatch", out: Path, half: bool, rate: int
) -> dict[str, int]:
    """Compute and write what is not there of a batch. Returns how many clips were made, there, damaged."""
    from dataclasses import replace

    crops = list(crops_of(batch, rate))
    state = [[folder.whole(crop, audio) for folder in folders.values()] for crop, audio in crops]
    wanted = [i for i, found in enumerate(state) if not all(found)]
    counts = {"made": len(wanted), "there": len(batch) - len(wanted), "damaged": sum(None in found for found in state)}
    if not wanted:
        return counts
    part = pick(batch, wanted)
    if any(text is None for text in part.texts) and hasattr(objective, "transcripts"):
        unknown = [i for i, text in enumerate(part.texts) if text is None]
        part = replace(part, texts=objective.transcripts(part))
        write_transcripts(out / TRANSCRIPTS, [(crops[wanted[i]][0], part.texts[i]) for i in unknown])
    made = objective.precompute(part)
    for place, (name, folder) in enumerate(folders.items()):
        for i, features in zip(wanted, made[name]):
            if not state[i][place]:
                folder.write(*crops[i], features.half() if half else features.float())
    return counts


def crops_of(batch: "SpeechBatch", rate: int) -> "Iterator[tuple[Crop, Tensor]]":
    """Each clip's crop, with the text that the data give, and its audio (channels, samples)."""
    from tokenizers_lab.teachers.cache import Crop

    for i, key in enumerate(batch.keys):
        crop = Crop(key, int(batch.starts[i]), batch.audio.shape[-1], rate, batch.texts[i])
        yield crop, batch.audio[i, :, : int(batch.lengths[i])].cpu()


def pick(batch: "SpeechBatch", chosen: list[int]) -> "SpeechBatch":
    """Some items of a batch."""
    from dataclasses import fields, replace

    from torch import Tensor

    found: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value[chosen]
        elif isinstance(value, list):
            found[field.name] = [value[i] for i in chosen]
    return replace(batch, **found)


def write_transcripts(path: Path, texts: "list[tuple[Crop, str | None]]") -> None:
    """Append what was recognized, for people to read."""
    import json

    with open(path, "a", encoding="utf-8") as file:
        for crop, text in texts:
            line = {"file": crop.key, "start": crop.start, "samples": crop.samples, "text": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
