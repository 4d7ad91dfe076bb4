"""gFID end to end: from NPZ files and folders whose features are known by construction to the numbers of ADM's evaluator."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from tokenizers_lab.cli import main as cli
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.eval import gfid
from tokenizers_lab.eval.features import FeatureExtractor, Features
from tokenizers_lab.eval.gfid import evaluate_samples, make_statistics
from tokenizers_lab.eval.image_arrays import open_image_array, write_image_array
from tokenizers_lab.eval.inception_score import inception_score
from tokenizers_lab.eval.precision_recall import precision_recall
from tokenizers_lab.eval.statistics import save_statistics

SIDE = 8


class Quadrants(nn.Module):
    """Stands for Inception: the mean colour of each quarter of an image, in levels; of the upper ones; and class logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 60).reshape(12, 5).sin() / 10)

    def forward(self, images: Tensor) -> Features:
        x = nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)      # (B, 12)
        return Features(x, x.reshape(-1, 3, 4)[:, :, :2].flatten(1), x @ self.weight)


@pytest.fixture(params=["inception"])
def network(request, monkeypatch) -> FeatureExtractor:
    """What --features loads."""
    extractor = FeatureExtractor(Quadrants(), request.param, "quadrants", "none", "weights of a test", "nearest")
    monkeypatch.setattr(gfid, "load_extractor", lambda features, device: extractor)
    return extractor


def colours(n: int, mean: float, deviation: float, seed: int) -> np.ndarray:
    """Normal colours of four quarters, on the grid of uint8: (n, 2, 2, 3)."""
    values = np.random.default_rng(seed).normal(mean, deviation, (n, 2, 2, 3))
    return values.round().clip(0, 255).astype(np.uint8)


def enlarge(values: np.ndarray, side: int = SIDE) -> np.ndarray:
    return values.repeat(side // 2, axis=1).repeat(side // 2, axis=2)


def known_features(values: np.ndarray) -> np.ndarray:
    return values.transpose(0, 3, 1, 2).reshape(len(values), 12).astype(np.float64)


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * np.trace(sqrtm(s @ t)).real)


@pytest.fixture
def sets(tmp_path) -> tuple[np.ndarray, np.ndarray]:
    """Colours of samples and reference, each in an NPZ file that NumPy wrote."""
    samples, reference = colours(700, 120, 20, 0), colours(500, 130, 30, 1)
    np.savez(tmp_path / "samples.npz", enlarge(samples))      # named arr_0, as ADM's files
    np.savez_compressed(tmp_path / "reference.npz", arr_0=enlarge(reference))
    return samples, reference


def measure(tmp_path: Path, *args, samples: str = "samples.npz", reference: str = "reference.npz", **options) -> dict:
    options.setdefault("count", None)
    return evaluate_samples(str(tmp_path / samples), str(tmp_path / reference), *args, **options)


def test_images_of_known_features(network, sets, tmp_path) -> None:
    result = measure(tmp_path, ["gfid", "is", "sfid", "precision", "recall", "kid"], batch_size=64)
    a, b = map(known_features, sets)
    found = result["rows"][0]["metrics"]
    assert found["gfid"]["title"] == "gFID" and result["n"] == 700
    assert found["gfid"]["value"] == pytest.approx(scipy_frechet(a, b), rel=1e-6)
    assert found["gfid"]["value"] == pytest.approx(12 * (10**2 + 10**2), rel=0.1)      # |Δμ|² + Σ (σ₁ − σ₂)²
    low, high = (found["gfid"]["uncertainty"][end] for end in ("low", "high"))
    assert low < found["gfid"]["value"] < high and found["gfid"]["bias_estimate"] > 0
    upper = [i for i in range(12) if i % 4 < 2]
    assert found["sfid"]["value"] == pytest.approx(scipy_frechet(a[:, upper], b[:, upper]), rel=1e-6)
    weight = network.network.weight.detach().numpy().astype(np.float64)
    assert found["is"]["value"] == pytest.approx(inception_score(torch.from_numpy(a @ weight)).value, rel=1e-5)
    manifolds = precision_recall(torch.from_numpy(a), torch.from_numpy(b), arithmetic="float64")
    assert (found["precision"]["value"], found["recall"]["value"]) == (manifolds.precision, manifolds.recall)
    assert 0 < manifolds.recall < manifolds.precision < 1 and found["kid"]["value"] > 0


def test_arithmetic_and_score_by_name(network, sets, tmp_path) -> None:
    half = measure(tmp_path, ["precision", "is"], arithmetic="adm-float16", score="torch-fidelity")["rows"][0]["metrics"]
    a, b = (torch.from_numpy(known_features(values)) for values in sets)
    assert half["precision"]["value"] == precision_recall(a.float(), b.float(), arithmetic="adm-float16").precision
    assert half["precision"]["arithmetic"] == "adm-float16" and len(half["is"]["splits"]) == 10
    assert "torch-fidelity" in half["is"]["split_protocol"]
    with pytest.raises(InputError, match="no protocol 'x' of the Inception Score"):
        measure(tmp_path, score="x")


