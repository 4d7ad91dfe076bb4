"""Samples of the report: what a generator makes of each class, beside an image of that class and the untrained network's."""

from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from .report_pictures import data_uri

if TYPE_CHECKING:
    from .report import RunView


def samples_section(views: "list[RunView]") -> str:
    """A column for each class that was sampled: the pictures of every run, one below the other."""
    known = [view for view in views if view.results and view.results.get("examples")]
    if not known:
        return '<section id="samples"><h2>Samples</h2><p class="soft">There are no samples.</p></section>'
    parts = []
    for view in known:
        assert view.results is not None
        examples = view.results["examples"]
        width, height = Image.open(view.run.path / examples[0]["files"]["sample"]).size
        head = f"<h3>{escape(view.name)}</h3>" if view.tag else ""
        cards = "".join(_card(view, example) for example in examples)
        labels = escape(str(view.results["protocol"]["labels"]))
        parts.append(f"""{head}<p class="soft">In each column from the top: {escape(", ".join(examples[0]["files"]))}.
Classes: {labels}. The untrained network starts from the same noise as the sample.</p>
<div class="cards" style="--ratio:{width}/{height}">{cards}</div>""")
    first = known[0].results
    assert first is not None
    return f"""<section id="samples"><h2>Samples <small>{len(first["examples"])} of {first["n"]}</small></h2>
{"".join(parts)}</section>"""


def _card(view: "RunView", example: dict) -> str:
    images = "".join(
        f'<img data-kind="{escape(kind)}" alt="{escape(kind)}, class {escape(example["class"])}" '
        f'src="{data_uri(Image.open(view.run.path / file))}">'
        for kind, file in example["files"].items()
    )
    return f'<figure class="sample">{images}<small>{escape(example["class"])}</small></figure>'
