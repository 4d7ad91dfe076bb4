import hashlib
import io
import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from speech_runs import written_run
from test_report import Page
from toy import SYSTEM as TOY_SYSTEM
from toy import Toy, ToyConfig, batches, pictures, write_run
from toy_speech import Steps, StepsConfig
from toy_speech import batches as clips
from toy_steps import FLOW_SYSTEM, MEL_SYSTEM, SPOKEN_SYSTEM, Flow, FlowConfig, Mel, Sampling, Spoken, SpokenConfig

from tokenizers_lab import registry
from tokenizers_lab.cli.eval import parse_steps
from tokenizers_lab.cli.main import call
from tokenizers_lab.errors import InputError
from tokenizers_lab.eval import image_metrics
from tokenizers_lab.eval.bitrate import CodeTally, LatentTally, latent_rates
from tokenizers_lab.eval.candidates import default_option
from tokenizers_lab.eval.images import evaluate_images
from tokenizers_lab.eval.report import write_report
from tokenizers_lab.eval.report_charts import Series, steps_chart
from tokenizers_lab.eval.runs import evaluate_run, open_run
from tokenizers_lab.eval.speech import evaluate_speech
from tokenizers_lab.eval.steps import FEWEST, affordable, split_steps, step_counts, sweep_images, sweep_speech
from tokenizers_lab.eval.summary import finish_run, print_summary

STAGE = {"name": "train", "steps": 3, "weights": {"mel": 1.0}}
SPOKEN = {"system": "spoken", "model": {"steps": 8}, "objective": {}, "stages": [STAGE]}
MEL = {**SPOKEN, "system": "mel"}


@pytest.fixture(autouse=True)
def systems(monkeypatch):
    known = (TOY_SYSTEM, FLOW_SYSTEM, SPOKEN_SYSTEM, MEL_SYSTEM)
    found = [SimpleNamespace(name=s.name, load=lambda s=s: s) for s in known]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    monkeypatch.setattr(image_metrics, "ALIASES", {"lpips": ()})


@pytest.fixture
def flow():
    torch.manual_seed(0)
    return Flow(FlowConfig()).fit(pictures(16)).eval()


@pytest.fixture
def spoken():
    model = Spoken(SpokenConfig())
    torch.nn.init.ones_(model.gain)
    return model.eval().requires_grad_(False)


def values(steps, metric):
    return [row["metrics"][metric]["value"] for row in steps["rows"]]


