"""The report of a run, or of two side by side: one HTML file that needs nothing else."""

import os
import tempfile
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tokenizers_lab.config import to_yaml
from tokenizers_lab.errors import TokenizersLabError
from tokenizers_lab.registry import get_system

from .report_curves import curves_section
from .report_page import page
from .report_parts import facts, latents_section, metrics_section
from .report_pictures import pictures_section
from .runs import RunFolder, evaluate_run, open_run, read_results

REPORT = "report.html"
SECTIONS = {
    "quality": "Quality", "pictures": "Reconstructions", "curves": "Curves", "latents": "Latents", "origin": "Origin and config",
}


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


def write_report(run_folder: str | Path, other: str | Path | None = None, path: str | Path | None = None) -> Path:
    """Write the report of a run, or of `run_folder` (A) against `other` (B), and return its path.

    By default report.html in the run's folder, or report-against-<other>.html. A run whose results.json is missing or older
    than its newest checkpoint is evaluated first; where that is impossible the page says why.
    Raises CheckpointError if a folder is no run.
    """
    folders = [Path(run_folder)] if other is None else [Path(run_folder), Path(other)]
    views = [view_run(folder, tag if other is not None else "") for folder, tag in zip(folders, "AB")]
    sections = (_header, metrics_section, pictures_section, curves_section, latents_section, _origin_section)
    body = "\n".join(section(views) for section in sections)
    default = REPORT if other is None else f"report-against-{views[1].run.path.resolve().name}.html"
    target = Path(path) if path is not None else folders[0] / default
    text = page(escape(" against ".join(v.run.path.resolve().name for v in views)), body)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=".report-", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)
    return target


def view_run(folder: Path, tag: str = "") -> RunView:
    """Read a run, evaluating it if its results are not those of its newest checkpoint."""
    run = open_run(folder)
    results = read_results(run)
    if results is not None and all((run.path / e["original"]).is_file() for e in results.get("examples", [])):
        return RunView(run, results, tag=tag)
    try:
        return RunView(run, evaluate_run(run), tag=tag)
    except TokenizersLabError as error:
        return RunView(run, None, str(error), tag)


def _header(views: list[RunView]) -> str:
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
        same_images = a.get("images_sha256") is not None and a.get("images_sha256") == b.get("images_sha256")
        compared = (a.keys() | b.keys()) - ({"source"} if same_images else set())      # the same pictures under two names
        differing = [k for k in sorted(compared) if a.get(k) != b.get(k)]
        if differing:
            lines.append('<p class="flag">The two were not measured alike, so their numbers do not compare: '
                         f"they differ in {escape(', '.join(differing))}.</p>")
    lines.append("<nav>" + "".join(f'<a href="#{key}">{title}</a>' for key, title in SECTIONS.items()) + "</nav>")
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
