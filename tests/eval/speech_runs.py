"""Runs of speech for the report's tests: one that is really trained for a few steps, and folders written by hand."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from tokenizers_lab.config import load_config
from tokenizers_lab.registry import get_system
from tokenizers_lab.training.loop import train

DM_CODEC = {      # a codec of 8 thousand weights and discriminators that do not count
    "system": "dm_codec",
    "model": {"filters": 4, "width": 16, "codebooks": 2, "codebook_size": 16, "lstm_layers": 1, "kmeans_iterations": 5},
    "objective": {
        "guidance": "sm", "speech_teacher": {"backend": "none"},
        "discriminators": {"periods": [2], "period_channels": [2] * 5, "scales": 1, "scale_channels": [16] * 7,
                           "windows": [64], "stft_filters": 2},
    },
    "stages": [{"name": "train", "steps": 3, "lr": 3e-3, "weights": {"waveform": 1.0, "mel": 1.0, "commitment": 1.0}}],
}
LM_SPT = {
    "system": "lm_spt",
    "model": {"semantic_width": 2, "acoustic_width": 2, "decoder_width": 32, "latent": 8, "semantic_size": 32,
              "acoustic_size": 16, "codebooks": 3, "auxiliary": {"width": 16}},
    "objective": {},
    "stages": [{"name": "train", "steps": 10, "weights": {"mel": 1.0}}],
}


def config(root: Path, settings: dict[str, Any], name: str, **data: Any) -> Any:
    """The config of a run in `root`, on four held-out clips of the sample speech."""
    data = {"train": "sample:speech", "val": "sample:speech", "val_limit": 4, "segment_seconds": 0.5, "workers": 0, **data}
    options = {"batch_size": 4, "log_every": 1, "validate_every": 2, "ema": 0.5}
    path = root / f"{name}.yaml"
    path.write_text(OmegaConf.to_yaml({**settings, "name": name, "out": str(root), "data": data, "train": options}))
    return load_config(str(path))


def trained_run(root: Path) -> Path:
    """A DM-Codec of three steps."""
    return train(config(root, DM_CODEC, "trained")).folder


def written_run(root: Path, settings: dict[str, Any], name: str, seed: int = 0, **data: Any) -> Path:
    """A run's folder as training leaves it after all steps, with random weights and no records."""
    cfg = config(root, settings, name, **data)
    run = root / f"{cfg.system}-{name}"
    steps = cfg.stages[0].steps
    checkpoint = run / "checkpoints" / f"step_{steps:08d}"
    torch.manual_seed(seed)
    get_system(cfg.system).resolve("tokenizer")(cfg.model).save_pretrained(checkpoint)
    (checkpoint / "training").mkdir()
    (checkpoint / "training" / "state.json").write_text(json.dumps({"step": steps}))
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    hashes = {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": steps, "sha256": hashes}))
    (run / "config.yaml").write_text((root / f"{name}.yaml").read_text())
    (run / "provenance.json").write_text(json.dumps({"teacher": "random weights (seed 0)"}))
    return run