def flow_run(root, steps=60):
    """A run of the diffusion toy: that of the plain one under another name."""
    run = write_run(root, steps=steps)
    target = run.rename(root / "flow-tiny")
    (target / "config.yaml").write_text((target / "config.yaml").read_text().replace("system: toy", "system: flow"))
    checkpoint = next((target / "checkpoints").iterdir())
    Flow(FlowConfig()).fit(pictures(9)).save_pretrained(checkpoint)
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"]
    hashes = {str(p.relative_to(checkpoint)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": steps, "sha256": hashes}))
    return target


def test_each_row_is_an_evaluation_at_that_number_of_steps(flow):
    main = evaluate_images(flow, batches(pictures(9), 4), ("psnr",))
    assert main["protocol"]["decoder_steps"] == 2 and main["protocol"]["guidance"] == 1.5
    assert main["rows"][0]["decoder_steps"] == 2 and main["rows"][1]["decoder_steps"] == 2      # the untrained network too
    steps = sweep_images(flow, batches(pictures(9), 2), main)
    assert steps["counts"] == [1, 2, 4, 16] and steps["own"] == 2 and steps["n"] == steps["of"] == 9
    for row in steps["rows"]:
        alone = evaluate_images(flow, batches(pictures(9), 4), ("psnr",), steps=row["steps"], baselines=False)
        assert alone["protocol"]["decoder_steps"] == row["steps"]
        assert alone["rows"][0]["metrics"]["psnr"] == row["metrics"]["psnr"]
        assert row["seconds"] > 0 and row["n"] == 9
    assert values(steps, "psnr") == sorted(values(steps, "psnr")) and values(steps, "psnr")[0] < values(steps, "psnr")[-1] - 1


def test_encodes_each_item_once(flow):
    main = evaluate_images(flow, batches(pictures(6), 4), ("psnr",))
    Flow.encoded = 0
    sweep_images(flow, batches(pictures(6), 4), main, counts=[1, 2, 3])
    assert Flow.encoded == 6


@pytest.mark.parametrize("threads", [1, 2])
def test_no_batch_size_and_no_thread_changes_a_value(flow, threads):
    images = pictures(9)
    main = evaluate_images(flow, batches(images, 4), ("psnr",), forward_batch=1)
    together = evaluate_images(flow, batches(images, 4), ("psnr",), forward_batch=4)      # refused if it drew noise
    assert together["rows"][0]["metrics"]["psnr"]["per_image"] == pytest.approx(
        main["rows"][0]["metrics"]["psnr"]["per_image"], abs=1e-4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one = sweep_images(flow, batches(images, 1), main, counts=[1, 4])
    finally:
        torch.set_num_threads(before)
    other = sweep_images(flow, batches(images, 5), main, counts=[1, 4])
    assert [row["metrics"] for row in one["rows"]] == [row["metrics"] for row in other["rows"]]


def test_drawn_noise_is_asked_for(flow):
    drawn = evaluate_images(flow, batches(pictures(4), 4), ("psnr",), sample=True)
    fixed = evaluate_images(flow, batches(pictures(4), 4), ("psnr",))
    noise = [one["rows"][0]["metrics"]["psnr"]["value"] for one in (drawn, fixed)]
    assert noise[0] != noise[1]
    with pytest.raises(InputError, match="see one at a time"):
        evaluate_images(flow, batches(pictures(4), 4), ("psnr",), sample=True, forward_batch=2)


def test_costs_no_more_than_the_main_evaluation(flow):
    main = {"keys": [f"{i:04d}" for i in range(1000)], "rows": [{"role": "model"}, {"role": "untrained"}, {"role": "baseline"}]}
    keys = affordable(main, own=4, counts=[1, 4, 15], fewest=3)
    assert len(keys) == 1000 * 2 * 5 // 21 and keys[0] == "0000" and keys[-1] > "0990"      # from all of the data
    assert len(affordable(main, own=1, counts=[10**6], fewest=3)) == 3
    assert affordable(main, own=100, counts=[1], fewest=3) == main["keys"]
    result = evaluate_images(flow, batches(pictures(40), 8), ("psnr",), baselines=False)
    steps = sweep_images(flow, batches(pictures(40), 8), result, counts=[1, 50])
    assert steps["n"] == len(steps["keys"]) == FEWEST["image"] and steps["of"] == 40
    assert len(steps["rows"][0]["metrics"]["psnr"]["per_image"]) == FEWEST["image"]


def test_speech_is_told_its_texts(spoken):
    main = evaluate_speech(spoken, clips(), ["sisdr"], baselines=False)
    assert main["protocol"] | {"decoder_steps": 8, "guidance": 2.0, "texts": "the data's"} == main["protocol"]
    assert main["rows"][0]["texts"] == "the data's, where known"
    steps = sweep_speech(spoken, clips(), main, ["sisdr", "mel"])
    assert steps["counts"] == [1, 2, 4, 8, 16, 32] and steps["per"] == "second of sound"
    assert steps["protocol"] == {"guidance": 2.0, "texts": "the data's"}
    assert values(steps, "sisdr") == sorted(values(steps, "sisdr"))
    assert steps["n"] == FEWEST["speech"] and steps["of"] == 5
    alone = dict(zip(main["keys"], main["rows"][0]["metrics"]["sisdr"]["per_clip"]))
    assert steps["rows"][3]["metrics"]["sisdr"]["per_clip"] == [alone[key] for key in steps["keys"]]      # with the text

    def silent():
        for batch in clips():
            batch.texts = [None] * len(batch)
            yield batch

    unknown = evaluate_speech(spoken, silent(), ["sisdr"], baselines=False)
    assert unknown["protocol"]["texts"] == "none"
    told, untold = (one["rows"][0]["metrics"]["sisdr"]["value"] for one in (main, unknown))
    assert untold < told - 3      # 6 dB if there were no other error


def test_models_without_steps(fitted):
    plain = evaluate_images(fitted, batches(pictures(3), 4), ("psnr",))
    assert "decoder_steps" not in plain["protocol"] and "decoder_steps" not in plain["rows"][0]
    with pytest.raises(InputError, match="no sampling steps"):
        evaluate_images(fitted, batches(pictures(3), 4), ("psnr",), steps=4)
    with pytest.raises(InputError, match="no sampling steps"):
        evaluate_speech(Steps(StepsConfig()), clips(), ["mel"], steps=4)
    with pytest.raises(InputError, match="no sampling steps"):
        sweep_images(fitted, batches(pictures(3), 4), plain)
    with pytest.raises(InputError, match="decodes in one go"):
        split_steps(fitted, [1, 2])
    assert split_steps(fitted, []) == (None, [])
    with pytest.raises(InputError, match="at least one"):
        step_counts(Flow(FlowConfig()), [0, 2])


def test_the_own_number_comes_from_the_signature_or_the_config():
    assert default_option(Flow(FlowConfig(sampling=Sampling(steps=7))), "steps") == 7
    assert default_option(Spoken(SpokenConfig(steps=5)), "steps") == 5
    assert default_option(Spoken(SpokenConfig()), "guidance") == 2.0
    assert default_option(Toy(ToyConfig()), "steps") is None


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "a", "1;2"])
def test_steps_of_the_command_line_are_whole_numbers(text):
    assert parse_steps("4, 1,4") == [4, 1] and parse_steps(None) == []
    with pytest.raises(InputError, match="--steps"):
        parse_steps(text)


def test_command_line_decodes_in_one_number_or_compares(flow, tmp_path, capsys):
    flow.save_pretrained(tmp_path / "flow")
    (tmp_path / "val").mkdir()
    for i, image in enumerate(pictures(5)):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "val" / f"{i}.png")
    command = ["eval", str(tmp_path / "flow"), str(tmp_path / "val"), "--size", "32", "--metrics", "psnr", "--out",
               str(tmp_path / "r.json")]
    assert call([*command, "--steps", "16"]) == 0
    whole = json.loads((tmp_path / "r.json").read_text())
    assert whole["protocol"]["decoder_steps"] == 16 and "steps" not in whole
    assert call([*command, "--steps", "1,16"]) == 0
    both = json.loads((tmp_path / "r.json").read_text())
    assert both["protocol"]["decoder_steps"] == 2 and both["steps"]["counts"] == [1, 16]
    assert both["steps"]["rows"][1]["metrics"]["psnr"] == whole["rows"][0]["metrics"]["psnr"]
    assert "s per image" in capsys.readouterr().out
    assert call([*command, "--steps", "1,16", "--sample"]) == 2 and "fixed noise" in capsys.readouterr().err


