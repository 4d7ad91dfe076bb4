"""Batches of whole clips of similar length: their plan, every clip once an epoch, sizes, ranks, resuming, unreadable clips."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from data_audio import encoded, sound, speech_config, write_clips, write_manifest
from test_speech_loader import same, take

from tokenizers_lab.config import load_config
from tokenizers_lab.data import buckets
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.data.buckets import batch_order, plan_batches
from tokenizers_lab.data.loader import build_loader, fixed_crops, len_batches
from tokenizers_lab.errors import CheckpointError, ConfigError, DataError
from tokenizers_lab.training.run import stage_lengths

LENGTHS = (8000, 1600, 4800, 3200, 12_800)      # samples at 16 kHz: 25, 5, 15, 10 and 40 frames
FRAMES = [n * 50 / 16_000 for n in LENGTHS]
N = 23


def config(source, **options):
    return speech_config(source, **{"batch_frames": 80, **options})


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"), N, lengths=LENGTHS)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"), [9, 4, 11, 7])


def write_tars(root, sizes, bad=(), broken=()):
    """Shards of clips with texts: those in `bad` are no sound though their length is listed, those in `broken` have no length."""
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for _ in range(size):
                samples = LENGTHS[number % 5]
                about = {"text": "x" * (number % 3)} | ({} if number in broken else {"duration": samples / 16_000})
                audio = b"no sound" if number in (*bad, *broken) else encoded(sound(samples, seed=number))
                for ending, data in (("json", json.dumps(about).encode()), ("wav", audio)):
                    info = tarfile.TarInfo(f"{number:03d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return root


def greedy(sizes, room, most):
    """The batches' sizes, by the words of the implementation notes."""
    batches = [[]]
    for size in sorted(sizes):
        if batches[-1] and not ((len(batches[-1]) + 1) * size <= room and len(batches[-1]) < most):
            batches.append([])
        batches[-1].append(size)
    return batches


def test_the_plan_is_filled_greedily_in_order_of_size():
    rng = np.random.default_rng(0)
    sizes = rng.uniform(1, 120, 200)
    sizes[[3, 50]] = np.nan
    for room, most in ((300, 5), (90, 40), (120, 1), (10_000, 1000)):
        plan = plan_batches(sizes, room, most)
        fitting = sizes[sizes <= room]
        found = [np.round(sizes[plan.batch(i)], 3).tolist() for i in range(len(plan))]
        assert found == greedy(np.round(fitting, 3).tolist(), room, most)
        assert plan.unknown == [3, 50] and plan.too_large == 198 - len(fitting)
        assert all(len(batch) * max(batch) <= room and len(batch) <= most for batch in found)
    assert len(plan_batches(np.array([np.float32(0.36)] * 5) * 50, 18 * 5, 9)) == 1       # 18.0000007 frames are 18
    assert len(plan_batches(np.zeros(0), 10, 4)) == len(plan_batches(np.array([11.0]), 10, 4)) == 0


@pytest.mark.parametrize("batches", [1, 2, 3, 7, 12, 25])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_steps_of_the_ranks_take_neighbours_and_each_batch_once_an_epoch(batches, world):
    orders = [batch_order(batches, world, 0, epoch).tolist() for epoch in range(5)]
    assert all(sorted(order) == list(range(batches)) for order in orders)
    if batches == 25:
        assert len(set(map(tuple, orders))) == 5 and orders[1] != batch_order(batches, world, 1, 1).tolist()
    flat = [(epoch, number) for epoch, order in enumerate(orders) for number in order]
    for first in range(0, len(flat) - world, world):
        step = flat[first : first + world]
        if len({epoch for epoch, _ in step}) == 1:
            numbers = [number for _, number in step]
            assert numbers == list(range(numbers[0], numbers[0] + world))


