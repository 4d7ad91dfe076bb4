"""Makes training data of published speech collections: a manifest with sound files, webdataset shards, or both.

    python scripts/prepare_speech.py asterisk OUT [--languages en fr es it ru]   # telephone prompts, one speaker a language
    python scripts/prepare_speech.py tuxpaint OUT [--languages fr ro …]          # spoken descriptions of pictures
    python scripts/prepare_speech.py fillets OUT [--languages cs nl]             # acted dialogues, several roles
    python scripts/prepare_speech.py librispeech OUT --source FOLDER
    python scripts/prepare_speech.py manifest OUT --source FILE.csv              # or .tsv, .jsonl: file, text, speaker, …
    python scripts/prepare_speech.py emilia OUT --source 'EN-B{000000..000009}.tar'

The first three take Debian packages, downloaded and unpacked, not installed (or .deb files in --packages DIR). G.722
prompts need `pip install tokenizers-lab[samples]`. OUT receives refused.jsonl, which says for each clip that was left out why,
and report.json. `--val-share 0.05` splits into OUT/train and OUT/val.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from debian_packages import unpack
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokenizers_lab.data import corpora
from tokenizers_lab.data.prepare import FORMS, Limits, prepare
from tokenizers_lab.data.sources import expand_shards
from tokenizers_lab.errors import TokenizersLabError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("collection", choices=("asterisk", "tuxpaint", "fillets", "librispeech", "manifest", "emilia"))
parser.add_argument("out", type=Path, help="new folder")
parser.add_argument("--source", help="librispeech: folder; manifest: file; emilia: shards (path, glob, brace range, URL)")
parser.add_argument("--languages", nargs="+", help="of the Debian packages; default: all that the collection has")
parser.add_argument("--packages", type=Path, help="folder with the .deb files; without it they are downloaded")
parser.add_argument("--form", choices=FORMS, default="manifest", help="default: manifest")
parser.add_argument("--per-shard", type=int, default=1000, help="clips of a shard (default 1000)")
parser.add_argument("--sample-rate", type=int, help="Hz; encode anew as FLAC of one channel; default: keep files as they are")
parser.add_argument("--min-seconds", type=float, default=Limits.min_seconds)
parser.add_argument("--max-seconds", type=float, default=Limits.max_seconds)
parser.add_argument("--val-share", type=float, default=0.0, help="share of the sentences that is held out")
parser.add_argument("--need-text", action="store_true", help="refuse clips without a transcript")
args = parser.parse_args()
if args.collection in ("librispeech", "manifest", "emilia") and not args.source:
    parser.error(f"{args.collection} needs --source")


def together(names: list[str], folder: Path) -> Path:
    """Packages unpacked over each other, as they are when installed."""
    folder.mkdir()
    return unpack(names, folder, args.packages, join=True)[names[0]]


def packages(scratch: Path) -> Iterator[corpora.Clip | corpora.Refused]:
    """The clips of a collection that Debian has."""
    if args.collection == "tuxpaint":
        root = unpack(["tuxpaint-stamps-default"], scratch, args.packages)["tuxpaint-stamps-default"]
        for item in corpora.tuxpaint_descriptions(root):
            if not args.languages or not isinstance(item, corpora.Clip) or item.language in args.languages:
                yield item
        return
    all_languages = {"asterisk": ["en", "fr", "es", "it", "ru"], "fillets": ["cs", "nl"]}[args.collection]
    for language in args.languages or all_languages:
        if args.collection == "asterisk":
            names = [f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-g722"]
            yield from corpora.asterisk_prompts(together(names, scratch / language))
        else:
            names = ["fillets-ng-data", f"fillets-ng-data-{language}"]
            yield from corpora.fillets_dialogues(together(names, scratch / language), language)


try:
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            "librispeech": lambda: corpora.librispeech(Path(args.source).expanduser()),
            "manifest": lambda: corpora.listed_clips(Path(args.source).expanduser()),
            "emilia": lambda: corpora.emilia(expand_shards(args.source)),
        }.get(args.collection, lambda: packages(Path(scratch)))()
        limits = Limits(args.min_seconds, args.max_seconds, args.sample_rate, args.val_share, args.need_text)
        in_place = args.collection in ("librispeech", "manifest")
        found = track(found, "clips", console=Console(stderr=True))
        report = prepare(found, args.out, limits, args.form, args.per_shard, in_place)
except TokenizersLabError as error:
    raise SystemExit(f"{type(error).__name__}: {error}") from None

table = Table("", "clips", "minutes")
for split, count in sorted(report.clips.items()):
    table.add_row(split, f"{count:,}", f"{report.seconds[split] / 60:,.1f}")
table.add_section()
for kind, seconds in sorted(report.languages.items()):
    table.add_row(f"language {kind}", "", f"{seconds / 60:,.1f}")
loudest = sorted(report.speakers.items(), key=lambda item: -item[1])
for kind, seconds in loudest[:12]:
    table.add_row(f"speaker {kind}", "", f"{seconds / 60:,.1f}")
if len(loudest) > 12:
    table.add_row(f"{len(loudest) - 12:,} other speakers", "", f"{sum(s for _, s in loudest[12:]) / 60:,.1f}")
table.add_section()
for reason, count in report.refused.most_common():
    table.add_row(f"refused: {reason}", f"{count:,}", "")
Console().print(table)
