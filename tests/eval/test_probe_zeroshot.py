"""Zero-shot classification by a toy that knows three colours by name."""

import json
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from torch import nn
from toy import SIZE

from tokenizers_lab.cli.main import call
from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.eval.labelled import SquashReader
from tokenizers_lab.eval.probe_zeroshot import (
    TEMPLATES,
    class_embeddings,
    plain_names,
    probe_zeroshot,
    read_classes,
    read_templates,
)
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.tokenizer import ImageTokenizer

WORDS = ["red", "green", "blue"]


@dataclass
class NamerConfig:
    """Nothing to say."""

    image_size: int = SIZE


class Namer(ImageTokenizer):
    """An image is its mean colour times a matrix, a text the matrix of the colours that it names."""

    system, downsample = "namer", 4

    def __init__(self, cfg):
        super().__init__(cfg)
        self.colours = nn.Parameter(torch.randn(3, 3))

    @classmethod
    def trained(cls):
        namer = cls(NamerConfig())
        namer.colours.data = torch.eye(3)
        return namer.eval()

    def image_embedding(self, images):
        return images.mean((2, 3)) @ self.colours

    def text_embedding(self, texts):
        found = torch.tensor([[float(word in text) for word in WORDS] for text in texts]) + 0.01
        return found + torch.tensor([[0.0, 0.0, 3.0 * text.startswith("odd")] for text in texts])


def images(counts, seed=0):
    """Images of class 0 (red), 1 (green), 2 (blue), so many of each."""
    labels = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    generator = torch.Generator().manual_seed(seed)
    made = torch.eye(3)[labels][:, :, None, None] * 0.5 + 0.4 * torch.rand(len(labels), 3, 8, 8, generator=generator)
    return [ImageBatch(made[[i]], [f"{i:02d}"], labels[[i]]) for i in range(len(labels))]


def named(labels):
    return {label: WORDS[int(label)] for label in labels}


def test_names_are_found_and_an_untrained_network_finds_none():
    result = probe_zeroshot(Namer.trained(), images([12, 6, 6]), class_names=named)
    model, untrained, majority = result["rows"]
    assert model["metrics"]["accuracy"]["value"] == 100 and majority["metrics"]["accuracy"]["value"] == 50
    assert untrained["weights"] == "random weights" and untrained["metrics"]["accuracy"]["value"] < 90
    assert model["answers"] == ["0"] * 12 + ["1"] * 6 + ["2"] * 6 == result["true"] and "top5" not in model["metrics"]
    assert [margin["over"] for margin in result["margins"]] == ["untrained (random weights)", "majority class"]
    assert result["margins"][1]["value"] == 50 and model["metrics"]["accuracy"]["uncertainty"]["low"] < 100
    assert result["protocol"]["templates"] == list(TEMPLATES) and result["classes"] == {"0": "red", "1": "green", "2": "blue"}
    json.dumps(result, allow_nan=False)


def test_wrong_names_are_wrong_answers():
    turned = dict(zip("012", ["green", "blue", "red"]))
    found = probe_zeroshot(Namer.trained(), images([4, 4, 4]), class_names=lambda labels: turned)
    assert found["rows"][0]["metrics"]["accuracy"]["value"] == 0
    more = {**dict(zip("012", WORDS)), "3": "a colour", "4": "x", "5": "y"}
    with pytest.raises(InputError, match="two classes are called 'red'"):
        probe_zeroshot(Namer.trained(), images([2, 2]), class_names=lambda labels: {"0": "red", "1": "red"})
    found = probe_zeroshot(Namer.trained(), images([4, 4, 4]), class_names=lambda labels: more, baselines=False)
    assert len(found["rows"]) == 1 and found["rows"][0]["metrics"]["top5"]["value"] == 100 and len(found["classes"]) == 6


def test_a_class_is_the_mean_over_templates_of_length_one():
    found = class_embeddings(Namer.trained(), ["red", "blue"], ["{}", "odd {}"])
    one, other = torch.tensor([1.01, 0.01, 0.01]), torch.tensor([1.01, 0.01, 3.01])
    expected = one / one.norm() + other / other.norm()
    torch.testing.assert_close(found[0], expected / expected.norm())
    assert found[0].norm() == pytest.approx(1)      # long texts do not count more


