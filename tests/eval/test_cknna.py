"""CKNNA against its formula written out, its properties, and SE-CKNNA in the harness."""

import json
import math
import socket
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Toy, ToyConfig, batches, pictures

from tokenizers_lab.cli.main import call
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.eval import cknna as module
from tokenizers_lab.eval.alignment import measure_alignment, sets_of, transform_image
from tokenizers_lab.eval.cknna import align, cknna, find_neighbours, jackknife_interval, leave_out, neighbours_kept, prepare
from tokenizers_lab.eval.harness import evaluate
from tokenizers_lab.eval.image_features import latent_features, parse_teacher, pixel_features
from tokenizers_lab.settings import ImageDataConfig


def written_out(one, other, k):
    """The formula with whole (n, n) matrices and loops over their entries."""
    n = len(one)

    def kernel(x):
        x = x.double()
        limit = x.abs().flatten().sort().values[int(0.95 * x.numel())]
        x = x.clamp(-limit, limit)
        x = x / x.norm(dim=1, keepdim=True)
        return (x @ x.T).numpy()

    def nearest(matrix):
        mask = np.zeros((n, n))
        for i in range(n):
            others = sorted((j for j in range(n) if j != i), key=lambda j: -matrix[i, j])
            mask[i, others[:k]] = 1
        return mask

    def hsic(m, other):
        crossed = sum(m[i, j] * other[j, i] for i in range(n) for j in range(n))
        product = sum(m[i, j] * other[j, l] for i in range(n) for j in range(n) for l in range(n))      # noqa: E741
        return (crossed + m.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * product) / (n * (n - 3))

    a, b = kernel(one), kernel(other)
    near_a, near_b = nearest(a), nearest(b)
    both = near_a * near_b
    return hsic(both * a, both * b) / (math.sqrt(hsic(near_a * a, near_a * a) * hsic(near_b * b, near_b * b)) + 1e-6)


def related(n, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(n, 5, generator=generator)
    return one, one @ torch.randn(5, 7, generator=generator) + noise * torch.randn(n, 7, generator=generator)


def angles(degrees):
    turn = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([turn.cos(), turn.sin()], 1)


def test_six_points_on_a_circle_by_hand():
    """k = 1: pairs (0, 1), (2, 3), (4, 5) are mutual nearest neighbours in one; the other has (0, 1), (2, 4), (3, 5).

    The 0.95 quantile of the 12 coordinates is the largest but none (entry 11), so that nothing is clamped.
    """
    one, other = angles([0, 10, 120, 130, 240, 250]), angles([0, 10, 120, 240, 130, 250])
    c, n = math.cos(math.radians(10)), 6

    def hsic(entries):      # that many entries, all mutual, each c, one in a row and a column
        return c * c * (entries + entries**2 / ((n - 1) * (n - 2)) - 2 / (n - 2) * entries) / (n * (n - 3))

    assert cknna(one, one, 1) == pytest.approx(hsic(6) / (hsic(6) + 1e-6), rel=1e-12)
    assert cknna(one, other, 1) == pytest.approx(hsic(2) / (hsic(6) + 1e-6), rel=1e-12)


@pytest.mark.parametrize(("n", "k"), [(7, 2), (13, 3), (24, 10)])
def test_it_is_the_formula(n, k):
    one, other = related(n)
    assert cknna(one, other, k) == pytest.approx(written_out(one, other, k), rel=1e-12)
    assert cknna(other, one, k) == pytest.approx(written_out(other, one, k), rel=1e-12)


def test_order_scale_and_chunks_do_not_matter(monkeypatch):
    one, other = related(60)
    value = cknna(one, other)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert cknna(one[order], other[order]) == pytest.approx(value, rel=1e-12)
    assert cknna(one[order], other) != pytest.approx(value, abs=0.05)
    assert cknna(3 * one, 0.1 * other) == pytest.approx(value, rel=1e-9)
    monkeypatch.setattr(module, "ROWS", 7)
    assert cknna(one, other) == pytest.approx(value, rel=1e-12)


def test_the_same_features_give_one_and_unrelated_ones_about_nothing():
    one, _ = related(400)
    assert cknna(one, one) == pytest.approx(1, abs=1e-3) and cknna(one, one) < 1
    turned = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))[0]
    assert cknna(one, one @ turned) > 0.8      # only the clamping sees axes
    chance = [cknna(one, torch.randn(400, 6, generator=torch.Generator().manual_seed(seed))) for seed in range(5)]
    assert abs(sum(chance) / 5) < 0.03


