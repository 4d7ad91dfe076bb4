"""The linear probe: its optimum, torch's own SGD, what is held out, baselines, and the command."""

import json
import math

import pytest
import torch
from PIL import Image
from toy import Toy, pictures

from tokenizers_lab.cli.main import call
from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError, DataError, InputError
from tokenizers_lab.eval.image_features import ImageFeatures, latent_features, layer_features, pixel_features
from tokenizers_lab.eval.labelled import accuracy, class_namer, collect_labelled, hold_out, margins, wilson_interval
from tokenizers_lab.eval.probe_linear import PENALTIES, RATES, LinearSettings, fit_lbfgs, fit_sgd, logits, probe_linear
from tokenizers_lab.nn.dinov3_vit import TokenFeatures
from tokenizers_lab.nn.layer_tokens import LayerTokens
from tokenizers_lab.settings import ImageDataConfig

COLOURS = {"blue": (0.2, 0.3, 0.8), "green": (0.2, 0.7, 0.3), "red": (0.8, 0.2, 0.2)}


def coloured(count, seed=0, strength=1.0, noise=0.1):
    """Batches of noisy images of three colours, in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    middle = torch.tensor(list(COLOURS.values())).mean(0)
    means = middle + strength * (torch.tensor(list(COLOURS.values())) - middle)
    images = (means[labels][:, :, None, None] + noise * torch.randn(count, 3, 16, 16, generator=generator)).clamp(0, 1)
    images = (images * 255).round() / 255
    keys = [f"{seed}/{i:03d}.png" for i in range(count)]
    return [ImageBatch(images[i : i + 7], keys[i : i + 7], labels[i : i + 7]) for i in range(0, count, 7)]


def blank(label="blank"):
    """Features that know nothing: noise by the key."""
    def compute(images, keys):
        return torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(sum(key.encode()))) for key in keys])

    return ImageFeatures(label, "untrained", "noise", compute)


def test_the_optimum_is_the_one_of_the_gradient():
    """At the solution the gradient of the penalised loss is 0, computed by hand; a random classifier's is not."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (60,), generator=generator)
    weights = fit_lbfgs(x, y, 3, 0.01)
    wrong = logits(weights, x).softmax(1) - torch.nn.functional.one_hot(y, 3)
    assert (x.T @ wrong / 60 + 0.01 * weights[:-1]).abs().max() < 1e-6 and wrong.mean(0).abs().max() < 1e-6
    smaller = fit_lbfgs(x, y, 3, 1.0)[:-1].norm()
    assert smaller < weights[:-1].norm() / 2
    torch.testing.assert_close(fit_lbfgs(x, y, 3, 0.01, start=fit_lbfgs(x, y, 3, 1.0)), weights, atol=1e-5, rtol=0)


def test_two_points_have_a_closed_form():
    """x = ±1: the penalised logistic regression has w = 1 / (λ (1 + exp(2 w))) for each of its two opposite weights."""
    x, y = torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.tensor([0, 1])
    w = float(fit_lbfgs(x, y, 2, 0.5)[0, 0])
    assert w == pytest.approx(1 / (0.5 * (1 + math.exp(2 * w))), rel=1e-5)


