"""Sees which tokens a module mixes, whatever it computes: by changing one token after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from attncompile.models.zoo.entry import Call
from attncompile.models.zoo.seen import counts_words, mask_words
from attncompile.models.zoo.truth import heads_of


@contextlib.contextmanager
def sparse_modules(recorder: Any, root: torch.nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Counts each call of modules of these classes once. Their first argument is [batch, tokens, width], and so is
    their (first) result; heads are read from their attributes.
    """
    handles = []

    def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recorder.inside:
            return
        recorder.inside += 1
        tokens = args[0] if args else kwargs["hidden_states"]
        seen = _seen(layer, tokens, args[1:], kwargs)
        words = mask_words(seen[:, None], False) + counts_words(_weights(layer, tokens, args[1:], kwargs))
        recorder.inside -= 1
        heads, length = heads_of(layer), int(tokens.shape[1])
        dim = int(tokens.shape[2]) // heads
        recorder.sums.append(float(tokens.double().abs().sum()))
        recorder.calls.append(Call(heads, heads, dim, dim, length, length, words, type(layer).__name__))
        recorder.inside += 1

    def after(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        recorder.inside -= 1

    chosen = [m for m in root.modules() if type(m).__name__ in names]
    try:
        for module in chosen:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seen(layer: Any, tokens: torch.Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> np.ndarray:
    """Bool [batch, queries, keys]: whether the result at a query changes with the token at the key."""
    plain = _result(layer, tokens, rest, kwargs)
    columns = [(_result(layer, x, rest, kwargs) != plain).any(-1) for x in _changed_one_by_one(tokens)]
    return torch.stack(columns, -1).numpy()


def _weights(layer: Any, tokens: torch.Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> np.ndarray | None:
    """Float [heads, queries, keys]: the weight of each key of the first batch entry where all scores are equal, which
    they are once nothing is left of the queries. None for a module that does not project to ``query`` and ``value``.
    """
    query, value = getattr(layer, "query", None), getattr(layer, "value", None)
    if not isinstance(query, torch.nn.Linear) or not isinstance(value, torch.nn.Linear):
        return None
    kept = [(p, p.detach().clone()) for p in query.parameters()]
    try:
        for parameter, _ in kept:
            parameter.zero_()
        plain, heads = _result(layer, tokens, rest, kwargs)[0], heads_of(layer)
        columns = []
        for j, x in enumerate(_changed_one_by_one(tokens)):
            moved = (_result(layer, x, rest, kwargs)[0] - plain).double().reshape(len(plain), heads, -1)
            by = (value(x) - value(tokens))[0, j].double().reshape(heads, -1)
            columns.append((moved * by).sum(-1) / (by * by).sum(-1))  # [queries, heads]
        return torch.stack(columns, -1).movedim(1, 0).numpy()
    finally:
        for parameter, old in kept:
            parameter.copy_(old)


def _changed_one_by_one(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """``tokens`` [batch, tokens, width] with the first token changed, with the second, and so on."""
    for j in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, j] = changed[:, j].flip(-1) * 1.5 + 0.25
        yield changed


def _result(layer: Any, tokens: torch.Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    out = layer.forward(tokens, *rest, **{k: v for k, v in kwargs.items() if k != "hidden_states"})
    return out if isinstance(out, torch.Tensor) else out[0]