def test_a_finished_run_shows_its_steps(tmp_path):
    run = flow_run(tmp_path)
    summary = finish_run(run)
    steps = summary["steps"]
    assert json.loads((run / "results.json").read_text())["steps"] == steps
    console = Console(file=io.StringIO(), width=160)
    print_summary(summary, console)
    printed = console.file.getvalue()
    page = Page((run / "report.html").read_text())
    text = "".join(page.words)
    assert "sampling steps, 9 of 9 images; the model's own number is 2" in printed and "s per image" in printed
    for row in steps["rows"]:
        assert f"{row['metrics']['psnr']['value']:.2f}" in printed
        assert f"{row['metrics']['psnr']['value']:.4g} dB" in text
    labels = [a.get("aria-label") for tag, a in page.tags if tag == "svg"]
    assert {"PSNR-dB-by-sampling-steps", "seconds-to-decode-one-image-by-sampling-steps", "SSIM-by-sampling-steps"} <= set(labels)
    assert ("a", {"href": "#steps"}) in page.tags and {"scope": "row"} in [a for tag, a in page.tags if tag == "th"]
    both = write_report(run, run).read_text()
    assert "A: 16" in both and "B: 16" in both


def test_a_plain_run_has_no_such_section(tmp_path):
    page = write_report(write_run(tmp_path)).read_text()
    assert 'id="steps"' not in page and 'href="#steps"' not in page and 'href="#curves"' in page