def test_thirteen_rates_at_once_are_thirteen_runs_of_torch():
    assert len(RATES) == 13 and RATES[0] == 1e-5 and RATES[-1] == 0.1 and len(set(RATES)) == 13
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, generator=generator), torch.randint(0, 2, (24,), generator=generator)
    settings = LinearSettings("sgd", iterations=9, batch_size=24)      # whole batches: their order is nothing
    found = fit_sgd(x, y, 2, settings)
    for number in (0, 12):
        weights = torch.zeros(4, 2)
        weights[:-1] = 0.01 * Draw(0).normal("linear probe", (3, 2))
        weights.requires_grad_()
        optimizer = torch.optim.SGD([weights], RATES[number] * 24 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        for _ in range(9):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(x @ weights[:-1] + weights[-1], y).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(found[number], weights.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_features_that_say_the_class_are_read_and_others_are_not(solver):
    settings = LinearSettings(solver, iterations=None if solver == "lbfgs" else 300, batch_size=32)
    result = probe_linear([pixel_features(2), blank()], coloured(90, 1), coloured(60, 2), settings)
    pixels, noise, majority = result["rows"]
    assert pixels["metrics"]["accuracy"]["value"] > 95 and noise["metrics"]["accuracy"]["value"] < 60
    assert majority["metrics"]["accuracy"]["value"] == pytest.approx(100 / 3) and majority["answer"] == "0"
    bounds, interval = pixels["metrics"]["accuracy"]["uncertainty"], wilson_interval(pixels["metrics"]["accuracy"]["right"], 60)
    assert (bounds["low"], bounds["high"], bounds["method"]) == (100 * interval.low, 100 * interval.high, "Wilson")
    assert [margin["over"] for margin in result["margins"]] == ["blank", "majority class"]
    difference = pixels["metrics"]["accuracy"]["value"] - noise["metrics"]["accuracy"]["value"]
    assert result["margins"][0]["value"] == pytest.approx(difference) and result["margins"][0]["uncertainty"]["low"] > 20
    losses = [point["selection_loss"] for point in pixels["curve"]]
    assert pixels["chosen"] == [PENALTIES, RATES][solver == "sgd"][losses.index(min(losses))]
    assert ("best_on_held_out" in pixels) is (solver == "sgd") and sum(c["n"] for c in pixels["per_class"].values()) == 60
    assert pixels["answers"] == [a for a in pixels["answers"] if a in "012"] and result["protocol"]["training_images"] == 90
    json.dumps(result, allow_nan=False)


def test_it_is_the_same_in_any_order_and_batch():
    given = coloured(60, 1, 0.02, 0.3)
    images, keys = torch.cat([b.images for b in given]), [k for b in given for k in b.keys]
    labels = torch.cat([b.labels for b in given])
    other = [ImageBatch(images[[i]], [keys[i]], labels[[i]]) for i in range(59, -1, -1)]
    one, two = probe_linear([pixel_features(2)], given), probe_linear([pixel_features(2)], other)
    assert one["rows"] == two["rows"] and one["keys"] == two["keys"] and one["n"] == 12
    assert 0 < one["rows"][0]["metrics"]["accuracy"]["value"] < 100


def test_a_fixed_fifth_of_each_class_is_held_out():
    keys, classes = [f"k{i}" for i in range(43)], ["a"] * 30 + ["b"] * 10 + ["c"] * 2 + ["d"]
    rest, held = hold_out(keys, classes, 5)
    assert sorted(rest + held) == list(range(43)) and [sum(classes[i] == c for i in held) for c in "abcd"] == [6, 2, 1, 0]
    order = torch.randperm(43, generator=torch.Generator().manual_seed(0)).tolist()
    _, again = hold_out([keys[i] for i in order], [classes[i] for i in order], 5)
    assert {keys[order[i]] for i in again} == {keys[i] for i in held} and held != hold_out(keys, classes, 5, "selection")[1]
    _, fewer = hold_out(keys[1:], classes[1:], 5)      # one image more or less changes one at most
    assert len({keys[i] for i in held} - {keys[i + 1] for i in fewer}) <= 1
    with pytest.raises(ConfigError, match="take 2 or more"):
        hold_out(keys, classes, 1)


def test_held_out_pixels_are_not_trained_on():
    train, tested = coloured(30, 1), coloured(12, 2)
    leak = [ImageBatch(batch.images, [f"copy-{key}" for key in batch.keys], batch.labels) for batch in tested]
    result = probe_linear([pixel_features(2)], [*train, *leak], tested)
    assert result["protocol"]["same_as_held_out"] == 12 and result["protocol"]["training_images"] == 30
    with pytest.raises(DataError, match="two classes or more besides the 12 that are held out"):
        probe_linear([pixel_features(2)], leak, tested)


def test_what_cannot_be_probed_is_refused(fitted):
    bare = [ImageBatch(pictures(2), ["a", "b"])]
    with pytest.raises(DataError, match="a has no class"):
        probe_linear([pixel_features()], bare)
    with pytest.raises(InputError, match="NaN or infinite features for 1/000"):
        probe_linear([ImageFeatures("broken", "model", "x", lambda images, keys: images.mean((2, 3)) / 0 * 0)], coloured(6, 1))
    with pytest.raises(InputError, match="has no features of layers"):
        layer_features(fitted, "toy")
    with pytest.raises(ConfigError, match="no solver 'newton'"):
        LinearSettings("newton")
    with pytest.raises(DataError, match="two images are named"):
        collect_labelled([], coloured(6, 1) * 2)


def test_features_of_latents_and_of_blocks(fitted):
    images = pictures(2)
    mean = fitted.encode(images).posterior.mean
    torch.testing.assert_close(latent_features(fitted, "x").compute(images, ["a", "b"]), mean.mean((2, 3)))
    torch.testing.assert_close(latent_features(fitted, "x", grid=4).compute(images, ["a", "b"]), mean.flatten(1))
    fitted.set_latent_statistics(torch.full((6,), 3.0), torch.full((6,), 2.0))
    torch.testing.assert_close(latent_features(fitted, "x").compute(images, ["a", "b"]), mean.mean((2, 3)))
    drawn = latent_features(fitted, "x", sample=True).compute(images[:1], ["a"])
    assert 0 < (drawn - mean[:1].mean((2, 3))).abs().max() < 0.2

    class Deep(Toy):
        def features(self, images, layers):
            patches = torch.arange(4.0).repeat(2, 1)[..., None]
            return [TokenFeatures(torch.full((2, 1), float(number)), patches) for number in layers]

    found = layer_features(Deep(fitted.cfg), "x", layers=(-3, 5, -1)).compute(images, ["a", "b"])
    assert found.tolist() == [[-3, 5, -1, 1.5]] * 2

    class Classless(Toy):
        def features(self, images, layers):
            return [LayerTokens(number + torch.arange(4.0).repeat(2, 1)[..., None]) for number in layers]

    found = layer_features(Classless(fitted.cfg), "x", layers=(0, 2)).compute(images, ["a", "b"])
    assert found.tolist() == [[1.5, 3.5]] * 2
    with pytest.raises(ConfigError, match="need a layer"):
        layer_features(Classless(fitted.cfg), "x", layers=())


def test_margins_are_paired():
    rows = [{"label": str(i), "role": "model", "metrics": {"accuracy": accuracy(right)}} for i, right in enumerate(
        ([True, True, False, True], [True, False, False, False]))]
    (found,) = margins(rows)
    assert found["value"] == 50 and found["over"] == "1" and found["uncertainty"]["low"] < 50 < found["uncertainty"]["high"]


def write_folders(root, count=12):
    for batch in coloured(3 * count, 5):
        for image, key, label in zip(batch.images, batch.keys, batch.labels):
            folder = root / list(COLOURS)[int(label)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(folder / key.replace("/", "-"))
    return root


def test_names_of_classes(tmp_path):
    root = write_folders(tmp_path / "images", 2)
    data = ImageDataConfig(train=str(root), val=str(root), size=16)
    assert [class_namer(data)(i) for i in range(3)] == ["blue", "green", "red"]
    data.val = str(root / "red")
    assert class_namer(data)(7) == "7"


def test_the_command(tmp_path, fitted, toy_system, capsys):
    root, model, out = write_folders(tmp_path / "images"), fitted.save_pretrained(tmp_path / "toy"), tmp_path / "linear.json"
    words = ["probe", "linear", str(model), str(root), "--size", "16", "--device", "cpu"]
    assert call([*words, "--grid", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [row["role"] for row in result["rows"]] == ["model", "untrained", "baseline", "baseline"]
    assert result["rows"][0]["width"] == 24 and result["rows"][1]["weights"] == "random weights" and result["n"] == 6
    assert result["classes"] == ["blue", "green", "red"] and result["rows"][0]["metrics"]["accuracy"]["value"] > 90
    assert "better than untrained (random weights) by" in printed and "majority class: always" in printed
    assert result["protocol"]["data"]["training"]["source"] == str(root) and result["protocol"]["holdout"] == 5
    both = tmp_path / "both"
    write_folders(both / "train", 12)
    write_folders(both / "val", 3)      # the first of those
    assert call([*words[:3], str(both), *words[4:], "--no-baselines", "--out", str(out)]) == 0
    assert "9 training images are left out" in capsys.readouterr().out and json.loads(out.read_text())["n"] == 9
    for extra, message in (
        (["--val", "x", "--holdout", "3"], "does not go with --holdout"), (["--features", "blocks"], "no features of layers"),
        (["--blocks", "2"], "these are latents"), (["--layers", "0,1"], "these are latents"),
        (["--features", "blocks", "--layers", "0", "--blocks", "2"], "give one of them"),
        (["--features", "blocks", "--layers", "0,a"], "--layers takes numbers"),
        (["--grid", "0"], "--grid must be at least 1"),
    ):
        assert call([*words, *extra]) == 2
        assert message in capsys.readouterr().err
