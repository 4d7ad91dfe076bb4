"""The leaderboard: a comparison as one page that loads nothing from anywhere.

A table that is sorted by any column, a plot of any two columns, reconstructions side by side, margins, protocol.
"""

import json
from html import escape
from importlib.resources import files
from typing import Any

from PIL import Image

from .compare import RANDOM
from .compare_examples import ORIGINAL, Example, Examples
from .compare_text import (
    COST,
    QUALITY,
    RATE,
    failures,
    heading,
    label_of,
    margin_text,
    noun_of,
    protocol_lines,
    threads_of,
    title_of,
)
from .report_charts import MEL_LEFT, MEL_WIDTH, nice
from .report_page import page
from .report_parts import metric_cell
from .report_pictures import picture_viewer
from .report_sounds import SECONDS, Sound, clip_card

ROOM = 9_000_000      # characters that the reconstructions may take


def comparison_page(result: dict[str, Any], examples: Examples | None = None) -> str:
    """The whole HTML document of a comparison. examples: what is shown side by side; none: nothing."""
    folder = files("tokenizers_lab.eval")
    style, script = ((folder / f"compare.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    sections = {
        "table": ("Table", _table(result)), "plot": ("Quality against rate", _plot(result)),
        "reconstructions": ("Reconstructions", _reconstructions(result, examples)),
        "margins": ("Margins", _margins(result)), "protocol": ("Protocol", _protocol(result)),
    }
    written = {key: entry for key, entry in sections.items() if entry[1]}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in written.items())
    title = escape(title_of(result))
    body = "\n".join(f'<div id="{key}">{text}</div>' for key, (_, text) in written.items())
    return page(title, f"""<style>
{style}</style>
<h1>{title}</h1>
<p class="soft">{_summary(result)}</p>
<nav aria-label="sections">{links}</nav>
{_flags(result)}
{body}
<script>
{script}</script>""")


def _summary(result: dict[str, Any]) -> str:
    """What was compared on what, in one line."""
    models = sum(row["role"] == "model" for row in result["rows"])
    costs = result["costs"]
    where = (costs or result["environment"])["processor"]
    threads = f", {threads_of(costs)}" if costs else ""
    items = f"{result['n']} {noun_of(result)} of {result['protocol']['source']}"
    return escape(f"{models} models on the same {items}, on {where}{threads}")


def _flags(result: dict[str, Any]) -> str:
    """What a reader must know before the numbers: random weights and failures."""
    named = [row["label"] for row in result["rows"] if row.get("random")]
    texts = failures(result)
    if named:
        texts.insert(0, f"Random weights, which say nothing about the trained model: {', '.join(named)}.")
    return "".join(f'<p class="flag">{escape(text)}</p>' for text in texts)


# --- table --------------------------------------------------------------------------------------------------------------

def _table(result: dict[str, Any]) -> str:
    columns = result["columns"]
    head = "".join(
        f'<th scope="col" aria-sort="none" class="{column["group"]}"><button type="button" data-better="{column["better"]}">'
        f"{_head(column)}</button></th>"
        for column in columns)
    body = "".join(_row(row, columns, result["best"]) for row in result["rows"])
    return f"""<p class="soft">The head of a column sorts by it, the better side first; once more turns it round. What has no
value is last. Below a value: its 95 % interval; below a speed: the range of the repeats. Bold: the best of the models whose
weights are not random.</p>
<p class="spoken" role="status" id="sorted"></p>
<div class="wide" tabindex="0" role="region" aria-label="all numbers"><table class="sortable"><thead><tr>
<th scope="col" aria-sort="none"><button type="button">model</button></th>{head}</tr>
</thead><tbody>{body}</tbody></table></div>"""


def _head(column: dict[str, Any]) -> str:
    """A column's heading, whose arrow never stands alone in a line."""
    return escape(heading(column)).replace(" ↑", "&nbsp;↑").replace(" ↓", "&nbsp;↓")


