"""What a config's `train` and `val` name: a packaged sample set, a folder, a manifest, or a list of webdataset shards."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers_lab.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
_ARCHIVE = re.compile(r"\.(tar|tgz|tar\.gz)(\?.*)?$", re.IGNORECASE)
_CHUNKS = re.compile(r"([0-9]+)")


@dataclass(frozen=True)
class Source:
    """A folder of samples, a file that lists them, or the shards in reading order; one of the three."""

    folder: Path | None = None
    shards: tuple[str, ...] = ()
    manifest: Path | None = None
    samples: int | None = None      # of shards, where it is known


def resolve_source(
    source: str, split: str, noun: str = "images", sample: str = "sample:photos", manifests: tuple[str, ...] = ()
) -> Source:
    """What a source string names. split, `train` or `val`, is the part of a sample set, unless named: sample:photos/val.

    noun, sample: what is looked for and its sample set, for errors. manifests: endings of files that list samples.
    Raises DataError if nothing is there, in one line that says what was looked for.
    """
    if source.startswith("sample:"):
        name, _, part = source.removeprefix("sample:").partition("/")
        return Source(folder=sample_path(name, part or split))
    if "://" in source or _ARCHIVE.search(source):
        return Source(shards=tuple(expand_shards(source)))
    folder = Path(source).expanduser()
    if folder.suffix.lower() in manifests and folder.is_file():
        return Source(manifest=folder)
    if not folder.is_dir():
        listed = f"a manifest ({', '.join(manifests)}), " if manifests else ""
        what = "is a file" if folder.is_file() else "does not exist"
        raise DataError(
            f"data source '{source}' {what}; name a folder of {noun}, {listed}shards (shard-{{000..099}}.tar, a glob, a URL) "
            f"or {sample}"
        )
    return Source(folder=folder)


def sample_path(name: str, split: str) -> Path:
    """The folder of a packaged sample set, for example sample_path("photos", "val"). Raises DataError for an unknown one."""
    known = sorted(p.name for p in SAMPLES.iterdir() if p.is_dir()) if SAMPLES.is_dir() else []
    if name not in known:
        raise DataError(f"there is no sample set '{name}'; known: {', '.join(f'sample:{k}' for k in known) or 'none'}")
    folder = SAMPLES / name / split
    if not folder.is_dir():
        splits = ", ".join(sorted(p.name for p in (SAMPLES / name).iterdir() if p.is_dir()))
        raise DataError(f"the sample set '{name}' has no split '{split}'; it has: {splits}")
    return folder


def expand_shards(source: str) -> list[str]:
    """The shards that a path, a glob, a brace range or a URL names; a glob's in natural order, a range's as written.

    Raises DataError if a glob matches nothing, a local shard is missing, or its protocol is unknown.
    """
    from braceexpand import braceexpand

    try:
        patterns = list(braceexpand(source))
    except ValueError:
        raise DataError(f"shards '{source}': a brace is not closed") from None
    shards: list[str] = []
    for pattern in patterns:
        found = _glob_remote(pattern) if "://" in pattern else _glob_local(pattern)
        if not found:
            raise DataError(f"shards '{source}': nothing matches {pattern}")
        shards += found
    return shards


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Sorts 2.jpg before 10.jpg."""
    chunks = _CHUNKS.split(text)   # text and digits alternate, so that like is compared with like
    return [int(c) if i % 2 else c.casefold() for i, c in enumerate(chunks)], text


def _glob_local(pattern: str) -> list[str]:
    path = os.path.expanduser(pattern)
    if os.path.exists(path):
        return [path]
    return sorted(glob.glob(path, recursive=True), key=natural_key)


def _glob_remote(pattern: str) -> list[str]:
    import fsspec

    protocol = pattern.split("://")[0].split("::")[-1]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:   # ImportError says which package to install
        raise DataError(f"shards '{pattern}' cannot be read: {error}") from error
    if "*" not in pattern:   # ? and [ are ordinary characters of a URL
        return [pattern]
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        return sorted((fs.unstrip_protocol(p) for p in fs.glob(path)), key=natural_key)
    except Exception as error:   # each store has exceptions of its own
        raise DataError(f"shards '{pattern}' cannot be listed ({type(error).__name__}: {error})") from error