def test_adms_file_of_statistics_and_images(network, sets, tmp_path) -> None:
    """Statistics serve the Fréchet distances, the images precision and recall, however different they are."""
    mean, covariance = np.full(12, 120.0), np.eye(12) * 400
    np.savez(tmp_path / "adm.npz", arr_0=enlarge(sets[1][:200]), mu=mean.astype(np.float32), sigma=covariance,
             mu_s=mean[:6].astype(np.float32), sigma_s=covariance[:6, :6])
    result = measure(tmp_path, reference="adm.npz")
    found = result["rows"][0]["metrics"]
    assert list(found) == ["gfid", "is", "sfid", "precision", "recall"]
    a = known_features(sets[0])
    expected = np.square(a.mean(0) - mean).sum() + np.trace(np.cov(a, rowvar=False)) + np.trace(covariance)
    expected -= 2 * np.trace(sqrtm(np.cov(a, rowvar=False) @ covariance)).real
    assert found["gfid"]["value"] == pytest.approx(expected, rel=1e-6) and expected < 100      # not 2,400
    manifolds = precision_recall(torch.from_numpy(a), torch.from_numpy(known_features(sets[1][:200])), arithmetic="float64")
    assert found["recall"]["value"] == manifolds.recall
    reference = result["protocol"]["features"]["reference"]
    assert reference["images"] == 200 and len(reference["file_sha256"]) == 64
    assert any("assumed to be FID's Inception" in note for note in result["warnings"])
    np.savez(tmp_path / "bare.npz", mu=mean, sigma=covariance)
    bare = measure(tmp_path, reference="bare.npz")["rows"][0]["metrics"]
    assert list(bare) == ["gfid", "is"] and bare["gfid"]["value"] == found["gfid"]["value"]
    with pytest.raises(InputError, match="precision needs the reference's images"):
        measure(tmp_path, ["precision"], reference="bare.npz")


@pytest.mark.parametrize("network", ["random"], indirect=True)
def test_a_stand_in_is_never_called_fid(network, sets, tmp_path) -> None:
    mean = np.zeros(12)
    np.savez(tmp_path / "adm.npz", arr_0=enlarge(sets[1]), mu=mean, sigma=np.eye(12))
    result = measure(tmp_path, ["gfid", "precision"], reference="adm.npz")
    found = result["rows"][0]["metrics"]
    assert list(found) == ["frechet_random", "precision_random"]
    assert "FID" not in found["frechet_random"]["title"]
    a, b = map(known_features, sets)      # of the images, not of the stored statistics, which are of another network
    assert found["frechet_random"]["value"] == pytest.approx(scipy_frechet(a, b), rel=1e-6)
    assert any("its images serve instead" in note for note in result["warnings"])
    np.savez(tmp_path / "bare.npz", mu=mean, sigma=np.eye(12))
    with pytest.raises(InputError, match="do not say their network"):
        measure(tmp_path, ["gfid"], reference="bare.npz")


def save_folder(values: np.ndarray, folder: Path, names: str = "{:04d}.png") -> None:
    for i, array in enumerate(enlarge(values)):
        file = folder / names.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)


