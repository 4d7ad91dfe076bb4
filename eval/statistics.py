"""Mean and covariance of features in float64, and the files that hold them."""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.assets import cache_dir
from tokenizers_lab.errors import DataError, InputError

from .deterministic import map_in_order

CHUNK = 8192       # samples of a partial sum; this and the next three are part of the definition of the last digits
ROWS = 1024        # samples that one thread sums or centres at a time
TILE = 256         # rows of a block of the covariance: only blocks on and below the diagonal are computed
SPAN = 1024        # its columns at most
FORMAT = "tokenizers_lab statistics 1"
SPREAD = 4         # a missing statistic of this many keys is named in an error


@dataclass
class Statistics:
    """First two moments of a set of features, with where they come from."""

    mean: Tensor                              # (D,) float64
    covariance: Tensor                        # (D, D) float64, unbiased
    n: int | None                             # number of samples; None: the file does not say
    source: dict[str, Any] = field(default_factory=dict)     # extractor, resize, content hash, … where known
    factor: Tensor | None = None              # (D, n) with factor · factorᵀ = covariance, of samples no more than features

    @property
    def width(self) -> int:
        """D, the number of features."""
        return len(self.mean)


def _check_matrix(features: Tensor, name: str = "features") -> None:
    if features.dim() != 2 or not features.is_floating_point() or 0 in features.shape:
        raise InputError(f"{name} must be a float matrix (N, D), not {features.dtype} {tuple(features.shape)}")


def check_features(features: Tensor, name: str = "features") -> None:
    """Raise InputError unless features are a finite float matrix (N, D) with at least one row."""
    _check_matrix(features, name)
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise InputError(f"{name} of {int((~finite).sum())} of {len(features)} samples are NaN or infinite (first: {first}): "
                         "look at those images, or run the network in float32")


def check_two_sets(features: Tensor, reference: Tensor) -> None:
    """Raise InputError unless both are finite float matrices (N, D) and (M, D)."""
    check_features(features)
    check_features(reference, "reference features")
    if features.shape[1] != reference.shape[1]:
        raise InputError(f"the two sets have {features.shape[1]} and {reference.shape[1]} features: they come from different "
                         "networks")


def compute_statistics(features: Tensor, source: Mapping[str, Any] | None = None) -> Statistics:
    """Mean and unbiased covariance in float64 of features (N, D), N ≥ 2.

    The bits depend on the features and their order alone, not on the number of threads: each block of the covariance is
    summed by one thread over fixed chunks of samples. Needs 8·CHUNK·D bytes beside the features (134 MB for D = 2048;
    50,000 × 2048 float32 features are 400 MB). Raises InputError on fewer than two samples or non-finite features.
    """
    _check_matrix(features)
    n, width = features.shape
    if n < 2:
        raise InputError("a covariance needs at least two samples")
    features = features.detach().cpu()
    total = torch.zeros(width, dtype=torch.float64)
    for part in map_in_order(lambda rows: rows.sum(dim=0, dtype=torch.float64), features.split(ROWS)):
        total += part
    if not total.isfinite().all():
        check_features(features)      # says which
    mean = total / n
    lower = torch.zeros(width, width, dtype=torch.float64)
    centred = torch.empty(min(n, CHUNK), width, dtype=torch.float64)      # one buffer: fresh pages cost as much as the sums

    for chunk in features.split(CHUNK):
        x = centred[: len(chunk)]
        for _ in map_in_order(lambda rows: torch.sub(rows[0], mean, out=rows[1]), zip(chunk.split(ROWS), x.split(ROWS))):
            pass
        for _ in map_in_order(lambda block: _add_products(lower, x, *block), _blocks(width)):      # noqa: B023
            pass
    lower = lower.tril()
    covariance = (lower + lower.tril(-1).T) / (n - 1)
    factor = centred[:n].T / (n - 1) ** 0.5 if n <= min(width, CHUNK) else None
    return Statistics(mean, covariance, n, dict(source or {}), factor)


def _blocks(width: int) -> list[tuple[slice, slice]]:
    """Rows and columns of blocks that cover a matrix on and below its diagonal, the largest first."""
    rows = [slice(start, min(start + TILE, width)) for start in range(0, width, TILE)]
    blocks = [(r, slice(start, min(start + SPAN, r.stop))) for r in rows for start in range(0, r.stop, SPAN)]
    return sorted(blocks, key=lambda b: (b[0].start - b[0].stop) * (b[1].stop - b[1].start))


def _add_products(total: Tensor, x: Tensor, rows: slice, columns: slice) -> None:
    """Add a block of xᵀ x, x (N, D)."""
    total[rows, columns].addmm_(x[:, rows].T, x[:, columns])


# Files


