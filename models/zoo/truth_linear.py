"""Sees linear attention: a product of keys and values over the tokens, and a product of queries with the result."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attncompile.models.zoo.entry import Call


class _Watch(TorchFunctionMode):
    """Records every product of which one operand is a product itself, while a watched function runs."""

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self.recorder = recorder
        self.names: list[str] = []
        self._states: list[tuple[torch.Tensor, int]] = []
        self._ones = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if not self.names:
            return result
        if name == "pad" and (kwargs or {}).get("value", args[3] if len(args) > 3 else 0) == 1:
            self._ones = 1
        elif name == "matmul":
            self._product(args[0], args[1], result)
        return result

    def _product(self, a: torch.Tensor, b: torch.Tensor, result: torch.Tensor) -> None:
        for state, tokens in self._states:
            if a is state or b is state:
                # state [.., dim, value dim] is read by queries [.., n, dim] on its left, else it is transposed
                queries, width = (a.shape[-2], b.shape[-1]) if b is state else (b.shape[-1], a.shape[-2])
                heads = math.prod(a.shape[1:-2])
                self.recorder.sums.append(float(result.double().abs().sum()))
                self.recorder.calls.append(
                    Call(heads, heads, int(a.shape[-1]), int(width) - self._ones, int(queries), tokens, "none",
                         self.names[-1], kind="linear")
                )  # fmt: skip
                self._states, self._ones = [], 0
                return
        self._states.append((result, int(a.shape[-1])))


@contextlib.contextmanager
def linear_modules(recorder: Any, root: torch.nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Watches the forward of modules of these classes, and calls of diffusers' processors of these classes.

    A module with a method ``attend(query, key, value)`` (each [batch, heads, tokens, dim]) is recorded at its call,
    causal where its attribute ``causal`` says so.
    """
    watch = _Watch(recorder)
    saved: list[tuple[Any, str, Any]] = []

    def put(holder: Any, attribute: str, function: Callable[..., Any]) -> None:
        saved.append((holder, attribute, holder.__dict__.get(attribute)))
        object.__setattr__(holder, attribute, function)

    for module in root.modules():
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__name__ in names:
            put(module, "processor", _Watched(watch, processor, type(processor).__name__))
        if type(module).__name__ not in names:
            continue
        if hasattr(module, "attend"):
            put(module, "attend", _recorded(recorder, module))
        else:
            put(module, "forward", _Watched(watch, module.forward, type(module).__name__))
    try:
        with watch:
            yield
    finally:
        for holder, attribute, value in reversed(saved):
            if value is None:
                object.__delattr__(holder, attribute)
            else:
                object.__setattr__(holder, attribute, value)


class _Watched:
    """A function, watched while it runs."""

    def __init__(self, watch: _Watch, function: Callable[..., Any], name: str) -> None:
        self._watch, self._function, self._name = watch, function, name
        if not hasattr(function, "__self__"):  # a processor: its call's signature is looked at by diffusers
            functools.update_wrapper(self, type(function).__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._watch.names.append(self._name)
        try:
            return self._function(*args, **kwargs)
        finally:
            self._watch.names.pop()


def _recorded(recorder: Any, module: Any) -> Callable[..., Any]:
    original: Any = module.attend

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> Any:
        mask = "causal" if getattr(module, "causal", False) else "none"
        recorder.sums.append(float(query.double().abs().sum()))
        recorder.calls.append(
            Call(int(query.shape[-3]), int(key.shape[-3]), int(query.shape[-1]), int(value.shape[-1]),
                 int(query.shape[-2]), int(key.shape[-2]), mask, type(module).__name__, kind="linear")
        )  # fmt: skip
        return original(query, key, value, *rest, **more)

    return attend