def test_memory_is_that_of_rows_and_neighbours(monkeypatch):
    seen = []
    kept = torch.Tensor.topk

    def watched(self, *arguments, **options):
        seen.append(tuple(self.shape))
        return kept(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    neighbours = find_neighbours(prepare(torch.randn(2000, 6)), 20)
    assert set(seen) == {(512, 2000), (464, 2000)} and neighbours.index.shape == (2000, 20)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that live at the same time while it is on, and the most of them."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return found

    def gone(self, place, size):
        self.seen.discard(place)
        self.now -= size


def test_peak_memory_grows_with_the_images_and_not_with_their_square():
    """4,000 images: not even one whole kernel, 4,000 × 4,000 numbers, is ever there, let alone a tensor of all differences."""
    n = 4000
    one, other = related(n)
    with Live() as live:
        value = cknna(one, other)
    assert 0 < value < 1
    rows = 8 * module.ROWS * n
    assert rows < live.most < 4 * rows < 8 * n * n      # the piece of a kernel at hand, and what topk needs


def test_what_does_not_differ_has_no_value_and_what_is_wrong_is_refused():
    one, other = related(30)
    assert math.isnan(cknna(one, torch.ones(30, 3))) and math.isnan(cknna(torch.ones(30, 3), other))
    assert math.isnan(cknna(one, torch.rand(30, 1) + 1))      # one positive number has one direction
    with pytest.raises(InputError, match="at least 12 images, not 11"):
        cknna(one[:11], other[:11])
    with pytest.raises(InputError, match="the same images, not of 30 and 29"):
        cknna(one, other[:29])
    with pytest.raises(InputError, match="not finite"):
        cknna(one, other.where(other != other[3, 2], math.nan))
    with pytest.raises(InputError, match="a vector for each image"):
        prepare(one[None])


def test_the_jackknife_leaves_images_out():
    """Each value without a group is that of the others' own neighbours (the clamping aside, which tails alone decide)."""
    one, other = (torch.nn.functional.normalize(x.double()) for x in related(50, noise=0.5))
    count = neighbours_kept(50)
    a, b = find_neighbours(one, count), find_neighbours(other, count)
    without = leave_out(a, b)
    kept = torch.arange(50) % 20 != 3
    assert without[3] == pytest.approx(align(find_neighbours(one[kept], 10), find_neighbours(other[kept], 10)), rel=1e-12)
    assert align(a, b) == pytest.approx(align(find_neighbours(one, 10), find_neighbours(other, 10)), rel=1e-12)
    found = jackknife_interval(align(a, b), without)
    assert found["low"] < align(a, b) < found["high"] and "20 groups" in found["method"]
    known = jackknife_interval(2.0, [1.0, 2.0, 3.0])      # sqrt(2/3 · 2) · t(0.975, 2)
    assert known["high"] - 2 == pytest.approx(math.sqrt(4 / 3) * 4.302652729911275)
    assert jackknife_interval(2.0, [1.0, math.nan]) is None


def test_transformed_images_are_the_published_draws():
    image = pictures(1)[0]
    assert torch.equal(transform_image(image, "clean", 3), image)
    pixels = (image.permute(1, 2, 0).numpy() * 255).round()
    np.random.seed(42 + 3)
    expected = (pixels + np.random.normal(0, 0.1, pixels.shape) * 255).clip(0, 255).astype(np.uint8)
    assert np.array_equal((transform_image(image, "noise 0.1", 3) * 255).round().permute(1, 2, 0).numpy(), expected)
    shapes = set()
    for index in range(12):
        np.random.seed(42 + index)
        rotation, scale = np.random.choice([0, 90, 180, 270]), np.random.choice([1, 0.75, 0.5, 0.25])
        made = transform_image(image, "rotation and scale", index)
        turned = np.rot90(image.permute(1, 2, 0).numpy(), rotation // 90)
        assert made.shape == (3, int(32 * scale), int(32 * scale))
        if scale == 1:
            assert np.array_equal(made.permute(1, 2, 0).numpy(), turned)
        else:
            corner = np.asarray(turned)[: int(4 / scale), : int(4 / scale)].mean((0, 1))
            assert made[:, :4, :4].mean((1, 2)).numpy() == pytest.approx(corner, abs=0.08)
        shapes.add(made.shape[1])
    assert shapes == {8, 16, 24, 32}
    assert all(transform_image(image, "rotation and scale", i, 16).shape[1] in (16, 32) for i in range(12))


def images_and_keys(n):
    return batches(pictures(n, seed=3), 5), [f"{i:03d}.png" for i in range(n)]


def test_se_cknna_is_the_mean_over_the_five_sets(fitted):
    given, keys = images_and_keys(16)
    source, teacher = latent_features(fitted, "model"), pixel_features(4)
    found = measure_alignment([source], teacher, given, keys, ["cknna", "se_cknna"], k=3)["model"]
    assert sets_of(["se_cknna"]) == ["noise 0.05", "noise 0.1", "noise 0.15", "noise 0.2", "rotation and scale"]
    assert list(found["se_cknna"]["parts"]) == sets_of(["se_cknna"])
    assert found["se_cknna"]["value"] == pytest.approx(sum(found["se_cknna"]["parts"].values()) / 5)
    images = torch.cat([batch.images for batch in given])
    mean = fitted.encode(images).posterior.mean.mean((2, 3))
    assert found["cknna"]["value"] == pytest.approx(cknna(mean, torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1), 3))
    level = torch.stack([transform_image(image, "noise 0.2", i) for i, image in enumerate(images)])
    noisy = cknna(fitted.encode(level).posterior.mean.mean((2, 3)), teacher.compute(level, keys), 3)
    assert found["se_cknna"]["parts"]["noise 0.2"] == pytest.approx(noisy, abs=1e-9)
    same = measure_alignment([teacher], teacher, given, keys, ["se_cknna"], k=3)[teacher.label]["se_cknna"]
    assert same["value"] == pytest.approx(1, abs=1e-3)
    other = measure_alignment([source], teacher, batches(pictures(16, seed=3), 16)[::-1], keys, ["cknna", "se_cknna"], k=3)
    assert other["model"] == found
    with pytest.raises(DataError, match="files changed"):
        measure_alignment([source], teacher, given[:2], keys, ["cknna"], k=3)


def bytes_of(given, together=True):
    torch.manual_seed(0)
    tokenizer = Toy(ToyConfig()).fit(pictures(16)).eval()
    keys = [f"{i:03d}.png" for i in range(15)]
    return json.dumps(measure_alignment(
        [latent_features(tokenizer, "model")], pixel_features(4), given, keys, ["cknna", "se_cknna"], k=3, together=together))


def one_of_two(rank, address, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        Path(folder, f"{rank}.json").write_text(bytes_of(batches(pictures(15, seed=3), 1)[rank::2]))
    finally:
        dist.destroy_process_group()


def test_two_processes_give_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    mp.start_processes(one_of_two, (address, str(tmp_path)), nprocs=2, start_method="fork")      # no imports anew
    alone = bytes_of(batches(pictures(15, seed=3), 4))
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text() == alone


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pictures(14)):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i:02d}.png")
    return tmp_path / "images"