def test_folders_and_own_statistics_give_what_npz_files_give(network, sets, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TOKENIZERS_LAB_CACHE", str(tmp_path / "cache"))
    for values, name in zip(sets, ("samples", "reference")):
        save_folder(values[:60], tmp_path / name)
        np.savez(tmp_path / f"{name}.npz", enlarge(values[:60]))
    plain = measure(tmp_path)
    folders = measure(tmp_path, samples="samples", reference="reference")
    pooled, spatial = make_statistics(str(tmp_path / "reference"), "inception", SIDE)
    save_statistics(tmp_path / "own.npz", pooled, spatial)
    own = measure(tmp_path, reference="own.npz")
    values = [{name: metric["value"] for name, metric in found["rows"][0]["metrics"].items()} for found in (plain, folders, own)]
    assert values[0] == values[1] == {**values[0], **values[2]} and list(values[2]) == ["gfid", "is", "sfid"]
    raw, _ = make_statistics(str(tmp_path / "reference.npz"))
    assert torch.equal(raw.mean, pooled.mean) and raw.source["images"]["n"] == 60
    save_folder(sets[0][:3], tmp_path / "samples", "{:04d}-large.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "samples" / "zzz.png")
    with pytest.raises(DataError, match=r"zzz\.png has 16 × 16 pixels, the first image 8 × 8"):
        measure(tmp_path, samples="samples")


def test_the_score_of_images_sorted_by_class_is_taken_in_another_order(network, sets, tmp_path, monkeypatch) -> None:
    """ADM's splits follow the order: folders of classes would make each split a few classes."""
    monkeypatch.setattr(gfid, "SCORES", {"adm": {"split_size": 25}})
    bright = np.concatenate([colours(25, mean, 10, mean) for mean in (20, 80, 160, 230)])
    save_folder(bright, tmp_path / "flat")
    for start in range(0, 100, 25):
        save_folder(bright[start : start + 25], tmp_path / "nested" / f"class{start}")
    flat, nested = (measure(tmp_path, ["is"], samples=name)["rows"][0]["metrics"]["is"] for name in ("flat", "nested"))
    assert nested["value"] > 1.1 * flat["value"]
    assert "hash of their names" in nested["split_protocol"] and "hash" not in flat["split_protocol"]


def test_what_is_refused(network, sets, tmp_path) -> None:
    with pytest.raises(InputError, match=r"holds 700 images, a gFID is of 50,000: --allow-count"):
        measure(tmp_path, count=50_000)
    np.savez(tmp_path / "large.npz", enlarge(sets[1], 16))
    with pytest.raises(InputError, match=r"images of 8 × 8 pixels, the reference .* of 16 × 16"):
        measure(tmp_path, reference="large.npz")
    pooled, spatial = make_statistics(str(tmp_path / "large.npz"))
    save_statistics(tmp_path / "own.npz", pooled, spatial)
    with pytest.raises(InputError, match="of 16 × 16: compare images of one size"):
        measure(tmp_path, reference="own.npz")
    with pytest.raises(InputError, match="no metric of samples 'rfid'; known: gfid"):
        measure(tmp_path, ["rfid"])
    np.savez(tmp_path / "float.npz", np.zeros((3, 8, 8, 3)))
    with pytest.raises(DataError, match="must be uint8"):
        measure(tmp_path, samples="float.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(DataError, match=r"neither statistics .* nor images"):
        measure(tmp_path, reference="other.npz")
    with pytest.raises(InputError, match="neither a folder of images nor an"):
        measure(tmp_path, samples="nothing")
    whole = (tmp_path / "samples.npz").read_bytes()
    damaged = whole[:3000] + bytes([whole[3000] ^ 255]) + whole[3001:]
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with pytest.raises(DataError, match="is damaged"):
        measure(tmp_path, samples="damaged.npz")


def test_arrays_are_read_and_written_in_pieces(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), dtype=np.uint8)
    write_image_array(tmp_path / "a.npz", images.shape, (images[i : i + 4] for i in range(0, 11, 4)))
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == ["arr_0"] and np.array_equal(file["arr_0"], images)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    array = open_image_array(tmp_path / "a.npz")
    assert np.array_equal(np.concatenate(list(array.pieces(3, 2, 9))), images[2:9])
    shares = [batch for rank in range(3) for batch in array.batches(2, rank, 3)]
    assert [key for batch in shares for key in batch.keys] == [f"{i:08d}" for i in range(11)]
    assert torch.equal(torch.cat([batch.images for batch in shares]) * 255, torch.from_numpy(images).permute(0, 3, 1, 2).float())
    with pytest.raises(DataError, match="was to hold 11 images, there were 4"):
        write_image_array(tmp_path / "b.npz", images.shape, [images[:4]])
    assert not (tmp_path / "b.npz").exists() and len(list(tmp_path.iterdir())) == 1


def in_two(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    extractor = FeatureExtractor(Quadrants(), "inception", "quadrants", "none", "weights of a test", "nearest")
    gfid.load_extractor = lambda features, device: extractor
    found = measure(Path(folder), batch_size=7)
    Path(folder, f"{rank}.json").write_text(json.dumps(found["rows"]))
    dist.destroy_process_group()


def test_two_processes_measure_as_one(network, sets, tmp_path) -> None:
    for values, name in zip(sets, ("samples", "reference")):
        np.savez(tmp_path / f"{name}.npz", enlarge(values[:51]))
    mp.spawn(in_two, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    rows = json.dumps(measure(tmp_path, batch_size=64)["rows"])
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text() == rows


def test_command(network, sets, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.call(["eval", "gfid", "samples.npz", "reference.npz"]) == 2
    assert "InputError: samples.npz holds 700 images, a gFID is of 50,000" in capsys.readouterr().err
    words = ["eval", "gfid", "samples.npz", "reference.npz", "--allow-count", "--device", "cpu", "--out", "out.json"]
    assert cli.call(words) == 0
    shown = capsys.readouterr().out
    result = json.loads(Path("out.json").read_text())
    assert f"{result['rows'][0]['metrics']['gfid']['value']:.1f}" in shown and "gFID to reference.npz" in shown
    assert "700 samples, 8 × 8 px" in shown and result["protocol"]["features"]["reference"]["file_sha256"] in shown
    assert cli.call(["eval", "statistics", "reference.npz", "own.npz", "--device", "cpu"]) == 0
    assert "500 images, 12 features: own.npz" in capsys.readouterr().out
    assert cli.call(["eval", "gfid", "samples.npz", "own.npz", "--allow-count", "--device", "cpu", "--out", "own.json"]) == 0
    again = json.loads(Path("own.json").read_text())["rows"][0]["metrics"]
    assert again["gfid"]["value"] == result["rows"][0]["metrics"]["gfid"]["value"]
    assert cli.call(["eval", "statistics", "reference.npz", "own.txt"]) == 2
    assert cli.call(["eval", "gfid", "--help"]) == 0
    assert "toklab eval gfid [-h]" in capsys.readouterr().out
