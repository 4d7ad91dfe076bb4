"""Small sets of images with captions and classes, made on the spot, for tests of VTP."""

from pathlib import Path

from PIL import Image, ImageDraw

from tokenizers_lab.data.manifest import Row, write_manifest

COLOURS, SHAPES = ("red", "blue", "green", "black"), ("circle", "square")


def write_shapes(folder: Path, items: int = 8, first: int = 0, side: int = 48, ground: str = "white") -> Path:
    """Coloured shapes at changing places with captions such as "A red circle."; the shape is the class. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(first, first + items):
        colour, shape = COLOURS[number % 4], SHAPES[number // 4 % 2]
        image = Image.new("RGB", (side, side), ground)
        left, top = side // 6 + number * 7 % (side // 3), side // 6 + number * 5 % (side // 3)
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((left, top, left + side // 2, top + side // 2), fill=colour)
        image.save(folder / f"{number:03d}.png")
        rows.append(Row(f"{number:03d}.png", f"A {colour} {shape}.", label=shape))
    write_manifest(folder / "manifest.jsonl", rows)
    return folder
