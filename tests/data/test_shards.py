"""Webdataset shards: from disk and HTTP, every sample once an epoch, resumed exactly, divided among streams."""

import functools
import http.server
import json
import threading

import pytest
import torch
from data_images import data_config, jpeg, write_shards
from test_loader import same, take

from tokenizers_lab.data import shards as shards_module
from tokenizers_lab.data.images import ImageReader
from tokenizers_lab.data.loader import build_loader, len_samples, validation_batches
from tokenizers_lab.data.shards import ShardStream, read_ahead, shard_samples
from tokenizers_lab.errors import CheckpointError, DataError

SIZES = [7, 4, 9, 1, 6, 5]   # 32 samples


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("tars"), SIZES)


@pytest.fixture
def served(tars):
    """The shards behind an HTTP server on the loopback interface."""
    failing: dict[str, int] = {}   # how many more answers break off
    refusing: dict[str, int] = {}  # how many more questions get an error

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send_head(self):
            if refusing.get(self.path, 0) > 0:
                refusing[self.path] -= 1
                return self.send_error(503)
            return super().send_head()

        def copyfile(self, source, outputfile):
            if failing.get(self.path, 0) > 0:
                failing[self.path] -= 1
                outputfile.write(source.read(9000))
                self.close_connection = True
                return
            super().copyfile(source, outputfile)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tars)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", failing, refusing
    server.shutdown()
    server.server_close()


def urls(tars):
    return [str(tars / f"{i}.tar") for i in range(len(SIZES))]


def epochs(tars, streams, count, seed=0, buffer=5):
    """The keys of each epoch, over all streams."""
    seen = {e: [] for e in range(count)}
    for stream in range(streams):
        samples = ShardStream(urls(tars), seed, buffer, stream, streams).samples(0, stream, 0)
        for _, sample, (epoch, _, _) in samples:
            if epoch >= count:
                break
            seen[epoch].append(sample["__key__"])
    return seen


@pytest.mark.parametrize("streams", [1, 2, 4, 6])
def test_every_sample_once_an_epoch_over_the_streams(tars, streams):
    seen = epochs(tars, streams, 3)
    assert all(sorted(keys) == [f"{i:05d}" for i in range(32)] for keys in seen.values())
    assert len({tuple(keys) for keys in seen.values()}) == 3   # each epoch in an order of its own


def test_blocks_are_permuted_and_another_seed_permutes_otherwise(tars):
    url = urls(tars)[2:3]

    def keys(seed, buffer):
        stream = ShardStream(url, seed, buffer, 0, 1).samples(0, 0, 0)
        return [int(next(stream)[1]["__key__"]) - 11 for _ in range(9)]

    assert keys(0, 1) == list(range(9))
    assert keys(0, 100) != list(range(9)) and sorted(keys(0, 100)) == list(range(9))
    assert keys(0, 100) != keys(1, 100)
    assert sorted(keys(0, 4)[:4]) == [0, 1, 2, 3] and sorted(keys(0, 4)[4:8]) == [4, 5, 6, 7]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_reads_what_it_would_have_read(tmp_path, workers, world):
    write_shards(tmp_path, SIZES, bad=(3, 20))
    cfg = data_config(tmp_path / "{0..5}.tar", workers=workers, crop="random", crop_min=8, bad_fraction=1.0)
    for rank in range(world):
        whole = take(build_loader(cfg, 3, 7, rank, world), 24)   # over two epochs
        for stop in (1, 2, 11):
            state = json.loads(json.dumps(whole[stop - 1][1]))
            resumed = build_loader(cfg, 3, 7, rank, world, start_step=stop, state=state)
            assert same(take(resumed, 24 - stop), whole[stop:])


def test_a_run_resumed_again_and_again(tars):
    cfg = data_config(tars / "*.tar", workers=2)
    whole, state, pieces = take(build_loader(cfg, 3, 0), 9), None, []
    for _ in range(3):
        pieces += take(build_loader(cfg, 3, 0, state=state), 3)
        state = pieces[-1][1]
    assert same(pieces, whole)


def test_resuming_decodes_nothing_that_it_skips(tars, monkeypatch):
    cfg = data_config(tars / "2.tar")
    whole = take(build_loader(cfg, 2, 0), 4)
    opened = []
    view = ImageReader.training
    monkeypatch.setattr(ImageReader, "training", lambda self, raw, numbers: (opened.append(raw.key), view(self, raw, numbers))[1])
    batch, _ = next(build_loader(cfg, 2, 0, state=whole[2][1]))
    assert opened == batch.keys == whole[3][0].keys


