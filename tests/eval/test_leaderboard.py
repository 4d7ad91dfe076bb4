"""The leaderboard's parts: the same items for all, rates, speed and memory, rows that failed, several processes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from leaderboards import Broken, codecs, images, measured, ours, speech
from PIL import Image

from tokenizers_lab.cli.main import call
from tokenizers_lab.data.audio import read_audio
from tokenizers_lab.errors import CheckpointError, DataError, InputError, WeightsMissing
from tokenizers_lab.eval import compare, compare_costs
from tokenizers_lab.eval.compare import compare_models, write_comparison
from tokenizers_lab.eval.compare_costs import Job, image_rates, measure_costs, peak_growth
from tokenizers_lab.eval.compare_examples import ORIGINAL, Keeper
from tokenizers_lab.eval.compare_page import comparison_page, plot_data
from tokenizers_lab.eval.compare_text import markdown
from tokenizers_lab.eval.peers import RANDOM_PEERS, load_peer
from tokenizers_lab.tokenizer import ImageEncoding


@pytest.fixture(scope="module")
def spoken():
    return speech(codecs())


@pytest.fixture(scope="module")
def seen():
    return images()


def test_the_same_items_for_all_models(spoken, tmp_path):
    result, examples = spoken
    assert len(examples.items) == 2 and {item.key for item in examples.items} < set(result["keys"])
    for item in examples.items:
        assert list(item.made) == ["ours", "mimi:random-tiny@2", "mimi:random-tiny"]
        made, rate = item.made["ours"]
        assert rate == 16_000 and made.shape == (1, 8_000) and item.original[1] == 24_000
    tokenizer = ours()
    audio = compare_costs.network_input(
        compare_costs.Clip(examples.items[0].key, *examples.items[0].original), tokenizer)[None]
    torch.testing.assert_close(examples.items[0].made["ours"][0], tokenizer.reconstruct(audio)[0])
    write_comparison(result, tmp_path, examples)
    written = json.loads((tmp_path / "compare.json").read_text())["examples"]
    assert [entry["key"] for entry in written] == [item.key for item in examples.items]
    audio, rate = read_audio(tmp_path / written[1]["files"]["mimi:random-tiny"])
    torch.testing.assert_close(audio, examples.items[1].made["mimi:random-tiny"][0], atol=1 / 2**15, rtol=0)


def test_which_items_does_not_depend_on_their_order():
    class Row:
        role = "model"

    keys, pictures = [f"{i}.png" for i in range(20)], torch.rand(20, 3, 4, 4)

    def kept(order, count):
        keeper = Keeper(count)
        for i in order:
            keeper.image(Row, pictures[i : i + 1], 1 - pictures[i : i + 1], [keys[i]])
        return keeper.of_all_processes()

    forward, backward = kept(range(20), 5), kept(range(19, -1, -1), 5)
    assert list(forward) == list(backward) and len(forward) == 5 and list(kept(range(20), 3)) == list(forward)[:3]
    key = next(iter(forward))
    original, made = forward[key]
    assert (np.abs(255 - original.astype(int) - made) <= 1).all()
    assert (original == (pictures[keys.index(key)].permute(1, 2, 0) * 255).round().byte().numpy()).all()


def test_pictures_are_written(seen, tmp_path):
    result, examples = seen
    write_comparison(result, tmp_path, examples)
    entry = json.loads((tmp_path / "compare.json").read_text())["examples"][2]
    assert list(entry["files"]) == [ORIGINAL, "diffusers:kl-random-tiny", "diffusers:dc-random-tiny"]
    for label, file in entry["files"].items():
        item = examples.items[2]
        assert (np.asarray(Image.open(tmp_path / file)) == (item.original if label == ORIGINAL else item.made[label])).all()
    # the number of an item on the page is that of the picture there
    made, original = (item.made["diffusers:kl-random-tiny"] / 255, item.original / 255)
    psnr = result["rows"][0]["metrics"]["psnr"]["per_image"][result["keys"].index(item.key)]
    assert -10 * np.log10(np.square(made - original).mean()) == pytest.approx(psnr, abs=1e-4)


def test_rates(spoken, seen):
    by_label = {row["label"]: row["metrics"] for row in spoken[0]["rows"]}
    assert by_label["ours"]["bitrate"]["value"] == pytest.approx(4 * 5 * 50 / 1000)
    assert by_label["mimi:random-tiny@2"]["bitrate"]["value"] == pytest.approx(2 * 6 * 12.5 / 1000)
    assert "stored" not in [column["name"] for column in spoken[0]["columns"]]      # all rates are of codes
    assert [row["metrics"]["floats"]["value"] for row in seen[0]["rows"]] == [4 / 64, 8 / 64]

    class Coded:
        codebook_size = 64

    codes = image_rates(Coded(), ImageEncoding(codes=torch.zeros(1, 2, 4, 4, dtype=torch.int64)), 16 * 16)
    assert codes["bits"]["value"] == codes["stored"]["value"] == 2 * 16 * 6 / 256 and "floats" not in codes
    latents = image_rates(Coded(), ImageEncoding(latents=torch.zeros(1, 3, 4, 4)), 16 * 16)
    assert latents["floats"]["value"] == 3 * 16 / 256 and latents["stored"]["value"] == 16 * 3 * 16 / 256
    columns = compare._columns([{"metrics": codes}, {"metrics": latents}])
    assert [column["name"] for column in columns] == ["bits", "floats", "stored"]


def test_models_take_turns(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(compare_costs, "perf_counter", lambda: clock[0])

    def job(name, seconds):
        def step(kind):
            calls.append(f"{kind} {name}")
            clock[0] += next(seconds)
        return Job(name, torch.nn.Linear(2, 3), lambda: step("encode"), lambda code: step("decode"), 8.0)

    def broken():
        raise RuntimeError("no kernel\nfor this")

    jobs = [job("a", iter([9, 9, 9, 9, 1, 2, 4, 2, 2, 2])), job("b", iter([9] * 4 + [0.5] * 6)),
            Job("c", torch.nn.Linear(2, 3), broken, print, 1.0)]
    found = measure_costs(jobs, "images/s", range(5))
    assert calls[:4] == ["encode a", "decode a", "encode b", "decode b"] and calls[4:6] == ["encode b", "decode b"]
    speed = found["a"]["encode_speed"]
    assert speed["seconds"] == [1, 4, 2] and speed["value"] == 4.0      # 8 images in the median, 2 s
    assert (speed["uncertainty"]["low"], speed["uncertainty"]["high"]) == (2.0, 8.0)
    assert found["b"]["decode_speed"]["value"] == 16.0 and found["a"]["memory"]["weights_bytes"] == 9 * 4
    for name in ("encode_speed", "decode_speed", "memory"):
        assert found["c"][name]["value"] is None and found["c"][name]["missing"] == "RuntimeError: no kernel for this"


@pytest.mark.skipif(not compare_costs.CLEAR.exists(), reason="Linux tells the peak")
def test_peak_memory():
    mib = 2**20

    def work():
        big = torch.ones(48 * mib // 4)
        (big + 1).sum()      # 96 MiB together
        return torch.ones(mib)

    for _ in range(2):       # what was freed before is no gift
        assert 90 * mib < peak_growth(work, torch.device("cpu")) < 112 * mib
    assert peak_growth(lambda: None, torch.device("cpu")) < 4 * mib


def test_a_model_that_fails_is_a_row(tmp_path):
    missing = WeightsMissing("weights <b>are not here</b>")
    result, examples = speech([("gone", missing), ("broken", ours(Broken)), ("ours", ours()), ("again", ours())])
    rows = {row["label"]: row for row in result["rows"]}
    assert [row["label"] for row in result["rows"]] == ["gone", "broken", "ours", "again", "mean mel"]
    assert rows["gone"]["failed"] == str(missing) and rows["broken"]["failed"] == "RuntimeError: out of memory"
    assert rows["gone"]["metrics"] == {} and rows["ours"]["metrics"]["mel"]["value"] > 0
    assert {margin["over"] for margin in result["margins"]} == {"ours"}
    assert list(examples.items[0].made) == ["ours", "again"]
    page, text = comparison_page(result, examples), markdown(result)
    assert "weights &lt;b&gt;are not here" in page and "<b>are" not in page
    assert page.count('<span class="flag">failed</span>') == 2
    assert "- broken could not be measured: RuntimeError: out of memory" in text and "| gone (failed) | – |" in text
    with pytest.raises(RuntimeError, match="out of"):
        speech([("broken", ours(Broken)), ("gone", missing)])
    with pytest.raises(WeightsMissing):
        speech([("gone", missing), ("also", CheckpointError("no"))])


def test_damaged_data_is_no_fault_of_a_model(monkeypatch):
    def unreadable(*args, **options):
        raise DataError("clip.wav cannot be read")

    monkeypatch.setattr(compare, "evaluate_speech_data", unreadable)
    with pytest.raises(DataError, match=r"clip\.wav cannot"):
        speech(codecs())


def test_what_is_no_tokenizer():
    with pytest.raises(InputError, match="ours is for speech, net is no tokenizer"):
        compare_models([("ours", ours()), ("net", torch.nn.Linear(1, 1))], "sample:speech", ["mel"])


def test_without_timing_and_examples():
    result, examples = speech(codecs(), count=0, repeats=0)
    assert examples.items == [] and result["costs"] is None
    assert [column["name"] for column in result["columns"] if column["group"] == "cost"] == ["parameters"]
    assert "Reconstructions</h2>" not in comparison_page(result, examples)


def test_plot_data(spoken):
    result = spoken[0]
    data = plot_data(result)
    mel = result["rows"][0]["metrics"]["mel"]
    assert data["rows"][0]["values"]["mel"] == [mel["value"], mel["uncertainty"]["low"], mel["uncertainty"]["high"]]
    assert [(row["shown"], row["random"]) for row in data["rows"]][1:3] == [
        ("mimi:random-tiny@2 (random weights)", True), ("mimi:random-tiny (random weights)", True)]
    evil = {**result, "rows": [{**result["rows"][0], "label": "</script><script>alert(1)</script>"}], "best": {}}
    assert "<script>alert" not in comparison_page(evil)


def test_random_peers():
    for name, cfg in RANDOM_PEERS.items():
        if name.endswith("-tiny"):
            peer, again = load_peer(name), load_peer(name)
            assert peer.provenance == {"source": "random weights (seed 1)", "class": cfg.autoencoder}
            assert all(torch.equal(a, b) for a, b in zip(peer.state_dict().values(), again.state_dict().values()))
            assert peer.reconstruct(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_two_processes_give_the_same_as_one(spoken, tmp_path):
    program = Path(__file__).with_name("leaderboard_in_processes.py")
    started = [subprocess.Popen([sys.executable, program, str(rank), "2", tmp_path / "store", tmp_path / "2.json"])
               for rank in (0, 1)]
    try:
        assert [process.wait(timeout=180) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    together, kept = json.loads((tmp_path / "2.json").read_text())
    result, examples = spoken
    assert measured(together) == json.loads(json.dumps(measured(result)))
    assert kept == {item.key: {label: made.tolist() for label, (made, _) in item.made.items()} for item in examples.items}
    assert together["rows"][0]["metrics"]["encode_speed"]["value"] > 0


def test_command(tmp_path, capsys):
    ours().save_pretrained(tmp_path / "ours")
    start, data = ["compare", str(tmp_path / "ours")], ["--data", "sample:speech", "--limit", "2", "--seconds", "0.5"]
    more = ["--metrics", "mel", "--repeats", "1", "--examples", "1", "--out", str(tmp_path / "out")]
    assert call([*start, str(tmp_path / "nothing"), "--peer", "dac:random-tiny", *data, *more]) == 0
    printed = capsys.readouterr().out
    assert "nothing could not be loaded: there is no folder" in printed and "dac:random-tiny (random weights)" in printed
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert "failed" in result["rows"][1] and len(result["examples"]) == 1 and result["costs"]["repeats"] == 1
    assert call([*start, "--peer", "opus:64", *data]) == 2
    assert "there is no peer 'opus:64'; known for images: diffusers:" in capsys.readouterr().err
    assert call([*start, "opus:64", *data]) == 2 and "there is no peer" in capsys.readouterr().err
    assert call([*start, "--peer", "diffusers:kl-random-tiny", *data]) == 2
    assert "is for speech, diffusers:kl-random-tiny is for images" in capsys.readouterr().err
    assert call([*start, "dac:random-tiny", *data, "--repeats", "-1"]) == 2 and "--repeats must be" in capsys.readouterr().err
    assert call([*start, "dac:random-tiny", *data, "--speed-batch", "2"]) == 2 and "is for images" in capsys.readouterr().err
    assert call(["compare", str(tmp_path / "nothing"), str(tmp_path / "more"), *data]) == 2
    assert "there is no folder" in capsys.readouterr().err
