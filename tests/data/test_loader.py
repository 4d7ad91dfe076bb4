"""Folders: every sample once an epoch over the ranks; a resumed run is the same run; unreadable files; validation."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from data_images import data_config, jpeg, write_folder

from tokenizers_lab.data import transforms
from tokenizers_lab.data.decode import read_image
from tokenizers_lab.data.loader import build_loader, fit_image, len_samples, validation_batches
from tokenizers_lab.data.sampling import batch_positions, epoch_order, sample_index, spread, view_numbers
from tokenizers_lab.errors import CheckpointError, ConfigError, DataError


def take(loader, steps):
    """The next batches and their states."""
    return [next(loader) for _ in range(steps)]


def same(a, b):
    """Two lists of (batch, state) are bit for bit the same."""
    assert len(a) == len(b)
    for (x, x_state), (y, y_state) in zip(a, b):
        assert x.keys == y.keys and x_state == y_state and torch.equal(x.images, y.images)
        assert (x.labels is None) == (y.labels is None) and (x.labels is None or torch.equal(x.labels, y.labels))
    return True


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos"), 23)


def test_batches_are_float_images_in_unit_range_with_names(photos):
    batch, state = next(build_loader(data_config(photos, flip=False), 4, seed=0))
    assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.float32 and batch.images.is_contiguous()
    expected = np.asarray(fit_image(read_image(photos / batch.keys[2]), 16)).transpose(2, 0, 1)
    assert torch.equal(batch.images[2], torch.from_numpy(expected.copy()).float() / 255)
    assert batch.labels is None and json.loads(json.dumps(state)) == state
    assert len_samples(data_config(photos)) == 23


@pytest.mark.parametrize("world", [1, 2])
def test_every_image_once_an_epoch_over_the_ranks(photos, world):
    names = []
    loaders = [build_loader(data_config(photos), 4, 0, rank, world) for rank in range(world)]
    for _ in range(2 * 23 * 4 // (4 * world)):   # 8 epochs of 23 are 46 batches of 4
        for loader in loaders:
            names += next(loader)[0].keys
    epochs = [names[i : i + 23] for i in range(0, len(names), 23)]
    assert len(epochs) == 8 and all(sorted(e) == sorted(f"{i}.jpg" for i in range(23)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 8   # each in an order of its own


def test_the_order_does_not_depend_on_the_number_of_ranks(photos):
    one = [k for batch, _ in take(build_loader(data_config(photos), 4, 0), 6) for k in batch.keys]
    two = [build_loader(data_config(photos), 2, 0, rank, 2) for rank in range(2)]
    assert one == [k for _ in range(6) for loader in two for k in next(loader)[0].keys]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_reads_what_it_would_have_read(tmp_path, workers, world):
    folder = write_folder(tmp_path / "set", 23, bad=(3, 11))
    cfg = data_config(folder, workers=workers, crop="random", crop_min=8, bad_fraction=1.0)
    for rank in range(world):
        whole = take(build_loader(cfg, 4, 7, rank, world), 15)
        assert whole[-1][1]["bad"] > 0
        for stop in (1, 6, 13):
            resumed = build_loader(cfg, 4, 7, rank, world, start_step=stop, state=json.loads(json.dumps(whole[stop - 1][1])))
            assert same(take(resumed, 15 - stop), whole[stop:])
        by_step = take(build_loader(cfg, 4, 7, rank, world, start_step=6), 2)     # the step alone gives the same batches
        by_state = take(build_loader(cfg, 4, 7, rank, world, state=whole[5][1]), 2)
        assert [b.keys for b, _ in by_step] == [b.keys for b, _ in by_state] == [b.keys for b, _ in whole[6:8]]


def test_workers_change_nothing(photos):
    none, two = (data_config(photos, crop="random", crop_min=8, workers=workers) for workers in (0, 2))
    assert same(take(build_loader(none, 4, 0), 8), take(build_loader(two, 4, 0), 8))


def test_another_seed_and_another_epoch_give_other_crops(tmp_path):
    cfg = data_config(write_folder(tmp_path, 1), crop="random", crop_min=8, flip=False)
    images = [next(loader := build_loader(cfg, 1, 0))[0].images, next(loader)[0].images, next(build_loader(cfg, 1, 1))[0].images]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_no_global_randomness_is_read_or_moved(photos):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(build_loader(data_config(photos, workers=1), 4, 0), 2)
    list(validation_batches(data_config(photos, val=str(photos)), 4))
    assert torch.equal(before, torch.get_rng_state())


def test_changed_data_are_noticed_on_resume(tmp_path):
    folder = write_folder(tmp_path, 5)
    _, state = next(build_loader(data_config(folder), 2, 0))
    (folder / "new.jpg").write_bytes(jpeg(9))
    with pytest.raises(CheckpointError, match="holds 6 images, held 5"):
        build_loader(data_config(folder), 2, 0, state=state)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_counted_and_listed(tmp_path, workers):
    folder = write_folder(tmp_path / "set", 12, bad=(2, 5, 7))
    (folder / "5.jpg").write_bytes(jpeg(5)[:-100])
    listed = tmp_path / "run" / "quarantine.jsonl"
    loader = build_loader(data_config(folder, workers=workers, bad_fraction=0.5), 4, 0, quarantine=listed)
    batches = take(loader, 3)   # one epoch
    assert all(len(batch) == 4 for batch, _ in batches)
    keys = [k for batch, _ in batches for k in batch.keys]
    good = {f"{i}.jpg" for i in range(12) if i not in (2, 5, 7)}
    assert set(keys) == good and len(keys) == 12
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {e["key"] for e in entries} == {"2.jpg", "5.jpg", "7.jpg"} and len(entries) == 3
    assert "truncated" in next(e for e in entries if e["key"] == "5.jpg")["reason"]
    state = batches[-1][1]
    assert state["bad"] >= 3 and state["seen"] == 12 + state["bad"]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_end_the_run_at_the_same_step(tmp_path, workers):
    folder = write_folder(tmp_path, 10, bad=(1, 2))

    def survived(start=0, state=None):
        loader = build_loader(data_config(folder, workers=workers, bad_fraction=0.01), 4, 0, start_step=start, state=state)
        done = []
        with pytest.raises(DataError, match="bad_fraction"):
            for item in loader:
                done.append(item)
        return done

    whole = survived()
    assert len(whole) > 5
    resumed = survived(4, whole[3][1])
    assert same(resumed, whole[4:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_unreadable_images_ends_with_one_line(tmp_path, workers):
    folder = write_folder(tmp_path, 3, bad=(0, 1, 2))
    for fraction in (0.01, 1.0):
        with pytest.raises(DataError, match="could not be read") as error:
            next(build_loader(data_config(folder, workers=workers, bad_fraction=fraction), 4, 0))
        assert "\n" not in str(error.value)


def test_a_fault_of_the_program_is_not_taken_for_a_bad_image(photos, monkeypatch):
    monkeypatch.setattr(transforms, "fit_image", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(build_loader(data_config(photos), 4, 0))


def test_a_killed_decoding_process_ends_the_run_with_advice(photos):
    before = set(multiprocessing.active_children())
    loader = build_loader(data_config(photos, workers=1), 4, 0)
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.2)                        # not here, where a run may be saving, but at the next fetch
    with pytest.raises(DataError, match=r"lower data\.workers"):
        take(loader, 10)


def test_wrong_options():
    for options in ({"workers": -1}, {"shuffle_buffer": 0}, {"bad_fraction": 2.0}, {"crop": "left"}):
        with pytest.raises(ConfigError):
            build_loader(data_config("sample:photos", **options), 4, 0)
    with pytest.raises(ConfigError, match=r"data\.val"):
        validation_batches(data_config("sample:photos"), 4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_gives_each_image_once_in_order(photos, workers, world, monkeypatch):
    monkeypatch.setattr("tokenizers_lab.data.loader.WORTH_WORKERS", 1)
    cfg = data_config("none", val=str(photos), workers=workers)
    ranks = [list(validation_batches(cfg, 4, rank, world)) for rank in range(world)]
    names = [[k for batch in batches for k in batch.keys] for batches in ranks]
    order = [f"{i}.jpg" for i in range(23)]
    assert names == [order[rank::world] for rank in range(world)]
    expected = np.asarray(fit_image(read_image(photos / "0.jpg"), 16)).transpose(2, 0, 1)   # never mirrored
    assert torch.equal(ranks[0][0].images[0], torch.from_numpy(expected.copy()).float() / 255)


def test_validation_of_fewer_images_than_ranks(tmp_path):
    cfg = data_config("none", val=str(write_folder(tmp_path, 2)))
    assert [[b.keys for b in validation_batches(cfg, 4, rank, 3)] for rank in range(3)] == [[["0.jpg"]], [["1.jpg"]], []]


def test_val_limit_is_spread_over_the_folder(photos):
    cfg = data_config("none", val=str(photos), val_limit=5)
    assert [k for b in validation_batches(cfg, 2) for k in b.keys] == ["0.jpg", "4.jpg", "9.jpg", "13.jpg", "18.jpg"]
    assert list(spread(3, 5)) == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_validation_image_is_an_error(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("tokenizers_lab.data.loader.WORTH_WORKERS", 1)
    cfg = data_config("none", val=str(write_folder(tmp_path, 6, bad=(4,))), workers=workers)
    batches = validation_batches(cfg, 2)
    assert next(batches).keys == ["0.jpg", "1.jpg"]
    with pytest.raises(DataError, match=r"4\.jpg: not an image") as error:
        list(batches)
    assert "\n" not in str(error.value)


def test_sampling_is_a_pure_function():
    orders = [epoch_order(100, 1, e) for e in range(3)]
    assert all(sorted(o) == list(range(100)) for o in orders) and not np.array_equal(orders[0], orders[1])
    epoch_order.cache_clear()
    assert sample_index(205, 100, 1) == orders[2][5]
    assert [list(batch_positions(3, 2, rank, 2)) for rank in range(2)] == [[12, 13], [14, 15]]


def test_view_numbers_are_uniform_and_independent():
    numbers = np.array([view_numbers(0, p) for p in range(2000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.03 and np.abs(numbers.var(0) - 1 / 12).max() < 0.005
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.08
    assert view_numbers(0, 1) == view_numbers(0, 1) != view_numbers(1, 1) != view_numbers(0, 1, "a")


def test_waiting_time_is_measured_and_reset(photos, monkeypatch):
    loader = build_loader(data_config(photos), 4, 0)
    fetch = loader._fetcher
    monkeypatch.setattr(loader, "_fetcher", (((time.sleep(0.05), next(fetch))[1]) for _ in range(2)))
    begin = time.perf_counter()
    take(loader, 2)
    assert 0.1 <= loader.wait_seconds() <= time.perf_counter() - begin
    assert loader.wait_seconds() == 0


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from data_images import data_config
from tokenizers_lab.data.loader import build_loader
if __name__ == "__main__":
    os.setpgrp()
    flags = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: flags.append(n))
    loader = build_loader(data_config({folder!r}, workers=2), 4, 0)
    next(loader)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(0, number)               # what Ctrl-C and schedulers do: all processes get it
    for _ in range(20):
        next(loader)
    print(len(flags))                      # and leave with the processes still running
"""


def test_decoding_goes_on_after_a_signal_so_that_the_run_can_be_saved(photos):
    script = SIGNALLED.format(tests=str(__file__).rpartition("/")[0], folder=str(photos))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2", done.stderr