def test_labels_keys_and_images(tars):
    batch, state = next(build_loader(data_config(tars / "{0..5}.tar", flip=False), 4, 0))
    numbers = [int(key[-5:]) for key in batch.keys]
    assert batch.labels.tolist() == numbers and batch.labels.dtype == torch.int64
    assert batch.keys[0].split("/")[0] in {f"{i}.tar" for i in range(6)}
    assert batch.images.shape == (4, 3, 16, 16) and batch.images.min() >= 0 and batch.images.max() <= 1
    assert json.loads(json.dumps(state)) == state


def test_each_epoch_and_seed_crops_anew(tmp_path):
    write_shards(tmp_path, [1])
    cfg = data_config(tmp_path / "0.tar", crop="random", crop_min=8, flip=False)
    (first, _), (second, _) = take(build_loader(cfg, 1, 0), 2)
    other, _ = next(build_loader(cfg, 1, 1))
    assert not torch.equal(first.images, second.images) and not torch.equal(first.images, other.images)


def test_number_of_samples_is_what_the_config_says(tars):
    assert len_samples(data_config(tars / "*.tar")) is None
    assert len_samples(data_config(tars / "*.tar", samples=32)) == 32


def test_changed_processes_or_data_are_refused_with_the_number_to_use(tars):
    where = tars / "*.tar"
    _, state = next(build_loader(data_config(where, workers=2), 3, 0, 1, 2))
    for args, options, line in [
        ((1, 3), {"workers": 2}, "resume with 2 processes"),
        ((1, 2), {"workers": 1}, "data.workers=2"),
        ((0, 2), {"workers": 2}, "rank 1, not of rank 0"),
        ((1, 2), {"workers": 2, "shuffle_buffer": 6}, "data.shuffle_buffer=5"),
    ]:
        with pytest.raises(CheckpointError, match=line):
            build_loader(data_config(where, **options), 3, 0, *args, state=state)
    with pytest.raises(CheckpointError, match="names 5 shards, named 6"):
        build_loader(data_config(tars / "{0..4}.tar", workers=2), 3, 0, 1, 2, state=state)
    with pytest.raises(CheckpointError, match="other shards"):
        build_loader(data_config(tars / "{1,0,2,3,4,5}.tar", workers=2), 3, 0, 1, 2, state=state)
    with pytest.raises(CheckpointError, match="saved state"):
        build_loader(data_config(where, workers=2), 3, 0, 1, 2, start_step=3)


