"""Fixtures of the training tests."""

import pytest
from runner import Runner


@pytest.fixture
def runner(tmp_path):
    """Runs `toklab train` in processes of its own."""
    return Runner(tmp_path)
