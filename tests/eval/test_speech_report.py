import base64
import io
import json
import re
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from speech_runs import DM_CODEC, LM_SPT, trained_run, written_run
from test_report import Page
from toy import write_run

from tokenizers_lab.cli.main import call
from tokenizers_lab.cli.train import show_results
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import InputError
from tokenizers_lab.eval import report, report_sounds
from tokenizers_lab.eval.report import view_run, write_report
from tokenizers_lab.eval.report_curves import curve
from tokenizers_lab.eval.runs import evaluate_run, open_run, read_results
from tokenizers_lab.eval.sounds import ClipKeeper, draw_mel, mel_levels
from tokenizers_lab.eval.summary import finish_run, print_summary
from tokenizers_lab.hub import load
from tokenizers_lab.metrics import MEL_HOP, MEL_RATE


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trained codec's folder and what `toklab train` prints of it."""
    run = trained_run(tmp_path_factory.mktemp("runs"))
    return run, finish_run(run)


@pytest.fixture(scope="module")
def decodings(tmp_path_factory):
    """A run of a codec that decodes in several ways, one of them at another rate."""
    run = written_run(tmp_path_factory.mktemp("runs"), LM_SPT, "toy", sample_rate=24_000, val_limit=2)
    write_report(run)
    return run


def players(page: str) -> dict[str, list[tuple[np.ndarray, int]]]:
    """The sounds of a page, by title."""
    found: dict[str, list[tuple[np.ndarray, int]]] = {}
    title = None
    for tag, attributes in Page(page).tags:
        if tag == "figure" and attributes.get("class") == "sound":
            title = attributes["data-kind"]
        if tag == "audio":
            head, _, body = (attributes["src"] or "").partition(",")
            assert head == "data:audio/flac;base64" and "controls" in attributes
            found.setdefault(str(title), []).append(soundfile.read(io.BytesIO(base64.b64decode(body)), dtype="int16"))
    return found


def test_table_holds_model_untrained_and_mean_mel(finished):
    run, summary = finished
    rows = {row["role"]: row["metrics"] for row in summary["rows"]}
    assert {"model", "untrained", "baseline"} <= set(rows) and summary["n"] == 4
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [record for record in records if record["kind"] == "val"][-1]
    assert rows["model"]["mel"]["value"] == pytest.approx(validated["mel"], rel=1e-4)      # the same weights, the same clips
    assert rows["model"]["sisdr"]["value"] == pytest.approx(validated["sisdr"], abs=0.01)
    console = Console(file=io.StringIO(), width=160)
    print_summary(summary, console)
    printed = console.file.getvalue()
    for role in ("model", "untrained", "baseline"):
        assert f"{rows[role]['mel']['value']:.4f}" in printed, role
    assert "dm_codec-trained: finished, 3 steps, 4 held-out clips" in printed and "mean mel" in printed
    for path in summary["paths"].values():
        assert path in printed and (run / path).exists()
    assert set(summary["paths"]) == {"sounds", "metrics", "results", "checkpoint", "report"}


def test_wav_files_are_the_clips_and_what_the_model_makes_of_them(finished):
    run, summary = finished
    tokenizer = load(str(run))
    config = open_run(run).config.data
    batch = next(validation_batches(config, 4))
    clips = {key: batch.audio[i, :, : batch.lengths[i]] for i, key in enumerate(batch.keys)}
    assert len(summary["examples"]) == 4
    for example in summary["examples"]:
        original = clips[example["key"]]
        wanted = {"original": original, "reconstruction": tokenizer.reconstruct(original[None])[0]}
        for name, audio in wanted.items():
            with wave.open(str(run / example["sounds"][name])) as file:
                assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
                samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
            assert np.abs(samples / 32768 - audio[0].clamp(-1, 1).numpy()).max() < 1e-4
        assert example["values"]["mel"] == summary["rows"][0]["metrics"]["mel"]["per_clip"][summary["keys"].index(example["key"])]
        assert example["text"] and example["seconds"] == pytest.approx(original.shape[1] / 16_000, abs=1e-3)
        picture = np.asarray(Image.open(run / example["picture"]).convert("RGB")).astype(int)
        assert picture.shape[1] == 900 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 40


