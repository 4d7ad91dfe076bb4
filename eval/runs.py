"""A training run's folder: what it holds, and its evaluation on held-out images or clips."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenizers_lab.config import load_config
from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import CheckpointError, DataError, WeightsMissing
from tokenizers_lab.hub import load
from tokenizers_lab.network import Network
from tokenizers_lab.registry import get_system
from tokenizers_lab.settings import RunConfig
from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer, Tokenizer
from tokenizers_lab.training.checkpoint import newest_checkpoint, read_state
from tokenizers_lab.training.run import stage_lengths

from .candidates import takes_steps
from .grid import save_grid, to_pixels
from .images import Candidate, data_protocol, evaluate_images
from .latents import latent_statistics
from .provenance import write_json

RESULTS, GRID, EXAMPLES, METRICS_FILE, TEACHERS = "results.json", "grid.png", "examples", "metrics.jsonl", "provenance.json"
NOUNS = {"image": "images", "speech": "clips", "generator": "images"}     # what a run of that kind is measured on
MODEL_LABEL = "trained (EMA weights)"
EXAMPLE_COUNT, CLIP_COUNT = 16, 6     # pictures, clips that are kept to listen to
METRICS = {
    "image": ("psnr", "ssim", "lpips"),
    "speech": ("mel", "sisdr", "stoi", "pesq_wb", "usage", "bitrate"),     # those that take seconds; wer and the like by name
    "generator": ("fid", "kid"),     # of samples, named after the features
}
STEP_METRICS = {"image": ("psnr", "ssim", "lpips"), "speech": ("mel", "sisdr")}      # at each number of sampling steps


@dataclass
class RunFolder:
    """What a run's folder says, without loading a network."""

    path: Path
    config: RunConfig
    records: list[dict[str, Any]]      # lines of metrics.jsonl
    checkpoint: Path | None            # newest whole checkpoint
    step: int                          # its step
    total: int                         # steps of the whole run
    boundaries: list[tuple[str, int]]  # stages and the step at which each begins

    @property
    def kind(self) -> str:
        """What it is for: image, speech or generator."""
        return get_system(self.config.system).kind

    @property
    def status(self) -> str:
        """`finished`, or `step k of n`."""
        return f"finished, {self.total} steps" if self.step >= self.total else f"step {self.step} of {self.total}"


def open_run(folder: str | Path) -> RunFolder:
    """Read a run's config, metrics and newest checkpoint. Raises CheckpointError if the folder is no run."""
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"{path} is not a run: it has no config.yaml. A run's folder is OUT/<system>-<name>")
    config = load_config(str(path / "config.yaml"))
    checkpoint = newest_checkpoint(path)
    boundaries, start = [], 0
    world = len(list(checkpoint.glob("training/rank_*.pt"))) if checkpoint else 1
    for stage, (steps, _) in zip(config.stages, stage_lengths(config, world)):
        boundaries.append((stage.name, start))
        start += steps
    step = 0 if checkpoint is None else int(read_state(checkpoint)["step"])
    return RunFolder(path, config, read_records(path / METRICS_FILE), checkpoint, step, start, boundaries)


