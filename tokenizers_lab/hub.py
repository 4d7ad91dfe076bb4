"""Finds, loads, converts and publishes tokenizers by name.

A name is a folder that `save_pretrained` wrote, a checkpoint, a run (its newest whole checkpoint), `<system>/official` for
the weights that the paper's authors released, or a hub id `org/name`. A folder that exists comes first.
"""

import difflib
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_lab.asset_fetch import describe_error, locked, offline, reachable
from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.assets import cache_dir
from tokenizers_lab.config import override_objective
from tokenizers_lab.errors import CheckpointError, ConfigError, InputError, TokenizersLabError, WeightsMissing
from tokenizers_lab.model_card import model_card
from tokenizers_lab.network import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, Network, load_weights, read_config, read_weights
from tokenizers_lab.registry import System, get_system, systems
from tokenizers_lab.training.checkpoint import MANIFEST, list_checkpoints, load_torch, newest_checkpoint

__all__ = [
    "OfficialWeights", "build_from_dict", "build_tokenizer", "convert_official", "hub_snapshot", "is_tokenizer", "load",
    "model_card", "push", "resolve_folder", "save_official", "weights_sha256",
]

HEADS_FILE = "heads.safetensors"      # the objective's heads of converted weights, where the authors released them
OFFICIAL_ENV = "TOKENIZERS_LAB_OFFICIAL"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(
    name: str | os.PathLike[str], device: torch.device | str = "cpu", path: str | os.PathLike[str] | None = None
) -> Network:
    """The tokenizer, or generator, of that name (see the top of this file), in eval mode; of a checkpoint, the moving average of
    the weights.

    path: for `<system>/official`, the authors' file or a folder of the hub's layout, instead of a download; the environment
    variable TOKENIZERS_LAB_OFFICIAL names such a folder too. Raises CheckpointError if the thing is missing, damaged or not
    ours, WeightsMissing if it would have to be fetched and cannot be.
    """
    return load_folder(resolve_folder(name, path)).to(device)


