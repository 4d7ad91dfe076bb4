"""Opens the leaderboard in headless Chromium and uses it as a person would: sort, slide, choose."""

import pytest
from browser import look
from leaderboards import codecs, images, speech

from tokenizers_lab.errors import WeightsMissing
from tokenizers_lab.eval.compare import write_comparison

pytestmark = pytest.mark.browser

# synchronous, after the page's own script; keys are what a keyboard gives a button: a click
SORT = """<script>
window.addEventListener('load', () => {
  const all = selector => [...document.querySelectorAll(selector)], seen = { problems: window.problems };
  const names = () => all('.sortable tbody tr').map(row => row.cells[0].dataset.value);
  const heads = all('.sortable th');
  seen.heads = heads.map(head => head.textContent);
  seen.orders = [names()];
  for (const column of [1, 1, 2, 0]) {
    const button = heads[column].firstElementChild;
    button.focus();
    button.click();
    const sorted = heads.filter(head => head.getAttribute('aria-sort') !== 'none').length;
    seen.orders.push([document.activeElement === button && sorted === 1, heads[column].getAttribute('aria-sort'), ...names()]);
  }
  seen.spoken = document.querySelector('#sorted').textContent;
  seen.flags = all('.sortable .flag').map(flag => flag.closest('tr').cells[0].dataset.value + ': ' + flag.textContent);
  const up = document.querySelector('#up'), across = document.querySelector('#across');
  const drawn = () => ({
    circles: all('#drawing .trained').length,
    hollow: all('#drawing .random').map(mark => mark.getAttribute('stroke-dasharray')),
    places: all('#drawing g').map(group => {
      const mark = group.querySelector('.trained, .random').getBoundingClientRect();
      const bar = group.querySelector('.bar'), height = bar ? bar.getBoundingClientRect().height : 0;
      return [group.dataset.label, mark.left + mark.width / 2, mark.top + mark.height / 2, height];
    }),
    legend: all('#legend li').map(item => item.textContent), undrawn: document.querySelector('#undrawn').textContent,
    axes: all('#drawing .axis').map(text => text.textContent),
    label: document.querySelector('#drawing').getAttribute('aria-label'),
    labels: all('#drawing .label').map(text => text.textContent), flat: all('#drawing .flat').length,
  });
  const choose = (select, value) => { select.value = value; select.dispatchEvent(new Event('change')); };
  seen.plots = [drawn()];
  choose(up, 'sisdr'); seen.plots.push(drawn());
  choose(up, 'mel'); choose(across, 'parameters'); seen.plots.push(drawn());
  seen.players = all('.sound audio').length;
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.names = all('button, select, audio, svg[role=img], .wide[tabindex]').filter(
    element => !(element.textContent.trim() || element.getAttribute('aria-label') || element.labels?.length)).length;
  document.documentElement.dataset.seen = JSON.stringify(seen);
});
</script></body>"""
SLIDE = """<script>
window.addEventListener('load', () => {
  const all = selector => [...document.querySelectorAll(selector)], seen = { problems: window.problems, clips: [] };
  const range = document.querySelector('input[type=range]'), [under, over] = all('.stack img'), selects = all('.viewer select');
  for (const place of [50, 20]) {
    range.value = place; range.dispatchEvent(new Event('input')); seen.clips.push(getComputedStyle(over).clipPath);
  }
  seen.choices = selects.map(select => [select.value, ...[...select.options].map(option => option.value)]);
  const cards = all('.cards button'), source = (card, kind) => card.querySelector('img[data-kind="' + kind + '"]').src;
  const pair = () => [under, over].map(image => cards.map(card => all('.viewer option').map(option => option.value).find(
    kind => source(card, kind) === image.src)).map((kind, i) => kind && i + ' ' + kind).find(Boolean));
  seen.pairs = [pair()];
  selects[0].value = selects[0].options[2].value; selects[0].dispatchEvent(new Event('change'));
  cards[1].click();
  seen.pairs.push(pair());
  seen.values = document.querySelector('.values').textContent;
  seen.images = all('.cards img').map(image => image.naturalWidth);
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  document.documentElement.dataset.seen = JSON.stringify(seen);
});
</script></body>"""


