"""Tables of the report: metrics with their baselines, latent statistics, facts."""

from html import escape
from typing import TYPE_CHECKING, Any

from .report_charts import channel_chart, nice, share_chart
from .runs import NOUNS

if TYPE_CHECKING:
    from .report import RunView


def facts(rows: dict[str, Any]) -> str:
    """A table of names and values; random weights stand out."""
    cells = []
    for name, value in rows.items():
        text = escape(str(value))
        if "random weights" in text:
            text = f'<span class="flag">{text}</span>'
        cells.append(f"<tr><td>{escape(name)}</td><td>{text}</td></tr>")
    return f'<div class="wide"><table class="facts"><tbody>{"".join(cells)}</tbody></table></div>'


def metric_cell(result: dict[str, Any] | None) -> str:
    """Value and interval, or why there is none."""
    if result is None:
        return "<td>–</td>"
    if result["value"] is None:
        return '<td><span class="flag">not here</span></td>'
    unit = f" {result['unit']}" if result["unit"] else ""
    interval = result["uncertainty"]
    low_high = f"<small>{nice(interval['low'])} to {nice(interval['high'])}</small>" if interval else ""
    return f"<td>{nice(result['value'])}{escape(unit)}{low_high}</td>"


def metrics_section(views: "list[RunView]") -> str:
    """Held-out metrics of each run, of its untrained network and of the trivial baseline, then the margins."""
    known = [v for v in views if v.results]
    if not known:
        return '<section id="quality"><h2>Quality</h2><p class="soft">Not evaluated.</p></section>'
    titles: dict[str, str] = {}
    for view in known:
        for name, result in _results(view)["rows"][0]["metrics"].items():
            arrow = {"higher": " ↑", "lower": " ↓"}.get(result.get("better", ""), "")
            titles.setdefault(name, result["title"] + arrow)
    lines = []
    for view in known:
        for row in _results(view)["rows"]:
            label = f"{view.name}, {row['label']}" if view.tag else row["label"]
            cells = "".join(metric_cell(row["metrics"].get(name)) for name in titles)
            lines.append(f'<tr class="{escape(row["role"])}"><td>{escape(label)}</td>{cells}</tr>')
    for view in known:
        margins = _results(view)["margins"]
        for over in dict.fromkeys(m["over"] for m in margins):
            by_name = {m["metric"]: m for m in margins if m["over"] == over}
            cells = "".join(_margin_cell(by_name.get(name)) for name in titles)
            label = f"{view.name}, better than {over} by" if view.tag else f"better than {over} by"
            lines.append(f'<tr class="margin"><td>{escape(label)}</td>{cells}</tr>')
    reasons = {r["title"]: r["missing"] for v in known for r in _results(v)["rows"][0]["metrics"].values() if "missing" in r}
    missing = "".join(f"<p>{escape(title)} is not here: {escape(reason)}</p>" for title, reason in reasons.items())
    first, noun = _results(known[0]), NOUNS[known[0].run.kind]
    head = "".join(f"<th>{escape(title)}</th>" for title in titles.values())
    means = f"Means over the {noun}; below each its 95 % bootstrap interval. Margins are taken {noun[:-1]} by {noun[:-1]}."
    return f"""<section id="quality"><h2>Quality <small>on {first["n"]} held-out {noun}</small></h2>
<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>
<p class="soft">{escape(first.get("explanation") or means)} Positive margins are better.</p>{missing}</section>"""


def _results(view: "RunView") -> dict[str, Any]:
    assert view.results is not None
    return view.results


def _margin_cell(margin: dict[str, Any] | None) -> str:
    if margin is None:
        return "<td>–</td>"
    interval = margin["uncertainty"]
    low_high = f"<small>{nice(interval['low'])} to {nice(interval['high'])}</small>" if interval else ""
    return f"<td>{margin['value']:+.3g}{low_high}</td>"


def latents_section(views: "list[RunView]") -> str:
    """Size, active units, rate, per-channel spread and explained variance of the latents."""
    parts = ['<section id="latents"><h2>Latents</h2>']
    for view in views:
        if not view.results or "latents" not in view.results:
            continue
        latents = view.results["latents"]
        if view.tag:
            parts.append(f"<h3>{escape(view.name)}</h3>")
        shape = " × ".join(map(str, latents["shape"]))
        if latents["kind"] == "codes":
            parts.append(facts({
                "codes of an image (books, height, width)": shape, "codebook size": latents["codebook_size"] or "not known",
                "codes used": latents["codes_used"], "perplexity": [float(nice(p)) for p in latents["perplexity"]],
                "bits of an image": nice(latents["bits_per_image"]) if latents["bits_per_image"] else "not known"}))
            continue
        channels = len(latents["mean"])
        kl = latents["kl_bits_per_image"]
        parts.append(facts({
            "latents of an image (channels, height, width)": shape,
            "floats of an image": f"{latents['floats_per_image']:,}, one for {nice(latents['values_per_float'])} pixel values",
            "active units": f"{latents['active_units']} of {channels} channels: variance of the posterior mean above "
                            f"{latents['active_variance']}",
            "KL to the standard normal": f"{kl:,.0f} bits an image" if kl is not None else "no posterior",
            "principal axes for 90 % of the variance": _axes_for(latents["explained_variance"], 0.9),
        }))
        key = view.tag or "run"
        channels_svg = channel_chart(f"channels {key}", latents["mean"], latents["std"])
        shares_svg = share_chart(f"variance {key}", latents["explained_variance"])
        parts.append(f"""<div class="charts below">
<figure class="chart two"><h3>Mean ± standard deviation by channel, as encode gives them</h3>{channels_svg}</figure>
<figure class="chart"><h3>Variance explained by the first k axes, %</h3>{shares_svg}</figure></div>""")
    return "\n".join(parts) + "</section>"


def _axes_for(shares: list[float], wanted: float) -> str:
    total = 0.0
    for k, share in enumerate(shares, start=1):
        total += share
        if total >= wanted:
            return f"{k} of {len(shares)}"
    return f"{len(shares)} of {len(shares)}"
