"""Cached latents: what is stored of images, what training and validation read of it, what is refused."""

import io
import json
import math
import tarfile

import pytest
import torch
from data_images import data_config, jpeg, write_shards
from data_latents import CLASSES, Toy, cache, image_folder, latent_config
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from test_loader import take

from tokenizers_lab.data.batch import ImageBatch, LatentBatch
from tokenizers_lab.data.latents import LatentReader, find_latent_manifest, read_latent_manifest
from tokenizers_lab.data.loader import build_loader, len_samples, validation_batches
from tokenizers_lab.data.sampling import sample_index, view_numbers
from tokenizers_lab.errors import CheckpointError, ConfigError, DataError, InputError
from tokenizers_lab.eval import latent_cache

FORMATS = ["safetensors", "webdataset"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("photos") / "set")


@pytest.fixture(scope="module")
def caches(photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return {name: cache(photos, root / name, format=name, moments=True) for name in FORMATS}


def encoded(photos, **options):
    """(latents, mirrored latents, spread, label) of every image, from the tokenizer itself, in order."""
    toy, rows = Toy(), {}
    for batch in validation_batches(data_config("none", val=str(photos), size=16, **options), 1):
        plain, mirrored = toy.encode(batch.images), toy.encode(batch.images.flip(3))
        std = plain.posterior.std.transpose(1, 2).reshape(1, 3, 4, 4) / toy.latent_std[:, None, None]
        rows[batch.keys[0]] = plain.latents[0], mirrored.latents[0], std[0], None if batch.labels is None else int(batch.labels)
    return {key: tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in row) for key, row in rows.items()}


def batches_of(folder, n=6, **options):
    """All samples of a source in validation's order, as one batch."""
    parts = list(validation_batches(latent_config("none", val=str(folder), **options), n))
    spread = None if parts[0].spread is None else torch.cat([b.spread for b in parts])
    labels = None if parts[0].labels is None else torch.cat([b.labels for b in parts])
    return LatentBatch(torch.cat([b.latents for b in parts]), [key for b in parts for key in b.keys], labels, spread)


def same(a, b):
    for (x, x_state), (y, y_state) in zip(a, b, strict=True):
        assert x.keys == y.keys and x_state == y_state and torch.equal(x.latents, y.latents) and torch.equal(x.labels, y.labels)
    return True


@pytest.mark.parametrize("form", FORMATS)
def test_validation_is_what_the_tokenizer_gives_in_order(photos, caches, form):
    expected, found = encoded(photos), batches_of(caches[form])
    assert found.keys == list(expected) and found.latents.dtype == torch.float32
    for i, (latents, _, spread, label) in enumerate(expected.values()):
        torch.testing.assert_close(found.latents[i], latents)
        torch.testing.assert_close(found.spread[i], spread)
        assert int(found.labels[i]) == label
    halves = [[k for b in validation_batches(latent_config("x", val=str(caches[form])), 2, r, 2) for k in b.keys] for r in (0, 1)]
    assert halves == [list(expected)[0::2], list(expected)[1::2]]


def test_training_mirrors_by_the_numbers_of_the_sample(photos, caches):
    expected = encoded(photos)
    names, mirrored = list(expected), 0
    for step, (batch, _) in enumerate(take(build_loader(latent_config(caches["safetensors"]), 3, seed=5), 12)):
        for i, key in enumerate(batch.keys):
            position = 3 * step + i
            assert key == names[sample_index(position, 11, 5)]
            flip = view_numbers(5, position)[3] < 0.5
            mirrored += flip
            torch.testing.assert_close(batch.latents[i], expected[key][1 if flip else 0])
            assert int(batch.labels[i]) == expected[key][3]
    assert 6 < mirrored < 30


