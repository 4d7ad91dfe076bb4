"""The report of a run, or of two side by side: one HTML file that needs nothing else."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tokenizers_lab.config import to_yaml
from tokenizers_lab.errors import InputError, TokenizersLabError
from tokenizers_lab.registry import get_system

from .report_curves import curves_section
from .report_page import page
from .report_parts import facts, latents_section, metrics_section
from .report_pictures import pictures_section
from .report_samples import samples_section
from .report_sounds import codes_section, sounds_section
from .report_steps import steps_section
from .runs import METRICS, RunFolder, evaluate_run, open_run, read_results

REPORT = "report.html"


@dataclass
class RunView:
    """A run as the page shows it."""

    run: RunFolder
    results: dict[str, Any] | None     # None: could not be evaluated, see `problem`
    problem: str = ""
    tag: str = ""                      # A or B when two runs are compared

    @property
    def name(self) -> str:
        """The folder's name, with the tag in a comparison."""
        return f"{self.tag}: {self.run.path.name}" if self.tag else self.run.path.name


def write_report(
    run_folder: str | Path, other: str | Path | None = None, path: str | Path | None = None, metrics: Sequence[str] | None = None
) -> Path:
    """Write the report of a run, or of `run_folder` (A) against `other` (B), and return its path.

    By default report.html in the run's folder, or report-against-<other>.html. A run whose results.json is missing, older
    than its newest checkpoint or without one of the `metrics` (beside those of `runs.METRICS`) is evaluated first; where that
    is impossible the page says why, or with `metrics` its error is raised.
    Raises CheckpointError if a folder is no run, InputError if one run is for images and the other for speech.
    """
    folders = [Path(run_folder)] if other is None else [Path(run_folder), Path(other)]
    kinds = [open_run(folder).kind for folder in folders]
    if len(set(kinds)) > 1:
        raise InputError(f"{folders[0]} is for {kinds[0]}, {folders[1]} for {kinds[1]}: only runs of one kind compare")
    views = [view_run(folder, tag if other is not None else "", metrics) for folder, tag in zip(folders, "AB")]
    written = {key: section(views) for key, (_, section) in SECTIONS[kinds[0]].items()}
    written = {key: text for key, text in written.items() if text}
    body = "\n".join([_header(views, list(written)), *written.values()])
    default = REPORT if other is None else f"report-against-{views[1].run.path.resolve().name}.html"
    target = Path(path) if path is not None else folders[0] / default
    text = page(escape(" against ".join(v.run.path.resolve().name for v in views)), body)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=".report-", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)
    return target


def view_run(folder: Path, tag: str = "", metrics: Sequence[str] | None = None) -> RunView:
    """Read a run, evaluating it if its results are not those of its newest checkpoint, or lack one of the `metrics`."""
    run = open_run(folder)
    results = read_results(run)
    if results is not None and is_whole(run, results, metrics):
        return RunView(run, results, tag=tag)
    try:
        return RunView(run, evaluate_run(run, [*METRICS[run.kind], *(metrics or ())]), tag=tag)
    except TokenizersLabError as error:
        if metrics:      # who asks for a metric by name wants to hear why there is none
            raise
        return RunView(run, None, str(error), tag)


def is_whole(run: RunFolder, results: dict[str, Any], metrics: Sequence[str] | None) -> bool:
    """Whether the results have the metrics asked for and the files of their examples."""
    files = [file for e in results.get("examples", [])
             for file in (e.get("files") or e.get("sounds") or {"original": e.get("original")}).values()]
    asked = metrics is None or set(metrics) <= set(results["run"].get("metrics", []))
    return asked and all((run.path / file).is_file() for file in files)


def differ(one: Any, two: Any) -> bool:
    """Whether two entries of protocols are not the same; of what is said by metric, only metrics of both count."""
    if isinstance(one, dict) and isinstance(two, dict):
        return any(one[name] != two[name] for name in one.keys() & two.keys())
    return bool(one != two)


