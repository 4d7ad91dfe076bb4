"""One table of several models: the numbers of `toklab eval`, on the same data, with random weights named."""

import json
import re
from dataclasses import replace

import diffusers
import pytest
import torch

from tokenizers_lab.cli.main import call
from tokenizers_lab.errors import InputError
from tokenizers_lab.eval import compare, speech_metrics
from tokenizers_lab.eval.compare import compare_models, write_comparison
from tokenizers_lab.eval.compare_page import comparison_page
from tokenizers_lab.eval.compare_text import markdown
from tokenizers_lab.eval.peers import load_peer
from tokenizers_lab.eval.speech_data import evaluate_speech_data, speech_data_config
from tokenizers_lab.eval.speech_peers import load_speech_peer
from tokenizers_lab.models.dm_codec.config import ModelConfig
from tokenizers_lab.models.dm_codec.model import DMCodec

DATA = {"limit": 2, "seconds": 1.0}
METRICS = ["mel", "sisdr", "usage", "bitrate"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours(seed=0):
    torch.manual_seed(seed)
    return DMCodec(ModelConfig(filters=4, width=16, codebooks=4, codebook_size=32)).eval()


@pytest.fixture(scope="module")
def models():
    return [("ours", ours()), ("other", ours(1)), ("mimi:random-tiny", load_speech_peer("mimi:random-tiny"))]


@pytest.fixture(scope="module")
def result(models):
    return compare_models(models, "sample:speech", METRICS, **DATA)


def test_numbers_are_those_of_each_model_alone(models, result):
    assert [row["label"] for row in result["rows"]] == ["ours", "other", "mimi:random-tiny", "mean mel"]
    assert result["protocol"]["sample_rate"] == 24_000      # the highest of 16 and 24 kHz
    for (label, tokenizer), row in zip(models, result["rows"]):
        data = speech_data_config("sample:speech", tokenizer, rate=24_000, **DATA)
        alone = evaluate_speech_data(tokenizer, data, METRICS, label=label, baselines=False)
        assert row["metrics"]["mel"] == alone["rows"][0]["metrics"]["mel"] and alone["keys"] == result["keys"]
        assert row["metrics"]["bitrate"]["value"] == pytest.approx(alone["codes"]["bitrate"] / 1000)
        assert row["metrics"]["usage"]["value"] == pytest.approx(100 * alone["codes"]["usage"])
    assert result["rows"][0]["metrics"]["bitrate"]["value"] == pytest.approx(4 * 5 * 50 / 1000)
    assert [row.get("random") for row in result["rows"]] == [False, False, True, None]


def test_margins_and_the_best(result):
    rows = {row["label"]: row["metrics"] for row in result["rows"]}
    by_name = {(margin["row"], margin["metric"]): margin["value"] for margin in result["margins"]}
    # of mel, lower is better
    assert by_name["other", "mel"] == pytest.approx(rows["ours"]["mel"]["value"] - rows["other"]["mel"]["value"])
    assert by_name["other", "sisdr"] == pytest.approx(rows["other"]["sisdr"]["value"] - rows["ours"]["sisdr"]["value"])
    assert result["best"]["mel"] == min(("ours", "other"), key=lambda label: rows[label]["mel"]["value"])
    assert "mimi:random-tiny" not in result["best"].values() and "bitrate" not in result["best"]


def test_originals_have_a_row_where_a_metric_needs_none(models, monkeypatch):
    loud = speech_metrics.SpeechMetric(
        "loud", "peak", "", "higher", 16_000, "reconstruction",
        lambda options: lambda original, made, about: float(made.abs().max()))
    monkeypatch.setitem(speech_metrics.SPEECH_METRICS, "loud", loud)
    found = compare_models(models[:2], "sample:speech", ["loud"], **DATA)
    assert [row["role"] for row in found["rows"]] == ["model", "model", "originals"]
    assert found["rows"][-1]["metrics"]["loud"]["value"] > 0.05


def test_files(result, tmp_path):
    evil = json.loads(json.dumps(result))
    evil["rows"][1]["label"] = "a|b <script>alert(1)</script>"
    evil["best"]["mel"] = evil["rows"][1]["label"]
    paths = write_comparison(evil, tmp_path)
    assert json.loads(paths[0].read_text()) == evil
    text = paths[1].read_text()
    assert text == markdown(evil) and "| mimi:random-tiny (random weights) |" in text and "a\\|b" in text
    value = evil["rows"][1]["metrics"]["mel"]["value"]
    assert f"**{value:.4f} [" in text and result["environment"]["processor"] in text and "sample:speech" in text
    page = paths[2].read_text()
    assert page == comparison_page(evil) and "<script>alert" not in page and "http://" not in page and "https://" not in page
    rows = re.findall(r'<tr class="(\w+) (\w*)" data-label', page)
    assert rows == [("model", ""), ("model", ""), ("model", "random"), ("baseline", "")]
    assert page.count('<span class="flag">random weights</span>') == 1 and f'data-value="{value!r}" class="best"' in page
    assert "say nothing about the trained model: mimi:random-tiny." in page
    assert page.count("<button") == 1 + len(result["columns"])


def test_images(tmp_path):
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4, latent_channels=4, sample_size=32 * (seed + 1)).save_pretrained(tmp_path / name)
    models = [(name, load_peer(str(tmp_path / name))) for name in "ab"]
    with pytest.raises(InputError, match=r"trained at 32, 64 pixels: say at which size"):
        compare_models(models, "sample:photos", ["psnr"])
    found = compare_models(models, "sample:photos", ["psnr", "ssim"], size=32, limit=2)
    names = [column["name"] for column in found["columns"]]
    assert names == ["psnr", "ssim", "floats", "encode_speed", "decode_speed", "memory", "parameters"]
    assert len(found["rows"]) == 2 and found["n"] == 2
    assert found["rows"][0]["metrics"]["floats"]["value"] == 4 / 4      # four channels for every 2 × 2 pixels
    first, second = (row["metrics"]["psnr"]["value"] for row in found["rows"])
    assert found["margins"][0]["value"] == pytest.approx(second - first) and first != second
    with pytest.raises(InputError, match="a is for images, c is for speech"):
        compare_models([models[0], ("c", ours())], "sample:photos", ["psnr"])