def _row(row: dict[str, Any], columns: list[dict[str, Any]], best: dict[str, str]) -> str:
    """A row whose cells carry their values for sorting; without a value a cell carries none."""
    flag = f' <span class="flag">{RANDOM}</span>' if row.get("random") else ""
    flag += ' <span class="flag">failed</span>' if "failed" in row else ""
    facts = [row["system"]] if row["role"] == "model" and "system" in row else []
    facts += [f"{row['sample_rate']} Hz"] if "sample_rate" in row else []
    facts += [str(row["dtype"])] if row.get("dtype") not in (None, "float32") else []
    small = f"<small>{escape(', '.join(facts))}</small>" if facts else ""
    small += f'<small class="why">{escape(row["failed"])}</small>' if "failed" in row else ""
    cells = [f'<td data-value="{escape(row["label"])}"><b class="dot"></b>{escape(row["label"])}{flag}{small}</td>']
    for column in columns:
        metric = row["metrics"].get(column["name"])
        value = None if metric is None else metric["value"]
        attributes = "" if value is None else f' data-value="{value!r}"'
        attributes += f' title="{escape(metric["missing"])}"' if metric is not None and metric.get("missing") else ""
        attributes += ' class="best"' if best.get(column["name"]) == row["label"] else ""
        shown = metric_cell(metric if metric is None else {**metric, "unit": ""})      # the head says the unit
        cells.append(shown.replace("<td", f"<td{attributes}", 1))
    kind = "failed" if "failed" in row else RANDOM.split()[0] if row.get("random") else ""
    return f'<tr class="{escape(row["role"])} {kind}" data-label="{escape(row["label"])}">{"".join(cells)}</tr>'


# --- plot ---------------------------------------------------------------------------------------------------------------

def plot_data(result: dict[str, Any]) -> dict[str, Any]:
    """What the plot draws: columns, and of each row its value and interval by column."""
    columns = [{**{key: column[key] for key in ("name", "title", "unit", "better", "group")}, "heading": heading(column)}
               for column in result["columns"]]
    rows = []
    for row in result["rows"]:
        values = {}
        for name, metric in row["metrics"].items():
            if metric.get("value") is not None:
                interval = metric.get("uncertainty") or {}
                values[name] = [metric["value"], interval.get("low"), interval.get("high")]
        rows.append({"label": row["label"], "shown": label_of(row), "role": row["role"], "random": bool(row.get("random")),
                     "failed": "failed" in row, "values": values})
    return {"columns": columns, "rows": rows}


def _plot(result: dict[str, Any]) -> str:
    """Two choices and an empty drawing, which the script fills."""
    columns = result["columns"]
    across = [column for column in columns if column["group"] in (RATE, COST)]
    up = [column for column in columns if column["group"] == QUALITY]
    if not across or not up:
        return ""
    counts = {column["name"]: sum(row["metrics"].get(column["name"], {}).get("value") is not None for row in result["rows"])
              for column in across}
    chosen = max((column for column in across if column["group"] == RATE), key=lambda column: counts[column["name"]],
                 default=across[0])
    text = json.dumps(plot_data(result), allow_nan=False).replace("<", "\\u003c")
    return f"""<section><h2>Quality against rate</h2>
<div class="choices">{_choice("up", "Quality", up, up[0]["name"])}{_choice("across", "Against", across, chosen["name"])}</div>
<figure class="plot"><svg id="drawing" role="img"></svg>
<figcaption><ul id="legend"></ul><p class="soft" id="undrawn"></p></figcaption></figure>
<p class="soft">Vertical bars are 95 % intervals. Hollow, dashed: random weights. Points of one codec with several numbers of
codebooks are joined; dashed horizontals are rows without a rate.</p>
<script type="application/json" id="points">{text}</script></section>"""


def _choice(name: str, label: str, columns: list[dict[str, Any]], chosen: str) -> str:
    options = "".join(
        f'<option value="{escape(column["name"])}"{" selected" if column["name"] == chosen else ""}>'
        f"{escape(heading(column))}</option>"
        for column in columns)
    return f'<label>{label} <select id="{name}">{options}</select></label>'


# --- reconstructions ----------------------------------------------------------------------------------------------------

def _reconstructions(result: dict[str, Any], examples: Examples | None) -> str:
    """The same items for all models: pictures under a slider, or players under spectrograms."""
    if examples is None or not examples.items:
        return ""
    names = {row["label"]: label_of(row) for row in result["rows"]}
    if noun_of(result) == "images":
        return _pictures(result, examples.items, names)
    return _sounds(result, examples.items, names)


