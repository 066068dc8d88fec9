"""Sees attention that a module writes itself: a product, a softmax of its result, a product with the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from attncompile.models.zoo.seen import HIDDEN

_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
_SOFTMAXES = frozenset({"softmax", "exp"})

Note = Callable[["Seen"], None]


@dataclass(frozen=True, slots=True)
class Seen:
    """One attention: ``query``, ``key``, ``value`` are [.., length, dim], ``visible`` [.., queries, keys] bool."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: np.ndarray
    bias: bool
    sinks: bool


class Watch(TorchFunctionMode):
    """Calls ``note`` for every attention computed while ``active()`` is true."""

    def __init__(self, active: Callable[[], bool], note: Note) -> None:
        super().__init__()
        self._active, self._note = active, note
        self._products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._soft: torch.Tensor | None = None
        self._capped = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        if not self._active():
            return result
        if name in _PRODUCTS:
            self._product(name, args, kwargs, result)
        elif name == "tanh":
            self._capped = True
        elif name in _SOFTMAXES and isinstance(args[0], torch.Tensor):
            axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            if name == "exp" or axis in (-1, args[0].ndim - 1):
                self._softmax(args[0].detach())
        return result

    def _softmax(self, scores: torch.Tensor) -> None:
        """Takes ``scores`` for those of the first product of their size; one column more is a sink."""
        for product in self._products:
            rows, columns = product[2].shape[-2:]
            if scores.shape[-2] == rows and scores.shape[-1] - columns in (0, 1):
                self._soft, self._products = scores, [product]
                return

    def _product(self, name: str, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        first, second, plain = _operands(name, args, kwargs, result)
        if self._soft is not None and first.shape[-2:] == self._products[0][2].shape[-2:]:
            query, key, product = self._products[0]
            visible, bias = self._mask(self._soft, product)
            sinks = self._soft.shape[-1] > product.shape[-1]
            self._products, self._soft, self._capped = [], None, False
            self._note(Seen(query, key, second.transpose(-1, -2), visible, bias, sinks))
            return
        if self._soft is None:
            self._products.append((first, second, plain))

    def _mask(self, soft: torch.Tensor, product: torch.Tensor) -> tuple[np.ndarray, bool]:
        """Which keys the softmax sees, and whether anything was added to the scores of those."""
        scores = soft.float()[..., : product.shape[-1]]
        shown = scores - scores.amax(-1, keepdim=True) > HIDDEN
        if self._capped:
            return shown.numpy(), False
        scores = scores.reshape(-1, *scores.shape[-2:])
        plain = product.float().reshape(-1, *product.shape[-2:]).expand_as(scores)
        weight = shown.reshape(scores.shape).float()
        scores = scores.nan_to_num(0.0, 0.0, 0.0) * weight
        plain = plain * weight
        # What is left after a constant for each row (a subtracted maximum) and a factor for each head is a bias.
        count = weight.sum(-1, keepdim=True).clamp(min=1)
        scores, plain = ((t - t.sum(-1, keepdim=True) / count) * weight for t in (scores, plain))
        factor = (scores * plain).sum((-1, -2), keepdim=True) / (plain * plain).sum((-1, -2), keepdim=True).clamp(1e-12)
        rest = (scores - factor * plain).square().sum().sqrt() / scores.square().sum().sqrt().clamp(1e-12)
        limit = 1e-3 if soft.dtype == torch.float32 and product.dtype == torch.float32 else 2e-2
        return shown.numpy(), bool(rest > limit)


def _operands(
    name: str, args: Any, kwargs: Any, result: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A and B of A @ B^T, both [.., rows, contracted], and the product without what ``baddbmm`` adds to it."""
    if name == "baddbmm":
        given = {**dict(zip(("input", "batch1", "batch2"), args, strict=False)), **kwargs}
        added, a, b = given["input"], given["batch1"], given["batch2"]
        plain = result - kwargs.get("beta", 1) * added if added.shape[-1] == result.shape[-1] else result
        return a, b.transpose(-1, -2), plain
    if name != "einsum":
        a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
        return a, b.transpose(-1, -2) if b.ndim > 1 else b, result
    equation, *operands = args
    inputs, output = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    a, b = operands if len(operands) == 2 else operands[0]
    letters = [c for c in left if c in right and c not in output]  # what is summed over
    batch = [c for c in output if c in left and c in right]
    rows = [[c for c in side if c in output and c not in batch] for side in (left, right)]

    def arranged(tensor: torch.Tensor, side: str, own: list[str]) -> torch.Tensor:
        size = dict(zip(side, tensor.shape, strict=True))
        tensor = tensor.permute([side.index(c) for c in [*batch, *own, *letters]])
        shape = [size[c] for c in batch]
        return tensor.reshape([*shape, math.prod(size[c] for c in own), math.prod(size[c] for c in letters)])

    first, second = arranged(a, left, rows[0]), arranged(b, right, rows[1])
    return first, second, first @ second.transpose(-1, -2)