def save_statistics(path: str | Path, statistics: Statistics, spatial: Statistics | None = None) -> Path:
    """Write ADM's layout (mu, sigma, and mu_s, sigma_s if `spatial` is given) as NPZ, with n and source as JSON text."""
    path = Path(path)
    note = {"format": FORMAT, "n": statistics.n, "source": statistics.source}
    text = np.array(json.dumps(note, sort_keys=True))
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy(), "note": text}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            np.savez(file, **arrays)      # type: ignore[arg-type]
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return path


def read_statistics(path: str | Path) -> tuple[Statistics, Statistics | None]:
    """Statistics of an NPZ file (ours, ADM's or pytorch-fid's), and those of the spatial features if the file has them.

    Nothing is unpickled. A file without our note has `n` None and a source that says so. Raises DataError if it is none.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if not {"mu", "sigma"} <= names:
                raise DataError(f"{path} has no statistics: it needs mu and sigma, it holds {', '.join(sorted(names)[:SPREAD])}")
            note = json.loads(str(file["note"])) if "note" in names else {}
            moments = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in names}
    except FileNotFoundError:
        raise DataError(f"there is no statistics file {path}") from None
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable NPZ file of statistics: {error}") from error
    ours = note.get("format") == FORMAT
    source = dict(note.get("source", {})) if ours else {"note": "the file names neither network nor resize mode"}
    source["file_sha256"] = sha256_of(path)
    n = note.get("n")
    spatial = None
    if {"mu_s", "sigma_s"} <= set(moments):
        spatial = _checked(moments["mu_s"], moments["sigma_s"], n, source, path)
    return _checked(moments["mu"], moments["sigma"], n, source, path), spatial


def _checked(mu: np.ndarray, sigma: np.ndarray, n: int | None, source: dict[str, Any], path: Path) -> Statistics:
    """Statistics from arrays. Raises DataError unless they are a finite mean and a symmetric covariance."""
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise DataError(f"{path}: mean {mu.dtype} {mu.shape} and covariance {sigma.dtype} {sigma.shape} do not belong together")
    mean, covariance = torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64))
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise DataError(f"{path} has NaN or infinite statistics")
    if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(covariance.abs().max())):
        raise DataError(f"{path}: the covariance is not symmetric")
    return Statistics(mean, (covariance + covariance.T) / 2, n, source)


def check_compatible(statistics: Statistics, extractor: str, resize: str, width: int, assumed: bool = False) -> None:
    """Raise InputError if statistics were made by another network or resize mode than the one in use.

    extractor, resize: `FeatureExtractor.identifier` and `.resize`. assumed: accept a file that names neither, as ADM's.
    """
    if statistics.width != width:
        raise InputError(f"the reference statistics have {statistics.width} features, this network gives {width}: "
                         "they belong to another network")
    made = {"network": statistics.source.get("extractor"), "resize mode": statistics.source.get("resize")}
    for what, used in (("network", extractor), ("resize mode", resize)):
        if made[what] is None and not assumed:
            raise InputError(f"the reference statistics do not say their {what}, this evaluation uses '{used}': make them anew")
        if made[what] is not None and made[what] != used:
            raise InputError(f"the reference statistics were made with {what} '{made[what]}', this evaluation uses '{used}': "
                             "make them anew or choose the same")


# Cache


def content_hash(files: Sequence[str | Path], root: str | Path) -> str:
    """SHA-256 over name (relative to root), size and bytes of each file, in order of names: what a set of images *is*."""
    digest = hashlib.sha256()
    named: Iterator[tuple[str, Path]] = ((Path(file).relative_to(root).as_posix(), Path(file)) for file in files)
    for name, file in sorted(named):
        digest.update(json.dumps([name, file.stat().st_size, sha256_of(file)]).encode())
    return digest.hexdigest()


def cached_statistics(
    source: Mapping[str, Any], compute: Callable[[], tuple[Statistics, Statistics | None]], folder: str | Path | None = None
) -> tuple[Statistics, Statistics | None, bool]:
    """Statistics from the cache, or computed and put there; the flag says whether they were found.

    source: JSON data that determines them: content hash, extractor, resize mode, rounding, crop. It becomes their `source`.
    folder: default `statistics` in our cache. A damaged file is computed anew.
    """
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    path = Path(folder or cache_dir() / "statistics") / f"{key}.npz"
    if path.exists():
        try:
            statistics, spatial = read_statistics(path)
            if {k: v for k, v in statistics.source.items() if k != "file_sha256"} == dict(source):
                return statistics, spatial, True
        except DataError:
            pass      # written by a machine that lost power, say: the images are at hand
    statistics, spatial = compute()
    for one in (statistics, spatial):
        if one is not None:
            one.source, one.factor = dict(source), None      # as it will be read: a distance's last digits must not change
    save_statistics(path, statistics, spatial)
    return statistics, spatial, False