def test_a_tone_is_drawn_at_its_second_and_its_frequency():
    audio = torch.zeros(1, 32_000)
    audio[:, 16_000:24_000] = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(8_000) / 16_000)
    levels = mel_levels(audio, 16_000)
    axes = Figure().add_subplot()
    image = draw_mel(axes, levels, levels.max())
    left, right, bottom, top = image.get_extent()
    bands, frames = levels.shape
    ticks = {label.get_text(): height for height, label in zip(axes.get_yticks(), axes.get_yticklabels())}
    band = levels.max(1).argmax()
    assert abs(bottom + (band + 0.5) * (top - bottom) / bands - ticks["1k"]) < 0.6
    assert ticks["0"] == 0 and ticks["8k"] == pytest.approx(axes.get_ylim()[1])
    sounding = np.flatnonzero(levels[band] > levels.max() - 0.5)
    seconds = left + (sounding[[0, -1]] + 0.5) * (right - left) / frames
    assert seconds == pytest.approx([1.0, 1.5], abs=2.5 * MEL_HOP / MEL_RATE) and axes.get_xlim() == pytest.approx((0, 2))


def test_page_plays_what_it_shows(finished):
    run, summary = finished
    page = (run / "report.html").read_text()
    text = "".join(Page(page).words)
    sounds = players(page)
    assert set(sounds) == {"original", "reconstruction"} and len(page) < 5_000_000
    for kind in sounds:
        for example, (samples, rate) in zip(summary["examples"], sounds[kind], strict=True):
            on_disk, disk_rate = soundfile.read(run / example["sounds"][kind], dtype="int16")
            assert rate == disk_rate and np.array_equal(samples, on_disk[: 5 * rate])
            assert example["text"] in text and example["speaker"] in text
    cut = [e for e in summary["examples"] if e["seconds"] > 5]
    assert cut and f"the first 5 s of {cut[0]['seconds']:.1f} s" in text
    for wanted in ("on 4 held-out clips", "mean mel", "clip by clip", "mel distance", "SI-SDR", "filters: 4", "torch 2"):
        assert wanted in text, wanted


def test_use_of_each_codebook_is_shown(finished):
    run, summary = finished
    codes = summary["codes"]
    page = (run / "report.html").read_text()
    table = page[page.index('<table class="books">') :].partition("</table>")[0]
    rows = re.sub("<i .*?</i>|\n", "", table).split("<tr>")[2:]
    tokenizer = load(str(run))
    clips = [batch.audio[i : i + 1, :, : batch.lengths[i]] for batch in validation_batches(open_run(run).config.data, 4)
             for i in range(len(batch))]
    found = torch.cat([tokenizer.encode(clip).codes[0] for clip in clips], dim=1)
    assert len(codes["per_codebook"]) == 2 == len(rows)
    for book, row in enumerate(rows):
        used = len(found[book].unique())
        assert row.startswith(f'<td>{book}</td><td>16</td><td class="bar">{used} ({used / 16:.1%})</td>')
    text = "".join(Page(page).words)
    assert "400 bit/s" in text and f"{found.shape[1]:,} frames" in text      # 50 frames a second, 2 · 4 bits
    console = Console(file=io.StringIO(), width=160)
    print_summary(summary, console)
    assert "codes: 50 frames a second, 2 codebooks, 400 bit/s" in console.file.getvalue()


def test_page_is_self_contained_and_its_ids_unique(finished):
    page = (finished[0] / "report.html").read_text()
    inside = ("#", "data:image/png;base64,", "data:audio/flac;base64,")
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(inside), (tag, name)
    assert "media-src data:" in page and "http://" not in page and "https://" not in page
    ids = [attributes["id"] for _, attributes in Page(page).tags if attributes.get("id")]
    assert len(ids) == len(set(ids)) and {"sounds", "codes", "quality", "curves", "origin"} <= set(ids)


def test_a_loss_and_a_held_out_metric_of_one_name_have_their_own_charts(finished):
    view = view_run(finished[0])
    assert curve(view, "mel", "train")[0] == [1, 2, 3] and curve(view, "mel", "val")[0] == [2, 3]
    labels = re.findall(r'aria-label="(curve-[^"]*mel)"', (finished[0] / "report.html").read_text())
    assert sorted(labels) == ["curve-train-mel", "curve-val-mel"]


