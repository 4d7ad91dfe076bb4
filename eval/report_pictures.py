"""Pictures of the report: originals, reconstructions, differences, latents as colours, and a slider between any two."""

import base64
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from .report import RunView

DIFFERENCE_GAIN = 4      # pixel differences are shown this many times as strong


def data_uri(image: Image.Image) -> str:
    """A PNG inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def difference(a: Image.Image, b: Image.Image, gain: int = DIFFERENCE_GAIN) -> Image.Image:
    """|a − b| of each colour, `gain` times as strong; black where they are equal."""
    delta = np.abs(np.asarray(a.convert("RGB"), dtype=np.int16) - np.asarray(b.convert("RGB"), dtype=np.int16))
    return Image.fromarray(np.minimum(delta * gain, 255).astype(np.uint8))


def pictures_of(view: "RunView", example: dict[str, Any]) -> dict[str, Image.Image]:
    """Reconstruction, difference and latent of one example, by title."""
    suffix = f" {view.tag}" if view.tag else ""
    root = view.run.path
    original: Image.Image = Image.open(root / example["original"])
    reconstruction: Image.Image = Image.open(root / example["reconstruction"])
    pictures = {f"reconstruction{suffix}": reconstruction}
    pictures[f"difference ×{DIFFERENCE_GAIN}{suffix}"] = difference(original, reconstruction)
    if "latent" in example:
        pictures[f"latent{suffix}"] = Image.open(root / example["latent"])
    return pictures


def shared_examples(views: "list[RunView]") -> list[tuple[str, str, dict[str, Image.Image]]]:
    """Key, values as text, and pictures by title of the examples that all runs have, from the very same original."""
    by_run = [{e["key"]: e for e in v.results.get("examples", [])} if v.results else {} for v in views]
    rows = []
    for key in by_run[0]:
        if not all(key in examples for examples in by_run):
            continue
        originals: list[Image.Image] = [Image.open(v.run.path / e[key]["original"]) for v, e in zip(views, by_run)]
        if any(image.tobytes() != originals[0].tobytes() or image.size != originals[0].size for image in originals):
            continue
        pictures, values = {"original": originals[0]}, []
        for view, examples in zip(views, by_run):
            pictures |= pictures_of(view, examples[key])
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in examples[key]["values"].items())
            values.append(f"{view.tag}: {numbers}" if view.tag else numbers)
        rows.append((key, f"{key}: {'; '.join(values)}", pictures))
    return rows


def pictures_section(views: "list[RunView]") -> str:
    """A viewer with a slider between any two pictures of an example, above a column of pictures for each example."""
    rows = shared_examples(views)
    if not rows:
        nothing = "There are no pictures." if len(views) == 1 else "The runs share no held-out pictures."
        return f'<section id="pictures"><h2>Reconstructions</h2><p class="soft">{nothing}</p></section>'
    left, right = ("original", "reconstruction") if len(views) == 1 else ("reconstruction A", "reconstruction B")
    return picture_viewer(rows, left, right, f"""A difference of 255/{DIFFERENCE_GAIN} or more is white; latent colours are the
first three principal components, ±2 standard deviations.""")


def picture_viewer(rows: list[tuple[str, str, dict[str, Image.Image]]], left: str, right: str, note: str = "") -> str:
    """A slider between any two pictures of a row, `left` and `right` at first, above a column of pictures for each row.

    rows: key, values as text, and pictures by title, the same titles and sizes in all; note: a sentence below the choice.
    """
    titles = list(rows[0][2])
    width, height = rows[0][2][left].size
    cards = "".join(_card(*row) for row in rows)
    return f"""<section id="pictures" style="--ratio:{width}/{height}">
<h2>Reconstructions <small>of held-out images, {width} × {height} pixels</small></h2>
<div class="viewer"><div><div class="stack"><img alt=""><img class="over" alt=""></div>
<input type="range" min="0" max="100" value="50" step="0.5" aria-label="where the two pictures meet"></div>
<div>{_select("Left of the line", titles, left)}{_select("Right of it", titles, right)}<p class="soft values"></p>
<p class="soft">Move the slider, or drag on the picture; choose another picture below.
In each column from the top: {escape(", ".join(titles))}.
{note}</p></div></div>
<div class="cards">{cards}</div></section>"""


def _select(label: str, titles: list[str], chosen: str) -> str:
    options = "".join(f"<option{' selected' if title == chosen else ''}>{escape(title)}</option>" for title in titles)
    return f'<label>{label} <select aria-label="{label}">{options}</select></label>'


def _card(key: str, values: str, pictures: dict[str, Image.Image]) -> str:
    images = "".join(
        f'<img data-kind="{escape(title)}" alt="{escape(title)} of {escape(key)}" src="{data_uri(picture)}">'
        for title, picture in pictures.items()
    )
    caption = f"<small>{escape(Path(key).name)}</small>"
    return f'<button type="button" aria-pressed="false" data-values="{escape(values)}">{images}{caption}</button>'
