"""Finds the systems: one folder each under `models/` and, of latent generators, `eval/generation/`, or an entry point of
another package. A folder's `__init__.py` holds a `SYSTEM`; it imports nothing heavy, so that listing all systems is instant.
"""

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from tokenizers_lab.errors import ConfigError

ENTRY_POINT_GROUP = "tokenizers_lab.systems"
PACKAGES = ("tokenizers_lab.models", "tokenizers_lab.eval.generation")


@dataclass(frozen=True)
class System:
    """What the library needs to know of a system. Fields with a colon are `module:attribute`, imported on use."""

    name: str
    kind: Literal["image", "speech", "generator"]      # a tokenizer of images or speech; a generator of images' latents
    paper: str                    # authors' title and arXiv number
    summary: str                  # one line for `toklab list`
    model_config: str             # dataclass of the network
    objective_config: str         # dataclass of the objective
    tokenizer: str                # nn.Module class, a Tokenizer; of a generator, a LatentGenerator
    objective: str                # nn.Module class, an Objective
    convert: str | None = None    # module with OFFICIAL, from_official, to_official
    parity: str | None = None     # function (folder, given, draw) -> dict of tensors, for scripts/verify_parity.py

    def resolve(self, field: str) -> Any:
        """Import what a field names, for example `system.resolve("tokenizer")`."""
        module, _, attribute = getattr(self, field).partition(":")
        loaded = importlib.import_module(module)
        return getattr(loaded, attribute) if attribute else loaded


def systems() -> dict[str, System]:
    """Every system by name: the tokenizers, the generators, then entry points of other packages."""
    found = {}
    for name in PACKAGES:
        folders = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(name).__path__) if m.ispkg)
        found.update({folder: importlib.import_module(f"{name}.{folder}").SYSTEM for folder in folders})
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        found[entry.name] = entry.load()
    return found


def get_system(name: str) -> System:
    """The system of that name. Raises ConfigError with the nearest known name."""
    known = systems()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; nearest: '{near[0]}'" if near else f"; known: {', '.join(known)}"
        raise ConfigError(f"there is no system '{name}'{hint}")
    return known[name]