def test_of_several_names_the_closest_counts():
    several = dict(zip("012", ["thing | red", "green|thing", "blue"]))
    found = probe_zeroshot(Namer.trained(), images([4, 4, 4]), ["{}"], class_names=lambda labels: several)
    assert found["rows"][0]["metrics"]["accuracy"]["value"] == 100 and found["classes"] == several


def test_a_fifth_of_each_class_can_be_measured_alone():
    result = probe_zeroshot(Namer.trained(), images([10, 5, 5]), class_names=named, holdout=5)
    assert result["n"] == 4 and sorted(result["true"]) == ["0", "0", "1", "2"]


def test_files_of_classes_and_templates(tmp_path):
    file = tmp_path / "file"
    file.write_text("a {} here\n\n  {}\n")
    assert read_templates(file) == ["a {} here", "{}"]
    file.write_text("nothing\n")
    with pytest.raises(InputError, match=r"a template has \{\} once"):
        read_templates(file)
    file.write_text("n01\ta fish\nn02\tgoose \nn03\tother\n")
    assert read_classes(file, ["n01", "n02"]) == {"n01": "a fish", "n02": "goose", "n03": "other"}
    with pytest.raises(InputError, match="no name for the class 'n09'"):
        read_classes(file, ["n01", "n09"])
    file.write_text("fish\ngoose\n")
    assert read_classes(file, ["a", "b"]) == {"a": "fish", "b": "goose"}
    with pytest.raises(InputError, match="2 names for 3 classes"):
        read_classes(file, ["a", "b", "c"])
    with pytest.raises(InputError, match="cannot be read"):
        read_classes(tmp_path / "none", ["a"])
    assert plain_names(["sea_animals", "top-hat"]) == {"sea_animals": "sea animals", "top-hat": "top hat"}
    assert all(template.count("{}") == 1 for template in TEMPLATES) and len(set(TEMPLATES)) == 12


def write_folders(root):
    for label, word in enumerate(WORDS):
        (root / word).mkdir(parents=True)
        for i in range(3):
            pixels = [0, 0, 0]
            pixels[label] = 200 + i
            Image.new("RGB", (48, 24), tuple(pixels)).save(root / word / f"{i}.png")
    return root


def test_images_are_squashed_not_cropped(tmp_path):
    wide = Image.new("RGB", (64, 16), "white")
    wide.paste("black", (32, 0, 64, 16))
    wide.save(tmp_path / "wide.png")
    data = ImageDataConfig(train=str(tmp_path), val=str(tmp_path), size=16)
    (squashed,) = validation_batches(data, 1, reader=SquashReader(data))
    assert squashed.images.shape == (1, 3, 16, 16) and squashed.images[0, :, :, :7].min() == 1
    assert squashed.images[0, :, :, 9:].max() == 0
    (cropped,) = validation_batches(data, 1)
    assert not torch.equal(cropped.images, squashed.images)


def test_the_command(tmp_path, monkeypatch, capsys, fitted):
    root, out = write_folders(tmp_path / "images"), tmp_path / "zeroshot.json"
    monkeypatch.setattr("tokenizers_lab.cli.eval.load_model", lambda name, device: Namer.trained())
    words = ["probe", "zeroshot", "namer", str(root), "--device", "cpu"]
    assert call([*words, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["rows"][0]["metrics"]["accuracy"]["value"] == 100 and result["n"] == 9
    assert result["protocol"]["data"]["resize"].startswith("the whole image, scaled to a square") and result["true"][0] == "blue"
    assert "majority class: always 'blue'" in capsys.readouterr().out
    names = tmp_path / "names"
    names.write_text("red\tgreen\ngreen\tred\nblue\tblue\n")
    assert call([*words, "--classes", str(names), "--no-baselines", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"][0]["metrics"]["accuracy"]["right"] == 3
    monkeypatch.setattr("tokenizers_lab.cli.eval.load_model", lambda name, device: fitted)
    capsys.readouterr()
    assert call(words) == 2 and "does not compare images with texts" in capsys.readouterr().err


def test_images_without_classes_are_refused():
    with pytest.raises(DataError, match="has no class"):
        probe_zeroshot(Namer.trained(), [ImageBatch(torch.rand(1, 3, 8, 8), ["a"])])
    with pytest.raises(DataError, match="two classes or more"):
        probe_zeroshot(Namer.trained(), images([3]), class_names=named)
