"""Everything in one pass: images, sets of images, latents, references."""

import json
from pathlib import Path

import pytest
import torch
from test_fid_harness import little
from test_reconstructions import save
from toy import SIZE, Toy, ToyConfig, batches, pictures

from tokenizers_lab.errors import DataError, InputError, WeightsMissing
from tokenizers_lab.eval import harness
from tokenizers_lab.eval.harness import evaluate, load_extractor, plan_metrics
from tokenizers_lab.eval.images import evaluate_images
from tokenizers_lab.eval.latents import latent_statistics
from tokenizers_lab.eval.statistics import Statistics, save_statistics
from tokenizers_lab.settings import ImageDataConfig

N = 9
EVERYTHING = ("psnr", "ssim", "rfid", "sfid", "kid", "is", "precision", "recall", "latents")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageDataConfig:
    """Images in a folder, a small network in Inception's place, a cache of our own."""
    monkeypatch.setenv("TOKENIZERS_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(harness, "load_extractor", lambda features, device="cpu": little(features))
    save(pictures(N), tmp_path / "data")
    return ImageDataConfig(train="", val=str(tmp_path / "data"), size=SIZE, workers=0)


def values(result: dict) -> str:
    return json.dumps({k: v for k, v in result.items() if k != "environment"}, sort_keys=True)


def test_one_pass_gives_everything(data: ImageDataConfig, fitted: Toy) -> None:
    passes = []
    result = evaluate(fitted, data, EVERYTHING, features="random", baselines=False,
                      progress=lambda items, what: (passes.append(what), items)[1])
    assert passes == ["evaluating"] and result["n"] == N
    assert list(result["rows"][0]["metrics"]) == [
        "psnr", "ssim", "frechet_random", "frechet_spatial_random", "kernel_distance_random", "class_score_random",
        "precision_random", "recall_random"]
    assert result["latents"] == latent_statistics(fitted, batches(pictures(N), 1))[0]
    protocol = result["protocol"]
    assert protocol["crop"] == f"centre, {SIZE} × {SIZE} px" and protocol["resize"].startswith("ADM")
    assert (protocol["range"], protocol["dtype"], protocol["rounding"], protocol["latents"]) == (
        "[0, 1]", "float32", "uint8", "mode")
    assert protocol["features"]["resize"] == "none" and result["warnings"] == []


@pytest.mark.parametrize("options", [{}, {"sample": True, "round_uint8": False}])
def test_batches_and_threads_change_no_byte(data: ImageDataConfig, fitted: Toy, options: dict) -> None:
    found = []
    for threads, size in ((1, 1), (2, 4), (3, N)):
        torch.set_num_threads(threads)
        try:
            found.append(values(evaluate(fitted, data, EVERYTHING, features="random", batch_size=size, **options)))
        finally:
            torch.set_num_threads(1)
    assert len(set(found)) == 1
    protocol = json.loads(found[0])["protocol"]
    assert protocol["latents"] == ("sampled" if options else "mode")
    assert protocol["rounding"] == ("none, clamped to [0, 1]" if options else "uint8")


def test_images_are_in_flight_together_and_observed_in_order(fitted: Toy) -> None:
    seen: list[str] = []
    torch.set_num_threads(2)
    try:
        evaluate_images(fitted, batches(pictures(150, 8), 7), ("psnr",), baselines=False,
                        observe=lambda candidate, x, y, keys: seen.extend([*keys, str(torch.get_num_threads())]))
    finally:
        torch.set_num_threads(1)
    assert seen[::2] == [f"{i:03d}.png" for i in range(150)] and set(seen[1::2]) == {"2"}      # more than one chunk


def test_names_of_metrics() -> None:
    plan = plan_metrics(["psnr", "lpips", "rfid", "rfid", "latents", "psnr"])
    assert plan.pairs == ("psnr", "lpips_alex", "lpips_vgg") and plan.features == ("rfid",) and plan.latents
    for names, reference, message in (
        (["psn"], False, "there is no metric 'psn'; known: psnr, .*latents"), (["fid"], False, "fid needs a reference"),
        (["rfid"], True, "against another reference it is fid"), (["psnr"], True, "none of them was asked for"),
    ):
        with pytest.raises(InputError, match=message):
            plan_metrics(names, reference)
    with pytest.raises(InputError, match="at least one image"):
        evaluate_images(Toy(ToyConfig()), [], ("psnr",), forward_batch=0)
    for names in (["is"], ["psnr", "is"]):      # the score has no reference
        with pytest.raises(InputError, match="none of them was asked for"):
            plan_metrics(names, True)


def test_a_folder_as_reference(data: ImageDataConfig, fitted: Toy, tmp_path: Path) -> None:
    save(pictures(N + 3, seed=1), tmp_path / "other")
    first = evaluate(fitted, data, ["fid", "sfid"], features="inception", reference=str(tmp_path / "other"))
    assert set(first["rows"][0]["metrics"]) == {"fid", "sfid"}
    assert len(list((tmp_path / "cache" / "statistics").iterdir())) == 1
    (tmp_path / "other").rename(tmp_path / "renamed")
    again = evaluate(fitted, data, ["fid", "sfid", "kid", "precision"], features="inception", reference=str(tmp_path / "renamed"))
    for name in ("fid", "sfid"):      # from cached statistics, and from features
        assert again["rows"][0]["metrics"][name]["value"] == pytest.approx(first["rows"][0]["metrics"][name]["value"], rel=1e-9)
        one, two = (r["rows"][0]["metrics"][name] for r in (first, again))
        assert one["uncertainty"] == two["uncertainty"] and "reference taken as exact" in one["uncertainty"]["method"]
        assert one["reference"].endswith("other") and two["reference"].endswith("renamed")
    named = [r["protocol"]["features"]["reference"] for r in (first, again)]
    assert [n["folder"].rpartition("/")[2] for n in named] == ["other", "renamed"]
    assert named[0]["images"] == named[1]["images"] and named[0]["images"]["n"] == N + 3
    assert first["warnings"] == again["warnings"] == []
    assert len(list((tmp_path / "cache" / "statistics").iterdir())) == 1
    Path(tmp_path, "renamed", "000.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"000\.png: not an image"):
        evaluate(fitted, data, ["fid"], features="inception", reference=str(tmp_path / "renamed"))
    with pytest.raises(InputError, match="or a folder of images"):
        (tmp_path / "x.tar").write_bytes(b"")
        evaluate(fitted, data, ["fid"], features="inception", reference=str(tmp_path / "x.tar"))


def statistics(tmp_path: Path, **source) -> str:
    moments = Statistics(torch.zeros(6).double(), torch.eye(6).double(), 100, source)
    return str(save_statistics(tmp_path / "reference.npz", moments))


class Untouchable(Toy):
    """Fails if a pass begins."""

    def encode(self, images, sample=False, generator=None):
        raise AssertionError("the reference must be checked before any image is encoded")


@pytest.mark.parametrize(("source", "metrics", "features", "message"), [
    ({"extractor": "another", "resize": "none"}, ["fid"], "inception", "made with network 'another'"),
    ({"extractor": "little", "resize": "PIL bicubic"}, ["fid"], "inception", "made with resize mode 'PIL bicubic'"),
    ({}, ["fid"], "random", "do not say their network"),
    ({"extractor": "little", "resize": "none"}, ["fid", "kid"], "inception", "kid needs the reference's images"),
    ({"extractor": "little", "resize": "none"}, ["sfid"], "inception", "no spatial features"),
])
def test_a_wrong_statistics_file_is_refused_before_the_pass(data, tmp_path, source, metrics, features, message) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(Untouchable(ToyConfig()), data, metrics, features=features, reference=statistics(tmp_path, **source))


def test_what_a_reference_does_not_say_is_a_warning(data: ImageDataConfig, fitted: Toy, tmp_path: Path) -> None:
    adm = statistics(tmp_path)      # as ADM's: neither network nor crop
    result = evaluate(fitted, data, ["fid"], features="inception", reference=adm)
    assert "neither network nor resize mode: assumed to be FID's Inception" in result["warnings"][0]
    assert "does not say how its images were cropped" in result["warnings"][1]
    other = statistics(tmp_path, extractor="little", resize="none", images={"crop": "centre, 64 × 64 px", "resize": "ADM"})
    assert any("crop: centre, 64 × 64 px" in w for w in evaluate(fitted, data, ["fid"], reference=other)["warnings"])
    with pytest.raises(DataError, match=r"no statistics file .*nothing\.npz"):
        evaluate(fitted, data, ["fid"], reference=str(tmp_path / "nothing.npz"))


def test_too_few_images(data: ImageDataConfig, fitted: Toy) -> None:
    data.val_limit = 3
    few = evaluate(fitted, data, ["rfid"], features="inception")["rows"][0]["metrics"]["rfid"]
    assert few["uncertainty"] is None and any("no more than the 6 features" in w for w in few["warnings"])
    with pytest.raises(InputError, match="at least 4 points in each set, not 3"):
        evaluate(fitted, data, ["precision"], features="inception")


class NoisyDecoder(Toy):
    """Draws as it decodes."""

    def decode(self, latents, generator=None):
        return super().decode(latents + 0.1 * torch.randn(latents.shape, generator=generator))


def test_noise_does_not_depend_on_neighbours(data: ImageDataConfig, fitted: Toy) -> None:
    with pytest.raises(InputError, match="forward_batch must be 1, not 4"):
        evaluate(fitted, data, ["psnr"], sample=True, forward_batch=4)
    for model, sample in ((fitted, True), (NoisyDecoder(ToyConfig()), False)):
        with pytest.raises(InputError, match="draws noise"):
            evaluate_images(model, batches(pictures(4), 4), ("psnr",), sample=sample, forward_batch=2)
    assert evaluate_images(fitted, batches(pictures(4), 4), ("psnr",), forward_batch=2)["n"] == 4


def test_two_images_of_one_name(fitted: Toy) -> None:
    with pytest.raises(DataError, match=r"two images are named '000\.png'"):
        evaluate_images(fitted, batches(pictures(2), 1) + batches(pictures(1), 1), ("psnr",))


def test_features_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitted: Toy) -> None:
    for name in ("TOKENIZERS_LAB_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match=r"weights-inception.*put the file into.*random and teacher features") as caught:
        load_extractor("inception")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there are no features 'resnet': known are inception, random, teacher"):
        load_extractor("resnet")
    save(pictures(2), tmp_path / "data")
    config = ImageDataConfig(train="", val=str(tmp_path / "data"), size=SIZE, workers=0)
    row = evaluate(fitted, config, ["psnr", "rfid"], allow_missing=True)["rows"][0]["metrics"]
    assert row["rfid"]["value"] is None and "weights-inception" in row["rfid"]["missing"] and row["psnr"]["value"] > 0
