"""The toy system, registered for the tests that ask for it."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from toy import SYSTEM, Toy, ToyConfig, pictures

from tokenizers_lab import registry


@pytest.fixture
def toy_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another package's entry point would register it."""
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(name="toy", load=lambda: SYSTEM)])


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fitted() -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig()).fit(pictures(16)).eval()


@pytest.fixture
def chromium() -> str:
    """Path of the browser; CI must have one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        reason = "no Chromium on this machine (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found
