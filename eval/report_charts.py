"""Charts of the report as inline SVG that takes the page's colours, in light and in dark."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .sounds import draw_mel

# matplotlib knows no CSS variables: it draws in stand-in colours, which become the page's colours afterwards
STAND_INS = {"ink": "#010203", "line": "#040506", **{f"c{i}": f"#0708{i:02d}" for i in range(10)}}
CSS = {name: f"var(--{name})" for name in STAND_INS}
POINTS = 400       # a longer curve is averaged to this many points
WIDTH, HEIGHT = 4.0, 2.3     # inches; the page scales the drawing
MEL_LEFT, MEL_WIDTH = 0.1, 0.88     # shares of a spectrogram's drawing: left of its first second, its seconds


@dataclass
class Series:
    """One curve: `colour` is a name of STAND_INS."""

    label: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]
    dots: bool = False     # a few points, marked, such as validations
    dashed: bool = False
    dotted: bool = False
    bounds: Sequence[tuple[float, float]] = ()     # of each value, where there is an interval: `steps_chart`


def thin(
    steps: Sequence[float], values: Sequence[float], points: int = POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, lows and highs of at most `points` bins of consecutive finite values."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(x):
        return x, y, y, y
    bins = [part for part in np.array_split(np.arange(len(x)), min(points, len(x))) if len(part)]
    return (np.array([x[b].mean() for b in bins]), np.array([y[b].mean() for b in bins]),
            np.array([y[b].min() for b in bins]), np.array([y[b].max() for b in bins]))


def line_chart(name: str, series: Sequence[Series], boundaries: Sequence[float] = (), log: bool = False) -> str:
    """Curves over steps; thin vertical lines at the stages' boundaries. `name` is unique on the page and read aloud."""
    figure, axes = _axes()
    lowest, highest = math.inf, -math.inf
    for curve in series:
        x, mean, low, high = thin(curve.steps, curve.values)
        if not len(x):
            continue
        lowest, highest = min(lowest, low.min()), max(highest, high.max())
        colour = STAND_INS[curve.colour]
        marker, line = "o" if curve.dots or len(x) == 1 else "", "--" if curve.dashed else ":" if curve.dotted else "-"
        axes.plot(x, mean, color=colour, linewidth=1.5, linestyle=line, marker=marker, markersize=3.2)
        if len(curve.values) > len(x):
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    _scale_values(axes, lowest, highest, log)
    for step in boundaries:
        axes.axvline(step, color=STAND_INS["ink"], linewidth=0.6, linestyle=":", alpha=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return _svg(figure, name)


def steps_chart(name: str, series: Sequence[Series], marked: Sequence[float] = (), log: bool = False) -> str:
    """Values over numbers of sampling steps, doubling to the right, with their intervals; dotted verticals at `marked`."""
    figure, axes = _axes()
    lowest, highest = math.inf, -math.inf
    for curve in series:
        colour = STAND_INS[curve.colour]
        axes.plot(curve.steps, curve.values, color=colour, linewidth=1.5, marker="o", markersize=3.2)
        if len(curve.bounds) == len(curve.values):
            low, high = zip(*curve.bounds)
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.18, linewidth=0)
        lowest, highest = min(lowest, *curve.values), max(highest, *curve.values)
    for step in marked:
        axes.axvline(step, color=STAND_INS["ink"], linewidth=0.6, linestyle=":", alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({step for curve in series for step in curve.steps}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    _scale_values(axes, lowest, highest, log)
    return _svg(figure, name)


def _scale_values(axes: "matplotlib.axes.Axes", lowest: float, highest: float, log: bool) -> None:
    """The axis of the values: logarithmic if asked for and all are positive."""
    if log and lowest > 0 and math.isfinite(highest):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 50 * lowest else (1,), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-4, 5))


def channel_chart(name: str, means: Sequence[float], stds: Sequence[float]) -> str:
    """Mean ± standard deviation of each latent channel, as a bar from one to the other end and a tick at the mean."""
    figure, axes = _axes(width=2 * WIDTH)
    x, mean, std = np.arange(len(means)), np.asarray(means), np.asarray(stds)
    width = min(0.8, 40 / max(len(x), 1))
    axes.bar(x, 2 * std, width, mean - std, color=STAND_INS["c0"], alpha=0.35, linewidth=0)
    axes.plot(x, mean, "_", color=STAND_INS["c0"], markersize=max(2.0, min(10.0, 300 / max(len(x), 1))))
    axes.axhline(0, color=STAND_INS["ink"], linewidth=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.01)
    return _svg(figure, name)


def share_chart(name: str, shares: Sequence[float]) -> str:
    """Cumulative explained variance over the number of principal axes, in per cent."""
    figure, axes = _axes()
    total = 100 * np.cumsum(np.asarray(shares))
    marker = "o" if len(total) < 40 else ""
    axes.plot(np.arange(1, len(total) + 1), total, color=STAND_INS["c0"], linewidth=1.5, marker=marker, markersize=3)
    axes.set_ylim(0, 104)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _svg(figure, name)


def mel_chart(name: str, levels: np.ndarray, loudest: float) -> str:
    """A mel spectrogram (80, frames) over seconds; its colours end at `loudest`. The page knows where its seconds are."""
    figure = Figure(figsize=(5.2, 1.9))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((MEL_LEFT, 0.2, MEL_WIDTH, 0.76))
    draw_mel(axes, levels, loudest)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(which="both", colors=STAND_INS["ink"], labelsize=8, length=2, color=STAND_INS["line"])
    axes.set_ylabel("Hz", fontsize=8, color=STAND_INS["ink"], labelpad=1)
    axes.set_xlabel("s", fontsize=8, color=STAND_INS["ink"], labelpad=0, loc="right")
    return _svg(figure, name)


def _axes(width: float = WIDTH) -> tuple[Figure, "matplotlib.axes.Axes"]:
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(STAND_INS["line"])
    axes.tick_params(which="both", colors=STAND_INS["ink"], labelsize=8, length=2, color=STAND_INS["line"])
    axes.grid(True, color=STAND_INS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The drawing as an <svg> element: text stays text, ids are unique to `name`, nothing points outside the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)      # HTML knows the namespaces
    svg = re.sub(r'\b(id="|url\(#|href="#)', lambda m: m.group(1) + _slug(name) + "-", svg)
    for key, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, CSS[key])
    opening = rf'<svg viewBox="\1" role="img" aria-label="{_slug(name)}">'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, svg, count=1)
    return re.sub(r"\n\s*", "\n", svg)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "chart"


def nice(value: float) -> str:
    """A number in four significant digits, without needless zeros."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"
