"""Checks a system against tensors that the authors' own code made: `scripts/verify_parity.py SYSTEM FOLDER`.

A folder holds config.json, weights, io.safetensors (inputs and outputs of the authors' code) and tolerance.json. The system's
parity function computes every tensor of io.safetensors from the rest, by the functions that train and infer; only the tensors
that tolerance.json names as inputs are shown to it.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.registry import get_system

# Folders that are no system's: imported by name, as all harnesses are
EVALUATORS = {"adm_evaluator": "tokenizers_lab.eval.parity_adm:compute"}


class GivenDraw(Draw):
    """Draws that return what a folder gives, by purpose. Anything else raises KeyError, another shape ValueError."""

    def __init__(self, given: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]):
        """names: purpose → tensors of `given` that may stand for it; the first that is there counts."""
        super().__init__(0)
        found = {purpose: [given[name] for name in options if name in given] for purpose, options in names.items()}
        self.values = {purpose: values[0] for purpose, values in found.items() if values}

    def within(self, scope: str) -> "GivenDraw":
        """The same draws: a folder has one micro-batch."""
        return self

    def generator(self, purpose: str) -> torch.Generator:
        """Nothing is drawn here."""
        raise KeyError(f"the folder gives values, but no generator for '{purpose}'")

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """The given values."""
        return self._value(purpose, shape)

    def uniform(self, purpose: str, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
        """The given values, which are already between low and high."""
        return self._value(purpose, shape)

    def integers(self, purpose: str, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """The given values."""
        return self._value(purpose, shape)

    def permutation(self, purpose: str, n: int) -> Tensor:
        """The given values."""
        return self._value(purpose, (n,))

    def _value(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        if purpose not in self.values:
            raise KeyError(f"the folder gives no values for the draw '{purpose}'")
        value = self.values[purpose]
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"the draw '{purpose}' is {tuple(value.shape)} in the folder, but {tuple(shape)} was asked for")
        return value


class RowDraw(GivenDraw):
    """Given draws whose permutations are only the rows that are taken: the first of the permutation."""

    def permutation(self, purpose: str, n: int) -> Tensor:
        """The given rows."""
        if purpose not in self.values:
            raise KeyError(f"the folder gives no values for the draw '{purpose}'")
        return self.values[purpose]


@dataclass
class Rules:
    """tolerance.json: what may be read before the comparison, and how far each tensor may be off."""

    inputs: list[str]                        # fnmatch patterns
    tolerances: list[tuple[str, float]]      # the first pattern that fits counts

    def is_input(self, name: str) -> bool:
        """Whether the tensor is given rather than computed."""
        return any(fnmatchcase(name, pattern) for pattern in self.inputs)

    def tolerance(self, name: str) -> float:
        """Largest allowed error. Raises ConfigError if no rule fits."""
        for pattern, value in self.tolerances:
            if fnmatchcase(name, pattern):
                return value
        raise ConfigError(f"tolerance.json has no rule for {name}")


@dataclass
class Check:
    """The outcome for one tensor."""

    name: str
    shape: tuple[int, ...]
    error: float | None              # none: not compared
    tolerance: float                 # 0 for tensors that must be equal
    verdict: str                     # ok, off, not computed, wrong shape, wrong type, not finite, input

    @property
    def failed(self) -> bool:
        """Whether this tensor speaks against the system."""
        return self.verdict not in ("ok", "input")


def parity_function(name: str) -> Callable[[Path, dict[str, Tensor]], dict[str, Tensor]]:
    """What computes a folder's tensors: a system's function, or that of an evaluator. Raises ConfigError if there is none."""
    if name in EVALUATORS:
        module, _, attribute = EVALUATORS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    found = get_system(name)
    if found.parity is None:
        raise ConfigError(f"the system '{name}' has no parity function")
    return found.resolve("parity")


def verify(system: str, folder: Path) -> list[Check]:
    """Compare every tensor of the folder's io.safetensors with what the system computes.

    Raises ConfigError if the system has no parity function or the folder's files do not fit, CheckpointError on damaged files.
    """
    compute = parity_function(system)
    rules = read_rules(folder / "tolerance.json")
    given = read_tensors(folder / "io.safetensors", rules, inputs=True)
    computed = compute(folder, given)
    reference = read_tensors(folder / "io.safetensors", rules, inputs=False)
    checks = [Check(name, tuple(value.shape), None, 0.0, "input") for name, value in given.items()]
    checks += [compare(name, computed.get(name), value, rules.tolerance(name)) for name, value in reference.items()]
    return sorted(checks, key=lambda c: c.name)


def read_rules(file: Path) -> Rules:
    """tolerance.json. Raises ConfigError if it is missing or malformed."""
    try:
        values = json.loads(file.read_text())
        return Rules([str(p) for p in values["inputs"]], [(str(p), float(t)) for p, t in values["rules"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} must hold 'inputs' and 'rules': {error}") from error


def read_tensors(file: Path, rules: Rules, inputs: bool) -> dict[str, Tensor]:
    """The inputs of io.safetensors, or all the others: never both at once. Raises CheckpointError on a damaged file."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if rules.is_input(name) == inputs}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error


def compare(name: str, computed: Tensor | None, reference: Tensor, tolerance: float) -> Check:
    """max |difference| / max(1, max |reference|) for floats; integers and booleans must be equal."""
    shape = tuple(reference.shape)
    if not reference.is_floating_point() and not reference.is_complex():
        tolerance = 0.0
    if computed is None:
        return Check(name, shape, None, tolerance, "not computed")
    if tuple(computed.shape) != shape:
        return Check(name, shape, None, tolerance, "wrong shape")
    if computed.is_floating_point() != reference.is_floating_point() or (tolerance == 0.0 and computed.dtype != reference.dtype):
        return Check(name, shape, None, tolerance, "wrong type")
    ours, theirs = computed.detach().to(torch.float64), reference.to(torch.float64)
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)).item() if theirs.numel() else 0.0
    if error != error or error == float("inf"):
        return Check(name, shape, error, tolerance, "not finite")
    return Check(name, shape, error, tolerance, "ok" if error <= tolerance else "off")


def summary(checks: list[Check]) -> str:
    """One line: how many tensors were compared, how many fail, the largest error."""
    compared = [c for c in checks if c.verdict != "input"]
    failed = [c for c in compared if c.failed]
    worst = max((c.error for c in compared if c.error is not None), default=0.0)
    names = ", ".join(c.name for c in failed[:5]) + (", …" if len(failed) > 5 else "")
    verdict = f"{len(failed)} FAILED ({names})" if failed else "all match"
    return f"{len(compared)} tensors compared, {len(checks) - len(compared)} inputs: {verdict}; largest error {worst:.2g}"
