"""Samples of a generator: transported as its velocity says, each by its own number alone, in files that others can read."""

import json
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gaussian import CHANNELS, EXACT, GRID, gaussian, pair, toy
from PIL import Image
from toy import SIZE

from tokenizers_lab.errors import ConfigError, DataError, InputError
from tokenizers_lab.eval.generation import sampling as module
from tokenizers_lab.eval.generation.generator import seeded_normal
from tokenizers_lab.eval.generation.pixels import to_uint8
from tokenizers_lab.eval.generation.sampling import SampleRequest, check_tokenizer, class_rows, draw_images, generate_samples
from tokenizers_lab.eval.sample_sets import open_samples

N = 7      # odd
REQUEST = SampleRequest(N, (0, 1, 2), seed=3)


def test_noise_is_transported_to_the_known_distribution() -> None:
    network = gaussian(0.4)
    labels, seeds = torch.arange(300) % 3, list(range(300))
    found = network.sample(labels, seeds, EXACT)
    noise = seeded_normal(seeds, (CHANNELS, GRID, GRID), "start")
    exact = network.means[labels] + 0.4 * noise
    assert torch.allclose(found, exact, atol=2e-3)
    assert found[labels == 2].std() > 0.3      # not the mean alone
    for shift in (0.3, 3.0):
        assert torch.allclose(network.sample(labels[:9], seeds[:9], replace(EXACT, shift=shift)), exact[:9], atol=1e-2)


def test_images_are_decoded_from_denormalised_latents() -> None:
    network, tokenizer = pair()
    labels, seeds = REQUEST.labels(), REQUEST.seeds(range(N))
    images = draw_images(network, tokenizer, labels, seeds, EXACT)
    latents = network.sample(labels, seeds, EXACT) * network.latent_std + network.latent_mean
    assert torch.equal(images, tokenizer.decode(latents).clamp(0, 1)) and images.shape == (N, 3, SIZE, SIZE)
    assert not torch.allclose(images, tokenizer.decode(network.sample(labels, seeds, EXACT)).clamp(0, 1), atol=0.05)


def test_guidance_moves_samples_away() -> None:
    network = gaussian()
    labels, seeds = torch.tensor([2] * 4), [1, 2, 3, 4]
    plain = network.sample(labels, seeds, EXACT)
    assert torch.equal(plain, network.sample(labels, seeds, replace(EXACT, guidance=1.0)))
    free = replace(EXACT, guidance=2.0)
    away, weak = network.sample(labels, seeds, free), gaussian()
    weak.means.data -= 0.5
    guided = network.sample(labels, seeds, free, weak)
    assert (guided - plain).mean() > 0.2      # away from the weaker one, whose means are lower
    assert not torch.allclose(away, guided, atol=0.05)
    some = network.sample(labels, seeds, replace(free, guided_channels=2))
    assert torch.allclose(some[:, 2:], plain[:, 2:]) and torch.allclose(some[:, :2], away[:, :2])
    late = network.sample(labels, seeds, replace(free, guidance_low=2.0, guidance_high=3.0))      # never
    assert torch.allclose(late, plain)


def test_labels_follow_the_rule() -> None:
    balanced = SampleRequest(10, (4, 7, 9)).labels().tolist()
    assert balanced == [4, 7, 9] * 3 + [4]
    permuted = [SampleRequest(300, (4, 7, 9), "permuted", seed).labels().tolist() for seed in (0, 0, 1)]
    assert permuted[0] == permuted[1] != permuted[2] and Counter(permuted[0]) == {4: 100, 7: 100, 9: 100}
    assert permuted[0] != [4, 7, 9] * 100
    drawn = SampleRequest(3000, (4, 7, 9), "random", 0).labels().tolist()
    counts = Counter(drawn)
    assert set(counts) == {4, 7, 9} and all(900 < count < 1100 for count in counts.values()) and len(set(counts.values())) > 1
    assert SampleRequest(10, (4, 7, 9), "random", 0).labels().tolist() == drawn[:10]
    assert SampleRequest(3000, (4, 7, 9), "random", 1).labels().tolist() != drawn
    assert len({*REQUEST.seeds(range(N)), *replace(REQUEST, seed=4).seeds(range(N))}) == 2 * N
    for wrong in ({"n": 0}, {"classes": ()}, {"rule": "sorted"}, {"rounding": "up"}):
        with pytest.raises(ConfigError):
            replace(REQUEST, **wrong)


