"""Errors meant for the person who must act: one line that says what is wrong and what to do."""


class TokenizersLabError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it as one line."""


class ConfigError(TokenizersLabError, ValueError):
    """A config has an unknown key, a wrong type or an impossible combination."""

    key = ""        # the dotted key at fault, where there is one: finds the file and line


class DataError(TokenizersLabError):
    """A data source is missing, empty, damaged, or too much of it is unreadable."""


class InputError(TokenizersLabError, ValueError):
    """A tensor or a file given to encode, decode or a metric has a wrong shape, range or type."""


class WeightsMissing(TokenizersLabError):
    """A pretrained network is not here and cannot be fetched; the message says what to fetch and where to put it."""


class CheckpointError(TokenizersLabError):
    """A checkpoint is missing, damaged, incomplete, or belongs to another model."""


class TrainingError(TokenizersLabError):
    """Training cannot go on: losses stay non-finite, the disk is full, or a run would be overwritten by accident."""