def read_records(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a torn last line of a running or killed run is left out."""
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def read_results(run: RunFolder) -> dict[str, Any] | None:
    """results.json, or None if it is missing, damaged or of another step than the newest checkpoint."""
    try:
        results = json.loads((run.path / RESULTS).read_text())
        return results if results["run"]["step"] == run.step else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class ExampleKeeper:
    """Keeps the first few originals and the model's reconstructions while an evaluation runs."""

    def __init__(self, count: int):
        self.count = count
        self.keys: list[str] = []
        self.originals: list[Tensor] = []
        self.reconstructions: list[Tensor] = []

    def __call__(self, candidate: Candidate, originals: Tensor, outputs: Tensor, keys: Sequence[str]) -> None:
        """Called by `evaluate_images`."""
        if candidate.role != "model":
            return
        for key, original, output in zip(keys, originals, outputs):
            if len(self.keys) < self.count:
                self.keys.append(key)
                self.originals.append(original.cpu())
                self.reconstructions.append(output.cpu())


def evaluate_run(
    run: RunFolder, metrics: Sequence[str] | None = None, device: torch.device | str = "cpu", batch_size: int = 16
) -> dict[str, Any]:
    """Evaluate the newest checkpoint's EMA weights on the run's validation images or clips, or what a generator samples.

    metrics: none: those of METRICS for its kind. One whose weights or package are not here becomes a row that says so.
    A diffusion decoder is also measured at several numbers of steps: `steps`.
    Writes results.json, examples/ and, of images, grid.png into the run's folder; returns the results.
    Raises CheckpointError without a checkpoint, DataError without validation data, InputError on an unknown metric.
    """
    if run.checkpoint is None:
        raise CheckpointError(f"{run.path} has no finished checkpoint yet: train longer, or lower train.checkpoint_every")
    noun = NOUNS[run.kind]
    if not run.config.data.val:
        raise DataError(f"{run.path} has no validation {noun}: set data.val to evaluate it")
    tokenizer = load(str(run.checkpoint), device=device)
    metrics = METRICS[run.kind] if metrics is None else metrics
    if isinstance(tokenizer, ImageTokenizer):
        results = _measure_images(run, tokenizer, metrics, batch_size)
    elif isinstance(tokenizer, SpeechTokenizer):
        results = _measure_clips(run, tokenizer, metrics, batch_size)
    else:
        results = _measure_samples(run, tokenizer, metrics, batch_size)
    if isinstance(tokenizer, Tokenizer) and takes_steps(tokenizer):
        results["steps"] = _measure_steps(run, tokenizer, results, batch_size)
    results["run"] = {
        "system": run.config.system, "name": run.config.name, "step": run.step, "total": run.total, "status": run.status,
        "checkpoint": run.checkpoint.relative_to(run.path).as_posix(), "stages": [list(b) for b in run.boundaries],
        "metrics": list(metrics),
    }
    results["teachers"] = teacher_provenance(run)
    write_json(results, run.path / RESULTS)
    return results


def _measure_images(run: RunFolder, tokenizer: ImageTokenizer, metrics: Sequence[str], batch_size: int) -> dict[str, Any]:
    """The results with examples and grid. Latents are painted in the examples' own principal colours."""
    keeper = ExampleKeeper(EXAMPLE_COUNT)
    results = evaluate_images(
        tokenizer, validation_batches(run.config.data, batch_size), metrics, label=MODEL_LABEL,
        data=data_protocol(run.config.data), allow_missing=True, together=False, latents=True, observe=keeper,
    )
    originals, reconstructions = torch.stack(keeper.originals), torch.stack(keeper.reconstructions)
    pictures = {"original": to_pixels(originals), "reconstruction": to_pixels(reconstructions)}
    _, colours = latent_statistics(tokenizer, [ImageBatch(originals, keeper.keys)], together=False)
    if colours is not None:
        with torch.inference_mode():
            latents = tokenizer.encode(originals.to(tokenizer.device)).latents
        assert latents is not None      # there are colours only for continuous latents
        pictures["latent"] = colours.paint(latents)
    results["examples"] = [{"key": key, "values": values_of(results, key, "per_image")} for key in keeper.keys]
    (run.path / EXAMPLES).mkdir(exist_ok=True)
    for i, entry in enumerate(results["examples"]):
        for kind, images in pictures.items():
            entry[kind] = f"{EXAMPLES}/{i:02d}_{kind}.png"
            Image.fromarray(images[i]).save(run.path / entry[kind], optimize=True)
    save_grid(originals, reconstructions, run.path / GRID)
    return results


def _measure_samples(run: RunFolder, network: Network, metrics: Sequence[str], batch_size: int) -> dict[str, Any]:
    """The results of a generator, with grid and samples. Raises CheckpointError if the network is none."""
    from .generation.evaluate import evaluate_generator
    from .generation.generator import LatentGenerator

    if not isinstance(network, LatentGenerator):
        raise CheckpointError(f"{run.checkpoint} holds neither a tokenizer of images or speech nor a generator")
    return evaluate_generator(run, network, metrics, batch_size)


def _measure_clips(run: RunFolder, tokenizer: SpeechTokenizer, metrics: Sequence[str], batch_size: int) -> dict[str, Any]:
    """The results with sound files and spectrograms of a few clips."""
    from .sounds import ClipKeeper, write_sounds
    from .speech import data_protocol, evaluate_speech

    keeper = ClipKeeper(CLIP_COUNT)
    results = evaluate_speech(
        tokenizer, validation_batches(run.config.data, batch_size), metrics, label=MODEL_LABEL,
        data=data_protocol(run.config.data), allow_missing=True, together=False, observe=keeper,
    )
    results["examples"] = write_sounds(run.path, tokenizer, keeper.kept, EXAMPLES)
    for entry in results["examples"]:
        entry["values"] = values_of(results, entry["key"], "per_clip")
    return results


def _measure_steps(run: RunFolder, tokenizer: Tokenizer, results: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Quality and time at several numbers of sampling steps, on as many of the same data as cost no more again."""
    from .steps import sweep_images, sweep_speech

    batches = validation_batches(run.config.data, batch_size)
    if isinstance(tokenizer, ImageTokenizer):
        return sweep_images(tokenizer, batches, results, STEP_METRICS["image"], together=False)
    assert isinstance(tokenizer, SpeechTokenizer)      # there is no third kind
    return sweep_speech(tokenizer, batches, results, STEP_METRICS["speech"], together=False)


def values_of(results: dict[str, Any], key: str, per_item: str) -> dict[str, float]:
    """The model's value of each metric for one item, where it has one."""
    place = results["keys"].index(key)
    values = {name: metric[per_item][place] for name, metric in results["rows"][0]["metrics"].items() if metric.get(per_item)}
    return {name: value for name, value in values.items() if value is not None}


def teacher_provenance(run: RunFolder) -> dict[str, str]:
    """Where the frozen networks of training come from: as the run recorded it, else by building the objective anew."""
    try:
        return dict(json.loads((run.path / TEACHERS).read_text()))
    except (OSError, ValueError, TypeError):
        pass
    try:
        objective = get_system(run.config.system).resolve("objective")(run.config.objective, run.config.model)
        return dict(objective.provenance())
    except WeightsMissing as error:
        return {"unknown": f"not recorded, and not here now: {error}"}
