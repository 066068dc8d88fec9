"""Sees which tokens a module mixes, whatever it computes: by changing one token after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from attncompile.models.zoo.entry import Call
from attncompile.models.zoo.seen import mask_words
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
        recorder.inside -= 1
        heads, length = heads_of(layer), int(tokens.shape[1])
        dim = int(tokens.shape[2]) // heads
        recorder.sums.append(float(tokens.double().abs().sum()))
        recorder.calls.append(
            Call(heads, heads, dim, dim, length, length, mask_words(seen[:, None], False), type(layer).__name__)
        )
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
    more = {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def result(x: torch.Tensor) -> torch.Tensor:
        out = layer.forward(x, *rest, **more)
        return out if isinstance(out, torch.Tensor) else out[0]

    plain = result(tokens)
    columns = []
    for j in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, j] = changed[:, j].flip(-1) * 1.5 + 0.25
        columns.append((result(changed) != plain).any(-1))
    return torch.stack(columns, -1).numpy()
