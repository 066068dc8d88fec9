"""What masks provably are, with certificates."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attncompile.passes.masks.analyser import MaskAnalyser

__all__ = ["MaskAnalyser"]


def __getattr__(name: str) -> Any:
    """The analyser, imported when it is asked for: it reads what detection says, and detection uses it."""
    if name == "MaskAnalyser":
        import_module("attncompile.passes.detect")
        return import_module("attncompile.passes.masks.analyser").MaskAnalyser
    raise AttributeError(name)