def test_streams_mirror_half_and_give_each_sample_once_an_epoch(photos, caches):
    expected = encoded(photos)
    seen, mirrored = [], 0
    for batch, _ in take(build_loader(latent_config(caches["webdataset"]), 11, seed=1), 4):
        for i, key in enumerate(batch.keys):
            number = int(key.rpartition("/")[2])
            plain, flipped, _, label = expected[list(expected)[number]]
            flip = torch.equal(batch.latents[i], flipped)
            assert flip or torch.equal(batch.latents[i], plain)
            mirrored += flip
            seen.append(number)
            assert int(batch.labels[i]) == label
    assert all(sorted(seen[e : e + 11]) == list(range(11)) for e in (0, 11, 22, 33)) and 10 < mirrored < 34
    plain = take(build_loader(latent_config(caches["webdataset"], flip=False), 11, seed=1), 2)
    assert all(any(torch.equal(row, e[0]) for e in expected.values()) for batch, _ in plain for row in batch.latents)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_what_it_would_have_read(caches, form, workers):
    cfg = latent_config(caches[form], workers=workers)
    for rank in range(2):
        if form == "webdataset" and workers:
            cfg = latent_config(caches[form], workers=1)      # three shards over two processes
        whole = take(build_loader(cfg, 2, 7, rank, 2), 9)
        state = json.loads(json.dumps(whole[3][1]))
        assert same(take(build_loader(cfg, 2, 7, rank, 2, start_step=4, state=state), 5), whole[4:])


@pytest.mark.parametrize("form", FORMATS)
def test_number_of_samples_is_known(caches, form):
    assert len_samples(latent_config(caches[form])) == 11


