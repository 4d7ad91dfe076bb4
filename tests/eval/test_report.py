import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from toy import write_run

from tokenizers_lab.errors import CheckpointError
from tokenizers_lab.eval import image_metrics
from tokenizers_lab.eval.report import view_run, write_report
from tokenizers_lab.eval.report_charts import Series, line_chart, thin
from tokenizers_lab.eval.report_curves import families, weighted_curve
from tokenizers_lab.eval.report_pictures import DIFFERENCE_GAIN
from tokenizers_lab.eval.runs import open_run, read_results
from tokenizers_lab.eval.summary import finish_run, print_summary

pytestmark = pytest.mark.usefixtures("toy_system", "without_lpips")
EVIL = "a <script>alert(1)</script> & \"more\" 'quotes'"


@pytest.fixture
def without_lpips(monkeypatch):
    """LPIPS is tested with the harness; here it would take the time."""
    monkeypatch.setattr(image_metrics, "ALIASES", {"lpips": ()})


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def images(self, kind: str) -> list[np.ndarray]:
        found = [a["src"] for tag, a in self.tags if tag == "img" and a.get("data-kind") == kind]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).convert("RGB")) for src in found]


def test_page_is_self_contained(tmp_path):
    page = write_report(write_run(tmp_path, note=EVIL)).read_text()
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    for tag, attributes in Page(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "data", "poster", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (tag, name)
    assert not list(tmp_path.glob("toy-tiny/.report*"))


def test_text_of_config_and_file_names_is_escaped(tmp_path):
    page = write_report(write_run(tmp_path, note=EVIL)).read_text()
    parsed = Page(page)
    assert "<script>alert" not in page and [tag for tag, _ in parsed.tags].count("script") == 1
    assert "b" not in {tag for tag, _ in parsed.tags[[t for t, _ in parsed.tags].index("button"):]}, "file names hold a <b>"
    assert "a <script>alert(1)</script>" in "".join(parsed.words)


def test_every_part_is_there(tmp_path):
    run = write_run(tmp_path)
    parsed = Page(write_report(run).read_text())
    text = "".join(parsed.words)
    for wanted in ("the published model: patches and a linear map", "finished, 60 steps",
                   "untrained (random weights)", "patch mean (8×8)", "random weights (seed 0)",
                   "centre, 32 × 32 px", "torch 2", "active units", "patch: 8", "train from step 0, finetune from step 30",
                   "× train 1, finetune 2", "learning rate"):
        assert wanted in text, wanted
    originals, reconstructions, differences, latents = (
        parsed.images(kind) for kind in ("original", "reconstruction", f"difference ×{DIFFERENCE_GAIN}", "latent"))
    assert len(originals) == len(reconstructions) == len(differences) == len(latents) == 9
    on_disk = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "val").iterdir())]
    for original, disk, reconstruction, difference in zip(originals, on_disk, reconstructions, differences):
        assert (original == disk).all()
        assert (difference == np.minimum(np.abs(disk.astype(int) - reconstruction) * DIFFERENCE_GAIN, 255)).all()
    value = read_results(open_run(run))["rows"][0]["metrics"]["psnr"]["value"]
    assert f"{value:.4g} dB" in text


def test_charts_are_whole_and_take_the_page_s_colours(tmp_path):
    page = write_report(write_run(tmp_path)).read_text()
    drawings = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 11      # loss, weighted, mse, kl, gan, psnr, ssim, lr, grad_norm, channels, variance
    ids: list[str] = []
    for drawing in drawings:
        root = ET.fromstring(drawing.replace("xlink:href", "href"))
        assert "var(--c" in drawing and not re.search(r"#0[1247]0[2568]\d\d", drawing)
        here = [element.get("id") for element in root.iter() if element.get("id")]
        used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', drawing)
        assert {a or b for a, b in used} <= set(here)
        ids += here
    assert len(ids) == len(set(ids)), "ids are unique on the page"


def test_weighted_terms_follow_the_weights_of_their_stage(tmp_path):
    view = view_run(write_run(tmp_path))
    raw = {r["step"]: r for r in view.run.records if r["kind"] == "train"}
    steps, values = weighted_curve(view, "mse")
    assert steps == [float(s) for s in raw]
    assert values == pytest.approx([raw[s]["mse"] * (1 if s <= 30 else 2) for s in raw])
    assert weighted_curve(view, "kl")[0] == [float(s) for s in raw if s <= 30]


def test_long_curves_are_averaged_not_cut():
    rng = np.random.default_rng(0)
    steps, values = np.arange(10_000), rng.normal(size=10_000)
    values[77] = float("nan")
    x, mean, low, high = thin(steps, values, points=100)
    assert len(x) == 100 and low.min() == np.nanmin(values) and high.max() == np.nanmax(values)
    assert mean.mean() == pytest.approx(np.nanmean(values), abs=1e-4)
    assert "<path" in line_chart("flat", [Series("a", "c0", [1, 2], [0.0, float("nan")])], log=True)


def test_interrupted_run_says_how_far_it_came(tmp_path):
    summary = finish_run(write_run(tmp_path, steps=40))
    assert summary["run"]["status"] == "step 40 of 60"
    console = Console(file=io.StringIO(), width=110)
    print_summary(summary, console)
    printed = console.file.getvalue()
    for wanted in ("step 40 of 60, 9 held-out images", "patch mean (8×8)", "random weights (seed 0)"):
        assert wanted in printed
    for path in summary["paths"].values():
        assert path in printed and len(path) > 5
    assert "step 40 of 60" in (tmp_path / "toy-tiny" / "report.html").read_text()


