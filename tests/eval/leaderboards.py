"""Small comparisons for the tests of the leaderboard."""

from typing import Any

import torch

from tokenizers_lab.eval.compare import compare_models
from tokenizers_lab.eval.compare_examples import Examples
from tokenizers_lab.eval.peers import load_peer
from tokenizers_lab.eval.speech_peers import load_speech_peer
from tokenizers_lab.models.dm_codec.config import ModelConfig
from tokenizers_lab.models.dm_codec.model import DMCodec


class Broken(DMCodec):
    """Its decoder raises what no author foresaw."""

    def decode(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("out of\nmemory")


def ours(kind: type[DMCodec] = DMCodec) -> DMCodec:
    torch.manual_seed(0)
    return kind(ModelConfig(filters=4, width=16, codebooks=4, codebook_size=32)).eval()


def codecs() -> list[tuple[str, Any]]:
    """One of ours, and one peer at two rates."""
    peers = ("mimi:random-tiny@2", "mimi:random-tiny")
    return [("ours", ours()), *((name, load_speech_peer(name)) for name in peers)]


def speech(models: list[tuple[str, Any]], count: int = 2, **options: Any) -> tuple[dict[str, Any], Examples]:
    """Five clips of half a second."""
    examples = Examples(count)
    given = {"limit": 5, "seconds": 0.5, "repeats": 2, "examples": examples, **options}
    return compare_models(models, "sample:speech", ["mel", "sisdr", "bitrate"], **given), examples


def images(count: int = 3, **options: Any) -> tuple[dict[str, Any], Examples]:
    """Four pictures of 32 pixels by the two peers with random weights."""
    examples = Examples(count)
    models = [(f"diffusers:{name}", load_peer(name)) for name in ("kl-random-tiny", "dc-random-tiny")]
    given = {"limit": 4, "size": 32, "repeats": 2, "examples": examples, **options}
    return compare_models(models, "sample:photos", ["psnr"], **given), examples


def measured(result: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in every run: all but the machine, times and memory."""
    rows = []
    for row in result["rows"]:
        metrics = {name: metric for name, metric in row["metrics"].items() if not name.endswith("_speed") and name != "memory"}
        rows.append({**row, "metrics": metrics})
    return {**{name: part for name, part in result.items() if name not in ("environment", "costs", "best")}, "rows": rows}
