"""The comparison as a page that loads nothing from anywhere, whose table is sorted by a click on a column."""

from html import escape
from importlib.resources import files
from typing import Any

from .compare import RANDOM, heading, margin_text, protocol_lines
from .report_page import page
from .report_parts import metric_cell


def comparison_page(result: dict[str, Any]) -> str:
    """The whole HTML document of a comparison."""
    columns = result["columns"]
    head = "".join(
        f'<th aria-sort="none"><button type="button" data-better="{column["better"]}">{escape(heading(column))}</button></th>'
        for column in columns)
    body = "".join(_row(row, columns, result["best"]) for row in result["rows"])
    script = (files("tokenizers_lab.eval") / "compare.js").read_text(encoding="utf-8")
    facts = "".join(f'<p class="soft">{escape(line)}</p>' for line in protocol_lines(result))
    title = escape(result["kind"][0].upper() + result["kind"][1:])
    return page(title, f"""<h1>{title}</h1>
<p class="soft">A click on a column sorts by it, the better side first; a second click turns it round.</p>
<div class="wide"><table class="sortable"><thead><tr><th aria-sort="none"><button type="button">model</button></th>{head}</tr>
</thead><tbody>{body}</tbody></table></div>
{_margins(result)}
<section id="protocol"><h2>Protocol</h2>{facts}</section>
<style>
.sortable button {{ all:unset; cursor:pointer }} .sortable button:focus-visible {{ outline:2px solid var(--c0) }}
.sortable th[aria-sort=ascending] button::after {{ content:" ▲" }}
.sortable th[aria-sort=descending] button::after {{ content:" ▼" }}
.sortable tr.model td {{ font-weight:400 }} .sortable td.best {{ font-weight:700 }}
</style>
<script>
{script}</script>""")


def _row(row: dict[str, Any], columns: list[dict[str, Any]], best: dict[str, str]) -> str:
    """A row whose cells carry their values for sorting; without a value a cell carries none."""
    flag = f' <span class="flag">{RANDOM}</span>' if row.get("random") else ""
    facts = [f"{row['parameters'] / 1e6:.1f} M parameters"] if "parameters" in row else []
    facts += [f"{row['sample_rate']} Hz"] if "sample_rate" in row else []
    small = f"<small>{escape(', '.join(facts))}</small>" if facts else ""
    cells = [f'<td data-value="{escape(row["label"])}">{escape(row["label"])}{flag}{small}</td>']
    for column in columns:
        metric = row["metrics"].get(column["name"])
        value = None if metric is None else metric["value"]
        attributes = "" if value is None else f' data-value="{value!r}"'
        attributes += ' class="best"' if best.get(column["name"]) == row["label"] else ""
        cells.append(metric_cell(metric).replace("<td", f"<td{attributes}", 1))
    return f'<tr class="{escape(row["role"])}">{"".join(cells)}</tr>'


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
    first = escape(result["rows"][0]["label"])
    return f"""<section id="margins"><h2>Better than {first} by</h2>
<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>
<p class="soft">Means of the differences, item by item, with their 95 % intervals; positive is better.</p></section>"""
