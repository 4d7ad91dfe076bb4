"""Makes image-caption pairs with classes of the pictures of a drawing program for children (Tux Paint's stamps, GPL-2).

    python scripts/prepare_pairs.py data/tuxpaint                    # downloads the Debian package (nothing is installed)
    python scripts/prepare_pairs.py data/tuxpaint --packages DIR     # takes the .deb file that is already in DIR

About 780 photographs and drawings in 16 folders (animals, food, vehicles, …), which are their classes, with English captions.
Pictures have transparent grounds, which become white. A fifth of each class is held out, chosen by a hash, the same
everywhere. OUT receives train/ and val/, each with a manifest.jsonl (file, text, label) that `data.train` and `data.val` read,
and, for `toklab probe zeroshot --classes … --templates …`, classes.tsv, where a class is called by the captions of its training
pictures, and templates.txt, which leaves these as they are.
Needs Debian or a system with its packages, and dpkg-deb. The pictures are under the GPL: share them under it.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from debian_packages import unpack
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokenizers_lab.data.manifest import Row, write_manifest
from tokenizers_lab.data.pairs import split_pairs, stamp_pairs
from tokenizers_lab.errors import TokenizersLabError

PACKAGE = "tuxpaint-stamps-default"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path, help="new folder")
parser.add_argument("--packages", type=Path, help="folder with the .deb file; without it it is downloaded")
parser.add_argument("--side", type=int, default=320, help="larger pictures are scaled down to so many pixels on the long side")
parser.add_argument("--val-share", type=float, default=0.2, help="share of each class that is held out")
args = parser.parse_args()
if args.out.exists() and any(args.out.iterdir()):
    raise SystemExit(f"{args.out} is not empty: name a new folder")


def on_white(path: Path) -> Image.Image:
    """A picture on white, square, so that a centre crop shows all of it; never scaled up."""
    with Image.open(path) as stored:
        image = stored.convert("RGBA")
    scale = min(1.0, args.side / max(image.size))
    if scale < 1:
        image = image.convert("RGBa")      # premultiplied: the colour of transparent pixels must not bleed in
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    ground = Image.new("RGB", (max(image.size),) * 2, "white")
    ground.paste(image, ((ground.width - image.width) // 2, (ground.height - image.height) // 2), image)
    return ground


table = Table("", "classes", "pictures", "captions", "MB")
with tempfile.TemporaryDirectory() as scratch:
    try:
        root = unpack([PACKAGE], Path(scratch), args.packages)[PACKAGE]
        parts = split_pairs(list(stamp_pairs(root)), args.val_share)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise SystemExit(f"{PACKAGE} cannot be had here ({error}): fetch its .deb on a Debian system (apt-get download "
                         f"{PACKAGE}) and name its folder in --packages") from None
    except TokenizersLabError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    for split, pairs in parts.items():
        rows = []
        for pair in track(pairs, description=split, console=Console(stderr=True)):
            file = args.out / split / f"{pair.key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            on_white(pair.image).save(file, optimize=True)
            rows.append(Row(f"{pair.key}.png", pair.text, label=pair.label))
        write_manifest(args.out / split / "manifest.jsonl", rows)
        if split == "train":
            called: dict[str, dict[str, None]] = {}      # captions of each class, each once, in order
            for row in rows:
                called.setdefault(row.label or "", {})[(row.text or "").replace("|", "/").replace("\t", " ")] = None
            lines = [f"{label}\t{' | '.join(captions)}\n" for label, captions in sorted(called.items())]
            (args.out / "classes.tsv").write_text("".join(lines), encoding="utf-8")
            (args.out / "templates.txt").write_text("{}\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in (args.out / split).rglob("*.png")) / 1e6
        table.add_row(split, str(len({r.label for r in rows})), str(len(rows)), str(len({r.text for r in rows})), f"{size:.1f}")
Console().print(table)