def arrays(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def test_files_are_read_by_others(tmp_path) -> None:
    network, tokenizer = pair()
    steps = []
    said = generate_samples(network, tokenizer, tmp_path / "out", REQUEST, sampling=EXACT, batch_size=3, formats=("npz", "png"),
                            names=["cat", "a dog that has a long name", "cow"], progress=lambda b, n: steps.append(n) or b)
    found = arrays(tmp_path / "out")
    assert found.dtype == np.uint8 and found.shape == (N, SIZE, SIZE, 3) and steps == [3]
    images = draw_images(network, tokenizer, REQUEST.labels(), REQUEST.seeds(range(N)), EXACT)
    assert np.abs(found.astype(int) - to_uint8(images).permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1
    assert np.array_equal(found, np.floor(images.numpy().transpose(0, 2, 3, 1) * np.float32(255)).astype(np.uint8))
    with zipfile.ZipFile(tmp_path / "out" / "samples.npz") as archive:
        assert archive.testzip() is None and archive.namelist() == ["arr_0.npy"]
    for i, array in enumerate(found):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "images" / f"{i:08d}.png")), array)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["grid.png", "images", "samples.json", "samples.npz"]
    assert said == json.loads((tmp_path / "out" / "samples.json").read_text())
    assert said["labels"] == {"rule": module.RULES["balanced"], "classes": [0, 1, 2]} and said["seed"] == 3
    assert said["generator"]["weights_sha256"] != said["tokenizer"]["weights_sha256"] and said["guide"] is None
    assert said["sampling"]["solver"] == "heun" and said["rounding"] == "uint8, truncate" and said["size"] == [SIZE, SIZE]
    assert "torch" in said["environment"]["packages"]
    samples = open_samples(str(tmp_path / "out"))
    assert len(samples) == N and samples.sha256() == said["files"]["samples.npz"] and samples.protocol() == said
    (tmp_path / "out" / "samples.npz").unlink()
    assert open_samples(str(tmp_path / "out")).sha256() == said["files"]["images"]


