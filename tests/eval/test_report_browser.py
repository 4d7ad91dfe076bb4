"""Opens the report in headless Chromium."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
from toy import write_run

from tokenizers_lab.eval import image_metrics
from tokenizers_lab.eval.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("toy_system")]

OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
           "--window-size=1280,1600", "--virtual-time-budget=10000", "--dump-dom"]

# runs in the page after its own script: uses it as a person would, and leaves what it saw in an attribute
PROBE = """<script>
window.addEventListener('load', () => {      // synchronous: decoding off the main thread would outlast the virtual time
  const all = selector => [...document.querySelectorAll(selector)];
  const range = document.querySelector('input[type=range]'), stack = document.querySelector('.stack');
  const [under, over] = stack.querySelectorAll('img'), selects = all('.viewer select');
  const clip = () => getComputedStyle(over).clipPath;
  const seen = { clips: [clip()], problems: window.problems };
  range.value = 25; range.dispatchEvent(new Event('input')); seen.clips.push(clip());
  range.value = 100; range.dispatchEvent(new Event('input')); seen.clips.push(clip());
  const source = (card, kind) => card.querySelector('img[data-kind="' + kind + '"]').src;
  const cards = all('.cards button');
  const shown = card => under.src === source(card, selects[0].value) && over.src === source(card, selects[1].value);
  seen.first = shown(cards[0]);
  cards[3].click();
  const pressed = card => card.getAttribute('aria-pressed') === 'true';
  seen.clicked = shown(cards[3]) && pressed(cards[3]) && !pressed(cards[0]);
  selects[1].value = [...selects[1].options].at(-1).value; selects[1].dispatchEvent(new Event('change'));
  seen.selected = selects[1].value.startsWith('latent') && over.src === source(cards[3], selects[1].value);
  seen.values = document.querySelector('.values').textContent;
  seen.images = all('.cards img').map(i => [i.naturalWidth, i.getBoundingClientRect().width]);
  const visible = path => path.getBoundingClientRect().width > 20 && getComputedStyle(path).stroke !== 'none';
  seen.charts = all('.chart svg').map(chart => [chart.getBoundingClientRect().width, chart.getBoundingClientRect().height,
    [...chart.querySelectorAll('[id*=line2d] path')].some(visible)]);
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  document.documentElement.dataset.seen = JSON.stringify(seen);
});
</script></body>"""
WATCH = """<script>window.problems = [];
window.addEventListener('error', e => problems.push(String(e.message)));
document.addEventListener('securitypolicyviolation', e => problems.push(e.violatedDirective + ' ' + e.blockedURI));
</script></head>"""


@pytest.fixture
def chromium() -> str:
    """Path of the browser; CI must have one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        reason = "no Chromium on this machine (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def look(chromium: str, page, tmp_path) -> dict:
    """Open a copy of the page with the probe in it; returns what the probe saw."""
    text = page.read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</head>", WATCH, 1).replace("</body>", PROBE, 1))
    command = [chromium, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"file://{probed}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr, [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert 'data-ready="yes"' in result.stdout
    seen = re.search(r'data-seen="([^"]*)"', result.stdout)
    assert seen, "the page's script or the probe stopped"
    return json.loads(html.unescape(seen.group(1)))


def test_report_works_in_a_browser(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(image_metrics, "ALIASES", {"lpips": ()})
    seen = look(chromium, write_report(write_run(tmp_path)), tmp_path)
    assert seen["problems"] == []
    assert seen["clips"] == ["inset(0px 0px 0px 50%)", "inset(0px 0px 0px 25%)", "inset(0px 0px 0px 100%)"]
    assert seen["first"] and seen["clicked"] and seen["selected"] and seen["values"].startswith("003 <b>.png: psnr ")
    assert len(seen["images"]) == 9 * 4 and all(natural in (4, 32) and shown > 60 for natural, shown in seen["images"])
    assert len(seen["charts"]) == 11 and all(width > 200 and height > 100 for width, height, _ in seen["charts"])
    assert sum(drawn for *_, drawn in seen["charts"]) >= 10
    assert seen["overflow"] <= 0


def test_two_runs_work_in_a_browser(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(image_metrics, "ALIASES", {"lpips": ()})
    page = write_report(write_run(tmp_path), write_run(tmp_path, "other", channels=3, steps=40, seed=1))
    seen = look(chromium, page, tmp_path)
    assert seen["problems"] == [] and seen["first"] and seen["clicked"] and seen["selected"]
    assert seen["clips"] == ["inset(0px 0px 0px 50%)", "inset(0px 0px 0px 25%)", "inset(0px 0px 0px 100%)"]
    assert seen["values"].startswith("003 <b>.png: A: psnr ") and "; B: psnr " in seen["values"]
    assert len(seen["images"]) == 9 * 7 and all(natural in (4, 32) and shown > 20 for natural, shown in seen["images"])
    assert all(width > 200 and height > 100 and drawn for width, height, drawn in seen["charts"])
    assert seen["overflow"] <= 0


def test_the_page_refuses_the_network(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(image_metrics, "ALIASES", {"lpips": ()})
    page = write_report(write_run(tmp_path))
    page.write_text(page.read_text().replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">', 1))
    with pytest.raises(AssertionError, match="Content Security Policy"):
        look(chromium, page, tmp_path)