@pytest.mark.parametrize("world", [1, 2])
def test_every_clip_whole_once_an_epoch_over_the_ranks(clips, world):
    cfg = config(clips)
    count = len_batches(cfg, 4)
    assert count == len(greedy(FRAMES * 4 + FRAMES[:3], 80, 4))
    loaders = [build_loader(cfg, 4, 0, rank, world) for rank in range(world)]
    batches = [next(loader)[0] for _ in range(count * 2 // world) for loader in loaders]
    epochs = [batches[:count], batches[count : 2 * count]] if count * 2 % world == 0 else []
    assert epochs and all(sorted(k for b in epoch for k in b.keys) == sorted(f"{i}.flac" for i in range(N)) for epoch in epochs)
    assert [b.keys for b in epochs[0]] != [b.keys for b in epochs[1]]
    assert {tuple(b.keys) for b in epochs[0]} == {tuple(b.keys) for b in epochs[1]}      # formed once
    for batch in batches:
        assert batch.audio.shape == (len(batch), 1, batch.lengths.max()) and len(batch) * batch.audio.shape[2] * 50 / 16_000 <= 80
        assert len(batch) <= 4 and (batch.starts == 0).all()
        for audio, length, key in zip(batch.audio, batch.lengths, batch.keys):
            whole = read_audio(clips / key, 16_000, 1)[0]
            assert torch.equal(audio[:, :length], whole) and (audio[:, length:] == 0).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_resumed_run_reads_what_it_would_have_read(tmp_path, workers, kind):
    if kind == "folder":
        source: object = write_clips(tmp_path, 19, bad=(3,), lengths=LENGTHS)
        (tmp_path / "7.flac").write_bytes((tmp_path / "7.flac").read_bytes()[:-800])       # its header is whole
    else:
        source = write_tars(tmp_path, [9, 4, 11, 7], bad=(3, 4, 5, 14, 20), broken=(0, 10, 22)) / "{0..3}.tar"
    cfg = config(source, workers=workers, bad_fraction=1.0)
    for rank in range(2):
        whole = take(build_loader(cfg, 3, 7, rank, 2), 24)
        assert whole[-1][1]["bad"] > 0
        for stop in range(1, 23) if workers == 0 else (1, 6, 13):
            state = json.loads(json.dumps(whole[stop - 1][1]))
            resumed = build_loader(cfg, 3, 7, rank, 2, start_step=stop, state=state)
            assert same(take(resumed, 24 - stop), whole[stop:])
        if kind == "folder":      # by the step alone too
            (batch, _), (expected, _) = next(build_loader(cfg, 3, 7, rank, 2, start_step=5)), whole[5]
            assert batch.keys == expected.keys and torch.equal(batch.audio, expected.audio)


def test_unreadable_and_too_large_clips_are_left_out_and_counted(tmp_path, caplog):
    folder = write_clips(tmp_path / "set", 20, bad=(2, 5), lengths=LENGTHS)
    (folder / "8.flac").write_bytes((folder / "8.flac").read_bytes()[:-800])
    (folder / "long.flac").write_bytes(encoded(sound(32_000), kind="FLAC"))      # 100 frames
    listed = tmp_path / "quarantine.jsonl"
    cfg = config(folder, bad_fraction=1.0)
    with caplog.at_level(logging.WARNING):
        loader = build_loader(cfg, 4, 0, quarantine=listed)
    assert "1 clips larger than data.batch_frames, 2 of unknown length" in caplog.text
    count = len_batches(cfg, 4)
    batches = take(loader, 2 * count)
    good = sorted(f"{i}.flac" for i in range(20) if i not in (2, 5, 8))
    for epoch in (batches[:count], batches[count:]):
        assert sorted(k for b, _ in epoch for k in b.keys) == good
    assert batches[-1][1]["bad"] == 2 and batches[-1][1]["seen"] == 2 * 18       # 8.flac at each epoch; 2 and 5 are in no batch
    reasons = {e["key"]: e["reason"] for e in map(json.loads, listed.read_text().splitlines())}
    assert set(reasons) == {"2.flac", "5.flac", "8.flac"} and "not a sound" in reasons["2.flac"]
    with pytest.raises(DataError, match="none of the 21 clips has a known size of at most 4 frames"):
        build_loader(config(folder, batch_frames=4), 4, 0)


def test_a_batch_of_unreadable_clips_gives_way_to_another(tmp_path):
    rows = [{"file": f"{i}.flac", "duration": 0.1 if i < 3 else 0.5} for i in range(6)]
    write_clips(tmp_path, 6, bad=(0, 1, 2))
    cfg = config(write_manifest(tmp_path / "list.jsonl", rows), bad_fraction=1.0)
    keys = [set(batch.keys) for batch, _ in take(build_loader(cfg, 3, 0), 4)]
    assert keys == [{"3.flac", "4.flac", "5.flac"}] * 4
    write_manifest(tmp_path / "bad.jsonl", rows[:3])
    with pytest.raises(DataError, match="batches in a row could not be read"):
        next(build_loader(config(tmp_path / "bad.jsonl", bad_fraction=1.0), 3, 0))


def test_texts_count_and_listed_lengths_are_believed(tmp_path):
    write_clips(tmp_path, 4)      # 25 frames each
    rows = [{"file": f"{i}.flac", "text": "é" * (5 * i), "duration": 0.5} for i in range(4)]      # 0, 10, 20, 30 bytes
    cfg = config(write_manifest(tmp_path / "list.jsonl", rows), batch_frames=100)
    assert len_batches(cfg, 9) == 1
    cfg.text_frames = 1.0        # 25, 35, 45, 55
    batches = [batch for batch, _ in take(build_loader(cfg, 9, 0), 3)]
    assert {tuple(batch.keys) for batch in batches} == {("0.flac", "1.flac"), ("2.flac",), ("3.flac",)}
    assert {batch.texts[-1] for batch in batches} == {"é" * 5, "é" * 10, "é" * 15}
    cfg.frame_rate, cfg.text_frames = 100.0, 0.0
    assert len_batches(cfg, 9) == 2
    rows[0]["duration"] = 0.001      # a wrong one: the clip is longer than a batch may be
    cfg = config(write_manifest(tmp_path / "list.jsonl", rows[:1]), batch_frames=20, bad_fraction=1.0)
    with pytest.raises(DataError, match="could not be read"):
        next(build_loader(cfg, 9, 0))


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_give_every_clip_once_an_epoch_in_windows(tars, workers):
    cfg = config(tars / "{0..3}.tar", workers=workers, shuffle_buffer=6, text_frames=2.0)
    loaders = [build_loader(cfg, 4, 0, rank, 2) for rank in range(2)]
    epochs, sizes = {}, []
    for loader in loaders:
        for _ in range(18):
            batch, state = next(loader)
            (epoch,) = {p[0] for p in state["positions"] if p[3]} if workers == 1 else {None}
            epochs.setdefault(epoch, []).extend(batch.keys)
            takes = [length * 50 / 16_000 + 2 * len(text or "") for length, text in zip(batch.lengths.tolist(), batch.texts)]
            sizes.append(len(takes))
            assert max(takes) * len(takes) <= 80 and len(takes) <= 4 and takes == sorted(takes)
            assert len({key.split("/")[0] for key in batch.keys}) == 1
    assert max(sizes) == 4
    if workers == 1:
        assert sorted(k.split("/")[1] for k in epochs[0]) == [f"{i:03d}" for i in range(31)]


def test_shards_of_what_cannot_be_used_end_with_one_line(tmp_path, tars, monkeypatch):
    monkeypatch.setattr(buckets, "MAX_UNWANTED_RUN", 60)
    with pytest.raises(DataError, match="clips in a row are left out"):
        next(build_loader(config(tars / "*.tar", batch_frames=3), 4, 0))
    monkeypatch.setattr(buckets, "MAX_BAD_RUN", 40)
    write_tars(tmp_path, [10], bad=range(10))
    with pytest.raises(DataError, match="40 samples in a row could not be read"):
        next(build_loader(config(tmp_path / "0.tar", bad_fraction=1.0), 4, 0))


def test_what_does_not_fit(clips, tars):
    _, state = next(build_loader(config(clips), 4, 0, 0, 2))
    with pytest.raises(CheckpointError, match="resume with 2 processes"):
        build_loader(config(clips), 4, 0, state=state)
    with pytest.raises(CheckpointError, match="batches, made"):
        build_loader(config(clips), 2, 0, 0, 2, state=state)
    for options in ({"features": "x", "crop": "fixed"}, {"teacher_rate": 8000}, {"batch_frames": 0}, {"frame_rate": 0.0},
                    {"text_frames": -1.0}):   # fmt: skip
        with pytest.raises(ConfigError, match=r"data\."):
            build_loader(config(clips, **options), 4, 0)
    with pytest.raises(ConfigError, match="whole clips"):
        next(fixed_crops(config(clips, crop="fixed"), 4))
    assert len_batches(config(tars / "*.tar"), 4) is None


def test_epochs_count_batches(clips, tars):
    def lengths(source, world=1, **options):
        overrides = [f"data.train={source}", "data.val=null", "data.batch_frames=80", "train.batch_size=8", "stages.0.steps=null",
                     "stages.0.epochs=3", *options.get("more", ())]
        return stage_lengths(load_config("dm_codec/tiny", overrides), world)[0]

    more = ["data.features=null", "data.teacher_rate=null"]
    count = len_batches(config(clips), 8)
    steps, unit = lengths(clips, more=more)
    assert steps == 3 * count and unit == 1 / count
    half = len_batches(config(clips), 4)
    steps, unit = lengths(clips, 2, more=more)
    assert steps == round(3 * half / 2) and unit == 2 / half
    with pytest.raises(ConfigError, match="in steps, or list the clips in a manifest"):
        lengths(tars / "{0..3}.tar", more=more)
    with pytest.raises(ConfigError, match="whole clips"):
        lengths(clips, more=["data.teacher_rate=8000"])
    with pytest.raises(ConfigError, match=r"data\.batch_frames must be above 0"):
        lengths(clips, more=[*more, "data.batch_frames=0"])


def test_a_window_s_batches_come_in_another_order_each_epoch(tars):
    loader = build_loader(config(tars / "2.tar", shuffle_buffer=20), 1, 0)
    epochs = [[next(loader)[0].keys[0] for _ in range(11)] for _ in range(3)]
    assert len(set(map(tuple, epochs))) == 3 and all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
