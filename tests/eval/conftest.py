"""The toy system, registered for these tests alone."""

import pytest
import torch
import toy

from tokenizers_lab import registry


@pytest.fixture
def toy_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "systems", lambda: {"toy": toy.SYSTEM})


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fitted() -> toy.Toy:
    torch.manual_seed(0)
    return toy.Toy(toy.ToyConfig()).fit(toy.pictures(16)).eval()
