"""Entries that are the package's own recipes, in other forms."""

from __future__ import annotations

from dataclasses import replace

from attncompile.models.export import build, resolve
from attncompile.models.recipe import Built, Options
from attncompile.models.zoo.entry import Entry


def recipe(entry: Entry) -> Built:
    """The tiny size of the recipe ``entry.name``; ``entry.options`` that are fields of ``Options`` are given to it."""
    options = Options(
        exporter=entry.exporter, opset=entry.opset, attention=entry.attention, dynamic=entry.dynamic,
        **{k: v for k, v in entry.options.items() if k in Options.__dataclass_fields__},
    )  # fmt: skip
    built = build(entry.name, resolve(entry.name, options))
    if not any(name.endswith("_mask") for name in built.inputs):
        return built
    # A mask that hides nothing cannot be told from none: two rows, of which the second is padded on the left.
    built = build(entry.name, resolve(entry.name, replace(options, batch=2)))
    for name, tensor in built.inputs.items():
        if name.endswith("_mask"):
            tensor.fill_(1)
            tensor[1, :5] = 0
    return built
