"""Rebuilds the sample speech from the packages that carry it, as ATTRIBUTION.csv beside the clips says.

    python scripts/build_sample_speech.py                   # downloads the Debian packages (nothing is installed)
    python scripts/build_sample_speech.py --packages DIR    # takes .deb files that are already in DIR

Needs Debian 12 or a system with its packages and dpkg-deb, and `pip install tokenizers-lab[samples]`. Every original is
checked by its SHA-256. The same libsndfile and torchaudio give the same bytes; others may compress the same samples otherwise.
"""

import argparse
import csv
import hashlib
import json
import tempfile
from pathlib import Path

import torch
from debian_packages import unpack
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokenizers_lab.data.audio import encode_audio, read_audio, to_channels
from tokenizers_lab.data.corpora import read_g722
from tokenizers_lab.data.resample import resample

SPEECH = Path(__file__).resolve().parents[1] / "tokenizers_lab" / "data" / "samples" / "speech"
RATE = 16_000      # Hz

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--packages", type=Path, help="folder with the .deb files; without it they are downloaded")
parser.add_argument("--out", type=Path, default=SPEECH, help="folder that receives train/ and val/ (default: inside the package)")
args = parser.parse_args()
torch.set_num_threads(1)      # sums in the same order on every machine

with open(SPEECH / "ATTRIBUTION.csv", newline="", encoding="utf-8") as table:
    rows = list(csv.DictReader(table))

same_bytes = same_samples = 0
manifests: dict[str, list[dict[str, object]]] = {"train": [], "val": []}
with tempfile.TemporaryDirectory() as scratch:
    folders = unpack(sorted({row["package"].split()[0] for row in rows}), Path(scratch), args.packages)
    for row in track(rows, description="clips", console=Console(stderr=True)):
        original = folders[row["package"].split()[0]] / row["original"]
        if hashlib.sha256(original.read_bytes()).hexdigest() != row["original_sha256"]:
            raise SystemExit(f"{original.name} is another file than in ATTRIBUTION.csv: take the package version that it names")
        audio, rate = read_g722(original) if original.suffix == ".g722" else read_audio(original)
        encoded = encode_audio(resample(to_channels(audio, 1), rate, RATE), RATE)

        target = args.out / row["file"]
        if target.is_file():
            same_bytes += target.read_bytes() == encoded
            same_samples += torch.equal(read_audio(target)[0], read_audio(encoded)[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded)
        seconds = read_audio(encoded)[0].shape[1] / RATE
        split, name = row["file"].split("/")
        manifests[split].append({"file": name, "text": row["text"], "speaker": row["speaker"], "language": row["language"],
                                 "duration": round(seconds, 4)})

for split, clips in manifests.items():
    lines = [json.dumps(clip, ensure_ascii=False) + "\n" for clip in clips]
    (args.out / split / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")

report = Table("split", "clips", "seconds", "speakers", "languages", "bytes")
for split, clips in manifests.items():
    total = sum((args.out / split / str(clip["file"])).stat().st_size for clip in clips)
    seconds = sum(float(str(clip["duration"])) for clip in clips)
    speakers, languages = (str(len({clip[kind] for clip in clips})) for kind in ("speaker", "language"))
    report.add_row(split, str(len(clips)), f"{seconds:.1f}", speakers, languages, f"{total:,}")
Console().print(report)
print(f"{same_samples} of {len(rows)} clips have the same samples as before, {same_bytes} the same bytes")