def test_axis_of_steps_doubles(tmp_path):
    svg = steps_chart("x", [Series("run", "c0", [1, 2, 4, 8, 32], [5.0, 4, 3, 2, 1], bounds=[(4.5, 5.5)] * 5)])
    ticks = [t for t in re.findall(r">([\d.]+)</text>", svg) if t in ("1", "2", "4", "8", "16", "32")]
    assert ticks[:5] == ["1", "2", "4", "8", "32"] and "16" not in ticks
    path = re.search(r'd="(M [^"]*)"[^>]*stroke: var\(--c0\)', svg) or re.search(r'd="(M [^"]*)"[^>]*var\(--c0\)', svg)
    x = [float(v) for v in re.findall(r"[ML] ([\d.]+) ", path[1])]
    gaps = [b - a for a, b in pairwise(x)]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-3) and gaps[3] == pytest.approx(2 * gaps[2], rel=1e-3)


def test_run_of_continuous_speech(tmp_path):
    model = Mel(SpokenConfig())
    result = evaluate_speech(model, clips(), ["sisdr", "usage", "bitrate", "rtf"])
    assert "codes" not in result and result["latents"]["floats_per_second"] == 16_000 and result["latents"]["channels"] == 4
    assert "no codes" in result["latents"]["no_codes"] and result["speed"]["decode_rtf"] > 0
    assert result["latents"]["frames"] == sum(-(-round(c["seconds"] * 16_000) // 4) for c in result["clips"])
    tally = LatentTally(4, 100, 400).merge(LatentTally()).merge(LatentTally(4, 50, 150))
    assert latent_rates(tally, model)["measured_floats_per_second"] == pytest.approx(600 / (550 / 16_000))
    with pytest.raises(InputError, match="no latents"):
        latent_rates(LatentTally(), model)
    assert not CodeTally().counts
    run = written_run(tmp_path, MEL, "toy", val_limit=2)
    console = Console(file=io.StringIO(), width=160)
    print_summary(finish_run(run, metrics=["mel", "usage", "bitrate"]), console)
    assert "16,000 floats a second" in console.file.getvalue() and "perplexity" not in console.file.getvalue()
    text = "".join(Page((run / "report.html").read_text()).words)
    assert "floats a second" in text and "no codes" in text and "4000" in text


def test_command_line_of_continuous_speech(tmp_path, capsys):
    Mel(SpokenConfig()).save_pretrained(tmp_path / "mel")
    assert call(["eval", str(tmp_path / "mel"), "sample:speech", "--limit", "2", "--metrics", "mel,bitrate"]) == 0
    assert "16,000 floats a second" in capsys.readouterr().out


def test_speech_run_shows_its_steps(tmp_path):
    run = written_run(tmp_path, SPOKEN, "toy", val_limit=2)
    results = evaluate_run(open_run(run), ["mel", "usage"])
    assert [row["steps"] for row in results["steps"]["rows"]] == [1, 2, 4, 8, 16, 32] and results["steps"]["n"] == 2
    assert "codes" in results and set(results["steps"]["rows"][0]["metrics"]) == {"mel", "sisdr"}
    text = "".join(Page(write_report(run).read_text()).words)
    assert "texts the data's" in text and "s per second of sound" in text
