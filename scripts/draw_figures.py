"""Draws the documentation's figures of data flow: docs/figures/<name>.svg of each that docs/figures/figures.yaml describes.

python scripts/draw_figures.py

Figures have a light ground of their own, so that they read on light and dark pages.
"""

import re
from html import escape
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
STEP_X, STEP_Y, WIDTH, HEIGHT, MARGIN = 158, 82, 126, 48, 18      # pixels
INK, LINE, GROUND = "#1f2937", "#64748b", "#f8fafc"
KINDS = {      # fill, border, dash, what it is
    "data": ("#ffffff", "#64748b", "", "data"),
    "code": ("#d1fae5", "#047857", "", "latents or codes"),
    "net": ("#dbeafe", "#1d4ed8", "", "trains"),
    "frozen": ("#e5e7eb", "#4b5563", "5 3", "frozen"),
    "loss": ("#fee2e2", "#b91c1c", "", "loss"),
}

Box = tuple[float, float, str, str]      # column, row, kind, text


def centre(box: Box, top: float) -> tuple[float, float]:
    """Middle of a box in pixels; top: the least row of the figure."""
    return MARGIN + WIDTH / 2 + box[0] * STEP_X, MARGIN + HEIGHT / 2 + (box[1] - top) * STEP_Y


def draw_box(box: Box, top: float) -> str:
    """A box with its text, of one or two lines."""
    (x, y), (fill, border, dash, _) = centre(box, top), KINDS[box[2]]
    lines = box[3].split("|")
    radius = HEIGHT / 2 if box[2] == "data" else 6
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    texts = "".join(f'<text x="{x:g}" y="{y + 4 + 15 * (i - (len(lines) - 1) / 2):g}">{escape(line)}</text>'
                    for i, line in enumerate(lines))
    return (f'<rect x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="{radius:g}" fill="{fill}" '
            f'stroke="{border}"{dashes}/>{texts}')


def draw_arrow(arrow: str, boxes: dict[str, Box], top: float) -> str:
    """A line from box to box, around the corner where both row and column differ; `~` goes below the boxes between."""
    parts = re.fullmatch(r"(\w+) ([>~]) (\w+)", arrow)
    if parts is None or not {parts[1], parts[3]} <= set(boxes):
        raise SystemExit(f"no arrow between boxes of this figure: {arrow}")
    source, target = boxes[parts[1]], boxes[parts[3]]
    (x0, y0), (x1, y1) = centre(source, top), centre(target, top)
    if parts[2] == "~":      # from the bottom, under what is between, into the bottom
        low = max(y0, y1) + HEIGHT / 2 + 14
        points = [(x0, y0 + HEIGHT / 2), (x0, low), (x1, low), (x1, y1 + HEIGHT / 2)]
    elif source[0] == target[0]:
        side = HEIGHT / 2 if y1 > y0 else -HEIGHT / 2
        points = [(x0, y0 + side), (x1, y1 - side)]
    elif source[1] == target[1]:
        points = [(x0 + WIDTH / 2, y0), (x1 - WIDTH / 2, y1)]
    else:
        bend = x1 - WIDTH / 2 - (STEP_X - WIDTH) / 2
        points = [(x0 + WIDTH / 2, y0), (bend, y0), (bend, y1), (x1 - WIDTH / 2, y1)]
    path = "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.4" marker-end="url(#tip)"/>'


def draw(figure: dict[str, Any]) -> str:
    """The figure as SVG, with a legend of the kinds that it has."""
    boxes: dict[str, Box] = {name: tuple(box) for name, box in figure["boxes"].items()}
    top, bottom = min(b[1] for b in boxes.values()), max(b[1] for b in boxes.values())
    width = 2 * MARGIN + WIDTH + max(b[0] for b in boxes.values()) * STEP_X
    height = 2 * MARGIN + HEIGHT + (bottom - top) * STEP_Y + 34
    used = [kind for kind in KINDS if any(b[2] == kind for b in boxes.values())]
    legend = "".join(
        f'<rect x="{MARGIN + 144 * i}" y="{height - 26:g}" width="16" height="12" rx="3" fill="{KINDS[kind][0]}" '
        f'stroke="{KINDS[kind][1]}"{f""" stroke-dasharray="{KINDS[kind][2]}" """ if KINDS[kind][2] else ""}/>'
        f'<text x="{MARGIN + 144 * i + 22}" y="{height - 16:g}" text-anchor="start">{KINDS[kind][3]}</text>'
        for i, kind in enumerate(used))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12.5" text-anchor="middle" fill="{INK}">\n'
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>\n'
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{GROUND}" stroke="#cbd5e1"/>\n'
        + "\n".join([draw_arrow(arrow, boxes, top) for arrow in figure["arrows"]])
        + "\n" + "\n".join([draw_box(box, top) for box in boxes.values()])
        + f"\n{legend}\n</svg>\n")


def figures() -> dict[str, str]:
    """The SVG of every figure, by its name."""
    described = yaml.safe_load((FOLDER / "figures.yaml").read_text(encoding="utf-8"))
    return {name: draw(figure) for name, figure in described.items()}


if __name__ == "__main__":
    for name, svg in figures().items():
        (FOLDER / f"{name}.svg").write_text(svg, encoding="utf-8")
        print(f"docs/figures/{name}.svg")
