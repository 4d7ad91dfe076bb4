"""Evaluation of speech codecs: every clip once and as if alone, what cannot be measured is counted and listed."""

import csv
import json
import math
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from test_reconstructions import save
from toy import SIZE, Toy, ToyConfig, pictures
from toy_speech import N, Steps, batches, config

from tokenizers_lab import registry
from tokenizers_lab.cli import main as cli
from tokenizers_lab.data.loader import sample_path
from tokenizers_lab.errors import ConfigError, DataError, InputError, WeightsMissing
from tokenizers_lab.eval import speech_metrics
from tokenizers_lab.eval.bitrate import CodeTally, code_statistics
from tokenizers_lab.eval.candidates import UNTRAINED_LABEL
from tokenizers_lab.eval.harness import evaluate
from tokenizers_lab.eval.provenance import weights_sha256, write_json
from tokenizers_lab.eval.speech import evaluate_speech
from tokenizers_lab.eval.speech_candidates import MEAN_MEL_LABEL, ORIGINALS_LABEL, model_candidate, originals_candidate
from tokenizers_lab.eval.speech_data import clip_table, evaluate_speech_data, speech_data_config, write_clip_table
from tokenizers_lab.eval.speech_metrics import SpeechMetric
from tokenizers_lab.metrics import mean_mel_distance, mel_distance, si_sdr
from tokenizers_lab.registry import System
from tokenizers_lab.settings import ImageDataConfig

VAL = sample_path("speech", "val")


@pytest.fixture
def model() -> Steps:
    return Steps.fitted()


def values(result: dict) -> str:
    """Everything of a result that is a measurement, as bytes of JSON."""
    return json.dumps({k: v for k, v in result.items() if k not in ("environment", "speed")}, sort_keys=True)


def with_metric(monkeypatch, name: str, measure, needs: str = "pair", rate: int | None = None, summary=None) -> None:
    metric = SpeechMetric(name, name.upper(), "", "higher", rate, needs, lambda options: measure, summary)
    monkeypatch.setitem(speech_metrics.SPEECH_METRICS, name, metric)