def test_statistics_are_those_of_all_plain_latents(photos, caches):
    for form in FORMATS:
        manifest, latents = read_latent_manifest(caches[form]), batches_of(caches[form]).latents.double()
        torch.testing.assert_close(manifest.mean, latents.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(manifest.std, latents.std((0, 2, 3), correction=0), rtol=1e-10, atol=1e-12)


def test_what_the_manifest_says(caches, photos, tmp_path):
    found = read_latent_manifest(caches["safetensors"])
    assert (found.tokenizer, found.system, found.source, found.size) == ("toys/one", "toy", "images", 16)
    assert (found.shape, found.flips, found.moments, found.sampled, found.dtype) == ((3, 4, 4), True, True, False, "float32")
    assert (found.samples, found.labelled, found.classes, found.skipped) == (11, 11, list(CLASSES), [])
    assert [shard.samples for shard in found.shards] == [4, 4, 3]
    from tokenizers_lab.eval.provenance import weights_sha256

    assert found.weights_sha256 == weights_sha256(Toy()) and found.folder == str(caches["safetensors"])
    files = sorted(path.name for path in caches["safetensors"].iterdir())
    assert files == ["latents.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    manifest = tmp_path / "numbers.jsonl"      # labels that are a manifest's own numbers have no names
    rows = [{"file": str(path), "label": 7 * i} for i, path in enumerate(sorted(photos.rglob("*.jpg")))]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_latent_manifest(cache(manifest, tmp_path / "numbers"))
    assert found.classes == [] and batches_of(tmp_path / "numbers").labels.tolist() == [7 * i for i in range(11)]


def test_files_are_as_feature_files_of_generators_are(photos, caches):
    expected = encoded(photos)
    with safe_open(caches["safetensors"] / "shard-00001.safetensors", "pt") as file:
        assert json.loads(file.metadata()["keys"]) == list(expected)[4:8]
    tensors = load_file(caches["safetensors"] / "shard-00001.safetensors")
    assert sorted(tensors) == ["labels", "latents", "latents_flip", "spread", "spread_flip"]
    assert tensors["labels"].dtype == torch.int64 and tensors["latents_flip"].shape == (4, 3, 4, 4)
    torch.testing.assert_close(tensors["latents_flip"], torch.stack([row[1] for row in list(expected.values())[4:8]]))
    with tarfile.open(caches["webdataset"] / "shard-00002.tar") as tar:
        assert tar.getnames() == [f"{i:08d}.{end}" for i in range(8, 11) for end in ("safetensors", "json")]
        about = json.load(tar.extractfile("00000009.json"))
        values = load(tar.extractfile("00000009.safetensors").read())
    key = list(expected)[9]
    assert about == {"key": key, "label": expected[key][3]}
    torch.testing.assert_close(values["latents_flip"], expected[key][1])


@pytest.mark.parametrize("form", FORMATS)
def test_neither_batch_sizes_nor_workers_change_a_byte(photos, caches, tmp_path, monkeypatch, form):
    monkeypatch.setattr(latent_cache, "WORTH_WORKERS", 1)
    again = cache(photos, tmp_path / "again", batch_size=2, workers=2, format=form, moments=True)
    for path in caches[form].iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_draws_are_of_the_posterior_and_of_the_image_alone(photos, tmp_path):
    one = cache(photos, tmp_path / "one", sample=True, limit=4, flips=False)
    two = cache(photos, tmp_path / "two", sample=True, flips=True, batch_size=5)
    other = cache(photos, tmp_path / "other", sample=True, seed=1)
    plain, drawn, expected = batches_of(one, flip=False), batches_of(two), encoded(photos)
    assert all(torch.equal(row, drawn.latents[drawn.keys.index(key)]) for key, row in zip(plain.keys, plain.latents))
    assert not torch.equal(batches_of(other).latents, drawn.latents)
    noise = torch.stack([(drawn.latents[i] - row[0]) / row[2] for i, row in enumerate(expected.values())])
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1 and drawn.spread is None
    mirrored = load_file(two / "shard-00000.safetensors")["latents_flip"]
    rows = list(expected.values())[:4]      # the toy's spread of a mirrored image is the mirrored spread
    own = (mirrored - torch.stack([row[1] for row in rows])) / torch.stack([row[2].flip(2) for row in rows])
    assert abs(own.std() - 1) < 0.2 and (own - noise[:4]).abs().mean() > 0.5
    manifest = read_latent_manifest(two)
    assert manifest.sampled and torch.equal(manifest.std, read_latent_manifest(other).std)      # of the modes


@pytest.mark.parametrize("dtype, error", [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_the_space(photos, caches, tmp_path, dtype, error):
    half = cache(photos, tmp_path / "half", dtype=dtype, moments=True)
    assert load_file(half / "shard-00000.safetensors")["latents"].dtype == getattr(torch, dtype)
    found, whole = batches_of(half), batches_of(caches["safetensors"])
    assert found.latents.dtype == torch.float32 and not torch.equal(found.latents, whole.latents)
    torch.testing.assert_close(found.latents, whole.latents, rtol=error, atol=1e-6)
    torch.testing.assert_close(found.spread, whole.spread, rtol=error, atol=1e-6)


def test_a_permuted_order_is_one_of_all_images(photos, tmp_path):
    keys = batches_of(cache(photos, tmp_path / "shuffled", format="webdataset", shuffle=True)).keys
    assert keys != list(encoded(photos)) and sorted(keys) == sorted(encoded(photos))


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    photos = image_folder(tmp_path / "set", 14, bad=(1, 3, 4, 6, 7, 9, 10, 13))      # all of a class, a whole shard
    folder = cache(photos, tmp_path / "latents", batch_size=2)
    manifest = read_latent_manifest(folder)
    assert sorted(s["key"] for s in manifest.skipped) == sorted(
        f"{CLASSES[i % 3]}/a.{i}.jpg" for i in (1, 3, 4, 6, 7, 9, 10, 13))
    assert all("not an image" in s["reason"] and str(tmp_path) not in s["reason"] for s in manifest.skipped)
    found = batches_of(folder)
    assert manifest.samples == len(found) == 6 and found.labels.tolist() == [0, 0, 2, 2, 2, 2]
    assert found.keys == [key for key in encoded_keys(photos) if key not in {s["key"] for s in manifest.skipped}]
    with pytest.raises(DataError, match="no image that could be read"):
        cache(image_folder(tmp_path / "none", 3, bad=(0, 1, 2)), tmp_path / "nothing")


def encoded_keys(photos):
    from tokenizers_lab.data.folder import open_folder

    return list(open_folder(photos).names)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_shards(tmp_path, workers):
    tars = write_shards(tmp_path / "tars", [5, 1, 7], bad=(2, 8))
    source = str(tars / "{0..2}.tar")
    folder = cache(source, tmp_path / "latents", batch_size=2, workers=workers)
    manifest, found = read_latent_manifest(folder), batches_of(folder)
    assert [s["key"] for s in manifest.skipped] == ["0.tar/00002", "2.tar/00008"]
    assert found.labels.tolist() == [i for i in range(13) if i not in (2, 8)]
    assert [shard.samples for shard in manifest.shards] == [3, 4, 3, 1]
    few = cache(source, tmp_path / "few", limit=6, workers=workers)
    assert batches_of(few).labels.tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(ConfigError, match="--shuffle is for folders"):
        cache(source, tmp_path / "shuffled", shuffle=True)


def test_a_process_decodes_only_its_shards_of_a_stream(tmp_path):
    from tokenizers_lab.eval.latent_pieces import CacheReader, StreamedPieces, Wanted

    write_shards(tmp_path, [5, 1, 7])
    reader, urls = CacheReader(data_config("x")), tuple(str(tmp_path / f"{i}.tar") for i in range(3))
    for rank, there, expected in ((0, [], [0, 0, 2, 2]), (1, [], [1, 1, 3]), (0, [2], [0, 0]), (1, [1, 3], [])):
        pieces = list(StreamedPieces(urls, None, reader, 2, 4, Wanted(rank, 2, frozenset(there))))
        assert [piece.stream for piece in pieces] == [*expected, 4] and not pieces[-1].keys      # the last one tells how many
        assert [int(key[-5:]) // 4 for piece in pieces for key in piece.keys] == [
            piece.stream for piece in pieces for _ in piece.keys]


def test_images_with_and_without_a_class(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("b.cls", b"4"), ("c.cls", b"1"), ("d.jpg", jpeg(2)),
                           ("d.cls", b"x")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for form in FORMATS:
        folder = cache(tmp_path / "a.tar", tmp_path / form, format=form)
        manifest = read_latent_manifest(folder)
        assert manifest.samples == 2 and manifest.labelled == 1 and len(manifest.skipped) == 2
        assert [b.labels for b in validation_batches(latent_config("x", val=str(folder)), 1)] == [None, torch.tensor([4])]
        assert batches_of(folder).labels is None


def test_sources_of_images_are_read_as_images(photos, caches):
    cfg = latent_config(photos, val=str(caches["safetensors"]), crop="random", crop_min=8)
    batch, _ = next(build_loader(cfg, 4, 0))
    assert isinstance(batch, ImageBatch) and batch.images.shape == (4, 3, 16, 16) and batch.labels is not None
    assert isinstance(next(validation_batches(cfg, 4)), LatentBatch)
    cfg = latent_config(caches["webdataset"], val="sample:photos", val_limit=2)
    assert isinstance(next(build_loader(cfg, 4, 0))[0], LatentBatch) and isinstance(next(validation_batches(cfg, 2)), ImageBatch)
    assert find_latent_manifest(photos) is None
    with pytest.raises(DataError, match=r"holds no latents: make them by `toklab latents"):
        read_latent_manifest(photos)


def test_image_shards_too(tmp_path):
    tars = write_shards(tmp_path, [5, 4])
    batch, _ = next(build_loader(latent_config(tars / "*.tar"), 3, 0))
    assert isinstance(batch, ImageBatch) and len(batch.labels) == 3


def test_shards_elsewhere(caches):
    import fsspec

    remote = fsspec.filesystem("memory")
    for path in caches["webdataset"].iterdir():
        remote.pipe(f"/latents-test/{path.name}", path.read_bytes())
    url = "memory://latents-test/shard-{00000..00002}.tar"
    local, far = (take(build_loader(latent_config(where), 4, 0), 5) for where in (caches["webdataset"], url))
    assert same(far, local)
    found, here = read_latent_manifest(url), read_latent_manifest(caches["webdataset"])
    assert torch.equal(found.mean, here.mean) and found.folder == "memory://latents-test"
    remote.rm("/latents-test/latents.json")      # samples can be read without it
    assert find_latent_manifest(url) is None and same(take(build_loader(latent_config(url), 4, 0), 5), local)
    remote.rm("/latents-test", recursive=True)


def test_without_mirrored_latents_training_must_not_mirror(photos, tmp_path):
    for form in FORMATS:
        folder = cache(photos, tmp_path / form, format=form, flips=False)
        with pytest.raises(DataError, match=r"no latents of mirrored images: set data.flip=false"):
            build_loader(latent_config(folder), 2, 0)
        assert len(next(build_loader(latent_config(folder, flip=False), 2, 0))[0]) == 2
        assert len(batches_of(folder)) == 11      # validation needs none
    (folder / "latents.json").unlink()
    with pytest.raises(DataError, match="holds no latents_flip"):
        take(build_loader(latent_config(folder / "*.tar", bad_fraction=0.0), 4, 0), 4)


def test_bad_samples_are_skipped_counted_and_listed(photos, tmp_path):
    folder = cache(photos, tmp_path / "latents", moments=True)
    file = folder / "shard-00001.safetensors"
    tensors = load_file(file)
    tensors["latents"][1, 0, 2, 2] = math.nan
    tensors["spread"][3, 2, 0, 0] = math.inf
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file(tensors, file, about)
    listed = tmp_path / "q.jsonl"
    names = encoded_keys(photos)
    loader = build_loader(latent_config(folder, flip=False, bad_fraction=0.5), 11, 0, quarantine=listed)
    assert not {names[5], names[7]} & {key for batch, _ in take(loader, 3) for key in batch.keys}
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted([names[5], names[7]])
    assert all("is not finite" in line["reason"] for line in lines)
    with pytest.raises(DataError, match=rf"{names[5]} in .*latents is not finite"):
        list(validation_batches(latent_config("x", val=str(folder)), 4))
    left = []
    kept = list(validation_batches(latent_config("x", val=str(folder)), 4, on_bad=left.append))
    assert sum(map(len, kept)) == 9 and len(left) == 2
    save_file({**tensors, "latents": tensors["latents"][:, :2].contiguous()}, file, about)
    with pytest.raises(DataError, match=r"latents is torch.float32 \(2, 4, 4\), not float \(3, 4, 4\)"):
        list(validation_batches(latent_config("x", val=str(folder)), 4))


def test_bad_samples_of_streams(tmp_path):
    good = save({"latents": torch.zeros(3, 4, 4)})
    samples = [("a.safetensors", good), ("b.safetensors", b"nothing"), ("c.safetensors", save({"other": torch.zeros(3)})),
               ("d.safetensors", save({"latents": torch.zeros(2, 4, 4)})), ("e.safetensors", good), ("e.json", b"[1"),
               ("f.safetensors", good), ("f.json", b'{"label": 5}'), ("g.json", b"{}"),
               ("h.safetensors", save({"latents": torch.full((3, 4, 4), math.inf)}))]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    listed = tmp_path / "q.jsonl"
    cfg = latent_config(tmp_path / "a.tar", flip=False, bad_fraction=1.0, shuffle_buffer=1)
    batch, _ = next(build_loader(cfg, 3, 0, quarantine=listed))      # the third one is of the next epoch
    assert batch.keys == ["a.tar/a", "a.tar/f", "a.tar/a"] and batch.labels is None
    reasons = {line["key"][-1]: line["reason"] for line in map(json.loads, listed.read_text().splitlines())}
    assert sorted(reasons) == list("bcdegh")
    for key, text in {"b": "cannot be read", "c": "holds no latents", "d": "(2, 4, 4), not float (3, 4, 4)", "e": "its .json",
                      "g": "has no image", "h": "is not finite"}.items():
        assert text in reasons[key]


def test_damage_is_one_line(photos, tmp_path):
    folder = cache(photos, tmp_path / "latents")
    text, shard = (folder / "latents.json").read_text(), (folder / "shard-00001.safetensors").read_bytes()

    def error(kind=CheckpointError):
        with pytest.raises(kind) as raised:
            build_loader(latent_config(folder), 2, 0)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    for content in ("{", "[]", text.replace('"shape"', '"shapes"'), text.replace('"samples": 11', '"samples": 12')):
        (folder / "latents.json").write_text(content)
        assert "latents.json is damaged" in error()
    (folder / "latents.json").write_text(text.replace('"format": 1', '"format": 9'))
    assert "has the format 9, this version reads 1" in error()
    (folder / "latents.json").write_text(text)
    (folder / "shard-00001.safetensors").write_bytes(shard[:-5])
    assert "shard-00001.safetensors is damaged" in error(DataError)
    (folder / "shard-00001.safetensors").write_bytes((folder / "shard-00002.safetensors").read_bytes())
    assert "holds 3 samples, latents.json says 4" in error(DataError)
    (folder / "shard-00001.safetensors").unlink()
    assert "shard-00001.safetensors is missing" in error(DataError)
    (folder / "latents.json").rename(folder / "latents.partial.json")
    assert "are not finished: run `toklab latents` again" in error(DataError)


def test_a_cache_made_anew_in_its_place_is_read_anew(photos, tmp_path):
    old = batches_of(cache(photos, tmp_path / "latents", sample=True))
    for path in list((tmp_path / "latents").iterdir()):
        path.unlink()
    new = batches_of(cache(photos, tmp_path / "latents", sample=True, seed=3, limit=9))
    assert len(new) == 9 and not torch.equal(new.latents[0], old.latents[0])


def test_few_files_are_kept_open(photos, tmp_path, monkeypatch):
    from functools import lru_cache

    from tokenizers_lab.data import latents

    folder = cache(photos, tmp_path / "latents", shard_size=1)
    kept = lru_cache(maxsize=2)(latents._open.__wrapped__)
    monkeypatch.setattr(latents, "_open", kept)
    assert len(take(build_loader(latent_config(folder), 4, 0), 6)) == 6 and kept.cache_info().currsize == 2


@pytest.mark.parametrize("kind, options, error, text", [
    ("codes", {}, InputError, "gives codes only"),
    ("plain", {"moments": True}, InputError, "no posterior: its latents are always the same; leave out --moments"),
    ("plain", {"sample": True}, InputError, "leave out --sample"),
    ("gaussian", {"sample": True, "moments": True}, ConfigError, "choose one"),
    ("gaussian", {"shard_size": 0}, ConfigError, "--shard-size must be at least 1"),
    ("gaussian", {"dtype": "int8"}, ConfigError, "float32, bfloat16, float16"),
])
def test_what_cannot_be_stored(photos, tmp_path, kind, options, error, text):
    with pytest.raises(error, match=text):
        cache(photos, tmp_path / "out", kind=kind, **options)
    assert not (tmp_path / "out").exists()      # nothing was begun that would stand in the way


def test_a_tokenizer_without_a_posterior(photos, caches, tmp_path):
    found = batches_of(cache(photos, tmp_path / "plain", kind="plain"))
    assert torch.equal(found.latents, batches_of(caches["safetensors"]).latents) and found.spread is None


def test_a_reader_checks_the_options_of_images():
    with pytest.raises(ConfigError, match=r"data\.crop"):
        LatentReader(latent_config("x", crop="middle")).check()
