"""Training curves of the report: the total, each loss term with its weights, learning rate, validation."""

import re
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from .report_charts import Series, line_chart, nice

if TYPE_CHECKING:
    from .report import RunView

NOT_OTHERS = {"step", "stage", "kind", "loss", "lr"}     # what is drawn elsewhere
RUN_COLOURS = ("c0", "c1")
TITLES = {"loss": "total loss", "lr": "learning rate", "grad_norm": "gradient norm",
          "samples_per_second": "samples a second", "waiting": "share of time waiting for data"}
LAYER = re.compile(r"(.+)_(\d{2,})")      # a number of one layer: distill_weight_01
COLOURS = 10           # of the page: the next ten lines of a chart are dashed, those after them dotted
HELD_OUT = {"psnr": "PSNR, dB", "ssim": "SSIM", "mel": "mel distance", "sisdr": "SI-SDR, dB"}     # of validations


def curve(view: "RunView", key: str, kind: str) -> tuple[list[float], list[float]]:
    """Steps and values of one number in the records of a kind."""
    points = [(r["step"], r[key]) for r in view.run.records if r.get("kind") == kind and isinstance(r.get(key), int | float)]
    return [float(s) for s, _ in points], [float(v) for _, v in points]


def term_weights(view: "RunView") -> dict[str, dict[str, float]]:
    """Loss term: its weight in each stage that uses it."""
    weights: dict[str, dict[str, float]] = {}
    for stage in view.run.config.stages:
        for term, weight in stage.weights.items():
            weights.setdefault(term, {})[stage.name] = float(weight)
    return weights


def weighted_curve(view: "RunView", term: str) -> tuple[list[float], list[float]]:
    """Steps and values of a training term times its stage's weight."""
    weights = term_weights(view).get(term, {})
    points = [(float(r["step"]), weights[r["stage"]] * float(r[term])) for r in view.run.records
              if r.get("kind") == "train" and isinstance(r.get(term), int | float) and r.get("stage") in weights]
    return [s for s, _ in points], [v for _, v in points]


def curves_section(views: "list[RunView]") -> str:
    """All charts of the records. Dotted verticals are the boundaries of stages."""
    if not any(v.run.records for v in views):
        return '<section id="curves"><h2>Curves</h2><p class="soft">metrics.jsonl has no records yet.</p></section>'
    terms = _in_order(term for v in views for term in term_weights(v))
    trained, validated = _numbers(views, "train"), _numbers(views, "val")
    charts = [_chart(views, "loss", log=True)]
    charts += [_weighted_chart(view, terms) for view in views]
    charts += [_chart(views, term, log=True, note=_weights_note(views, term)) for term in terms if term in trained]
    charts += [_chart(views, key, kind="val") for key in validated if key != "step"]
    charts += [_chart(views, "lr")]
    others = [key for key in trained if key not in NOT_OTHERS and key not in terms]
    layers = families(others)
    charts += [_chart(views, key) for key in others if key not in {name for names in layers.values() for name in names}]
    charts += [_family_chart(view, family, names) for family, names in layers.items() for view in views]
    stages = "; ".join(_stages(v) for v in views)
    return f"""<section id="curves"><h2>Curves</h2><p class="key">{_legend(views)}</p>
<p class="soft">Stages, at the dotted verticals: {escape(stages)}.
Loss terms are shown unweighted; their weights stand beside their names.</p>
<div class="charts">{"".join(charts)}</div></section>"""


def _stages(view: "RunView") -> str:
    tag = f"{view.tag}: " if view.tag else ""
    return tag + ", ".join(f"{name} from step {start}" for name, start in view.run.boundaries)


def _legend(views: "list[RunView]") -> str:
    items = []
    for view, colour in zip(views, RUN_COLOURS):
        name = f"{view.tag} " if view.tag else ""
        items.append(f'<span><i style="border-color:var(--{colour})"></i>{name}training</span>')
        if any(r.get("kind") == "val" for r in view.run.records):
            dashes = f'<i class="dash" style="border-color:var(--{_val_colour(views, colour)})"></i>'
            items.append(f"<span>{dashes}{name}validation</span>")
    return "".join(items)


def _val_colour(views: "list[RunView]", colour: str) -> str:
    return "c1" if len(views) == 1 else colour


