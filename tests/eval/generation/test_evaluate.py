"""What a generator's run leaves when it ends: distances of samples, of the untrained network's, of the tokenizer's floor."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy as toys
from gaussian import Gaussian, GaussianConfig, gaussian
from PIL import Image
from rich.console import Console
from torch import nn
from toy import SIZE, Toy, ToyConfig

from tokenizers_lab import registry
from tokenizers_lab.errors import CheckpointError, InputError, WeightsMissing
from tokenizers_lab.eval import runs
from tokenizers_lab.eval.features import FeatureExtractor, Features
from tokenizers_lab.eval.generation import evaluate as module
from tokenizers_lab.eval.provenance import weights_sha256 as weights_of
from tokenizers_lab.eval.report import view_run
from tokenizers_lab.eval.summary import finish_run, print_summary
from tokenizers_lab.hub import load, weights_sha256
from tokenizers_lab.registry import System
from tokenizers_lab.training.objective import Objective

CLASSES, EACH = ("blue", "green <b>", "red"), 10


@dataclass
class NoObjectiveConfig:
    """Nothing is trained here."""

    teachers: dict[str, str] = field(default_factory=dict)


class NoObjective(Objective):
    """Only says where its teacher is from."""

    def __init__(self, cfg: NoObjectiveConfig, model: GaussianConfig):
        super().__init__(cfg)

    def provenance(self) -> dict[str, str]:
        return {"teacher": "none"}


SYSTEM = System(
    name="gaussian", kind="generator", paper="none", summary="normal latents of each class",
    model_config="gaussian:GaussianConfig", objective_config=f"{__name__}:NoObjectiveConfig",
    tokenizer="gaussian:Gaussian", objective=f"{__name__}:NoObjective")


class Colours(nn.Module):
    """Mean colour and its spread: what few images tell."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> Features:
        x = images.float() / 255
        return Features(torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1))


@pytest.fixture(autouse=True)
def systems(monkeypatch):
    """Both toys, as other packages would register them, and quick features."""
    entries = [SimpleNamespace(name=one.name, load=lambda one=one: one) for one in (toys.SYSTEM, SYSTEM)]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    extractor = FeatureExtractor(Colours(), "teacher", "colours", "none", "no weights", "nearest")
    monkeypatch.setattr(module, "build_extractor", lambda kind, device: extractor)


def save_images(folder: Path) -> torch.Tensor:
    """Images of three colours, each in the folder of its class."""
    rng = np.random.default_rng(0)
    images = []
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(EACH):
            array = rng.integers(0, 60, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            array[..., 2 - label] += 150
            Image.fromarray(array).save(folder / name / f"{i}.png")
            images.append(array)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def fitted(images: torch.Tensor, tokenizer: Toy) -> "module.LatentGenerator":
    """The best that such a generator can be: the mean latents of each class."""
    latents = tokenizer.encode(images).latents
    network = gaussian(0.2)
    network.set_latent_statistics(latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    normal = network.normalise(latents).reshape(3, EACH, *latents.shape[1:])
    network.means.data[:3] = normal.mean(dim=(1, 3, 4))[:, :, None, None]
    network.provenance["classes"] = list(CLASSES)
    return network


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run's folder, its tokenizer and its images."""
    images = save_images(tmp_path / "images")
    torch.manual_seed(0)
    tokenizer = Toy(ToyConfig()).fit(images).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    network = fitted(images, tokenizer)
    network.provenance["tokenizer"] = {"name": str(tmp_path / "tokenizer"), "sha256": weights_sha256(tmp_path / "tokenizer")}
    folder = tmp_path / "gaussian-tiny"
    checkpoint = folder / "checkpoints" / "step_00000010"
    network.save_pretrained(checkpoint)
    (checkpoint / "training").mkdir()
    (checkpoint / "training" / "state.json").write_text(json.dumps({"step": 10}))
    files = [p for p in checkpoint.rglob("*") if p.is_file()]
    hashes = {str(p.relative_to(checkpoint)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 10, "sha256": hashes}))
    (folder / "config.yaml").write_text(
        f"system: gaussian\nname: tiny\nout: {tmp_path}\n"
        f"data: {{train: {tmp_path / 'images'}, val: {tmp_path / 'images'}, size: {SIZE}, workers: 0, val_limit: 24}}\n"
        "stages:\n- {name: train, steps: 10, lr: 0.001, weights: {mse: 1.0}}\n")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 10, "stage": "train", "kind": "train", "loss": 0.5, "mse": 0.5}))
    return folder


