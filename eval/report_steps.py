"""Sampling steps in the report: a diffusion decoder's quality and time at each number of steps, as curves and as a table."""

from html import escape
from typing import TYPE_CHECKING, Any

from .report_charts import Series, nice, steps_chart
from .report_curves import RUN_COLOURS
from .report_parts import metric_cell
from .runs import NOUNS
from .summary_lines import steps_note

if TYPE_CHECKING:
    from .report import RunView


def steps_section(views: "list[RunView]") -> str:
    """Charts over the number of steps and a table of the same numbers; empty if no run's decoder takes steps."""
    known = [(view, view.results["steps"], colour) for view, colour in zip(views, RUN_COLOURS)
             if view.results and "steps" in view.results]
    if not known:
        return ""
    titles: dict[str, str] = {}
    units: dict[str, str] = {}
    for _, steps, _ in known:
        for name, metric in steps["rows"][0]["metrics"].items():
            arrow = {"higher": " ↑", "lower": " ↓"}.get(metric.get("better", ""), "")
            titles.setdefault(name, f"{metric['title']}{arrow}")
            units.setdefault(name, f", {metric['unit']}" if metric.get("unit") else "")
    per = known[0][1]["per"]
    charts = [_chart(known, name, f"{title}{units[name]}") for name, title in titles.items()]
    charts.append(_chart(known, None, f"seconds to decode one {per}"))
    first = known[0][1]
    key = "" if len(views) == 1 else f'<p class="key">{"".join(map(_key, known))}</p>'
    noun = NOUNS[first["kind"]]
    size = "; ".join(dict.fromkeys(f"{steps['n']} of {steps['of']}" for _, steps, _ in known))
    own = "" if all(steps["own"] is None for _, steps, _ in known) else " The dotted vertical is the model's own number."
    notes = "".join(f'<p class="soft">{escape(_named(view, steps_note(steps)))}.</p>' for view, steps, _ in known)
    return f"""<section id="steps"><h2>Sampling steps <small>on {escape(size)} held-out {noun}</small></h2>{key}
<p class="soft">The same codes decoded from the same noise in each number of steps; the axis doubles from tick to tick.
Bands are 95 % bootstrap intervals.{own} The table holds the same numbers.</p>
<div class="charts">{"".join(charts)}</div>
{_table(known, titles, per)}{notes}</section>"""


def _chart(known: Any, name: str | None, title: str) -> str:
    """One metric over the steps of each run; without a name, the time."""
    series, marked = [], []
    for view, steps, colour in known:
        points = [(row["steps"], row["seconds"], None) if name is None else _point(row, name) for row in steps["rows"]]
        found = [(count, value, bounds) for count, value, bounds in points if value is not None]
        if not found:
            continue
        counts, values, bounds = zip(*found)
        series.append(Series(view.tag or "run", colour, counts, values, bounds=[pair for pair in bounds if pair is not None]))
        marked += [] if steps["own"] is None else [float(steps["own"])]
    if not series:
        return ""
    drawing = steps_chart(f"{title} by sampling steps", series, sorted(set(marked)), log=name is None)
    best = " · ".join(f"{nice(s.values[0])} → {nice(s.values[-1])}" for s in series)
    return f'<figure class="chart"><h3>{escape(title)} <small>{escape(best)}</small></h3>{drawing}</figure>'


def _point(row: dict[str, Any], name: str) -> tuple[int, float | None, tuple[float, float] | None]:
    """Steps, value and interval of a metric in one row."""
    metric = row["metrics"].get(name) or {"value": None}
    interval = metric.get("uncertainty")
    return row["steps"], metric["value"], (interval["low"], interval["high"]) if interval else None


def _table(known: Any, titles: dict[str, str], per: str) -> str:
    """A row for each run and number of steps."""
    lines = []
    for view, steps, _ in known:
        for row in steps["rows"]:
            own = row["steps"] == steps["own"]
            label = _named(view, f"{row['steps']}{' (own)' if own else ''}")
            cells = "".join(metric_cell(row["metrics"].get(name)) for name in titles)
            mark = ' class="model"' if own else ""
            lines.append(f'<tr{mark}><th scope="row">{escape(label)}</th>{cells}<td>{nice(row["seconds"])}</td></tr>')
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles.values())
    return f"""<div class="wide steps"><table><caption class="soft">quality and time by sampling steps</caption>
<thead><tr><th scope="col">steps</th>{head}<th scope="col">s per {escape(per)}</th></tr></thead>
<tbody>{"".join(lines)}</tbody></table></div>"""


def _named(view: "RunView", text: str) -> str:
    return f"{view.tag}: {text}" if view.tag else text


def _key(known: Any) -> str:
    view, _, colour = known
    return f'<span><i style="border-color:var(--{colour})"></i>{escape(view.name)}</span>'
