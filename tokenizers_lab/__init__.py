"""tokenizers-lab: train, use and compare continuous and discrete tokenizers for images and speech."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from tokenizers_lab.hub import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from tokenizers_lab.hub import load

        return load
    raise AttributeError(f"module 'tokenizers_lab' has no attribute '{name}'")
