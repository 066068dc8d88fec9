"""Entries that are the package's own recipes, in other forms."""

from __future__ import annotations

from attncompile.models.export import build, resolve
from attncompile.models.recipe import Built, Options
from attncompile.models.zoo.entry import Entry


def recipe(entry: Entry) -> Built:
    """The tiny size of the recipe ``entry.name``; ``entry.options`` are fields of ``Options``."""
    options = Options(
        exporter=entry.exporter, opset=entry.opset, attention=entry.attention, dynamic=entry.dynamic, **entry.options
    )  # fmt: skip
    return build(entry.name, resolve(entry.name, options))
