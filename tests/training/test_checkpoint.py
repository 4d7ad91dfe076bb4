"""A save that fails anywhere loses no finished checkpoint and leaves none that looks finished."""

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokenizers_lab.errors import CheckpointError, TrainingError
from tokenizers_lab.training import checkpoint
from tokenizers_lab.training.checkpoint import (
    checkpoint_folder,
    list_checkpoints,
    load_torch,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify,
)

PHASES = ["begin", "shared", "own", "hash", "sync", "rename"]


def save(run: Path, step: int, floats: int = 1000, psnr: float | None = None) -> Path:
    def shared(folder: Path) -> None:
        save_file({"weight": torch.full((floats,), float(step))}, folder / "model.safetensors")
        validation = {} if psnr is None else {"psnr": psnr}
        (folder / "training/state.json").write_text(json.dumps({"step": step, "validation": validation}))

    def own(folder: Path) -> None:
        torch.save({"buffers": [torch.zeros(3)]}, folder / "training/rank_0.pt")

    return save_checkpoint(run, step, shared, own, rank=0, agree=lambda ok: ok)


def break_at(phase: str, action) -> None:
    """Make the next save do `action` in the middle of a phase."""
    def after(real):
        def broken(*args, **kwargs):
            real(*args, **kwargs)
            action()
        return broken

    if phase == "begin":
        Path.mkdir = after(Path.mkdir)
    elif phase == "shared":
        globals()["save_file"] = after(save_file)
    elif phase == "own":
        torch.save = after(torch.save)
    elif phase == "hash":
        checkpoint.sha256_of = lambda path: action()
    elif phase == "sync":
        checkpoint.sync = lambda path: action()
    elif phase == "rename":
        checkpoint.os.replace = lambda *args: action()


def in_child(function, *args) -> int:
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    child.join(60)
    return child.exitcode


def killed_save(run: Path, phase: str) -> None:
    break_at(phase, lambda: os.kill(os.getpid(), signal.SIGKILL))
    save(run, 2)


def failing_save(run: Path, phase: str) -> None:
    def fail():
        raise OSError(28, "No space left on device")

    break_at(phase, fail)
    try:
        save(run, 2)
    except TrainingError as error:
        os._exit(7 if "No space left" in str(error) and "--resume" in str(error) else 8)


def save_on_a_full_disk(run: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save(run, 2, floats=1_000_000)
    except TrainingError:
        os._exit(7)


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_the_middle_of_a_save(tmp_path, phase):
    first = save(tmp_path, 1)
    assert in_child(killed_save, tmp_path, phase) == -signal.SIGKILL
    assert newest_checkpoint(tmp_path) == first and list_checkpoints(tmp_path) == [first]
    assert save(tmp_path, 2) == newest_checkpoint(tmp_path)      # the leftovers do not block the next save


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_in_the_middle_of_a_save(tmp_path, phase):
    first = save(tmp_path, 1)
    assert in_child(failing_save, tmp_path, phase) == 7
    assert newest_checkpoint(tmp_path) == first and list_checkpoints(tmp_path) == [first]


def test_a_full_disk(tmp_path):
    first = save(tmp_path, 1)
    assert in_child(save_on_a_full_disk, tmp_path) == 7
    assert list_checkpoints(tmp_path) == [first]
    assert not list((tmp_path / "checkpoints").glob(".unfinished*"))      # what had been written is given back


@pytest.mark.parametrize("name", ["model.safetensors", "training/rank_0.pt", "training/state.json", "manifest.json"])
def test_a_truncated_file_is_skipped_loudly(tmp_path, name):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    data = (second / name).read_bytes()
    (second / name).write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="damaged checkpoint.*step_00000002"):
        assert newest_checkpoint(tmp_path) == first
    with pytest.raises(CheckpointError):
        verify(second)


def test_the_failure_of_another_process_stops_the_save_on_all(tmp_path):
    answers = iter([True, True, False])      # the third phase fails elsewhere
    with pytest.raises(TrainingError, match="another process failed"):
        save_checkpoint(tmp_path, 1, lambda folder: None, lambda folder: None, rank=0, agree=lambda ok: next(answers))
    assert list_checkpoints(tmp_path) == []


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step, psnr in [(1, 20.0), (2, 25.0), (3, 21.0), (4, None), (5, 22.0)]:
        save(tmp_path, step, psnr=psnr)
    prune_checkpoints(tmp_path, keep_last=2, keep_best=1, best="psnr")
    assert list_checkpoints(tmp_path) == [checkpoint_folder(tmp_path, s) for s in (5, 4, 2)]
    prune_checkpoints(tmp_path, keep_last=1, keep_best=1, best="-psnr")
    assert list_checkpoints(tmp_path) == [checkpoint_folder(tmp_path, s) for s in (5,)]


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_torch(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