def load_folder(folder: Path) -> Network:
    """The tokenizer of a saved folder or a checkpoint, in eval mode on the CPU. Raises CheckpointError."""
    check_manifest(folder)
    config = read_config(folder)
    tokenizer = build_from_dict(config["system"], config["model"], str(folder / CONFIG_FILE))
    load_weights(tokenizer, read_weights(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
    provenance = config.get("provenance")
    tokenizer.provenance = provenance if isinstance(provenance, dict) else {}
    return tokenizer.eval()


def resolve_folder(name: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """The folder with config.json and model.safetensors that a name stands for; fetched and converted if need be."""
    text = os.fspath(name)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _local_folder(folder)
    if folder.is_file():
        if folder.suffix in (".pth", ".pt", ".ckpt"):
            hint = f"if the authors released it, first run toklab convert SYSTEM {folder} FOLDER"
            raise CheckpointError(f"{folder} is a file, not a saved folder: {hint}")
        raise CheckpointError(f"{folder} is a file: give its folder, with {CONFIG_FILE} and {WEIGHTS_FILE}")
    parts = text.split("/")
    if len(parts) in (2, 3) and parts[1] == "official":
        return official_folder(parts[0], parts[2] if len(parts) == 3 else None, path)
    if HUB_ID.fullmatch(text):
        return _hub_folder(text)
    raise CheckpointError(f"there is no folder {text}{_near_folder(folder)}")


def is_tokenizer(source: str) -> bool:
    """Whether that names a tokenizer of this library: a saved folder, a run, or SYSTEM/official; not another network."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source.split("/")[1:2] == ["official"]
    try:
        return bool(list_checkpoints(folder)) or "system" in json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return False


def build_tokenizer(system: str, model_cfg: Any) -> Network:
    """A new tokenizer of that system with random weights; works under `torch.device("meta")`."""
    return get_system(system).resolve("tokenizer")(model_cfg)


def build_from_dict(system: str, model: dict[str, Any], source: str = "config.json") -> Network:
    """A tokenizer from the `system` and `model` of a saved config.json. Raises CheckpointError naming `source`.

    Its first weights are about to be overwritten: global random state is left as it was.
    """
    known = systems()
    if system not in known:
        raise CheckpointError(f"{source} is of the system '{system}', which is not installed here; there are: {', '.join(known)}")
    try:
        cfg = override_objective(known[system].resolve("model_config")(), model, "model")
        with torch.random.fork_rng(devices=[]):
            return build_tokenizer(system, cfg)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def weights_sha256(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of a saved folder's weights, as `sha256sum model.safetensors` gives it. Raises CheckpointError."""
    try:
        return sha256_of(Path(folder) / WEIGHTS_FILE)
    except OSError as error:
        raise CheckpointError(f"{folder} has no readable {WEIGHTS_FILE}: {error.strerror}") from error


def check_manifest(folder: Path) -> None:
    """In a checkpoint, compare the files that `load` reads with the manifest. Raises CheckpointError."""
    if not (folder / MANIFEST).exists():
        return
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged: its {MANIFEST} is unreadable; use another checkpoint of the run") from error
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file() or sha256_of(folder / name) != hashes.get(name):
            raise CheckpointError(f"{folder} is damaged: {name} is missing or was changed; use another checkpoint of the run")


def _local_folder(folder: Path) -> Path:
    """The folder itself if it is saved weights, or the newest whole checkpoint of a run."""
    if (folder / CONFIG_FILE).is_file():
        return folder
    if list_checkpoints(folder):
        newest = newest_checkpoint(folder)
        if newest is None:
            raise CheckpointError(f"every checkpoint in {folder / 'checkpoints'} is damaged")
        return newest
    if (folder / "config.yaml").is_file():
        raise CheckpointError(f"the run {folder} has no finished checkpoint yet")
    raise CheckpointError(f"{folder} holds no tokenizer: neither {CONFIG_FILE} with {WEIGHTS_FILE}, nor a run's checkpoints")


def _near_folder(path: Path) -> str:
    """`; nearest: 'x'` from the folders beside a missing one."""
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
    return f"; nearest: '{path.parent / near[0]}'" if near else ""


# --- the authors' weights -----------------------------------------------------------------------------------------------

class OfficialWeights(NamedTuple):
    """The authors' weights in our form."""

    tokenizer: Network              # in eval mode
    heads: dict[str, Tensor]          # of the objective's `heads`; empty if not released


def convert_official(system: str, file: str | os.PathLike[str], config: dict[str, Any] | None = None) -> OfficialWeights:
    """The authors' file (a torch pickle, read as data, or safetensors) as our tokenizer and heads.

    config: the authors' constructor arguments, for sizes that they did not release. Files that the release has beside it (see
    `_files_beside`) are read too; one that is not there is warned of. Raises CheckpointError on any key that is missing, left
    over or of another shape, and on a pickle that holds more than tensors.
    """
    path, module = Path(file), _convert_module(get_system(system))
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    state = read_weights(path) if path.suffix == ".safetensors" else load_torch(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no state dict")
    release, beside = module.OFFICIAL, _files_beside(path, module.OFFICIAL)
    for prefix, other in beside.items():
        if other.is_file():
            state = {**state, **{prefix + k: v for k, v in read_weights(other).items()}}
        else:
            warnings.warn(f"there is no {other}: {system} is converted without it", stacklevel=2)
    try:
        converted = module.from_official(state, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    tokenizer = build_tokenizer(system, converted.model)
    load_weights(tokenizer, converted.tokenizer, str(path))
    tokenizer.provenance = {
        "converted_from": release["hub_id"], "revision": release["revision"], "file": path.name, "file_sha256": sha256_of(path),
        **{f"{prefix}file_sha256": sha256_of(other) for prefix, other in beside.items() if other.is_file()},
        "licence": release["licence"], "source": release["source"],
    }
    return OfficialWeights(tokenizer.eval(), {k: v.float().contiguous() for k, v in converted.heads.items()})


def save_official(converted: OfficialWeights, folder: Path, heads: bool = True) -> Path:
    """Write converted weights as a saved folder, with the heads beside them."""
    converted.tokenizer.save_pretrained(folder)
    if heads and converted.heads:
        save_file(converted.heads, folder / HEADS_FILE, metadata={"format": "pt"})
    return folder


def official_folder(system_name: str, variant: str | None = None, path: str | os.PathLike[str] | None = None) -> Path:
    """The converted release of a system in our cache, converted on first use.

    variant: which of the authors' files, by its name or stem; none: the first. See `load` for `path`.
    """
    system = get_system(system_name)
    release = _convert_module(system).OFFICIAL
    name = _official_file(system_name, release, variant)
    cache = cache_dir() / "converted" / system_name
    given = path or os.environ.get(OFFICIAL_ENV)
    if given:
        file = _given_file(Path(given).expanduser(), release["hub_id"], name, system_name)
        folder = cache / f"{file.stem}-{sha256_of(file)[:16]}"
    else:
        file, folder = None, cache / f"{Path(name).stem}-{release['revision']}"
    with locked(cache):
        if not (folder / CONFIG_FILE).is_file():
            file = file or _fetch_official(system_name, release, name)
            for other in _files_beside(file, release).values():
                if not other.is_file() and given:
                    raise WeightsMissing(f"{system_name}/official needs {other} too; put it there")
                if not other.is_file():
                    _fetch_official(system_name, release, other.relative_to(file.parent).as_posix())
            with tempfile.TemporaryDirectory(prefix=".converting-", dir=cache) as draft:
                os.replace(save_official(convert_official(system_name, file), Path(draft) / "done"), folder)
    return folder


def _files_beside(file: Path, release: dict[str, Any]) -> dict[str, Path]:
    """Further files of a release that belong to one of its `files`, by what their keys are to begin with: OFFICIAL["beside"]."""
    return {prefix: file.parent / name for prefix, name in release.get("beside", {}).items()}


def _convert_module(system: System) -> Any:
    if system.convert is None:
        raise CheckpointError(f"{system.name}: its authors released no weights")
    return system.resolve("convert")


def _official_file(system: str, release: dict[str, Any], variant: str | None) -> str:
    """The authors' file name of a variant. Raises CheckpointError with those there are."""
    names = {key: f for f in release["files"] for key in (f, Path(f).stem)}
    if variant is not None and variant not in names:
        known = ", ".join(f"{system}/official/{Path(f).stem}" for f in release["files"])
        raise CheckpointError(f"{system} has no official weights '{variant}'; there are: {known}")
    return release["files"][0] if variant is None else names[variant]


def _given_file(given: Path, hub_id: str, name: str, system: str) -> Path:
    """The authors' file where the user says: the file itself, its folder, or a folder with `org/name/file` inside."""
    for candidate in (given, given / name, given / hub_id / name):
        if candidate.is_file():
            return candidate
    places = f"neither {given / name} nor {given / hub_id / name}"
    raise WeightsMissing(f"{system}/official: there is {places}; put {name} of {hub_id} there")


def _fetch_official(system: str, release: dict[str, Any], name: str) -> Path:
    """The authors' file from the hub's cache, else from the hub. Raises WeightsMissing."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    if "download" in release:      # not on the hub
        raise WeightsMissing(f"{system}/official needs {name}: download it ({release['download']}) and set {OFFICIAL_ENV}=FOLDER")
    cached = try_to_load_from_cache(release["hub_id"], name, revision=release["revision"])
    if isinstance(cached, str):
        return Path(cached)
    try:
        if offline():
            raise OSError("TOKENIZERS_LAB_OFFLINE is set")
        reachable(constants.ENDPOINT)      # the hub's client would retry for half a minute
        return Path(hf_hub_download(release["hub_id"], name, revision=release["revision"]))
    except Exception as error:             # the client's errors are those of the HTTP library of its version
        raise WeightsMissing(
            f"{system}/official needs {name} of {release['hub_id']} from the hub: where there is a network, run hf download "
            f"{release['hub_id']} {name} --local-dir FOLDER, then set {OFFICIAL_ENV}=FOLDER ({describe_error(error)})"
        ) from error


# --- the hub ------------------------------------------------------------------------------------------------------------

def _hub_folder(repo: str) -> Path:
    """A hub repository's snapshot of config and weights. Raises as `hub_snapshot`, CheckpointError if it is not ours."""
    folder = hub_snapshot(repo, [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, HEADS_FILE])
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"the hub's {repo} is no tokenizer of ours: it has no {CONFIG_FILE} or no {WEIGHTS_FILE}")
    return folder


def hub_snapshot(repo: str, patterns: list[str]) -> Path:
    """A hub repository's files that match the patterns, fetched or from the hub's cache.

    Raises WeightsMissing if they are not here and there is no network, CheckpointError if there is no such repository.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    reason = "TOKENIZERS_LAB_OFFLINE is set"
    folder: str | None = None
    try:
        if not offline():
            reachable(constants.ENDPOINT)
            folder = snapshot_download(repo, allow_patterns=patterns)
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no folder {repo} here, and no public repository of that name on the hub") from error
    except Exception as error:
        reason = describe_error(error)
    if folder is None:
        try:
            folder = snapshot_download(repo, allow_patterns=patterns, local_files_only=True)
        except Exception as error:
            near = _near_folder(Path(repo))
            raise WeightsMissing(
                f"there is no folder {repo} here{near}, and the hub's {repo} cannot be fetched ({reason}): where there is a "
                f"network, run hf download {repo} --local-dir FOLDER and give that folder"
            ) from error
    return Path(folder)


def push(tokenizer: Network, repo_id: str, private: bool = True, yes: bool = False) -> str:
    """Upload a tokenizer with its model card to the hub; returns the repository's address.

    Weights that were converted from, or started from, an authors' release carry its licence: pushing them asks first.
    yes: do not ask. Raises InputError if nobody is there to answer or the answer is no, TokenizersLabError if the upload fails.
    """
    upstream = tokenizer.provenance.get("converted_from")
    if upstream and not yes:
        licence = tokenizer.provenance.get("licence", "unknown")
        question = f"these weights come from {upstream} (licence: {licence}); publish them as {repo_id}?"
        if not sys.stdin.isatty():
            raise InputError(f"{question} Pass yes=True if its licence lets you")
        if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
            raise InputError("not pushed")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        try:
            api = HfApi()
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        except Exception as error:
            reason = describe_error(error)
            raise TokenizersLabError(f"could not push to {repo_id} ({reason}); log in with hf auth login") from error
    return str(address)
