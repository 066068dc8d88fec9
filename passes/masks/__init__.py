"""What masks provably are, with certificates."""

from attncompile.passes.masks.analyser import MaskAnalyser

__all__ = ["MaskAnalyser"]
