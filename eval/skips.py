"""Held-out samples that could not be read and were left out."""

from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.errors import ConfigError, DataError


class Skips:
    """Collects held-out samples that could not be read. Raises DataError at the one that is too many."""

    def __init__(self, allowed: int):
        if allowed < 0:
            raise ConfigError(f"--allow-skips must be at least 0, not {allowed}")
        self.allowed = allowed
        self.reasons: list[str] = []

    def __call__(self, bad: Bad) -> None:
        """What `validation_batches` calls."""
        self.reasons.append(bad.reason)
        self.check(self.reasons)

    def check(self, reasons: list[str]) -> None:
        """Raise DataError if these are more than are allowed."""
        if len(reasons) > self.allowed:
            advice = f"{self.allowed} may be left out (--allow-skips)" if self.allowed else "--allow-skips N leaves out up to N"
            raise DataError(f"{reasons[-1]}; {advice}")
