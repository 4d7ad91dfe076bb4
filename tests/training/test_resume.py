"""A run killed at several steps and resumed ends with the bytes of the run that nobody disturbed."""

import json
import random
import signal

import pytest
from runner import Runner

from tokenizers_lab.training.checkpoint import newest_checkpoint


def final_hashes(run) -> dict[str, str]:
    """SHA-256 of weights, EMA, optimisers and the buffers of every rank at the end."""
    folder = newest_checkpoint(run)
    assert folder.name == "step_00000012"
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    return {name: value for name, value in hashes.items() if name.endswith((".safetensors", ".pt"))}


def killed_and_resumed(runner: Runner, steps: list[int], **options) -> None:
    for step in steps:
        process = runner.start("--auto-resume", **options)
        runner.signal_at(process, step)
        runner.finish(process)
        assert process.returncode != 0 and runner.step() < 12      # the kill landed in the middle
    assert "resumed from" in runner.train("--auto-resume", **options)


def training_losses(runner: Runner) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in runner.records() if r["kind"] == "train"]


@pytest.mark.parametrize("system, processes", [
    ("rectok", 1), *(pytest.param(system, n, marks=pytest.mark.slow) for system, n in (
        ("rectok", 2), ("dm_codec", 1), ("dm_codec", 2), ("lm_spt", 1), ("uniflow", 2), ("tadicodec", 1),
        ("vfm_vae", 1), ("vfm_vae", 2), ("vtp", 1), ("vtp", 2)))])
def test_killed_and_resumed_is_uninterrupted(tmp_path, system, processes):
    undisturbed, disturbed = Runner(tmp_path / "a", system), Runner(tmp_path / "b", system)
    undisturbed.train(processes=processes)
    # one kill before the GAN's start, one after it, one in the second stage; the steps inside these are random
    draw = random.Random()
    steps = [draw.randint(2, 4), draw.randint(6, 7), draw.randint(9, 11)]
    killed_and_resumed(disturbed, steps, processes=processes)
    a, b = final_hashes(undisturbed.run), final_hashes(disturbed.run)
    assert {f"training/rank_{rank}.pt" for rank in range(processes)} <= a.keys()
    assert a == b, f"killed at {steps}"
    assert training_losses(undisturbed) == training_losses(disturbed)      # every step once in metrics.jsonl


def test_a_signal_saves_and_a_resumed_run_goes_on(runner):
    process = runner.start()
    runner.signal_at(process, 3, signal.SIGTERM)
    output = runner.finish(process)
    assert process.returncode == 128 + signal.SIGTERM, output
    stopped = newest_checkpoint(runner.run)
    assert 3 <= json.loads((stopped / "training/state.json").read_text())["step"] < 12
    # an existing run is never overwritten by accident
    refused = runner.start()
    assert "--resume" in runner.finish(refused) and refused.returncode == 2
    assert "finished" in runner.train("--resume")
    assert newest_checkpoint(runner.run).name == "step_00000012"
    assert "finished" in runner.train("--resume")      # once more: nothing left to do