def folder(path: Path, *, bad: int = 0, good: int = 2) -> Path:
    """A few clips, and files that are none."""
    path.mkdir()
    for i, clip in enumerate(sorted(VAL.glob("*.flac"))[:good]):
        audio, rate = soundfile.read(clip)
        soundfile.write(path / f"good{i}.wav", audio[: rate // 2], rate)
    for i in range(bad):
        (path / f"bad{i}.wav").write_bytes(b"RIFF not a sound")
    return path


def test_values_are_those_of_a_plain_computation(model):
    result = evaluate_speech(model, batches(3))
    expected: dict[str, list[float]] = {"mel": [], "sisdr": [], "mean": []}
    for batch in sorted(batches(1), key=lambda batch: batch.keys[0]):      # results are in the order of the keys
        clip = batch.audio[:, :, : int(batch.lengths[0])]
        made = model.reconstruct(clip)
        expected["mel"].append(float(mel_distance(made, clip, 16_000)))
        expected["sisdr"].append(float(si_sdr(made, clip)))
        expected["mean"].append(float(mean_mel_distance(clip, 16_000)))
    row, untrained, mean = result["rows"]
    assert row["metrics"]["mel"]["per_clip"] == pytest.approx(expected["mel"], abs=1e-6)
    assert row["metrics"]["sisdr"]["per_clip"] == pytest.approx(expected["sisdr"], abs=1e-4)
    assert row["metrics"]["mel"]["value"] == pytest.approx(sum(expected["mel"]) / N, abs=1e-6)
    assert row["metrics"]["mel"]["uncertainty"]["low"] < row["metrics"]["mel"]["value"]
    assert row["weights_sha256"] == weights_sha256(model) != untrained["weights_sha256"]
    assert untrained["label"] == UNTRAINED_LABEL and untrained["weights"] == "random weights"
    assert mean["label"] == MEAN_MEL_LABEL and list(mean["metrics"]) == ["mel"]
    assert mean["metrics"]["mel"]["per_clip"] == pytest.approx(expected["mean"], abs=1e-6)
    margin = next(m for m in result["margins"] if m["over"] == MEAN_MEL_LABEL)
    assert margin["value"] == pytest.approx((sum(expected["mean"]) - sum(expected["mel"])) / N, abs=1e-6)
    assert result["n"] == N == len(result["keys"]) and result["clips"][0]["key"] == result["keys"][0]
    assert result["clips"][0]["text"] == "letters of your party's first name."


def test_batches_and_threads_change_no_byte(model):
    names, found = ["mel", "stft", "sisdr", "pesq", "estoi", "usage"], []
    for threads, size in ((1, 1), (3, 3), (2, N)):
        torch.set_num_threads(threads)
        try:
            seen: list[str] = []
            result = evaluate_speech(model, batches(size), names,
                                     observe=lambda candidate, clip, made: seen.append(clip.key))      # noqa: B023
        finally:
            torch.set_num_threads(1)
        found.append(values(result))
        assert seen[::2] == seen[1::2] and sorted(seen[::2]) == result["keys"]      # the model and its untrained copy
    assert len(set(found)) == 1


def test_two_processes_give_the_same_bytes_as_one(model, tmp_path):
    command = [sys.executable, Path(__file__).with_name("evaluate_speech_in_processes.py")]
    started = [subprocess.Popen([*command, str(rank), "2", tmp_path / "store", tmp_path / "2.json"]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=180) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    together = json.loads((tmp_path / "2.json").read_text())
    alone = evaluate_speech_data(model, config(), ["mel", "stft", "bitrate", "rtf"], batch_size=3)
    assert alone["n"] == together["n"] == N and set(together["speed"]) == set(alone["speed"])
    assert values(alone) == values(together)


def test_codes_are_counted(model):
    result = evaluate_speech(model, batches(), ["usage"], baselines=False)
    codes = result["codes"]
    counted = Counter(code for batch in batches(1)
                      for code in model.encode(batch.audio[:, :, : int(batch.lengths[0])]).codes[0, 1].tolist())
    frames = sum(counted.values())
    entropy = -sum(n / frames * math.log2(n / frames) for n in counted.values())
    book = codes["per_codebook"][1]
    assert (book["used"], book["dead"], codes["frames"]) == (len(counted), 64 - len(counted), frames)
    assert book["entropy_bits"] == pytest.approx(entropy, abs=1e-9) and book["perplexity"] == pytest.approx(2**entropy, abs=1e-6)
    assert (codes["frame_rate"], codes["bits_per_frame"], codes["bitrate"]) == (4000, 12, 48_000)
    assert codes["entropy_bitrate"] == pytest.approx(4000 * sum(b["entropy_bits"] for b in codes["per_codebook"]))
    assert codes["measured_bitrate"] == pytest.approx(frames * 12 / result["protocol"]["seconds_total"])
    assert codes["warnings"] == []


def test_code_statistics_of_known_codes(model):
    tally = CodeTally()
    tally.add(torch.tensor([[0, 1, 2, 3], [7, 7, 7, 7]]), [4, 16], 16)
    found = code_statistics(tally.merge(CodeTally()), model)
    assert [b["entropy_bits"] for b in found["per_codebook"]] == [2, 0] and found["sizes"] == [4, 16]
    assert (found["bits_per_frame"], found["dead"], found["seconds"]) == (6, 15, 0.001)
    assert "4 frames are few" in found["warnings"][0]
    with pytest.raises(InputError, match="gave no codes"):
        code_statistics(CodeTally(), model)


def test_speed_is_measured_and_named(model):
    speed = evaluate_speech(model, batches(), ["rtf"])["speed"]
    assert 0 < speed["encode_rtf"] < 1 and 0 < speed["decode_rtf"] < 1
    assert speed["audio_seconds"] == pytest.approx(10) and speed["threads"] == 1 and speed["processor"]


def test_originals_stand_beside_metrics_of_sound_alone(model, monkeypatch):
    with_metric(monkeypatch, "loud", lambda original, made, about: float(made.abs().max()), "reconstruction")
    rows = evaluate_speech(model, batches(), ["mel", "loud"])["rows"]
    assert [row["label"] for row in rows] == ["model", UNTRAINED_LABEL, MEAN_MEL_LABEL, ORIGINALS_LABEL]
    assert list(rows[2]["metrics"]) == ["mel"] and list(rows[3]["metrics"]) == ["loud"]
    peaks = sorted(float(batch.audio[0].abs().max()) for batch in batches(1))
    assert sorted(rows[3]["metrics"]["loud"]["per_clip"]) == pytest.approx(peaks)
    assert len(evaluate_speech(model, batches(), ["mel"])["rows"]) == 3


def test_a_clip_without_a_value_is_counted_and_listed(model, monkeypatch):
    keys = sorted(batch.keys[0] for batch in batches(1))
    given = {keys[0]: 1.0, keys[1]: None, keys[2]: float("nan"), keys[3]: {"value": 3.0, "word": "a", "_hidden": 1}, keys[4]: {
        "value": None, "reason": "too short"}}
    with_metric(monkeypatch, "odd", lambda original, made, about: given[about["key"]],
                summary=lambda cells, seed: {"hidden": sum(cell.get("_hidden", 0) for cell in cells)})
    with_metric(monkeypatch, "never", lambda original, made, about: None)
    with_metric(monkeypatch, "said", lambda original, made, about: float(len(about["text"])), "text")
    quiet = [SimpleNamespace(**{**vars(batch), "texts": [None]}) if batch.keys[0] == keys[0] else batch for batch in batches(1)]
    metrics = evaluate_speech(model, quiet, ["odd", "never", "said"], baselines=False)["rows"][0]["metrics"]
    odd = metrics["odd"]
    assert odd["per_clip"] == [1, None, None, 3, None] and (odd["value"], odd["n"], odd["hidden"]) == (2, 2, 1)
    assert odd["unmeasured"] == {
        keys[1]: "it cannot be measured", keys[2]: "the metric gave no finite number", keys[4]: "too short"}
    assert odd["details"][3] == {"word": "a"} and odd["details"][0] == {}
    assert metrics["never"]["value"] is None and "no clip could be measured" in metrics["never"]["missing"]
    assert metrics["said"]["unmeasured"] == {keys[0]: "its text is not known"} and metrics["said"]["n"] == N - 1


def test_other_rates_and_ways_to_decode(model):
    whole = evaluate_speech(model, batches(), ["mel", "sisdr"])
    half = evaluate_speech(model, batches(), ["mel", "sisdr"], decoding="half")
    assert half["rows"][0]["output_rate"] == 8000 and half["rows"][0]["decoding"] == "half"
    assert half["rows"][0]["metrics"]["mel"]["value"] != whole["rows"][0]["metrics"]["mel"]["value"]
    assert half["rows"][0]["metrics"]["sisdr"]["value"] > 5      # at the right speed, or it would be far below 0
    with pytest.raises(InputError, match="does not decode in the way 'backwards'; it has half"):
        evaluate_speech(model, batches(), decoding="backwards")
    read = speech_data_config("sample:speech", model, N, 2.9, rate=24_000)
    other = evaluate_speech_data(model, read, ["mel", "bitrate"])
    assert other["protocol"]["sample_rate"] == 24_000 and other["rows"][0]["output_rate"] == 16_000
    assert other["rows"][0]["metrics"]["mel"]["value"] == pytest.approx(whole["rows"][0]["metrics"]["mel"]["value"], abs=0.15)
    assert other["codes"]["seconds"] == pytest.approx(whole["protocol"]["seconds_total"], abs=0.01)


def test_channels_are_mixed_or_each():
    stereo, cfg = Steps.fitted(2), config(channels=2)
    one = next(iter(batches(N, channels=2)))
    one.audio[:, 1] = 0.5 * one.audio[:, 1].roll(500, -1)      # the toy gives both channels their mean
    results = {way: evaluate_speech(stereo, [one], ["sisdr"], channels=way, baselines=False) for way in ("mixed", "each")}
    each = results["each"]["rows"][0]["metrics"]["sisdr"]
    assert results["mixed"]["rows"][0]["metrics"]["sisdr"]["value"] > each["value"] + 5
    parts = [cell["value"] for cell in each["details"][0]["channels"]]
    assert len(parts) == 2 and each["per_clip"][0] == pytest.approx(sum(parts) / 2)
    assert results["each"]["protocol"]["channels"] == "each" and cfg.channels == 2
    with pytest.raises(InputError, match="mixed, each"):
        evaluate_speech(stereo, [one], channels="left")


def test_unreadable_files_are_errors_unless_allowed(model, tmp_path):
    data = speech_data_config(str(folder(tmp_path / "clips", bad=2)), model)
    with pytest.raises(DataError, match=r"bad0\.wav: not a sound file.*; --allow-skips N leaves out"):
        evaluate_speech_data(model, data, ["mel"])
    with pytest.raises(DataError, match=r"bad1\.wav.*1 may be left out"):
        evaluate_speech_data(model, data, ["mel"], allow_skips=1, batch_size=1)
    with pytest.raises(ConfigError, match="at least 0"):
        evaluate_speech_data(model, data, ["mel"], allow_skips=-1)
    result = evaluate_speech_data(model, data, ["mel"], allow_skips=2)
    assert result["n"] == 2 and [reason.split(": ")[0][-8:] for reason in result["skipped"]] == ["bad0.wav", "bad1.wav"]
    nothing = speech_data_config(str(folder(tmp_path / "bad", bad=1, good=0)), model)
    with pytest.raises(DataError, match="no clips to evaluate: all 1 were skipped"):
        evaluate_speech_data(model, nothing, ["mel"], allow_skips=1)


def test_unreadable_samples_of_shards_and_images_too(model, tmp_path):
    source = folder(tmp_path / "clips", bad=1, good=3)
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for file in sorted(source.iterdir()):
            tar.add(file, file.name)
    shards = speech_data_config(str(tmp_path / "clips.tar"), model)
    with pytest.raises(DataError, match="bad0"):
        evaluate_speech_data(model, shards, ["mel"])
    result = evaluate_speech_data(model, shards, ["mel"], allow_skips=1)
    assert result["n"] == 3 and len(result["skipped"]) == 1

    save(pictures(3), tmp_path / "images")
    (tmp_path / "images" / "zzz.png").write_bytes(b"no picture")
    images = ImageDataConfig(train="", val=str(tmp_path / "images"), size=SIZE, workers=0)
    with pytest.raises(DataError, match=r"zzz\.png"):
        evaluate(Toy(ToyConfig()), images, ["psnr"])
    found = evaluate(Toy(ToyConfig()), images, ["psnr"], allow_skips=1)
    assert found["n"] == 3 and "zzz.png" in found["skipped"][0]


@pytest.mark.parametrize(("fault", "message"), [("nan", "NaN or infinite samples for"), ("short", "as long as its original")])
def test_broken_outputs_are_typed_errors(model, monkeypatch, fault, message):
    whole = Steps.decode

    def decode(self, codes, lengths=None, decoding=None):
        audio = whole(self, codes, lengths, decoding).clone()
        return audio[..., : audio.shape[-1] // 2] if fault == "short" else audio.fill_(float("nan"))

    monkeypatch.setattr(Steps, "decode", decode)
    with pytest.raises(InputError, match=message):
        evaluate_speech(model, batches())


def test_wrong_inputs_are_typed_errors(model):
    with pytest.raises(DataError, match="no clips"):
        evaluate_speech(model, [])
    with pytest.raises(DataError, match="two clips are named"):
        evaluate_speech(model, [*batches(limit=1), *batches(limit=1)])
    with pytest.raises(InputError, match=r"there is no speech metric 'psnr'; known: mel.*usage, bitrate, rtf"):
        evaluate_speech(model, batches(), ["psnr"])
    broken = next(iter(batches(1)))
    broken.audio[0, 0, 5] = float("inf")
    with pytest.raises(InputError, match="NaN or infinite samples"):
        evaluate_speech(model, [broken])
    with pytest.raises(InputError, match="must be told its clips' sample rate"):
        evaluate_speech(model_candidate(model), batches())
    with pytest.raises(ConfigError, match="--seconds must be positive"):
        speech_data_config("sample:speech", model, seconds=0.0)


def test_a_candidate_stands_alone(model):
    result = evaluate_speech(model_candidate(model, "mine"), batches(), ["mel"], sample_rate=16_000)
    assert [row["label"] for row in result["rows"]] == ["mine"]
    only = evaluate_speech(originals_candidate(), batches(), ["mel"], sample_rate=16_000, baselines=False)
    assert only["rows"][0]["metrics"] == {}      # an original is not measured against itself


def test_missing_packages_are_an_error_or_a_row_that_says_so(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)
    with pytest.raises(WeightsMissing, match=r"pip install 'tokenizers-lab\[metrics\]'"):
        evaluate_speech(model, batches(), ["mel", "pesq"])
    row = evaluate_speech(model, batches(), ["mel", "pesq"], allow_missing=True)["rows"][0]["metrics"]["pesq_wb"]
    assert row["value"] is None and "pip install" in row["missing"]


def test_the_table_of_clips(model, monkeypatch, tmp_path):
    heard = {"value": 1.0, "hits": 2, "hypothesis": "süß, \"so\"", "x": [1]}
    with_metric(monkeypatch, "words", lambda original, made, about: heard)
    result = evaluate_speech(model, batches(), ["mel", "words"])
    write_json(result, tmp_path / "r.json")      # it is JSON data
    lines = clip_table(json.loads((tmp_path / "r.json").read_text()))
    assert len(lines) == 3 * N
    path = write_clip_table(result, tmp_path / "new" / "clips.csv")
    with open(path, encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    first = read[0]
    assert first["key"] == result["keys"][0] and first["row"] == "model" and first["speaker"] == "en_US_f_Allison"
    assert first["words.hypothesis"] == "süß, \"so\"" and first["words.hits"] == "2" and "words.x" not in first
    assert float(first["mel"]) == result["rows"][0]["metrics"]["mel"]["per_clip"][0]
    assert read[2]["row"] == MEAN_MEL_LABEL or read[-1]["row"] == MEAN_MEL_LABEL
    assert read[-1]["words"] == "" and read[-1]["mel"]


def test_the_command(model, monkeypatch, tmp_path, capsys):
    system = System(
        name="steps", kind="speech", paper="A toy", summary="steps", model_config="toy_speech:StepsConfig", objective_config="",
        tokenizer="toy_speech:Steps", objective="")
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(name="steps", load=lambda: system)])
    model.save_pretrained(tmp_path / "saved")

    def toklab(*words: str, status: int = 0) -> tuple[str, str]:
        assert cli.call(["eval", str(tmp_path / "saved"), *words, "--device", "cpu"]) == status
        return capsys.readouterr()

    out, _ = toklab("sample:speech", "--limit", "3", "--seconds", "2", "--metrics", "mel,pesq_wb,usage,rtf",
                    "--out", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"))
    assert "3 clips of sample:speech, 6 s at 16000 Hz" in out and "PESQ (wide band)" in out and "48000 bit/s" in out
    assert "codebook 1:" in out and "real-time factor: encode" in out and MEAN_MEL_LABEL in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["rows"][0]["weights_sha256"] == weights_sha256(model) and result["protocol"]["limit"] == 3
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + 3 * 3
    bad = str(folder(tmp_path / "clips", bad=1))
    assert "bad0.wav" in toklab(bad, "--metrics", "mel", status=2)[1]
    assert "left out: " in toklab(bad, "--metrics", "mel", "--allow-skips", "1")[0]
    assert "--features is for images" in toklab("sample:speech", "--features", "random", status=2)[1]
    assert "there is no speech metric 'psnr'" in toklab("sample:speech", "--metrics", "psnr", status=2)[1]
