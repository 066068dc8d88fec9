"""The search for approximations within an error budget: see ``run.py``."""

from __future__ import annotations

from attncompile.search.calls import approximated
from attncompile.search.found import CurvePoint, HeadFound, SearchReport
from attncompile.search.run import Result, Search, Settings, open_sites, split

__all__ = [
    "CurvePoint", "HeadFound", "Result", "Search", "SearchReport", "Settings", "approximated", "open_sites", "split",
]  # fmt: skip