def test_fewer_shards_than_streams(tars):
    state = next(build_loader(data_config(tars / "{0..2}.tar", workers=4), 2, 0, 0, 2))[1]
    assert state["workers"] == 1   # 3 shards over 2 ranks feed one worker each
    with pytest.raises(DataError, match="3 shards cannot feed 4 processes"):
        build_loader(data_config(tars / "{0..2}.tar"), 2, 0, 0, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_the_same_batches_as_the_disk(tars, served, workers):
    url, *_ = served
    local = take(build_loader(data_config(tars / "{0..5}.tar", workers=workers), 4, 0), 10)
    assert same(take(build_loader(data_config(f"{url}/{{0..5}}.tar", workers=workers), 4, 0), 10), local)


def test_a_broken_connection_is_taken_up_where_it_broke(tars, served, monkeypatch):
    monkeypatch.setattr(shards_module.time, "sleep", lambda seconds: None)
    url, failing, refusing = served
    failing["/2.tar"] = 2
    expected = [s["__key__"] for s in shard_samples(str(tars / "2.tar"), 1)]
    assert [s["__key__"] for s in shard_samples(f"{url}/2.tar", 1)] == expected and len(expected) == 8
    assert failing["/2.tar"] == 0
    refusing["/2.tar"] = 3
    assert [s["__key__"] for s in shard_samples(f"{url}/2.tar", 1)] == expected
    refusing["/2.tar"] = 100
    with pytest.raises(DataError, match=r"2\.tar is damaged or unreachable after sample 0 .*503"):
        list(shard_samples(f"{url}/2.tar"))
    refusing["/2.tar"], failing["/2.tar"] = 0, 100
    with pytest.raises(DataError, match=r"2\.tar is damaged or unreachable after sample"):
        list(shard_samples(f"{url}/2.tar"))


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_and_damaged_shards(tars, served, tmp_path, workers):
    url, *_ = served
    (tmp_path / "cut.tar").write_bytes((tars / "0.tar").read_bytes()[:6000])
    (tmp_path / "text.tar").write_text("no archive")
    for source, line in [
        (f"{url}/99.tar", "no such file"),
        (tmp_path / "cut.tar", "cut.tar is damaged"),
        (tmp_path / "text.tar", "text.tar is damaged"),
    ]:
        with pytest.raises(DataError, match=line) as error:
            take(build_loader(data_config(source, workers=workers), 4, 0), 4)
        assert "\n" not in str(error.value)


def test_shards_without_images_end_with_one_line(tmp_path):
    write_shards(tmp_path, [0, 0])
    with pytest.raises(DataError, match="2 shards in a row hold no sample"):
        next(build_loader(data_config(tmp_path / "*.tar"), 4, 0))
    with pytest.raises(DataError, match="hold no sample"):
        list(validation_batches(data_config("none", val=str(tmp_path / "*.tar")), 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_samples_are_skipped_counted_and_listed(tmp_path, workers):
    write_shards(tmp_path, [6, 6], bad=(2, 7))
    listed = tmp_path / "quarantine.jsonl"
    loader = build_loader(data_config(tmp_path / "*.tar", workers=workers, bad_fraction=0.5), 5, 0, quarantine=listed)
    batches = take(loader, 4)   # two epochs
    keys = [k for b, _ in batches for k in b.keys]
    assert sorted(keys) == sorted(2 * [f"{i // 6}.tar/{i:05d}" for i in range(12) if i not in (2, 7)])
    assert sorted(json.loads(line)["key"] for line in listed.read_text().splitlines()) == ["0.tar/00002", "1.tar/00007"]
    assert batches[-1][1]["bad"] in (3, 4)   # the last one may stand after the last batch
    with pytest.raises(DataError, match="bad_fraction"):
        take(build_loader(data_config(tmp_path / "*.tar", workers=workers, bad_fraction=0.0), 5, 0), 3)


def test_shards_of_unreadable_samples_end(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_BAD_RUN", 20)
    write_shards(tmp_path, [3], bad=(0, 1, 2))
    with pytest.raises(DataError, match="could not be read"):
        next(build_loader(data_config(tmp_path / "*.tar", bad_fraction=1.0), 4, 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("limit", [None, 10])
def test_validation_gives_each_sample_once_in_order(tars, workers, world, limit):
    cfg = data_config("none", val=str(tars / "{0..5}.tar"), workers=workers, val_limit=limit)
    names = [[k[-5:] for b in validation_batches(cfg, 3, rank, world) for k in b.keys] for rank in range(world)]
    order = [f"{i:05d}" for i in range(limit or 32)]
    assert names == [order[rank::world] for rank in range(world)]


def test_an_unreadable_validation_sample_is_an_error(tmp_path):
    write_shards(tmp_path, [5], bad=(3,))
    with pytest.raises(DataError, match=r"0\.tar/00003: not an image"):
        list(validation_batches(data_config("none", val=str(tmp_path / "0.tar")), 2))


def test_other_image_types_in_shards_and_labels_that_are_no_numbers(tmp_path):
    import io
    import tarfile

    from data_images import encoded
    from PIL import Image

    picture = Image.open(io.BytesIO(jpeg(0)))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("a.png", encoded(picture, "PNG")), ("b.WEBP", encoded(picture, "WEBP")), ("c.jpeg", jpeg(1)),
                           ("d.jpg", jpeg(2)), ("d.cls", b"cat"), ("e.cls", b"1"), ("f.jpg", jpeg(3))]:   # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    listed = tmp_path / "q.jsonl"
    batch, _ = next(build_loader(data_config(tmp_path / "a.tar", bad_fraction=1.0, shuffle_buffer=1), 4, 0, quarantine=listed))
    assert batch.keys == [f"a.tar/{k}" for k in "abcf"] and batch.labels is None
    reasons = [json.loads(line)["reason"] for line in listed.read_text().splitlines()]
    assert "not a number" in reasons[0] and "no image" in reasons[1]


def test_read_ahead_is_one_item_ahead_and_passes_errors_on():
    made = []

    def items():
        for i in range(4):
            made.append(i)
            yield i
        raise DataError("end")

    ahead = read_ahead(items())
    assert next(ahead) == 0
    threading.Event().wait(0.05)
    assert made == [0, 1]
    assert [next(ahead), next(ahead), next(ahead)] == [1, 2, 3]
    with pytest.raises(DataError, match="end"):
        next(ahead)