def _header(views: list[RunView], sections: list[str]) -> str:
    systems = {v.run.config.system: get_system(v.run.config.system) for v in views}
    lines = [f"<h1>{escape(' against '.join(v.name for v in views))}</h1>"]
    lines += [f'<p class="soft">{escape(s.paper)}<br>the published model: {escape(s.summary)}</p>' for s in systems.values()]
    for view in views:
        label = f"{escape(view.name)}: " if view.tag else ""
        lines.append(f"<p>{label}<b>{escape(view.run.status)}</b></p>")
        if view.problem:
            lines.append(f'<p class="flag">{label}no held-out results: {escape(view.problem)}</p>')
    if len(views) == 2 and all(v.results for v in views):
        a, b = (v.results["protocol"] for v in views if v.results)
        hashes = [name for name in ("images_sha256", "audio_sha256") if a.get(name) is not None]
        same = bool(hashes) and all(a[name] == b.get(name) for name in hashes)
        compared = (a.keys() | b.keys()) - ({"source"} if same else set())      # the same data under two names
        differing = [k for k in sorted(compared) if differ(a.get(k), b.get(k))]
        if differing:
            lines.append('<p class="flag">The two were not measured alike, so their numbers do not compare: '
                         f"they differ in {escape(', '.join(differing))}.</p>")
    links = [f'<a href="#{key}">{SECTIONS[views[0].run.kind][key][0]}</a>' for key in sections]
    lines.append(f"<nav>{''.join(links)}</nav>")
    return "\n".join(lines)


def _origin_section(views: list[RunView]) -> str:
    parts = ['<section id="origin"><h2>Origin and config</h2>']
    for view in views:
        rows: dict[str, Any] = {}
        if view.results:
            rows |= {f"network in training: {name}": source for name, source in view.results["teachers"].items()}
            first = view.results["rows"][0]
            networks = {v["title"]: v["network"] for v in first["metrics"].values() if v.get("network")}
            rows |= {f"network of {title}": source for title, source in networks.items()}
            rows |= {
                "weights, SHA-256": first["weights_sha256"],
                "weights, history": first["weights"] or "trained from scratch",
                "parameters": f"{first['parameters']:,}",
                "checkpoint": view.results["run"]["checkpoint"],
            }
            rows |= {f"protocol: {k}": v for k, v in view.results["protocol"].items()}
            rows |= {f"environment: {k}": v for k, v in view.results["environment"].items() if k != "packages"}
            rows["packages"] = ", ".join(f"{k} {v}" for k, v in view.results["environment"]["packages"].items())
        if view.tag:
            parts.append(f"<h3>{escape(view.name)}</h3>")
        opened = " open" if len(views) == 1 else ""
        parts.append(f"<details{opened}><summary>Origin, protocol, environment</summary>{facts(rows)}</details>")
        parts.append(f"<details><summary>Config</summary><pre>{escape(to_yaml(view.run.config))}</pre></details>")
    return "\n".join(parts) + "</section>"


Section = Callable[[list[RunView]], str]
SECTIONS: dict[str, dict[str, tuple[str, Section]]] = {      # of each kind of run: anchor -> title, what writes it, if anything
    "image": {
        "quality": ("Quality", metrics_section), "pictures": ("Reconstructions", pictures_section),
        "steps": ("Sampling steps", steps_section),
        "curves": ("Curves", curves_section), "latents": ("Latents", latents_section),
        "origin": ("Origin and config", _origin_section),
    },
    "speech": {
        "quality": ("Quality", metrics_section), "sounds": ("Reconstructions", sounds_section),
        "steps": ("Sampling steps", steps_section),
        "codes": ("Codes", codes_section), "curves": ("Curves", curves_section), "origin": ("Origin and config", _origin_section),
    },
    "generator": {
        "quality": ("Quality", metrics_section), "samples": ("Samples", samples_section),
        "curves": ("Curves", curves_section), "origin": ("Origin and config", _origin_section),
    },
}
