"""Opens the report in headless Chromium."""

import json

import pytest
from browser import look
from speech_runs import DM_CODEC, LM_SPT, written_run
from toy import write_run

from tokenizers_lab.eval import image_metrics
from tokenizers_lab.eval.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("toy_system")]

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
SOUND_PROBE = """<script>
window.addEventListener('load', () => {      // which waits until each player knows how long it plays
  const all = selector => [...document.querySelectorAll(selector)], seen = { problems: window.problems };
  const box = element => element.getBoundingClientRect();
  seen.players = all('.sound').map(sound => {
    const audio = sound.querySelector('audio'), mel = box(sound.querySelector('.mel svg image'));
    return [sound.dataset.kind, audio.duration, audio.error && audio.error.message, box(audio).width, mel.width, mel.height];
  });
  const mel = all('.mel')[1], picture = box(mel.querySelector('svg image')), audio = mel.parentElement.querySelector('audio');
  mel.dispatchEvent(new MouseEvent('click', { clientX: picture.left + picture.width / 4 }));
  seen.quarter = audio.currentTime / audio.duration;
  audio.dispatchEvent(new Event('timeupdate'));
  const line = box(mel.querySelector('i'));
  seen.line = ((line.left + line.right) / 2 - picture.left) / picture.width;
  seen.shown = [0, 1].map(i => getComputedStyle(all('.mel i')[i]).visibility);
  seen.tops = all('.clip').map(clip => [...new Set([...clip.querySelectorAll('.sound')].map(sound => box(sound).top))].length);
  seen.charts = all('.chart svg').map(chart => box(chart).width);
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  document.documentElement.dataset.seen = JSON.stringify(seen);
});
</script></body>"""


def test_report_works_in_a_browser(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(image_metrics, "ALIASES", {"lpips": ()})
    seen = look(chromium, write_report(write_run(tmp_path)), tmp_path, PROBE)
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
    seen = look(chromium, page, tmp_path, PROBE)
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
        look(chromium, page, tmp_path, PROBE)


def test_sounds_play_in_a_browser(chromium, tmp_path):
    run = written_run(tmp_path, DM_CODEC, "toy", val_limit=2)
    seen = look(chromium, write_report(run), tmp_path, SOUND_PROBE)
    assert seen["problems"] == [] and seen["overflow"] <= 0
    assert [kind for kind, *_ in seen["players"]] == ["original", "reconstruction"] * 2
    seconds = [min(5, example["seconds"]) for example in json.loads((run / "results.json").read_text())["examples"]]
    for number, (kind, duration, error, *sizes) in enumerate(seen["players"]):
        assert duration == pytest.approx(seconds[number // 2], abs=0.01) and error is None, (kind, error)
        assert sizes[0] > 300 and sizes[1] > 300 and sizes[2] > 80
    assert seen["quarter"] == pytest.approx(0.25, abs=0.02) and seen["line"] == pytest.approx(0.25, abs=0.02)
    assert seen["shown"] == ["hidden", "visible"]
    assert seen["tops"] == [1, 1], "original and reconstruction stand side by side"


def test_two_speech_runs_in_a_browser(chromium, tmp_path):
    first = written_run(tmp_path, DM_CODEC, "toy", val_limit=1)
    second = written_run(tmp_path, LM_SPT, "toy", sample_rate=24_000, val_limit=1)
    seen = look(chromium, write_report(first, second), tmp_path, SOUND_PROBE)
    assert seen["problems"] == [] and seen["overflow"] <= 0
    assert [kind for kind, *_ in seen["players"]] == [
        "original A", "reconstruction A", "original B", "reconstruction B", "semantic B", "auxiliary B", "acoustic B"]
    durations = {round(duration, 2) for _, duration, *_ in seen["players"]}
    assert max(durations) - min(durations) <= 0.01 and all(error is None for _, _, error, *_ in seen["players"])
