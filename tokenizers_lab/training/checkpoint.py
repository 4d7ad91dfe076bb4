"""Checkpoints: a folder written under a temporary name, synced, hashed, renamed. What is renamed is whole.

A checkpoint is a saved tokenizer (config.json, model.safetensors with the EMA weights, README.md: `load()` reads it)
with what training needs beside it in `training/`, and manifest.json with the SHA-256 of every file.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.errors import CheckpointError, TrainingError

MANIFEST, STATE = "manifest.json", "training/state.json"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first, whole or damaged; unfinished ones have another name and are not among them."""
    return sorted((p for p in (run / "checkpoints").glob("step_*") if p.is_dir()), reverse=True)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its hash."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no finished checkpoint: its {MANIFEST} is missing or damaged") from error
    for name, expected in hashes.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise CheckpointError(f"{folder} is damaged: {name} is missing or was changed")


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if it has none. A damaged one is skipped with a warning."""
    for folder in list_checkpoints(Path(run)):
        try:
            verify(folder)
        except CheckpointError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
            continue
        return folder
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The small numbers of a checkpoint: step, stage, best value, validation metrics, strikes."""
    return json.loads((folder / STATE).read_text())


def load_torch(path: Path, map_location: Any = "cpu") -> Any:
    """torch.load of tensors and plain containers only. Raises CheckpointError on anything else."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:      # torch raises many types for a damaged or a hostile file
        raise CheckpointError(f"{path} is damaged or holds more than tensors: {error}") from error


def save_checkpoint(
    run: Path, step: int, write_shared: Callable[[Path], None], write_own: Callable[[Path], None],
    rank: int, agree: Callable[[bool], bool],
) -> Path:
    """Write one checkpoint together on all ranks.

    write_shared(folder) writes everything but the rank's own file, on rank 0; write_own(folder) writes the rank's own.
    agree(ok) is True on every rank if ok was True on all; it is also the barrier. Raises TrainingError on every rank if any
    could not write; finished checkpoints are never touched.
    """
    final = checkpoint_folder(run, step)
    draft = final.with_name(f".unfinished-{final.name}")

    def attempt(action: Callable[[], None]) -> str:
        try:
            action()
            return ""
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:      # torch and safetensors wrap a full disk
            return str(error) or type(error).__name__

    def begin() -> None:
        for leftover in [*final.parent.glob(".unfinished-*"), *final.parent.glob(".deleting-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        (draft / "training").mkdir(parents=True)

    def finish() -> None:
        files = sorted(p for p in draft.rglob("*") if p.is_file())
        hashes = {str(p.relative_to(draft)): sha256_of(p) for p in files}
        (draft / MANIFEST).write_text(json.dumps({"step": step, "sha256": hashes}, indent=1) + "\n")
        for path in [*files, draft / MANIFEST, draft / "training", draft]:
            sync(path)
        doomed = final.with_name(f".deleting-{final.name}")
        if final.exists():      # an earlier save of the same step, without its validation
            os.replace(final, doomed)
        os.replace(draft, final)
        sync(final.parent)
        shutil.rmtree(doomed, ignore_errors=True)

    on_main = (lambda action: attempt(action)) if rank == 0 else (lambda action: "")
    failure = ""
    for phase in (lambda: on_main(begin), lambda: on_main(lambda: write_shared(draft)),
                  lambda: attempt(lambda: write_own(draft)), lambda: on_main(finish)):
        failure = phase()
        if not agree(not failure):
            if rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
            reason = failure or "another process failed"
            raise TrainingError(f"could not save the checkpoint of step {step} in {run}: {reason}. "
                                "Earlier checkpoints are whole: free some space, then go on with --resume")
    return final


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside_newer(run: Path, checkpoint: Path) -> None:
    """Rename the damaged checkpoints that are newer than the one a run resumes from: kept to look at, they count no more."""
    for folder in list_checkpoints(run):
        if folder.name > checkpoint.name:
            os.replace(folder, folder.with_name(f"damaged-{folder.name}"))


def prune_checkpoints(run: Path, keep_last: int, keep_best: int, best: str) -> None:
    """Delete all but the newest `keep_last` and the best `keep_best` by the metric `best` ('-name': smaller is better)."""
    folders = list_checkpoints(run)
    keep = set(folders[: max(keep_last, 1)])
    sign, metric = (-1, best[1:]) if best.startswith("-") else (1, best)
    scored = [(sign * state["validation"][metric], folder) for folder in folders
              if metric in (state := _state_or_nothing(folder)).get("validation", {})]
    keep.update(folder for _, folder in sorted(scored, key=lambda pair: pair[0], reverse=True)[:keep_best])
    for folder in folders:
        if folder not in keep:
            doomed = folder.with_name(f".deleting-{folder.name}")      # never a half-deleted folder under a finished name
            os.replace(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _state_or_nothing(folder: Path) -> dict[str, Any]:
    try:
        return read_state(folder)
    except (OSError, ValueError):
        return {}