def _chart(views: "list[RunView]", key: str, log: bool = False, note: str = "", kind: str = "train") -> str:
    """One number of the records of a kind: a loss term and a held-out metric may have one name, and are two things."""
    series = []
    for view, colour in zip(views, RUN_COLOURS):
        val = kind == "val"
        colour = _val_colour(views, colour) if val else colour
        series.append(Series(view.tag or "run", colour, *curve(view, key, kind), dots=val, dashed=val))
    series = [s for s in series if s.steps]
    if not series:
        return ""
    drawing = line_chart(f"curve {kind} {key}", series, _boundaries(views), log)
    title = (HELD_OUT if kind == "val" else TITLES).get(key, key.replace("_", " "))
    last = " · ".join(f"{nice(s.values[-1])}" for s in series)
    return f'<figure class="chart"><h3>{escape(title)} <small>{note} last {escape(last)}</small></h3>{drawing}</figure>'


def _weighted_chart(view: "RunView", terms: list[str]) -> str:
    """Every term times its weight, on one logarithmic axis: what the total is made of."""
    series = [Series(term, f"c{i % 10}", *weighted_curve(view, term)) for i, term in enumerate(terms)]
    series = [s for s in series if s.steps and any(v > 0 for v in s.values)]
    if not series:
        return ""
    for s in series:      # the adversarial term may be negative, which a logarithm cannot show
        s.values = [v if v > 0 else float("nan") for v in s.values]
    drawing = line_chart(f"weighted terms {view.tag}", series, _boundaries([view]), log=True)
    key = "".join(f'<span><i style="border-color:var(--{s.colour})"></i>{escape(s.label)}</span>' for s in series)
    negative = " <small>where positive</small>" if any(v != v for s in series for v in s.values) else ""
    name = f" of {escape(view.name)}" if view.tag else ""
    return f'<figure class="chart"><h3>weighted terms{name}{negative}</h3>{drawing}<div class="key">{key}</div></figure>'


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ by a trailing number of two digits or more, by what they share, in the order of the numbers."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            found.setdefault(match[1], []).append((int(match[2]), name))
    return {family: [name for _, name in sorted(members)] for family, members in found.items() if len(members) > 1}


def _family_chart(view: "RunView", family: str, names: list[str]) -> str:
    """The numbers of all layers in one chart, a line for each, and beside each line's number its last value."""
    series = []
    for i, name in enumerate(names):
        turn = i // COLOURS % 3
        label = name.removeprefix(f"{family}_")
        series.append(Series(label, f"c{i % COLOURS}", *curve(view, name, "train"), dashed=turn == 1, dotted=turn == 2))
    series = [s for s in series if s.steps]
    if not series:
        return ""
    title = family.replace("_", " ")
    of = f" of {view.name}" if view.tag else ""
    drawing = line_chart(f"{family} by layer {view.tag}", series, _boundaries([view]))
    style = {(True, False): ";border-top-style:dashed", (False, True): ";border-top-style:dotted"}
    key = "".join(
        f'<span><i style="border-color:var(--{s.colour}){style.get((s.dashed, s.dotted), "")}"></i>{escape(s.label)} '
        f"<small>{nice(s.values[-1])}</small></span>" for s in series)
    return (f'<figure class="chart"><h3>{escape(title + of)} <small>by layer, with the last values</small></h3>{drawing}'
            f'<div class="key">{key}</div></figure>')


def _weights_note(views: "list[RunView]", term: str) -> str:
    notes = []
    for view in views:
        weights = term_weights(view).get(term, {})
        text = ", ".join(f"{stage} {nice(weight)}" for stage, weight in weights.items())
        if len(set(weights.values())) == 1:
            text = nice(next(iter(weights.values())))
        notes.append(f"{view.tag + ' ' if view.tag else ''}× {text or '0'}")
    return escape("; ".join(_in_order(notes))) + " ·"


def _boundaries(views: "list[RunView]") -> list[float]:
    """Steps at which a stage after the first begins, as far as the run has come."""
    return sorted({float(start) for v in views for _, start in v.run.boundaries if 0 < start <= v.run.step})


def _numbers(views: "list[RunView]", kind: str) -> list[str]:
    """Names of the numbers in the records of a kind."""
    records = [record for view in views for record in view.run.records if record.get("kind") == kind]
    return _in_order(name for record in records for name, value in record.items() if isinstance(value, int | float))


def _in_order(items: Iterable[Any]) -> list[Any]:
    """Each item once, in order of first appearance."""
    return list(dict.fromkeys(items))
