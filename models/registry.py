"""The recipes, each by the module and the name that hold it; a module is imported when its recipe is asked for."""

from __future__ import annotations

from importlib import import_module

from attncompile.core.errors import BadArguments
from attncompile.models.recipe import Recipe

_RECIPES: tuple[tuple[str, str], ...] = (
    ("vit", "attncompile.models.vit:VIT"),
    ("dinov2", "attncompile.models.vit:DINOV2"),
    ("swin", "attncompile.models.swin:SWIN"),
    ("dit", "attncompile.models.dit:DIT"),
    ("lit", "attncompile.models.lit:LIT"),
    ("pixart", "attncompile.models.pixart:PIXART"),
    ("flux", "attncompile.models.flux:FLUX"),
    ("mistral", "attncompile.models.llm:MISTRAL"),
    ("llama", "attncompile.models.llm:LLAMA"),
    ("gpt2", "attncompile.models.llm:GPT2"),
    ("bert", "attncompile.models.bert:BERT"),
    ("minilm", "attncompile.models.minilm:MINILM"),
)

NAMES: tuple[str, ...] = tuple(name for name, _ in _RECIPES)


def recipe(name: str) -> Recipe:
    """The recipe called ``name``. Raises ``BadArguments`` where there is none."""
    for known, where in _RECIPES:
        if known == name:
            module, attribute = where.split(":")
            found = getattr(import_module(module), attribute)
            if not isinstance(found, Recipe):
                raise TypeError(f"{where} is not a Recipe")
            return found
    raise BadArguments(f"no recipe is called {name!r}", f"choose one of {', '.join(NAMES)}")
