"""Models of timm at a small size."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from attncompile.models.images import structured_images
from attncompile.models.recipe import Built
from attncompile.models.weights import seed_weights
from attncompile.models.zoo.entry import Entry


class _Attributes(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Anything(metaclass=_Attributes):
    """Stands for a class or function of torchvision that is imported and never called; attributes are their names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("torchvision is not installed, or does not fit the installed torch")


class _Hollow(ModuleType):
    __path__: list[str] = []  # noqa: RUF012 a module's attribute

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """timm's data loaders import torchvision, its models do not use it, and its wheels for CUDA do not load beside a
    torch for the CPU: while timm is imported, hollow modules stand in for it.
    """
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchvision"}
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update(kept)


def model(entry: Entry) -> Built:
    """``options``: ``model`` (a name of timm), ``settings`` (arguments of it), ``side`` in pixels.

    ``entry.attention`` sdpa means timm's fused attention.
    """
    if "timm" not in sys.modules:
        with _without_torchvision():
            import timm
    import timm
    from timm.layers.config import set_fused_attn

    set_fused_attn(entry.attention == "sdpa")
    made = timm.create_model(entry.options["model"], pretrained=False, **entry.options.get("settings", {}))
    side = entry.options.get("side", 32)
    pixels = torch.from_numpy(structured_images(2, 3, side, 1))
    seed_weights(made, 0)
    return Built(made.eval(), {"x": pixels}, ("output",), {"x": {0: "batch"}})
