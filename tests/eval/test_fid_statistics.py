"""Means and covariances, and the files that hold them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.eval.feature_metrics import Reference, feature_metrics
from tokenizers_lab.eval.features import FeatureExtractor, Features
from tokenizers_lab.eval.statistics import (
    Statistics,
    cached_statistics,
    check_compatible,
    compute_statistics,
    content_hash,
    read_statistics,
    save_statistics,
)


def features(n: int = 100, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 5


def extractor(kind: str = "inception", identifier: str = "net A", resize: str = "bilinear") -> FeatureExtractor:
    return FeatureExtractor(torch.nn.Linear(1, 1), kind, identifier, resize, "weights of a test", "nearest")


@pytest.mark.parametrize(("n", "width"), [(2, 3), (100, 6), (2049, 300), (5000, 257)])
def test_equals_numpy_in_float64(n: int, width: int) -> None:
    data = features(n, width)
    found = compute_statistics(data)
    assert np.allclose(found.mean, data.double().numpy().mean(axis=0), rtol=0, atol=1e-13)
    assert np.allclose(found.covariance, np.cov(data.double().numpy(), rowvar=False), rtol=0, atol=1e-12)
    assert torch.equal(found.covariance, found.covariance.T)


def test_float64_matters() -> None:
    data = features(4000) + 1000      # float32 sums of squares would lose all digits
    assert np.allclose(compute_statistics(data).covariance, np.cov(data.double().numpy(), rowvar=False), rtol=1e-9)


def test_file_holds_statistics_exactly(tmp_path: Path) -> None:
    pool = compute_statistics(features(), {"extractor": "net A", "resize": "bilinear"})
    spatial = compute_statistics(features(seed=1))
    save_statistics(tmp_path / "a.npz", pool, spatial)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    found, found_spatial = read_statistics(tmp_path / "a.npz")
    assert torch.equal(found.mean, pool.mean) and torch.equal(found.covariance, pool.covariance) and found.n == 100
    assert found_spatial is not None and torch.equal(found_spatial.covariance, spatial.covariance)
    assert found.source["extractor"] == "net A" and len(found.source["file_sha256"]) == 64


def test_adms_file(tmp_path: Path) -> None:
    data = features()
    moments = compute_statistics(data)
    np.savez(tmp_path / "adm.npz", mu=moments.mean.numpy().astype(np.float32), sigma=moments.covariance.numpy(),
             mu_s=moments.mean.numpy(), sigma_s=moments.covariance.numpy(), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    pool, spatial = read_statistics(tmp_path / "adm.npz")
    assert pool.mean.dtype == torch.float64 and pool.n is None and spatial is not None
    reference = Reference(statistics=pool, spatial_statistics=spatial)
    assert "fid" in feature_metrics(["fid"], extractor(), Features(data), reference)
    with pytest.raises(InputError, match="do not say their network"):
        feature_metrics(["fid"], extractor("random"), Features(data), reference)
    with pytest.raises(InputError, match="needs the reference's images"):
        feature_metrics(["precision"], extractor(), Features(data), reference)


def test_pickled_file_is_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    np.savez(tmp_path / "trap.npz", mu=np.array([Trap()], dtype=object), sigma=np.eye(1))
    with pytest.raises(DataError, match="not a readable NPZ"):
        read_statistics(tmp_path / "trap.npz")
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="not a readable NPZ"):
        read_statistics(tmp_path / "plain.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("arrays", "message"), [
    ({"arr_0": np.zeros(3)}, "needs mu and sigma"),
    ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not belong together"),
    ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "not symmetric"),
    ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "NaN"),
    ({"mu": np.zeros(2, np.int64), "sigma": np.eye(2)}, "do not belong together"),
])
def test_bad_files(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_statistics(tmp_path / "bad.npz")
    with pytest.raises(DataError, match="there is no statistics file"):
        read_statistics(tmp_path / "none.npz")


def test_statistics_of_another_network_or_resize_mode() -> None:
    made = compute_statistics(features(), {"extractor": "net A", "resize": "bilinear"})
    check_compatible(made, "net A", "bilinear", 6)
    with pytest.raises(InputError, match="network 'net A', this evaluation uses 'net B'"):
        check_compatible(made, "net B", "bilinear", 6)
    with pytest.raises(InputError, match="resize mode 'bilinear', this evaluation uses 'bicubic'"):
        check_compatible(made, "net A", "bicubic", 6)
    with pytest.raises(InputError, match="6 features, this network gives 8"):
        check_compatible(made, "net A", "bilinear", 8)
    with pytest.raises(InputError, match="uses 'net B'"):      # the metric itself looks
        feature_metrics(["fid"], extractor(identifier="net B"), Features(features()), Reference(statistics=made))


def test_cache(tmp_path: Path) -> None:
    calls = []

    def compute() -> tuple[Statistics, None]:
        calls.append(1)
        return compute_statistics(features()), None

    source = {"images": "abc", "extractor": "net A", "resize": "bilinear"}
    first, _, found = cached_statistics(source, compute, tmp_path)
    again, _, found_again = cached_statistics(source, compute, tmp_path)
    assert (found, found_again, len(calls)) == (False, True, 1)
    assert torch.equal(first.covariance, again.covariance) and again.source["extractor"] == "net A"
    cached_statistics({**source, "resize": "bicubic"}, compute, tmp_path)      # another protocol is another entry
    assert len(calls) == 2
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])                              # a damaged entry is made anew
    assert cached_statistics(source, compute, tmp_path)[2] is False and len(calls) == 3


def test_content_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    for name, text in (("a/x.png", "1"), ("b.png", "22")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    files = [tmp_path / "b.png", tmp_path / "a/x.png"]
    before = content_hash(files, tmp_path)
    assert content_hash(files[::-1], tmp_path) == before
    (tmp_path / "b.png").write_text("23")
    changed = content_hash(files, tmp_path)
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert len({before, changed, content_hash([tmp_path / "c.png", tmp_path / "a/x.png"], tmp_path)}) == 3
