"""Short ways to write the entries of the zoo down."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from attncompile.models.zoo.entry import Entry

RECIPE = "attncompile.models.zoo.recipes:recipe"
PLAIN = "attncompile.models.zoo.plain:"
NO_CACHE = {"use_cache": False}
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PATCHES = {**SMALL, "image_size": 32, "patch_size": 8}
GROUPED = {"num_key_value_heads": 2, "pad_token_id": 0}

_FIELDS = {f.name for f in fields(Entry)}


def twice(entry: Entry) -> tuple[Entry, Entry]:
    """Through both exporters; TorchScript at opset 17."""
    return entry, replace(entry, exporter="torchscript", opset=17)


def _split(more: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {k: v for k, v in more.items() if k in _FIELDS}, {k: v for k, v in more.items() if k not in _FIELDS}


def text(name: str, family: str, model: str, config: str, **more: Any) -> Entry:
    """A text model of transformers; ``more`` are fields of the entry and options of ``families.text``."""
    own, options = _split(more)
    return Entry(name, "attncompile.models.zoo.families:text", family,
                 options={"model": model, "config": config, **options}, **own)  # fmt: skip


def image(name: str, model: str, config: str, settings: dict[str, Any], **more: Any) -> Entry:
    """An image model of transformers; ``more`` are fields of the entry and options of ``families.image``."""
    own, options = _split(more)
    return Entry(name, "attncompile.models.zoo.families:image", "vision",
                 options={"model": model, "config": config, "settings": settings, **options}, **own)  # fmt: skip


def cache(name: str, model: dict[str, Any], **more: Any) -> Entry:
    """A decoder of transformers with past keys and values as inputs; see ``caches.cached``."""
    own, options = _split(more)
    return Entry(name, "attncompile.models.zoo.caches:cached", "cache", options={**model, **options}, **own)


def diffusion(name: str, kind: str, settings: dict[str, Any], inputs: dict[str, Any], **more: Any) -> Entry:
    """A model of diffusers; see ``diffusion.model``."""
    own, options = _split(more)
    return Entry(name, "attncompile.models.zoo.diffusion:model", "diffusion",
                 options={"kind": kind, "settings": settings, "inputs": inputs, **options}, **own)  # fmt: skip


def timm(model: str, side: int, settings: dict[str, Any], **more: Any) -> Entry:
    """A model of timm; see ``timm_models.model``."""
    return Entry(f"timm-{model}", "attncompile.models.zoo.timm_models:model", more.pop("family", "vision"),
                 options={"model": model, "side": side, "settings": settings}, needs=("timm",), **more)  # fmt: skip