def test_refusals(models, monkeypatch):
    with pytest.raises(InputError, match="ours is named twice"):
        compare_models([models[0], models[0]], "sample:speech", METRICS)
    with pytest.raises(InputError, match="two models or more"):
        compare_models(models[:1], "sample:speech", METRICS)
    with pytest.raises(InputError, match="no speech metric 'beauty'"):
        compare_models(models[:2], "sample:speech", ["beauty"])
    seen = []

    def other_data(model, data, *args, **options):      # as if a file changed between two models
        seen.append(model)
        return evaluate_speech_data(model, replace(data, val_seconds=1.0 / len(seen)), *args, **options)

    monkeypatch.setattr(compare, "evaluate_speech_data", other_data)
    with pytest.raises(InputError, match="did not see the same data"):
        compare_models(models[:2], "sample:speech", ["mel"], **DATA)


def test_command(tmp_path, capsys):
    ours().save_pretrained(tmp_path / "ours")
    command = ["compare", str(tmp_path / "ours"), "dac:random-tiny@2", "--data", "sample:speech", "--limit", "2"]
    command += ["--seconds", "0.5"]
    assert call([*command, "--metrics", "mel,bitrate", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "dac:random-tiny@2 (random weights)" in printed and "mean mel" in printed and "bitrate, kbit/s" in printed
    written = ["compare.html", "compare.json", "compare.md", "examples"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    row = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"][1]
    assert row["weights"]["source"].startswith("random weights") and f"{row['metrics']['mel']['value']:.4f}" in printed
    assert call([*command, "--size", "32"]) == 2 and "--size is for images" in capsys.readouterr().err
    assert call(["compare", "dac:random-tiny", "--data", "sample:speech"]) == 2
    assert "two models or more" in capsys.readouterr().err

