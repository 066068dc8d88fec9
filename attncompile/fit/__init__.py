"""Feature maps fitted to a model's attention maps, for linear attention in the place of softmax: see ``run.py``."""

from __future__ import annotations

from attncompile.fit.fitted import FILE, Fitted, load, save
from attncompile.fit.found import FitReport, FitSite
from attncompile.fit.run import NAME, Fit, Settings, with_maps

__all__ = ["FILE", "NAME", "Fit", "FitReport", "FitSite", "Fitted", "Settings", "load", "save", "with_maps"]