def test_sort_and_plot(chromium, tmp_path):
    result, examples = speech([*codecs(), ("gone", WeightsMissing("not here"))])
    seen = look(chromium, write_comparison(result, tmp_path, examples)[2], tmp_path, SORT)
    assert seen["problems"] == [] and seen["overflow"] <= 0 and seen["names"] == 0
    rows = {row["label"]: row["metrics"] for row in result["rows"]}

    def ordered(metric, sign):
        known = [label for label in rows if metric in rows[label]]
        return sorted(known, key=lambda label: sign * rows[label][metric]["value"]) + [x for x in rows if x not in known]

    assert seen["heads"][1].startswith("mel distance") and seen["orders"][0] == list(rows)
    assert seen["orders"][1] == [True, "ascending", *ordered("mel", 1)]
    last = ordered("mel", -1)
    assert seen["orders"][2] == [True, "descending", *last]
    # SI-SDR is better if higher; equal places, here those without a value, stay as they were
    without = [label for label in last if "sisdr" not in rows[label]]
    assert seen["orders"][3] == [True, "descending", *ordered("sisdr", -1)[:3], *without]
    assert seen["orders"][4] == [True, "ascending", "gone", "mean mel", "mimi:random-tiny", "mimi:random-tiny@2", "ours"]
    assert seen["spoken"] == "sorted by model, ascending"
    assert sorted(seen["flags"]) == ["gone: failed", "mimi:random-tiny: random weights", "mimi:random-tiny@2: random weights"]
    first, second, third = seen["plots"]
    assert first["circles"] == 1 and len(first["hollow"]) == 2 and all(first["hollow"])
    peers = {"mimi:random-tiny", "mimi:random-tiny@2"}
    assert set(first["legend"]) == {"ours", *(f"{peer} (random weights)" for peer in peers), "mean mel"}
    assert first["undrawn"] == "Not drawn, without a value here: gone (failed)." and first["flat"] == 1
    assert first["axes"] == ["bitrate, kbit/s (logarithmic)", "mel distance ↓"]
    assert first["label"].startswith("mel distance ↓ against bitrate, kbit/s. ours: ")
    assert set(first["labels"]) == {"ours", *peers, "mean mel"}
    for plot, up, across in ((first, "mel", "bitrate"), (second, "sisdr", "bitrate"), (third, "mel", "parameters")):
        places = {label: (x, y) for label, x, y, _ in plot["places"]}
        assert len(places) == 3 and all(height > 2 for *_, height in plot["places"])
        by_x, by_y = (sorted(places, key=lambda label: places[label][axis]) for axis in (0, 1))
        values = {label: (rows[label][across]["value"], rows[label][up]["value"]) for label in places}
        assert [values[label][0] for label in by_x] == sorted(value for value, _ in values.values())
        assert [values[label][1] for label in by_y] == sorted((value for _, value in values.values()), reverse=True)
    assert second["axes"][1] == "SI-SDR, dB ↑" and second["flat"] == 0 and third["axes"][0].startswith("parameters, M")
    assert seen["players"] == len(examples.items) * 4


def test_slider(chromium, tmp_path):
    result, examples = images()
    seen = look(chromium, write_comparison(result, tmp_path, examples)[2], tmp_path, SLIDE)
    assert seen["problems"] == [] and seen["overflow"] <= 0
    assert seen["clips"] == ["inset(0px 0px 0px 50%)", "inset(0px 0px 0px 20%)"]
    titles = ["the original", "diffusers:kl-random-tiny (random weights)", "diffusers:dc-random-tiny (random weights)"]
    assert seen["choices"] == [[titles[0], *titles], [titles[1], *titles]]
    assert seen["pairs"] == [[f"0 {titles[0]}", f"0 {titles[1]}"], [f"1 {titles[2]}", f"1 {titles[1]}"]]
    assert seen["values"].startswith(f"{examples.items[1].key}: {titles[1]}: PSNR ") and len(seen["images"]) == 9
    assert set(seen["images"]) == {32}
