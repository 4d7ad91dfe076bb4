"""Rebuilds the sample photographs from the packages that carry them, as ATTRIBUTION.csv beside the photographs says.

    python scripts/build_sample_photos.py                   # downloads the Debian packages (nothing is installed)
    python scripts/build_sample_photos.py --packages DIR    # takes .deb files that are already in DIR

Needs Debian 12 or a system with its packages and dpkg-deb, and `pip install tokenizers-lab[samples]`. Every original is
checked by its SHA-256. The same Pillow gives the same bytes; another may encode the same pixels otherwise.
"""

import argparse
import csv
import hashlib
import importlib.util
import io
import re
import tempfile
from pathlib import Path

from debian_packages import unpack
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

PHOTOS = Path(__file__).resolve().parents[1] / "tokenizers_lab" / "data" / "samples" / "photos"
SIDE, QUALITY = 288, 90      # pixels a side of a picture; JPEG quality
PYTHON_PACKAGES = {"scikit-image": "skimage", "scikit-learn": "sklearn"}      # pip name: where its files are


def open_original(path: Path, sha256: str) -> Image.Image:
    """An original photograph in RGB. A jigzo puzzle (.pzl) has it in the corner of its last JPEG, beside the pieces."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SystemExit(f"{path.name} is another file than in ATTRIBUTION.csv: take the package version that the table names")
    if path.suffix != ".pzl":
        return Image.open(io.BytesIO(content)).convert("RGB")
    size = re.search(rb"\nimage 0 0 (\d+) (\d+) ", content)
    assert size is not None
    texture = Image.open(io.BytesIO(content[content.rindex(b"\xff\xd8\xff\xe0"):])).convert("RGB")
    return texture.crop((2, 2, int(size[1]) - 2, int(size[2]) - 2))      # two pixels in: the edge is blended


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--packages", type=Path, help="folder with the .deb files; without it they are downloaded")
parser.add_argument("--out", type=Path, default=PHOTOS, help="folder that receives train/ and val/ (default: inside the package)")
args = parser.parse_args()

with open(PHOTOS / "ATTRIBUTION.csv", newline="", encoding="utf-8") as table:
    rows = list(csv.DictReader(table))
Image.MAX_IMAGE_PIXELS = None      # the originals are known, and some are large

same = 0
with tempfile.TemporaryDirectory() as scratch:
    # 1. Unpack the packages beside each other.
    folders: dict[str, Path] = {}
    for package in sorted({row["package"].split()[0] for row in rows}):
        if package in PYTHON_PACKAGES:
            spec = importlib.util.find_spec(PYTHON_PACKAGES[package])
            if spec is None or spec.origin is None:
                raise SystemExit(f"{package} is not installed: pip install {package}")
            folders[package] = Path(spec.origin).parents[1]
            continue
        folders |= unpack([package], Path(scratch), args.packages)

    # 2. Scale each photograph down once, and cut its pictures out.
    done: tuple[str, Image.Image] | None = None
    for row in track(rows, description="pictures", console=Console(stderr=True)):
        short = int(row["short_side"])
        key = f"{row['original']} {short}"
        if done is None or done[0] != key:
            original = open_original(folders[row["package"].split()[0]] / row["original"], row["original_sha256"])
            ratio = short / min(original.size)
            size = (round(original.width * ratio), round(original.height * ratio))
            done = key, original.resize(size, Image.Resampling.LANCZOS)
        left, top = int(row["left"]), int(row["top"])
        encoded = io.BytesIO()
        done[1].crop((left, top, left + SIDE, top + SIDE)).save(encoded, "JPEG", quality=QUALITY, optimize=True)
        target = args.out / row["file"]
        same += target.is_file() and target.read_bytes() == encoded.getvalue()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded.getvalue())

report = Table("split", "photographs", "pictures", "bytes")
for split in ("train", "val"):
    chosen = [row for row in rows if row["file"].startswith(f"{split}/")]
    total = sum((args.out / row["file"]).stat().st_size for row in chosen)
    report.add_row(split, str(len({row["original"] for row in chosen})), str(len(chosen)), f"{total:,}")
Console().print(report)
print(f"{same} of {len(rows)} pictures have the same bytes as before")