def test_the_command_names_the_teacher(folder, fitted, tmp_path, toy_system, capsys):
    model, out = fitted.save_pretrained(tmp_path / "toy"), tmp_path / "result.json"
    teacher = ("random:model_type=dinov2,hidden_size=12,num_hidden_layers=1,num_attention_heads=2,patch_size=4,image_size=16")
    words = ["eval", str(model), str(folder), "--size", "32", "--device", "cpu", "--metrics"]
    assert call([*words, "psnr,cknna,se_cknna", "--teacher", teacher, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "SE-CKNNA to " in printed and "the teacher has random weights" in printed
    assert "10 neighbours among 13 others agree by chance alone" in printed
    result = json.loads(out.read_text())
    assert [row["role"] for row in result["rows"]] == ["model", "untrained", "baseline"]
    for row in result["rows"]:
        assert set(row["metrics"]) == {"psnr", "cknna", "se_cknna"} and row["metrics"]["se_cknna"]["n"] == 14
        assert row["metrics"]["cknna"]["reference"].endswith("(random weights)")
    assert result["rows"][0]["metrics"]["cknna"]["features"] == "latents (mode), mean over positions"
    assert result["protocol"]["alignment"]["random"] and result["protocol"]["alignment"]["multiple_of_sides"] == 8
    assert call([*words, "psnr", "--teacher", teacher]) == 2
    assert "--teacher is for cknna and se_cknna" in capsys.readouterr().err


def test_a_teacher_that_is_not_here_is_an_error_or_a_row_that_says_so(folder, fitted, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = ImageDataConfig(train=str(folder), val=str(folder), size=32, workers=0)
    found = evaluate(fitted, data, ["psnr", "cknna"], teacher="transformers:no/where", allow_missing=True, baselines=False)
    assert found["rows"][0]["metrics"]["cknna"]["value"] is None
    assert "no/where" in found["rows"][0]["metrics"]["cknna"]["missing"]


def test_what_a_teacher_may_be_called():
    named = {text: (choice.backend, choice.source) for text in (
        "efficientnet-lite0", "timm:vit", "hf-hub:timm/vit", "facebook/dinov2-base", "vit_small", "transformers:x/y", "./folder",
    ) for choice in [parse_teacher(text)]}
    assert list(named.values()) == [
        ("asset", "efficientnet-lite0"), ("timm", "vit"), ("timm", "hf-hub:timm/vit"), ("transformers", "facebook/dinov2-base"),
        ("timm", "vit_small"), ("transformers", "x/y"), ("transformers", "./folder")]
    assert parse_teacher("random:model_type=dinov2,hidden_size=8").config == {"model_type": "dinov2", "hidden_size": "8"}


def test_codes_have_no_neighbours(fitted, monkeypatch):
    from tokenizers_lab.tokenizer import ImageEncoding

    monkeypatch.setattr(type(fitted), "encode", lambda self, images, **options: ImageEncoding(codes=images[:, :1].long()))
    with pytest.raises(InputError, match="gives codes, not latents"):
        latent_features(fitted, "model").compute(pictures(1), ["x"])
