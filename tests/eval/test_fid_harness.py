"""Metrics of sets of images in the harness: the same bytes however images are batched and shared among processes."""

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from toy import Toy, ToyConfig, batches, pictures

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.eval.feature_metrics import Reference, feature_metrics
from tokenizers_lab.eval.features import FeatureExtractor, Features, build_extractor
from tokenizers_lab.eval.fid import evaluate_frechet
from tokenizers_lab.eval.gather import gather_rows
from tokenizers_lab.eval.rfid import evaluate_rfid, reference_statistics
from tokenizers_lab.eval.statistics import Statistics, compute_statistics

COUNT = 23      # odd
METRICS = ("rfid", "sfid", "kid", "is", "precision", "recall")


class Little(nn.Module):
    """Stands for Inception: few features, so that few images make a whole covariance."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 5, stride=2)
        generator = torch.Generator().manual_seed(0)
        self.convolution.weight.data = torch.randn(6, 3, 5, 5, generator=generator) / 5
        self.convolution.bias.data.zero_()

    def forward(self, images: Tensor) -> Features:
        x = self.convolution(images.float() / 255).relu()
        return Features(x.mean(dim=(2, 3)), x[:, :, 3, 3], 5 * x.amax(dim=(2, 3)))


def little(kind: str = "random", rounding: str = "nearest") -> FeatureExtractor:
    return FeatureExtractor(Little(), kind, "little", "none", "random weights of a test", rounding)      # type: ignore[arg-type]


def tokenizer() -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig()).fit(pictures(16)).eval()


def share(images: Tensor, rank: int, count: int, size: int) -> list[ImageBatch]:
    """Every count-th image, in batches."""
    keys = [f"{i:03d}.png" for i in range(len(images))][rank::count]
    mine = images[rank::count]
    return [ImageBatch(mine[i : i + size], keys[i : i + size]) for i in range(0, len(keys), size)]


def metric_bytes(rank: int, count: int, size: int, extractor: FeatureExtractor) -> str:
    result = evaluate_rfid(tokenizer(), share(pictures(COUNT), rank, count, size), extractor, METRICS, baselines=True)
    return json.dumps([row["metrics"] for row in result["rows"]], sort_keys=True)


def measure(rank: int, address: str, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(rank + 1)      # processes need not have the same number of threads either
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        found = {f"little-{size}": metric_bytes(rank, 2, size, little()) for size in (1, 5)}
        images = pictures(3)
        extractor = build_extractor("random")
        real = evaluate_rfid(tokenizer(), share(images, rank, 2, 4), extractor, ["rfid"])
        found["inception"] = json.dumps(real["rows"][0]["metrics"], sort_keys=True)
        try:
            evaluate_rfid(tokenizer(), share(images, rank, 2, 4), little(), ["precision"])
        except InputError as error:
            found["error"] = str(error)
        cached = reference_statistics(lambda: share(images, rank, 2, 2), little(), {"hash": "x"}, folder=f"{folder}/cache")
        found["statistics"] = str(cached.statistics.covariance.tolist())
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    mp.spawn(measure, (address, str(tmp_path)), nprocs=2)
    two, other = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert two == other
    assert two["little-1"] == two["little-5"] == metric_bytes(0, 1, 4, little()) == metric_bytes(0, 1, COUNT, little())
    real = evaluate_rfid(tokenizer(), batches(pictures(3), 3), build_extractor("random"), ["rfid"])
    assert two["inception"] == json.dumps(real["rows"][0]["metrics"], sort_keys=True)
    assert "at least 4 points in each set, not 3" in two["error"]
    alone = reference_statistics(lambda: batches(pictures(3), 1), little(), {"hash": "x"}, folder=str(tmp_path / "own"))
    assert two["statistics"] == str(alone.statistics.covariance.tolist())


def test_values_are_those_of_the_features() -> None:
    images = pictures(COUNT)
    result = evaluate_rfid(tokenizer(), batches(images, 4), little(), METRICS, image_metrics=["psnr"], baselines=True)
    row = result["rows"][0]["metrics"]
    rounded = (tokenizer().reconstruct(images) * 255).round().byte()
    ours, theirs = little()(rounded), little()(images)
    expected = evaluate_frechet(ours.pool, theirs.pool, paired=True)
    found = row["frechet_random"]
    assert found["value"] == pytest.approx(expected.value, rel=1e-9) and found["n"] == COUNT
    assert found["uncertainty"]["low"] == pytest.approx(expected.interval.low, rel=1e-6)
    assert found["title"] == "Fréchet distance (random features)" and found["reference"] == "originals"
    assert found["warnings"] == ["few samples for this width: interval untested"]      # 23 images, six features
    assert set(row) == {"psnr"} | {f"{name}_random" for name in (
        "frechet", "frechet_spatial", "kernel_distance", "class_score", "precision", "recall")}
    assert "fewer than the usual 1000" in row["kernel_distance_random"]["warnings"][0]
    assert len(result["rows"]) == 3 and result["rows"][1]["metrics"]["frechet_random"]["value"] > found["value"]
    assert result["protocol"]["features"] == {
        "extractor": "little", "resize": "none", "rounding": "uint8, nearest", "reference": "the originals"}


def test_only_fids_network_gives_fid() -> None:
    images = pictures(COUNT)
    named = evaluate_rfid(tokenizer(), batches(images, 4), little("inception"), ["rfid", "is"])
    assert set(named["rows"][0]["metrics"]) == {"rfid", "is"}
    for kind in ("random", "teacher", "given"):
        names = evaluate_rfid(tokenizer(), batches(images, 4), little(kind), ["rfid", "kid"])["rows"][0]["metrics"]
        assert not any("fid" in name or "kid" in name for name in names)


def test_reference_statistics_are_cached_and_checked(tmp_path: Path) -> None:
    images, calls = pictures(COUNT), []

    def load() -> list[ImageBatch]:
        calls.append(1)
        return batches(images, 4)

    first = reference_statistics(load, little(), {"hash": "x", "size": 32}, True, str(tmp_path))
    again = reference_statistics(load, little(), {"hash": "x", "size": 32}, True, str(tmp_path))
    assert len(calls) == 1 and torch.equal(first.statistics.covariance, again.statistics.covariance)
    reference_statistics(load, little(), {"hash": "x", "size": 64}, True, str(tmp_path))
    reference_statistics(load, little(rounding="truncate"), {"hash": "x", "size": 32}, True, str(tmp_path))
    assert len(calls) == 3
    result = evaluate_rfid(tokenizer(), load(), little(), ["rfid", "sfid"], reference=again)
    with_features = evaluate_rfid(tokenizer(), load(), little(), ["rfid", "sfid"])
    for name in ("frechet_random", "frechet_spatial_random"):
        assert result["rows"][0]["metrics"][name]["value"] == with_features["rows"][0]["metrics"][name]["value"]
    assert result["protocol"]["features"]["reference"]["images"] == {"hash": "x", "size": 32}
    other = FeatureExtractor(Little(), "random", "another", "none", "", "nearest")
    with pytest.raises(InputError, match="made with network 'little'"):
        evaluate_rfid(tokenizer(), load(), other, ["rfid"], reference=again)


def test_flags_and_errors() -> None:
    images = pictures(5)      # no more than the six features
    few = evaluate_rfid(tokenizer(), batches(images, 2), little(), ["rfid"])["rows"][0]["metrics"]["frechet_random"]
    assert few["uncertainty"] is None and len(few["warnings"]) == 2
    with pytest.raises(InputError, match="at least 4 points"):
        evaluate_rfid(tokenizer(), batches(images[:3], 2), little(), ["precision"])
    with pytest.raises(InputError, match="no metric of features 'fvd'"):
        evaluate_rfid(tokenizer(), batches(images, 2), little(), ["fvd"])
    with pytest.raises(InputError, match="the teacher has none"):
        evaluate_rfid(tokenizer(), batches(images, 2), little("teacher"), ["sfid"])
    with pytest.raises(InputError, match="truncation needs round_uint8=False"):
        evaluate_rfid(tokenizer(), batches(images, 2), little(rounding="truncate"), ["rfid"])
    with pytest.raises(DataError, match=r"two images are named '000\.png'"):
        evaluate_rfid(tokenizer(), batches(images, 2) + batches(images[:1], 1), little(), ["rfid"])
    broken = little()
    broken.network.convolution.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite"):
        evaluate_rfid(tokenizer(), batches(pictures(9), 2), broken, ["rfid"])
    no_logits = Reference(statistics=Statistics(torch.zeros(6).double(), torch.eye(6).double(), None))
    with pytest.raises(InputError, match="needs class logits"):
        feature_metrics(["is"], little("inception"), Features(torch.rand(9, 6)), no_logits)


def test_gathered_rows_are_sorted_by_key() -> None:
    keys, rows = gather_rows(["b", "a", "c"], {"x": torch.tensor([[2.0], [1.0], [3.0]])})
    assert keys == ["a", "b", "c"] and rows["x"].flatten().tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="2 rows of x for 1 keys"):
        gather_rows(["a"], {"x": torch.zeros(2, 1)})
    shuffled = torch.rand(50, 3).double()
    assert torch.equal(compute_statistics(shuffled).covariance, compute_statistics(shuffled.clone()).covariance)