def item_values(result: dict[str, Any], label: str, key: str) -> str:
    """A row's metrics of one item, as text."""
    place = result["keys"].index(key)
    row = next(row for row in result["rows"] if row["label"] == label)
    values = []
    for metric in row["metrics"].values():
        one = metric.get("per_image") or metric.get("per_clip")
        if one and one[place] is not None:
            values.append(f"{metric['title']} {nice(one[place])} {metric['unit']}".strip())
    return ", ".join(values)


def _pictures(result: dict[str, Any], items: list[Example], names: dict[str, str]) -> str:
    rows: list[tuple[str, str, dict[str, Image.Image]]] = []
    taken = 0
    for item in items:
        pictures = {ORIGINAL: Image.fromarray(item.original)}
        pictures |= {names[label]: Image.fromarray(array) for label, array in item.made.items()}
        taken += sum(2 * picture.width * picture.height for picture in pictures.values())      # a photograph's PNG in base64
        if rows and taken > ROOM:
            break
        said = "; ".join(f"{names[label]}: {item_values(result, label, item.key)}" for label in item.made)
        rows.append((item.key, f"{item.key}: {said}", pictures))
    return picture_viewer(rows, ORIGINAL, list(rows[0][2])[1])


def _sounds(result: dict[str, Any], items: list[Example], names: dict[str, str]) -> str:
    cards: list[str] = []
    for number, item in enumerate(items):
        audio, rate = item.original
        sounds = [Sound(ORIGINAL, audio[:, : round(SECONDS * rate)], rate)]
        for label, (made, made_rate) in item.made.items():
            cut = made[:, : round(SECONDS * made_rate)]
            sounds.append(Sound(names[label], cut, made_rate, item_values(result, label, item.key)))
        card = clip_card(number, {"key": item.key, **item.about}, sounds)
        if cards and sum(map(len, cards)) + len(card) > ROOM:
            break
        cards.append(card)
    return f"""<section id="sounds" style="--left:{MEL_LEFT:.1%};--width:{MEL_WIDTH:.1%}">
<h2>Reconstructions <small>of {len(cards)} held-out clips</small></h2>
<p class="soft">At most the first {SECONDS:g} s of a clip. Spectrograms are what the mel distance compares: 80 mel bands up to
8 kHz, natural logarithm of the magnitude; all of a clip in the same colours, from the original's loudest band (white) to 80 dB
below (black). Click into one to listen from there.</p>
{"".join(cards)}</section>"""


# --- margins and protocol -----------------------------------------------------------------------------------------------

def _margins(result: dict[str, Any]) -> str:
    """The table of differences to the first model."""
    margins = result["margins"]
    if not margins:
        return ""
    titles = {column["name"]: column["title"] for column in result["columns"]}
    names = list(dict.fromkeys(margin["metric"] for margin in margins))
    head = "".join(f"<th>{escape(titles[name])}</th>" for name in names)
    lines = []
    for label in dict.fromkeys(margin["row"] for margin in margins):
        found = {margin["metric"]: margin for margin in margins if margin["row"] == label}
        cells = "".join(f"<td>{escape(margin_text(found.get(name)))}</td>" for name in names)
        lines.append(f"<tr><td>{escape(label)}</td>{cells}</tr>")
    first = escape(margins[0]["over"])
    return f"""<section><h2>Better than {first} by</h2>
<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>
<p class="soft">Means of the differences, item by item, with their 95 % intervals; positive is better.</p></section>"""


def _protocol(result: dict[str, Any]) -> str:
    lines = "".join(f'<p class="soft">{escape(line)}</p>' for line in protocol_lines(result))
    origins = "".join(
        f"<tr><td>{escape(row['label'])}</td><td>{escape(_origin(row))}</td></tr>"
        for row in result["rows"] if row["role"] == "model")
    return f"""<section><h2>Protocol</h2>{lines}<details><summary>Where the weights are from</summary><div class="wide">
<table class="facts"><tbody>{origins}</tbody></table></div></details></section>"""


def _origin(row: dict[str, Any]) -> str:
    """Source and hash of a row's weights."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    weights = row.get("weights") or "no source is noted: trained here"
    said = weights if isinstance(weights, str) else "; ".join(f"{name}: {value}" for name, value in weights.items())
    return f"{said}; weights' SHA-256 {row['weights_sha256']}"
