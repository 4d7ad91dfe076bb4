"""`toklab tokenize` on one machine: what it stores, that it is what `encode` says, and who can read it."""

import functools
import http.server
import json
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
import webdataset
from tokenized_sources import clip, contents, picture, save_network, save_other, tokenize, write_clips, write_images, write_shards

from tokenizers_lab.cli import main as cli
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.data.decode import read_image
from tokenizers_lab.data.tokens import read_token_manifest, read_token_shard, read_tokens, token_shards
from tokenizers_lab.data.transforms import fit_image
from tokenizers_lab.errors import DataError
from tokenizers_lab.hub import load, weights_sha256
from tokenizers_lab.tokenizing import encoding
from tokenizers_lab.tokenizing.plan import member_name

SECOND = 16_000
LENGTHS = [SECOND, 9000, 30_000, 320, 3 * SECOND, 12_345, 20_000]


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TOKLAB_DEBUG", raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """By system: a saved folder."""
    root = tmp_path_factory.mktemp("models")
    return {system: save_network(system, root / system) for system in ("rectok", "lm_spt", "dm_codec")}


def words_of(capsys, *words) -> str:
    """What a run that fails says, which is one line."""
    capsys.readouterr()
    assert tokenize(*words) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
@pytest.mark.parametrize("system", ["lm_spt", "dm_codec"])
def test_codes_of_clips_are_those_of_encode(tmp_path, model, system, form):
    manifest = write_clips(tmp_path / "clips", LENGTHS, rate=22_050)
    options = ["--batch-size", 3, "--shard-size", 5, "--window", 1.5, "--batch-seconds", 4, "--format", form]
    assert tokenize(manifest, "out", "--model", model[system], *options) == 0
    tokenizer = load(model[system])
    samples = list(read_tokens("out"))
    assert [sample.key for sample in samples] == [f"{i}.flac" for i in range(len(LENGTHS))]
    for i, sample in enumerate(samples):
        audio, _ = read_audio(tmp_path / "clips" / f"{i}.flac", tokenizer.sample_rate, 1)
        with torch.inference_mode():
            codes = tokenizer.encode(audio[None]).codes[0]
        assert len(codes.unique()) > 3 or codes.numel() < 20
        assert sample.kind == "codes" and sample.value.dtype == np.uint16
        assert torch.equal(sample.tensor, codes)
        about = sample.about
        assert about["samples"] == LENGTHS[i]
        assert (about["original_rate"], about["sample_rate"]) == (22_050, tokenizer.sample_rate)
        assert about["seconds"] == pytest.approx(LENGTHS[i] / 22_050)
        said = [about[name] for name in ("text", "speaker", "language", "class")]
        assert said == [f"Clip {i}, é.", f"s{i % 2}", "en", f"w{i % 3}"]


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_latents_of_images_are_those_of_encode(tmp_path, model, form, dtype):
    root = write_images(tmp_path / "images", 7, bad=(3,))
    options = ["--batch-size", 2, "--shard-size", 4, "--bad-fraction", 0.2, "--format", form, "--dtype", dtype]
    assert tokenize(root, "out", "--model", model["rectok"], *options) == 0
    tokenizer = load(model["rectok"])
    samples = {sample.key: sample for sample in read_tokens("out")}
    assert sorted(samples) == sorted(f"class {i % 2}/{i}.v1.png" for i in range(7) if i != 3)
    for key, sample in samples.items():
        pixels = torch.from_numpy(np.array(fit_image(read_image(root / key), 16))).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            latents = tokenizer.encode(pixels).latents[0]
        assert sample.value.dtype == dtype and sample.value.shape == latents.shape
        assert torch.allclose(sample.tensor, latents, atol=1e-5 if dtype == "float32" else 2e-3)
        assert sample.about["class"] == key.split("/")[0] and sample.about["label"] == int(key[6])
        assert (sample.about["file_width"], sample.about["file_height"], sample.about["crop"]) == (24, 20, 16)
    manifest = read_token_manifest("out")
    assert manifest["samples"] == 6 and manifest["skipped_samples"] == 1
    assert manifest["model_sha256"] == weights_sha256(model["rectok"])
    [skipped] = manifest["skipped"]
    assert skipped["key"] == "class 1/3.v1.png" and "not an image" in skipped["reason"] and skipped["shard"] in manifest["files"]


def test_whole_images_of_many_sizes(tmp_path, model):
    root = tmp_path / "images"
    root.mkdir()
    sizes = [(24, 20), (9, 33), (24, 20), (16, 16)]
    for i, size in enumerate(sizes):
        (root / f"{i}.png").write_bytes(picture(i, *size))
    assert tokenize(root, "out", "--model", model["rectok"], "--whole") == 0
    shapes = [sample.value.shape for sample in read_tokens("out")]
    assert shapes == [(6, -(-height // 8), -(-width // 8)) for width, height in sizes]
    assert cli.call(["decode", "out", "--model", model["rectok"], "--out", "decoded", "--device", "cpu"]) == 0
    assert [read_image(f"decoded/{i}.png").size for i in range(4)] == sizes
    assert cli.call(["encode", *(str(root / f"{i}.png") for i in range(4)), "--model", model["rectok"], "--out", "alone"]) == 0
    files = [f"alone/{i}.safetensors" for i in range(4)]
    assert cli.call(["decode", *files, "--model", model["rectok"], "--out", "alone"]) == 0
    for i in range(4):
        both = [np.asarray(read_image(f"{folder}/{i}.png")).astype(int) for folder in ("decoded", "alone")]
        assert np.abs(both[0] - both[1]).max() <= 1


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_decoding_a_data_set_is_decoding_its_clips(tmp_path, model, form):
    write_clips(tmp_path / "clips", LENGTHS[:4])
    assert tokenize("clips", "out", "--model", model["lm_spt"], "--format", form) == 0
    assert cli.call(["decode", "out", "--model", model["lm_spt"], "--out", "many", "--device", "cpu"]) == 0
    files = [str(tmp_path / "clips" / f"{i}.flac") for i in range(4)]
    assert cli.call(["encode", *files, "--model", model["lm_spt"], "--out", "one"]) == 0
    assert cli.call(["decode", *(f"one/{i}.safetensors" for i in range(4)), "--model", model["lm_spt"], "--out", "one"]) == 0
    for i in range(4):
        assert (tmp_path / f"many/{i}.wav").read_bytes() == (tmp_path / f"one/{i}.wav").read_bytes()


def test_decode_refuses_what_another_model_made(tmp_path, model, capsys):
    write_clips(tmp_path / "clips", LENGTHS[:1])
    assert tokenize("clips", "out", "--model", model["lm_spt"]) == 0
    other = save_other(tmp_path / "other")
    assert cli.call(["decode", "out", "--model", other]) == cli.USER_ERROR
    assert "was encoded by other weights" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_make_a_shard_each_and_keep_what_is_said(tmp_path, model, workers):
    write_shards(tmp_path / "tars", [6, 0, 5, 1], speech=True, bad=(2, 11))      # two full blocks, none, one not full
    words = ["tars/{0..3}.tar", "out", "--model", model["lm_spt"], "--batch-size", 3, "--bad-fraction", 0.2]
    assert tokenize(*words, "--workers", workers) == 0
    assert token_shards("out") == [f"shard-{i:06d}.tar" for i in range(4)]
    keys = [[sample.key for sample in read_token_shard(f"out/{name}")] for name in token_shards("out")]
    assert keys == [[f"set/{i:05d}" for i in (0, 1, 3, 4, 5)], [], [f"set/{i:05d}" for i in range(6, 11)], []]
    first = next(read_tokens("out"))
    assert first.about["source"]["dnsmos"] == 3.5 and first.about["file"] == "0.tar/set/00000"
    assert (first.about["text"], first.about["label"]) == ("Sample 0.", 0)
    skipped = read_token_manifest("out")["skipped"]
    assert [bad["key"] for bad in skipped] == ["set/00002", "set/00011"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_bytes_depend_on_nothing_but_the_work(tmp_path, model, workers):
    write_clips(tmp_path / "clips", LENGTHS)
    words = ["--model", model["lm_spt"], "--batch-size", 2, "--shard-size", 3]
    assert tokenize("clips", "a", *words, "--workers", 0) == 0
    assert tokenize("clips", "b", *words, "--workers", workers) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_webdataset_reads_the_shards(tmp_path, model):
    write_clips(tmp_path / "clips", LENGTHS[:3])
    assert tokenize("clips", "out", "--model", model["lm_spt"]) == 0
    read = list(webdataset.WebDataset(str(tmp_path / "out/shard-000000.tar"), shardshuffle=False).decode())
    ours = list(read_tokens("out"))
    assert [sample["__key__"] for sample in read] == ["0", "1", "2"]
    for theirs, mine in zip(read, ours):
        assert np.array_equal(theirs["codes.npy"], mine.value) and theirs["json"] == mine.about


def test_plain_readers_read_the_shards(tmp_path, model):
    import pyarrow.parquet as pq

    write_clips(tmp_path / "clips", LENGTHS[:3])
    for form in ("webdataset", "parquet"):
        assert tokenize("clips/clips.jsonl", form, "--model", model["lm_spt"], "--format", form) == 0
    mine = list(read_tokens("webdataset"))
    with tarfile.open("webdataset/shard-000000.tar") as tar:
        assert tar.getnames() == [f"{i}.{ending}" for i in range(3) for ending in ("codes.npy", "json")]
        assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in tar.getmembers())
    table = pq.read_table("parquet/shard-000000.parquet")
    assert str(table.schema.field("codes").type) == "list<element: list<element: uint16>>"
    assert table.schema.metadata[b"model_sha256"].decode() == weights_sha256(model["lm_spt"])
    for row, sample in zip(table.to_pylist(), mine):
        assert np.array_equal(np.array(row["codes"], np.uint16), sample.value) and row["text"] == sample.about["text"]


def test_long_clips_are_never_whole_in_memory(tmp_path, model, monkeypatch):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/long.wav").write_bytes(clip(40 * SECOND, 0, kind="WAV"))
    largest = 0
    encode = encoding.encode_pieces

    def watched(tokenizer, pieces):
        def seen():
            nonlocal largest
            for piece in pieces:
                largest = max(largest, piece.shape[-1])
                yield piece

        return encode(tokenizer, seen())

    monkeypatch.setattr(encoding, "encode_pieces", watched)
    assert tokenize("clips", "out", "--model", model["dm_codec"], "--workers", 0) == 0
    [sample] = read_tokens("out")
    assert 0 < largest <= 1 << 16 and sample.value.shape == (3, 40 * 50)


def test_a_clip_that_is_too_short_is_skipped_and_its_batch_is_not(tmp_path, model, monkeypatch):
    from tokenizers_lab.errors import InputError
    from tokenizers_lab.models.lm_spt.model import LMSPT

    write_clips(tmp_path / "clips", [SECOND, 320, 9000])
    encode = LMSPT.encode

    def refusing(self, audio, lengths=None):
        if lengths is not None and int(lengths.min()) < 1000:
            raise InputError("too short")
        return encode(self, audio, lengths)

    monkeypatch.setattr(LMSPT, "encode", refusing)
    assert tokenize("clips", "out", "--model", model["lm_spt"], "--bad-fraction", 0.5, "--workers", 0) == 0
    assert [sample.key for sample in read_tokens("out")] == ["0.flac", "2.flac"]
    [bad] = read_token_manifest("out")["skipped"]
    assert bad["key"] == "1.flac" and "too short" in bad["reason"]


def test_too_many_unreadable_samples_end_the_run(tmp_path, model, capsys):
    root = write_images(tmp_path / "images", 8, bad=(1, 2))
    words = [root, "out", "--model", model["rectok"], "--shard-size", 3]
    assert "2 of 8 samples could not be encoded, more than --bad-fraction 0.01 allows" in words_of(capsys, *words)
    with pytest.raises(DataError, match="unfinished"):
        next(read_tokens("out"))
    assert len(list(read_tokens("out", unfinished=True))) == 6
    assert tokenize(*words, "--bad-fraction", 0.25) == 0
    assert "3 of 3 shards are finished already" in capsys.readouterr().out


def test_far_too_many_end_it_early(tmp_path, model, capsys, monkeypatch):
    from tokenizers_lab.tokenizing import folder

    monkeypatch.setattr(folder, "JUDGED_FROM", 4)
    root = write_images(tmp_path / "images", 12, bad=tuple(range(12)))
    words = [root, "out", "--model", model["rectok"], "--shard-size", 2, "--batch-size", 1]
    assert "could not be encoded" in words_of(capsys, *words)
    assert len(list((tmp_path / "out").glob("*.tar"))) < 6


@pytest.mark.parametrize("change, said", [
    (["--batch-size", "4"], "was begun with --batch-size 16, not 4"),
    (["--shard-size", "2"], "was begun with --shard-size 1000, not 2"),
    (["--format", "parquet"], "was begun with --format webdataset, not parquet"),
    (["--dtype", "float16"], "was begun with --dtype float32, not float16"),
    (["--window", "3"], "was begun with --window 30.0, not 3.0"),
    (["--model", "other"], "is of another model"),
])
def test_other_work_is_refused(tmp_path, model, capsys, change, said):
    write_clips(tmp_path / "clips", LENGTHS[:2])
    assert tokenize("clips", "out", "--model", model["lm_spt"]) == 0
    save_other(tmp_path / "other")
    before = contents(tmp_path / "out")
    message = words_of(capsys, "clips", "out", "--model", model["lm_spt"], *change)
    assert message.startswith("CheckpointError: out ") and said in message
    assert contents(tmp_path / "out") == before


def test_another_listing_and_another_folder_are_refused(tmp_path, model, capsys):
    write_clips(tmp_path / "clips", LENGTHS[:2])
    assert tokenize("clips", "out", "--model", model["lm_spt"]) == 0
    (tmp_path / "clips/more.flac").write_bytes(clip(5000, 9))
    assert "is of another source" in words_of(capsys, "clips", "out", "--model", model["lm_spt"])
    assert "holds other files" in words_of(capsys, "clips", "clips", "--model", model["lm_spt"])


@pytest.mark.parametrize("words, said", [
    (["--size", "16"], "InputError: --size is for images"),
    (["--shard-size", "0"], "ConfigError: --shard-size must be above 0"),
    (["--window", "200"], "ConfigError: --window 200 is more than --batch-seconds 120"),
    (["--bad-fraction", "2"], "--bad-fraction within [0, 1]"),
])
def test_wrong_options(tmp_path, model, capsys, words, said):
    write_clips(tmp_path / "clips", LENGTHS[:1])
    assert said in words_of(capsys, "clips", "out", "--model", model["lm_spt"], *words)


@pytest.mark.parametrize("module, words, said", [
    ("ray", ["--ray", "local"], "pip install 'tokenizers-lab[ray]'"),
    ("pyarrow", ["--format", "parquet"], "pip install 'tokenizers-lab[parquet]'"),
])
def test_what_is_not_installed_is_named(tmp_path, model, capsys, monkeypatch, module, words, said):
    write_clips(tmp_path / "clips", LENGTHS[:1])
    monkeypatch.setitem(sys.modules, module, None)
    assert said in words_of(capsys, "clips", "out", "--model", model["lm_spt"], *words)


def test_latents_that_do_not_fit_float16(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr(encoding.np, "finfo", lambda _: type("tiny", (), {"max": 1e-6}))
    root = write_images(tmp_path / "images", 2)
    assert "--dtype float32" in words_of(capsys, root, "out", "--model", model["rectok"], "--dtype", "float16", "--workers", 0)


def test_names_in_a_tar():
    taken: set[str] = set()
    keys = ["a/b.c.flac", "a/b.c.wav", "/abs/x.png", "../up/x.png", ".hidden", "a/b_c"]
    assert [member_name(key, taken) for key in keys] == ["a/b_c", "a/b_c-2", "abs/x", "up/x", "_hidden", "a/b_c-3"]


def test_a_damaged_shard_is_an_error(tmp_path, model):
    write_clips(tmp_path / "clips", LENGTHS[:3])
    for form, ending in (("webdataset", "tar"), ("parquet", "parquet")):
        assert tokenize("clips", form, "--model", model["lm_spt"], "--format", form) == 0
        path = tmp_path / form / f"shard-000000.{ending}"
        path.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(DataError, match="damaged"):
            list(read_tokens(form))
    with pytest.raises(DataError, match="not a folder that toklab tokenize made"):
        next(read_tokens(tmp_path / "clips"))


def test_shards_behind_a_url(tmp_path, model):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    write_shards(tmp_path / "tars", [3, 2], speech=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "tars")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = ["--model", model["rectok"], "--workers", 0]
    try:
        assert tokenize(f"http://127.0.0.1:{server.server_port}/{{0..1}}.tar", "out", *words) == 0
    finally:
        server.shutdown()
        server.server_close()
    assert tokenize("tars/{0..1}.tar", "local", *words) == 0
    there, here = contents(tmp_path / "out"), contents(tmp_path / "local")
    del there["manifest.json"], here["manifest.json"]      # they name the source
    assert there == here


def test_the_command_line_starts_without_ray_torch_and_pyarrow():
    code = ("import sys; from tokenizers_lab.cli import main; main.build_parser(); "
            "print([m for m in ('ray', 'torch', 'pyarrow') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_manifest_tells_no_machine(tmp_path, model):
    write_clips(tmp_path / "clips", LENGTHS[:1])
    assert tokenize(tmp_path / "clips", "out", "--model", model["lm_spt"]) == 0
    said = json.loads((tmp_path / "out/manifest.json").read_text())
    assert said["source"] == "clips" and str(tmp_path) not in json.dumps(said)
