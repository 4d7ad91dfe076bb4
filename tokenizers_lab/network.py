"""Base class of every network that trains from a recipe: saved, loaded and published in one way."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizers_lab.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"


class Network(nn.Module):
    """The network that ships. A subclass sets `system` and builds itself from its model config alone."""

    system: ClassVar[str]

    def __init__(self, cfg: Any):
        super().__init__()
        self.cfg = cfg
        self.provenance: dict[str, Any] = {}     # licence, source and history of the weights; saved with them

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> Path:
        """Write config.json, model.safetensors and a model card into `folder` (written aside, then renamed file by file)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            write_network_files(staging, self.system, self.cfg, self.state_dict(), self.provenance, card)
            for file in staging.iterdir():
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, device: torch.device | str = "cpu") -> "Network":
        """Load from a saved folder, a run, a checkpoint or a hub id. Raises CheckpointError if it holds another system."""
        from tokenizers_lab.hub import load

        network = load(str(folder_or_hub_id), device=device)
        if not isinstance(network, cls):
            wanted = getattr(cls, "system", cls.__name__)
            raise CheckpointError(f"{folder_or_hub_id} holds a {network.system} network, not {wanted}")
        return network

    def start_part(self, part: str, source: str) -> str:
        """Give a submodule its first weights: those of the same submodule of the network at `source` (a run, a saved folder,
        a hub id). Returns where they are from.

        A system whose parts also start from other people's networks overrides it. Raises CheckpointError if they do not fit.
        """
        from tokenizers_lab.hub import load

        loaded = load(source)
        try:
            own, other = self.get_submodule(part), loaded.get_submodule(part)
        except AttributeError:
            known = ", ".join(name for name, _ in loaded.named_children() if hasattr(self, name))
            raise CheckpointError(f"init_parts: {source} has no part '{part}'; it has {known or 'none in common'}") from None
        load_weights(own, other.state_dict(), f"init_parts: {part} of {source}")
        return f"{part} of {source}"

    def start_run(self, cfg: Any) -> None:
        """Called once when a new run (`RunConfig`) begins, before training: what a network takes from its training data."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload to the hub; see `tokenizers_lab.hub.push`."""
        from tokenizers_lab.hub import push

        return push(self, repo_id, **options)


def write_network_files(
    folder: Path, system: str, cfg: Any, state: dict[str, Tensor], provenance: dict[str, Any], card: str | None = None
) -> None:
    """config.json, model.safetensors and README.md of a network, written plainly into an existing folder."""
    from tokenizers_lab.hub import model_card

    config = {"system": system, "model": OmegaConf.to_container(OmegaConf.structured(cfg)), "provenance": provenance}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CARD_FILE).write_text(card or model_card(system, config))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a saved folder. Raises CheckpointError if it is missing or is not ours."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["system"], config["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has no readable {CONFIG_FILE} of a tokenizer: {error}") from error
    return config


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises CheckpointError if it is missing or damaged."""
    try:
        with safe_open(file, "pt"):
            pass
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error


def check_fit(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError naming the first key of a state dict that is missing, left over or of another shape."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = sorted(k for k in expected.keys() & state.keys() if expected[k] != state[k].shape)
    problems = [("misses", missing), ("has left over", extra), ("has in another shape", shapes)]
    said = [f"{what} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "") for what, keys in problems if keys]
    if said:
        raise CheckpointError(f"{source} {'; '.join(said)}")


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Strict load that names what does not fit. Raises CheckpointError."""
    check_fit({k: v.shape for k, v in module.state_dict().items()}, state, f"{source} does not fit the model: it")
    module.load_state_dict(state)
