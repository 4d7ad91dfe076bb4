"""The models of the page: loaded once, each with what is known of its weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenizers_lab.cli.common import load_tokenizer
from tokenizers_lab.config import list_recipes, load_config, override_objective
from tokenizers_lab.errors import CheckpointError, InputError, TokenizersLabError
from tokenizers_lab.hub import resolve_folder, weights_sha256
from tokenizers_lab.network import read_config
from tokenizers_lab.registry import get_system
from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer
from tokenizers_lab.training.checkpoint import newest_checkpoint, read_state

from ..candidates import untrained_copy

MOST_RUNS = 6      # that are shown where none is named
RANDOM = "random weights: never trained"
UNKNOWN = "not recorded where these weights are from"


@dataclass(frozen=True)
class LoadedModel:
    """A tokenizer on the page."""

    title: str                                    # unique among those of the page
    tokenizer: ImageTokenizer | SpeechTokenizer
    sha256: str                                   # of the weights, as `toklab encode` writes it into its files
    origin: str                                   # where the weights are from
    warning: str = ""                             # what must be known before its results are judged

    @property
    def speech(self) -> bool:
        """Whether it is for speech."""
        return isinstance(self.tokenizer, SpeechTokenizer)

    @property
    def parameters(self) -> int:
        """Numbers that were learned."""
        return sum(parameter.numel() for parameter in self.tokenizer.parameters())


def runs_in(folder: Path) -> list[str]:
    """The runs of tokenizers in a folder that have a checkpoint, the newest first, at most six.

    Raises CheckpointError if there is none.
    """
    found = {run: checkpoint for run in folder.glob("*") if (checkpoint := newest_checkpoint(run)) and is_shown(checkpoint)}
    runs = sorted(found, key=lambda run: -found[run].stat().st_mtime)
    if not runs:
        raise CheckpointError(f"no MODEL was named and {folder}/ holds no run: train one (toklab train rectok/tiny, minutes on a "
                              "CPU), or name a run, a saved folder, SYSTEM/official or a hub id")
    return [str(run) for run in runs[:MOST_RUNS]]


def is_shown(folder: Path) -> bool:
    """Whether saved weights are of a tokenizer; the page has no place for other networks."""
    return get_system(read_config(folder)["system"]).kind in ("image", "speech")


def load_models(names: Sequence[str], device: str, watch: Callable[[Sequence[str]], Any] = iter) -> list[LoadedModel]:
    """The tokenizers of these names, in eval mode. watch: shows progress while it hands the names over.

    Raises InputError on a network that is no tokenizer, and what loading raises: CheckpointError, WeightsMissing.
    """
    titles = short_titles(names)
    models: list[LoadedModel] = []
    for name in watch(names):
        folder = resolve_folder(name)
        if not is_shown(folder):
            raise InputError(f"{name} is no tokenizer: toklab app shows tokenizers of images and of speech")
        tokenizer = load_tokenizer(name, device)
        origin, warning = describe_weights(name, folder, tokenizer)
        models.append(LoadedModel(titles[len(models)], tokenizer, weights_sha256(folder), origin, warning))
    return models


def short_titles(names: Sequence[str]) -> list[str]:
    """The last part of each path where that tells them apart, else the whole; hub ids and SYSTEM/official stay as they are."""
    short = [Path(name).name if Path(name).expanduser().is_dir() else name for name in names]
    titles = [last if short.count(last) == 1 else name for last, name in zip(short, names)]
    return [title if titles.count(title) == 1 else f"{title} ({i})" for i, title in enumerate(titles, start=1)]


def describe_weights(name: str, folder: Path, tokenizer: ImageTokenizer | SpeechTokenizer) -> tuple[str, str]:
    """(where the weights are from, what must be known of them or nothing), each one line."""
    saved = read_config(folder)
    provenance = saved.get("provenance") or {}
    trained = (folder / "training").is_dir()      # a checkpoint
    if provenance.get("converted_from"):
        origin, warning = f"the authors' release {provenance['converted_from']}", ""
    elif any("random" in str(value).lower() for value in provenance.values()):
        origin, warning = RANDOM, RANDOM
    elif trained:
        step = _step(folder)
        origin, warning = (f"trained with tokenizers-lab, {step:,} steps", "") if step else (RANDOM, RANDOM)
    elif is_untrained(tokenizer):
        origin, warning = RANDOM, RANDOM
    else:
        origin, warning = UNKNOWN, ""
    recipe = tiny_recipe(saved["system"], saved["model"])
    if recipe:
        small = f"of the tiny recipe {recipe}, which shows that every part works, not how good the system can be"
        warning = f"{warning}; {small}" if warning else small
    return origin, warning


def _step(folder: Path) -> int:
    """Steps that a checkpoint was trained for."""
    try:
        return int(read_state(folder)["step"])
    except (TokenizersLabError, KeyError):
        return 0


def tiny_recipe(system: str, model: dict[str, Any]) -> str | None:
    """The name of the recipe for minutes on a CPU whose network has these options, if there is one."""
    options = get_system(system).resolve("model_config")
    ours = override_objective(options(), model, "model")
    for name in list_recipes():
        if name.startswith(f"{system}/") and "tiny" in name and load_config(name).model == ours:
            return name
    return None


def is_untrained(tokenizer: ImageTokenizer | SpeechTokenizer) -> bool:
    """Whether all that a new network sets to a constant (biases, scales of norms, counts of codes) still has that value.

    A network that has no such tensors is not known to be untrained.
    """
    fresh = untrained_copy(tokenizer)
    if isinstance(fresh, SpeechTokenizer):
        fresh.fuse()
    known = tokenizer.state_dict()
    constants = {name: value for name, value in fresh.state_dict().items() if value.numel() > 1 and _constant(value)}
    return bool(constants) and all(bool(known[name].eq(value).all()) for name, value in constants.items())


def _constant(value: Tensor) -> bool:
    """Whether all numbers of a tensor are the same."""
    first = value.flatten()[0]
    return bool(value.eq(first).all())