def test_further_decodings_are_heard_at_their_own_rate(decodings):
    results = read_results(open_run(decodings))
    for example in results["examples"]:
        assert list(example["sounds"]) == ["original", "reconstruction", "semantic", "auxiliary", "acoustic"]
        lengths = {name: soundfile.info(decodings / file) for name, file in example["sounds"].items()}
        assert {name: info.samplerate for name, info in lengths.items()} == {
            "original": 24_000, "reconstruction": 24_000, "semantic": 24_000, "auxiliary": 16_000, "acoustic": 24_000}
        assert all(info.duration == pytest.approx(example["seconds"], abs=1e-3) for info in lengths.values())
    tokenizer = load(str(decodings))
    original, _ = soundfile.read(decodings / results["examples"][0]["sounds"]["original"], dtype="float32")
    codes = tokenizer.encode(torch.from_numpy(original)[None, None]).codes
    wanted = tokenizer.decode(codes, decoding="auxiliary")[0, 0].detach().numpy()
    heard, _ = soundfile.read(decodings / results["examples"][0]["sounds"]["auxiliary"], dtype="float32")
    assert np.abs(heard - wanted[: len(heard)].clip(-1, 1)).max() < 1e-3
    page = (decodings / "report.html").read_text()
    assert {kind: len(sounds) for kind, sounds in players(page).items()} == dict.fromkeys(results["examples"][0]["sounds"], 2)
    assert '<span class="flag">random weights (seed 0)</span>' in page


def test_two_runs_share_their_originals(finished, tmp_path):
    run, _ = finished
    other = written_run(tmp_path, DM_CODEC, "other", seed=1)
    evaluate_run(open_run(other), ["mel"])
    page = write_report(run, other, tmp_path / "both.html").read_text()
    assert {kind: len(sounds) for kind, sounds in players(page).items()} == {
        "original": 4, "reconstruction A": 4, "reconstruction B": 4}
    assert "not measured alike" not in "".join(Page(page).words)


def test_two_runs_of_two_rates_show_both_originals(finished, decodings, tmp_path):
    page = write_report(finished[0], decodings, tmp_path / "both.html").read_text()
    sounds = players(page)
    assert {"original A", "original B", "reconstruction A", "reconstruction B", "auxiliary B"} <= set(sounds)
    assert sounds["original A"][0][1] == 16_000 and sounds["original B"][0][1] == 24_000
    assert "not measured alike" in "".join(Page(page).words)


@pytest.mark.usefixtures("toy_system")
def test_a_run_of_speech_does_not_compare_with_one_of_images(finished, tmp_path):
    with pytest.raises(InputError, match="only runs of one kind compare"):
        write_report(finished[0], write_run(tmp_path))


def test_the_page_has_room_for_as_much_as_it_says(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(report_sounds, "ROOM", 1)
    monkeypatch.setattr(report_sounds, "SECONDS", 0.5)
    page = write_report(finished[0], path=tmp_path / "page.html").read_text()
    text = "".join(Page(page).words)
    assert [len(samples) for samples, _ in players(page)["original"]] == [8_000]
    assert "of 1 held-out clips" in text and "There are 4 clips there." in text and "the first 0.5 s of" in text


def test_markup_in_names_and_texts_stays_text(decodings, monkeypatch, tmp_path):
    run = open_run(decodings)
    results = read_results(run)
    evil = '<script>alert("1")</script>'
    results["examples"][0] |= {"key": f"a{evil}.flac", "text": evil, "speaker": evil}
    monkeypatch.setattr(report, "read_results", lambda run: results)
    page = write_report(decodings, path=tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and [tag for tag, _ in Page(page).tags].count("script") == 1
    assert evil in "".join(Page(page).words)


def test_a_metric_asked_for_later_is_measured_and_an_unknown_one_is_an_error(decodings, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(report, "evaluate_run", lambda run, metrics: asked.append(metrics) or read_results(run))
    monkeypatch.setattr(report, "SECTIONS", {"speech": {}})      # what is measured counts here, not the page
    assert call(["report", str(decodings)]) == 0 and call(["report", str(decodings), "--metrics", "mel,sisdr"]) == 0
    assert asked == []
    assert call(["report", str(decodings), "--metrics", "mel, wer"]) == 0
    assert len(asked) == 1 and {"mel", "sisdr", "wer"} <= set(asked[0])
    monkeypatch.undo()
    assert call(["report", str(decodings), "--metrics", "nonsense"]) == 2
    assert "there is no speech metric 'nonsense'" in capsys.readouterr().err


def test_a_finished_run_is_shown_again_without_measuring(finished, capsys):
    assert show_results(finished[0])
    assert "4 held-out clips" in capsys.readouterr().out


def test_clips_that_are_kept_are_of_different_speakers():
    keeper = ClipKeeper(3)
    model, other = SimpleNamespace(role="model"), SimpleNamespace(role="untrained")
    clip = SimpleNamespace(key="", speaker="")
    for key, speaker in (("1", "a"), ("2", "a"), ("3", "a"), ("4", "b"), ("5", "b"), ("6", "c"), ("7", "d")):
        for candidate in (model, other):
            keeper(candidate, SimpleNamespace(**{**vars(clip), "key": key, "speaker": speaker}), None)
    assert [kept.key for kept, _ in keeper.kept] == ["1", "4", "6"]