def in_two(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    said = generate_samples(*pair(), folder, REQUEST, sampling=EXACT, batch_size=2)
    Path(folder, f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def test_processes_and_batches_change_nothing(tmp_path) -> None:
    one, three, two = (tmp_path / name for name in ("one", "three", "two"))
    generate_samples(*pair(), one, REQUEST, sampling=EXACT, batch_size=1)
    generate_samples(*pair(), three, REQUEST, sampling=EXACT, batch_size=3)
    two.mkdir()
    mp.spawn(in_two, (f"file://{tmp_path}/rendezvous", str(two)), nprocs=2)
    assert (two / "0.json").read_text() == (two / "1.json").read_text()
    for other in (three, two):
        assert np.abs(arrays(one).astype(int) - arrays(other).astype(int)).max() <= 1
    assert len({image.tobytes() for image in arrays(one)}) == N
    network = gaussian()
    noise = [network.sample(torch.tensor(labels), seeds, replace(EXACT, steps=1, stop=0.999))
             for labels, seeds in (([0, 0, 0], [5, 6, 7]), ([0], [6]))]
    assert torch.equal(seeded_normal([5, 6, 7], (2, 3), "start")[1], seeded_normal([6], (2, 3), "start")[0])
    assert torch.allclose(noise[0][1], noise[1][0])


def test_interrupted_sampling_goes_on(tmp_path, monkeypatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    generate_samples(*pair(), whole, REQUEST, sampling=EXACT)
    drawn: list[int] = []
    draw = module.draw_images

    def counted(generator, tokenizer, labels, seeds, *rest):
        drawn.extend(seeds)
        if len(drawn) > 4:
            raise KeyboardInterrupt
        return draw(generator, tokenizer, labels, seeds, *rest)

    monkeypatch.setattr(module, "draw_images", counted)
    with pytest.raises(KeyboardInterrupt):
        generate_samples(*pair(), out, REQUEST, sampling=EXACT, batch_size=2)
    assert not (out / "samples.npz").exists()
    with pytest.raises(InputError, match=r"samples that were made otherwise \(seed 3, not 5\): choose another folder"):
        generate_samples(*pair(), out, replace(REQUEST, seed=5), sampling=EXACT)
    with pytest.raises(InputError, match=r"otherwise \(sampling\.steps\)"):
        generate_samples(*pair(), out, REQUEST, sampling=replace(EXACT, steps=41))
    first = drawn[:4]
    drawn.clear()
    monkeypatch.setattr(module, "draw_images", lambda *args: drawn.extend(args[3]) or draw(*args))
    generate_samples(*pair(), out, REQUEST, sampling=EXACT, batch_size=3)
    assert first + drawn == REQUEST.seeds(range(N))      # nothing twice
    assert np.abs(arrays(whole).astype(int) - arrays(out).astype(int)).max() <= 1
    drawn.clear()
    assert generate_samples(*pair(), out, REQUEST, sampling=EXACT)["n"] == N and drawn == []      # finished
    with pytest.raises(InputError, match="choose another folder"):
        generate_samples(*pair(), out, replace(REQUEST, n=8), sampling=EXACT)


def test_a_lost_part_is_noticed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_save_part", lambda *args: None)
    with pytest.raises(DataError, match="lacks samples"):
        generate_samples(*pair(), tmp_path, REQUEST, sampling=EXACT)


def test_another_tokenizer_is_refused() -> None:
    network, _ = pair()
    name = network.provenance["tokenizer"]
    assert check_tokenizer(network, name["sha256"], "here") == "the tokenizer that the generator names"
    with pytest.raises(InputError, match=r"learned the latents of toy .*, here is another tokenizer"):
        check_tokenizer(network, "0" * 64, "here")
    assert "not checked" in check_tokenizer(gaussian(), "0" * 64, "here")


def test_what_cannot_be_is_refused(tmp_path) -> None:
    network, tokenizer = pair()
    with pytest.raises(ConfigError, match="no format 'jpg'"):
        generate_samples(network, tokenizer, tmp_path, REQUEST, formats=("jpg",))
    network.means.data[0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite pixels"):
        draw_images(network, toy(), torch.tensor([0]), [1], EXACT)
    with pytest.raises(InputError, match="classes from 0 to 2"):
        draw_images(network, tokenizer, torch.tensor([4]), [1], EXACT)


def test_rows_of_the_grid() -> None:
    assert class_rows(torch.tensor([0, 2, 0, 2, 1, 0]), ["cat", "dog"]) == {"cat": [0], "dog": [4], "class 2": [1]}
    assert class_rows(torch.arange(80) % 8)["class 3"] == [3, 11, 19, 27, 35, 43, 51, 59]
    assert class_rows(torch.arange(80) % 4)["class 3"] == list(range(3, 67, 4))
    assert len(class_rows(torch.zeros(80, dtype=torch.int64))["class 0"]) == 64
    assert class_rows(torch.arange(20)) == {"0 to 7": list(range(8)), "8 to 15": list(range(8, 16))}
    assert class_rows(torch.arange(3)) == {"0 to 2": [0, 1, 2]}
    assert len(class_rows(torch.arange(50) % 25)) == 8
