import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import SIZE, Toy, ToyConfig, batches, pictures

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.errors import DataError, InputError, WeightsMissing
from tokenizers_lab.eval import image_metrics
from tokenizers_lab.eval.images import UNTRAINED_LABEL, evaluate_images
from tokenizers_lab.eval.latents import collect_latent_stats, latent_statistics
from tokenizers_lab.eval.provenance import git_commit, weights_sha256, write_json

FAST = ("psnr", "ssim")
N = 7


def values(result: dict) -> str:
    """Everything of a result that is a measurement, as bytes of JSON."""
    return json.dumps({k: v for k, v in result.items() if k != "environment"}, sort_keys=True)


def test_values_are_those_of_a_plain_computation(fitted):
    images = pictures(N)
    result = evaluate_images(fitted, batches(images, 3), FAST)
    output = (fitted.reconstruct(images) * 255).round() / 255
    mse = (output.double() - images.double()).square().flatten(1).mean(1)
    expected = -10 * mse.log10()
    model = result["rows"][0]["metrics"]["psnr"]
    assert model["per_image"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert model["value"] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert model["uncertainty"]["low"] < model["value"] < model["uncertainty"]["high"]
    assert result["n"] == model["n"] == N and result["skipped"] == []


@pytest.mark.parametrize("sample", [False, True])
def test_any_batch_size_gives_the_same_bytes(fitted, sample):
    images = pictures(N)
    results = [evaluate_images(fitted, batches(images, size), FAST, sample=sample) for size in (1, 2, 3, N)]
    assert len({values(r) for r in results}) == 1


def test_two_processes_give_the_same_bytes_as_one(fitted, tmp_path):
    program = Path(__file__).with_name("evaluate_in_processes.py")
    arguments = [sys.executable, program], ["2", tmp_path / "store", tmp_path / "2.json"]
    started = [subprocess.Popen([*arguments[0], str(rank), *arguments[1]]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=180) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    together = json.loads((tmp_path / "2.json").read_text())
    alone = evaluate_images(fitted, batches(pictures(N), 4), ("psnr",))
    alone["latents"], _ = latent_statistics(fitted, batches(pictures(N), 4))
    alone["collected"] = [v.tolist() for v in collect_latent_stats(fitted, batches(pictures(N), 4))]
    assert alone["n"] == together["n"] == N
    assert values(alone) == values(together)


def test_baselines_and_margins(fitted):
    result = evaluate_images(fitted, batches(pictures(N), 4), FAST)
    model, untrained, mean = result["rows"]
    assert untrained["label"] == UNTRAINED_LABEL and untrained["weights"] == "random weights"
    assert untrained["weights_sha256"] != model["weights_sha256"] == weights_sha256(fitted)
    assert mean["label"] == "patch mean (8×8)"
    psnr = [row["metrics"]["psnr"]["value"] for row in (model, untrained, mean)]
    assert psnr[0] > psnr[2] > psnr[1]
    margin = next(m for m in result["margins"] if m["metric"] == "psnr" and m["role"] == "baseline")
    assert margin["value"] == pytest.approx(psnr[0] - psnr[2], abs=1e-6) and margin["uncertainty"]["low"] > 0


def test_untrained_row_is_seeded_and_leaves_the_global_generator(fitted):
    torch.manual_seed(5)
    first = evaluate_images(fitted, batches(pictures(3), 4), ("psnr",))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == after
    torch.manual_seed(6)
    assert values(first) == values(evaluate_images(fitted, batches(pictures(3), 4), ("psnr",)))


def test_identical_images_get_the_cap_and_stay_json(fitted, tmp_path):
    flat = torch.full((3, 3, SIZE, SIZE), 0.2)
    result = evaluate_images(fitted, batches(flat, 2), ("psnr",))
    assert result["rows"][2]["metrics"]["psnr"]["value"] == image_metrics.PSNR_CAP
    assert json.loads(write_json(result, tmp_path / "r.json").read_text()) == result
    with pytest.raises(ValueError):
        write_json({"value": float("nan")}, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == result and len(list(tmp_path.iterdir())) == 1


class Broken(Toy):
    """Gives what a model must not give."""

    fault = "nan"

    def decode(self, latents, generator=None):
        images = super().decode(latents, generator)
        if self.fault == "size":
            return images[..., ::2, ::2]
        images[0, 0, 3, 3] = float(self.fault)
        return images


@pytest.mark.parametrize(
    ("fault", "message"), [("nan", "NaN or infinite pixels for 000.png"), ("inf", "NaN or infinite"), ("size", "their size")]
)
def test_broken_outputs_are_typed_errors(fault, message):
    model = Broken(ToyConfig())
    model.fault = fault
    with pytest.raises(InputError, match=message):
        evaluate_images(model, batches(pictures(2), 2), ("psnr",))


def test_wrong_inputs_are_typed_errors(fitted):
    with pytest.raises(DataError, match="no images"):
        evaluate_images(fitted, [], ("psnr",))
    with pytest.raises(InputError, match="multiples of 8"):
        evaluate_images(fitted, batches(pictures(1, 30), 1), ("psnr",))
    with pytest.raises(InputError, match="each size by itself"):
        evaluate_images(fitted, [*batches(pictures(1), 1), *batches(pictures(1, 64), 1)], ("psnr",))
    with pytest.raises(InputError, match="there is no image metric 'psrn'"):
        evaluate_images(fitted, batches(pictures(1), 1), ("psrn",))
    with pytest.raises(InputError, match="3 images and 2 keys"):
        evaluate_images(fitted, [ImageBatch(pictures(3), ["a", "b"])], ("psnr",))
    with pytest.raises(InputError, match="finite"):
        evaluate_images(fitted, batches(pictures(1) * float("nan"), 1), ("psnr",))


def test_missing_weights_are_an_error_or_a_row_that_says_so(fitted, monkeypatch):
    def absent(device):
        raise WeightsMissing("VGG is not here: put it there")

    spec = image_metrics.METRICS["lpips_vgg"]
    monkeypatch.setitem(image_metrics.METRICS, "lpips_vgg", image_metrics.MetricSpec(spec.name, spec.title, "", "lower", absent))
    with pytest.raises(WeightsMissing):
        evaluate_images(fitted, batches(pictures(2), 2), ("psnr", "lpips_vgg"))
    result = evaluate_images(fitted, batches(pictures(2), 2), ("psnr", "lpips_vgg"), allow_missing=True)
    row = result["rows"][0]["metrics"]["lpips_vgg"]
    assert row == {"title": spec.title, "value": None, "missing": "VGG is not here: put it there"}


def test_lpips_means_both_backbones_and_names_their_weights(fitted):
    result = evaluate_images(fitted, batches(pictures(2, 64), 2), ("lpips",), baselines=False)
    for name in ("lpips_alex", "lpips_vgg"):
        measured = result["rows"][0]["metrics"][name]
        assert 0 < measured["value"] < 2 and "SHA-256" in measured["network"]


def test_ms_ssim_needs_room_for_five_scales(fitted):
    images = pictures(2, 192)
    result = evaluate_images(fitted, batches(images, 2), ("ms_ssim",), baselines=False)
    assert 0.1 < result["rows"][0]["metrics"]["ms_ssim"]["value"] < 0.999
    metric = image_metrics.build_metrics(["ms_ssim"], torch.device("cpu"))[0][0]
    assert metric.compute(images, images).tolist() == pytest.approx([1, 1])
    with pytest.raises(InputError, match="more than 160 pixels"):
        evaluate_images(fitted, batches(pictures(1, 160), 1), ("ms_ssim",), baselines=False)


def test_weights_hash_is_that_of_the_saved_file(fitted, tmp_path, toy_system):
    saved = fitted.save_pretrained(tmp_path / "saved") / "model.safetensors"
    assert weights_sha256(fitted) == hashlib.sha256(saved.read_bytes()).hexdigest()


def test_commit_says_when_files_differ(tmp_path):
    assert git_commit(tmp_path) is None

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
