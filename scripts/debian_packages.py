"""Debian packages as folders: fetched and unpacked, never installed. Shared by the scripts that make data from them."""

import subprocess
from collections.abc import Iterable
from pathlib import Path


def unpack(packages: Iterable[str], scratch: Path, given: Path | None = None, join: bool = False) -> dict[str, Path]:
    """Unpack each package into scratch/NAME, or, to join them, all into scratch/all; the folder of each.

    given: a folder that holds the .deb files; without it they are downloaded.

    Needs Debian or a system with its packages, and dpkg-deb.
    """
    folders = {}
    for package in packages:
        if given is None:
            subprocess.run(["apt-get", "download", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        archives = sorted((given or scratch).glob(f"{package}_*.deb"))
        if not archives:
            raise SystemExit(f"there is no {package}_*.deb in {given}")
        folders[package] = scratch / ("all" if join else package)
        subprocess.run(["dpkg-deb", "-x", archives[-1], folders[package]], check=True)
    return folders