def test_summary_shows_the_margin_over_the_trivial_baseline(tmp_path):
    summary = finish_run(write_run(tmp_path))
    psnr = {row["role"]: row["metrics"]["psnr"]["value"] for row in summary["rows"]}
    assert psnr["model"] > psnr["baseline"] > psnr["untrained"]
    console = Console(file=io.StringIO(), width=110)
    print_summary(summary, console)
    assert f"{psnr['model'] - psnr['baseline']:+.3g}" in console.file.getvalue()
    assert all((tmp_path / "toy-tiny" / name).is_file() for name in ("results.json", "grid.png", "report.html"))


def test_missing_metric_is_said_in_table_and_page(tmp_path, monkeypatch):
    from tokenizers_lab.errors import WeightsMissing

    def absent(device):
        raise WeightsMissing("VGG is not here: put it <there>")

    spec = image_metrics.METRICS["lpips_vgg"]
    monkeypatch.setattr(image_metrics, "ALIASES", {"lpips": ("lpips_vgg",)})
    monkeypatch.setitem(image_metrics.METRICS, "lpips_vgg", image_metrics.MetricSpec(spec.name, spec.title, "", "lower", absent))
    summary = finish_run(write_run(tmp_path))
    console = Console(file=io.StringIO(), width=110)
    print_summary(summary, console)
    assert "LPIPS (VGG): VGG is not here: put it <there>" in console.file.getvalue()
    assert "LPIPS (VGG) is not here: VGG is not here: put it &lt;there&gt;" in (tmp_path / "toy-tiny" / "report.html").read_text()


def test_results_of_an_older_checkpoint_are_not_shown(tmp_path):
    run = write_run(tmp_path)
    finish_run(run)
    results = json.loads((run / "results.json").read_text())
    results["run"]["step"], results["rows"][0]["metrics"]["psnr"]["value"] = 20, 99.0
    (run / "results.json").write_text(json.dumps(results))
    assert "99 dB" not in write_report(run).read_text()
    assert json.loads((run / "results.json").read_text())["run"]["step"] == 60


def test_two_runs_on_one_page(tmp_path):
    first, second = write_run(tmp_path), write_run(tmp_path, "other", channels=3, steps=40)
    path = write_report(first, second)
    assert path == first / "report-against-toy-other.html"
    parsed = Page(path.read_text())
    text = "".join(parsed.words)
    for wanted in ("A: toy-tiny, trained (EMA weights)", "B: toy-other, trained (EMA weights)", "step 40 of 60"):
        assert wanted in text
    assert "not measured alike" not in text
    assert len(parsed.images("original")) == len(parsed.images("reconstruction A")) == len(parsed.images("latent B")) == 9
    better, worse = (read_results(open_run(run))["rows"][0]["metrics"]["psnr"]["value"] for run in (first, second))
    assert better > worse and f"{worse:.4g} dB" in text


def test_runs_measured_on_other_images_are_flagged(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", "other")
    (tmp_path / "b" / "val" / "008 <b>.png").unlink()
    text = "".join(Page(write_report(first, second).read_text()).words)
    assert "not measured alike" in text and "images_sha256" in text


def test_the_same_images_under_two_names_are_measured_alike(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", "other")
    text = "".join(Page(write_report(first, second).read_text()).words)
    sources = [read_results(open_run(run))["protocol"]["source"] for run in (first, second)]
    assert sources[0] != sources[1] and "not measured alike" not in text


def test_results_without_examples_have_a_page(tmp_path):
    run = write_run(tmp_path)
    finish_run(run)
    results = json.loads((run / "results.json").read_text())
    del results["examples"]
    (run / "results.json").write_text(json.dumps(results))
    parsed = Page(write_report(run).read_text())
    assert "There are no pictures." in "".join(parsed.words) and not parsed.images("original")


def test_a_run_that_cannot_be_evaluated_still_has_a_page(tmp_path):
    import shutil

    run = write_run(tmp_path)
    shutil.rmtree(run / "checkpoints")
    text = "".join(Page(write_report(run).read_text()).words)
    assert "no held-out results" in text and "no finished checkpoint yet" in text and "total loss" in text
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        finish_run(run)
    with pytest.raises(CheckpointError, match="is not a run"):
        write_report(tmp_path)


def test_numbers_of_layers_share_a_chart(tmp_path):
    assert families(["a_01", "loss", "b_1", "a_10", "a_02", "c_01"]) == {"a": ["a_01", "a_02", "a_10"]}
    run = write_run(tmp_path)
    layers = {f"distill_weight_{i:02d}": 1 / i for i in range(1, 25)}
    records = [{"step": step, "stage": "train", "kind": "train", "loss": 1.0, **layers, "misalignment_01": 0.2 * step,
                "misalignment_02": 0.4, "alone_07": 3.0} for step in (2, 4, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = write_report(run).read_text()
    titles = [re.sub(r"<[^>]*>", "", t) for t in re.findall(r'<figure class="chart"><h3>(.*?)</h3>', page)]
    assert [t for t in titles if "distill weight" in t] == ["distill weight by layer, with the last values"]
    assert [t.split()[0] for t in titles].count("misalignment") == 1 and any(t.startswith("alone 07") for t in titles)
    chart = page[page.index("<h3>distill weight"):]
    drawing, key = chart[: chart.index("</svg>")], chart[chart.index('<div class="key">') : chart.index("</figure>")]
    assert len(re.findall(r"fill: none;[^\"]*stroke: var\(--c\d\)", drawing)) == 24
    looks = re.findall(r'<i style="([^"]*)"></i>(\d+) <small>([\d.]+)</small>', key)
    assert [label for _, label, _ in looks] == [f"{i:02d}" for i in range(1, 25)] and looks[3][2] == "0.25"
    assert len({look for look, _, _ in looks}) == 24, "two layers look alike"
    assert len(re.findall("stroke-dasharray", drawing)) >= 14      # of the eleventh line on