def test_a_run_is_measured_and_shown(run, capsys) -> None:
    results = finish_run(run)
    assert results["n"] == 24 and [row["role"] for row in results["rows"]] == ["model", "untrained", "baseline"]
    values = [row["metrics"]["frechet_teacher"]["value"] for row in results["rows"]]
    trained, untrained, floor = values
    assert floor < trained < untrained / 3
    kernel = [row["metrics"]["kernel_distance_teacher"]["value"] for row in results["rows"]]
    assert kernel[2] < kernel[0] < kernel[1] / 3
    trained_network = load(str(run))
    fresh = Gaussian(GaussianConfig(deviation=0.2))      # the untrained network normalises as the trained one does
    fresh.set_latent_statistics(trained_network.latent_mean[:, 0, 0], trained_network.latent_std[:, 0, 0])
    assert [row["weights_sha256"] for row in results["rows"][:2]] == [weights_of(trained_network), weights_of(fresh)]
    margins = {(m["metric"], m["role"]): m["value"] for m in results["margins"]}
    assert margins["frechet_teacher", "untrained"] == pytest.approx(untrained - trained)
    assert margins["frechet_teacher", "baseline"] == pytest.approx(floor - trained)
    protocol = results["protocol"]
    assert protocol["labels"] == module.LABELS_OF_REFERENCE and protocol["sampling"]["steps"] == 50
    assert protocol["tokenizer"]["check"] == "the tokenizer that the generator names" and protocol["size"] == [SIZE, SIZE]
    for name in ("results.json", "grid.png", "report.html"):
        assert (run / name).is_file()
    page = (run / "report.html").read_text()
    assert page.count('data-kind="sample"') == len(results["examples"]) == 16
    assert "Fréchet distance (teacher features)" in page and "never FID" in page and "bootstrap interval" not in page
    assert "green &lt;b&gt;" in page and "green <b>" not in page
    print_summary(results, Console(width=160))
    shown = capsys.readouterr().out
    assert "24 held-out images" in shown and f"{trained:.4f}" in shown and "grid.png" in shown
    first = results["examples"][0]
    sample, reference = (np.asarray(Image.open(run / first["files"][kind])).mean(axis=(0, 1)) for kind in ("sample", "reference"))
    assert sample.argmax() == reference.argmax() == 2 and first["class"] == "blue"      # of the class that was asked for
    again = view_run(run)
    assert again.results == json.loads((run / "results.json").read_text())
    (run / first["files"]["sample"]).unlink()
    view_run(run)      # measured anew
    assert (run / first["files"]["sample"]).is_file()


def test_the_same_run_gives_the_same_numbers(run) -> None:
    one, two = (runs.evaluate_run(runs.open_run(run), batch_size=size) for size in (5, 24))
    for a, b in zip(one["rows"], two["rows"]):
        for name, metric in a["metrics"].items():
            assert metric["value"] == pytest.approx(b["metrics"][name]["value"], rel=0.02, abs=1e-4)


def test_a_tokenizer_that_is_gone_or_another(run, tmp_path) -> None:
    torch.manual_seed(1)
    Toy(ToyConfig()).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="another tokenizer"):
        finish_run(run)
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="there is no folder"):
        finish_run(run)


def test_without_the_teacher_features_are_random(monkeypatch) -> None:
    def missing(kind: str, device: torch.device) -> str:
        if kind == "teacher":
            raise WeightsMissing("not here")
        return kind

    monkeypatch.setattr(module, "build_extractor", missing)
    assert module.offline_extractors(torch.device("cpu")) == ["random"]
