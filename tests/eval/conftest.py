"""The toy system, registered for the tests that ask for it."""

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
