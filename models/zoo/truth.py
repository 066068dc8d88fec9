"""Counts the attention calls of a torch model while it runs. Knows nothing of ONNX or of the detector."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from attncompile.models.recipe import Built
from attncompile.models.zoo.entry import Call

_HIDDEN = -9000.0


def calls_of(built: Built, modules: tuple[str, ...] = ()) -> list[Call]:
    """Every attention call of one run of ``built`` on its example inputs, in order.

    Recorded are torch's ``scaled_dot_product_attention``, the eager attention functions of transformers, diffusers'
    attention scores, and calls of module classes named in ``modules``. A call inside another counts once.
    """
    recorder = _Recorder()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(_eager_functions(recorder))
        stack.enter_context(_diffusers_scores(recorder))
        stack.enter_context(_named_modules(recorder, built.module, modules))
        stack.enter_context(_multi_head(recorder))
        stack.enter_context(_sdpa(recorder))
        built.module(*built.inputs.values())
    return recorder.calls


class _Recorder:
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.inside = 0

    def note(self, query: torch.Tensor, key: torch.Tensor, mask: Any, causal: bool, how: str, heads: int = 0) -> None:
        """``query`` and ``key`` are [..., heads, length, dim]."""
        if self.inside:
            return
        lengths = (int(query.shape[-2]), int(key.shape[-2]))
        count = heads or (int(query.shape[-3]) if query.ndim > 3 else 1)
        kind = "causal" if causal and lengths[0] > 1 else _kind_of(mask, lengths)
        self.calls.append(Call(count, int(query.shape[-1]), *lengths, kind, how))


@contextlib.contextmanager
def _multi_head(recorder: _Recorder) -> Iterator[None]:
    """Wraps the function behind ``nn.MultiheadAttention``; its tensors are [length, batch, width]."""
    functional: Any = torch.nn.functional
    original = functional.multi_head_attention_forward

    def wrapped(query: Any, key: Any, value: Any, width: int, heads: int, *rest: Any, **more: Any) -> Any:
        mask, causal = more.get("attn_mask"), bool(more.get("is_causal"))
        if more.get("key_padding_mask") is not None:
            raise NotImplementedError("a key padding mask is not recorded")
        q, k = (t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for t in (query, key))
        recorder.note(q, k, mask, causal, "nn.MultiheadAttention")
        recorder.inside += 1
        try:
            return original(query, key, value, width, heads, *rest, **more)
        finally:
            recorder.inside -= 1

    functional.multi_head_attention_forward = wrapped
    try:
        yield
    finally:
        functional.multi_head_attention_forward = original


@contextlib.contextmanager
def _sdpa(recorder: _Recorder) -> Iterator[None]:
    """Wraps torch's function under every name that a loaded module of torch, transformers or diffusers has for it."""
    original = torch.nn.functional.scaled_dot_product_attention

    def wrapped(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
                is_causal: bool = False, **more: Any) -> Any:  # fmt: skip
        recorder.note(query, key, attn_mask, is_causal, "sdpa")
        return original(query, key, value, attn_mask, dropout_p, is_causal, **more)

    holders = [
        (module, name)
        for root, module in list(sys.modules.items())
        if root == "torch.nn.functional" or root.startswith(("transformers.", "diffusers."))
        for name, value in list(getattr(module, "__dict__", {}).items())
        if value is original
    ]
    for module, name in holders:
        module.__dict__[name] = wrapped
    try:
        yield
    finally:
        for module, name in holders:
            module.__dict__[name] = original


def _kind_of(mask: Any, lengths: tuple[int, int]) -> str:
    """What the elements of a mask say; ``+data`` where batch entries differ: the first one has no padding then."""
    if not isinstance(mask, torch.Tensor):
        return "none"
    array = mask.detach().cpu().float().numpy() if mask.dtype != torch.bool else mask.cpu().numpy()
    seen = array if array.dtype == bool else array > _HIDDEN
    if array.dtype != bool and bool(np.any(seen & (array != 0))):
        return "data"
    shape = (1,) * max(0, 4 - seen.ndim) + seen.shape
    seen = np.broadcast_to(seen.reshape(shape), (*shape[:2], *lengths))
    if not bool(np.all(seen == seen[:, :1])):
        return "data"
    first = _window_of(seen[0, 0])
    return first if first == "data" or bool(np.all(seen == seen[:1])) else f"{first}+data"


def _window_of(seen: np.ndarray) -> str:
    queries, keys = seen.shape
    if bool(seen.all()):
        return "none"
    if not bool(seen.any()):
        return "data"
    distance = np.arange(keys)[None] - np.arange(queries)[:, None] - (keys - queries)
    left, right = -int(distance[seen].min()), int(distance[seen].max())
    if not np.array_equal(seen, (distance >= -left) & (distance <= right)):
        return "data"
    left, right = (-1 if left >= keys - 1 else left), (-1 if right >= queries - 1 else right)
    return "causal" if (left, right) == (-1, 0) else f"window {left} {right}"


@contextlib.contextmanager
def _eager_functions(recorder: _Recorder) -> Iterator[None]:
    """Wraps ``eager_attention_forward`` in every transformers module that has been imported."""
    saved: list[tuple[Any, Callable[..., Any]]] = []
    for name, module in list(sys.modules.items()):
        original = getattr(module, "__dict__", {}).get("eager_attention_forward")
        if not name.startswith("transformers.") or original is None:
            continue

        def wrapped(
            layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None,
            *rest: Any, _original: Callable[..., Any] = original, **more: Any,
        ) -> Any:  # fmt: skip
            recorder.note(query, key, attention_mask, False, "transformers eager")
            recorder.inside += 1
            try:
                return _original(layer, query, key, value, attention_mask, *rest, **more)
            finally:
                recorder.inside -= 1

        saved.append((module, original))
        module.__dict__["eager_attention_forward"] = wrapped
    try:
        yield
    finally:
        for module, original in saved:
            module.__dict__["eager_attention_forward"] = original


@contextlib.contextmanager
def _diffusers_scores(recorder: _Recorder) -> Iterator[None]:
    """Wraps ``Attention.get_attention_scores`` (query and key [batch * heads, length, dim])."""
    module = sys.modules.get("diffusers.models.attention_processor")
    if module is None:
        yield
        return
    kind = module.Attention
    original = kind.get_attention_scores

    def wrapped(self: Any, query: torch.Tensor, key: torch.Tensor, attention_mask: Any = None) -> Any:
        recorder.note(query, key, attention_mask, False, "diffusers eager", heads=int(self.heads))
        return original(self, query, key, attention_mask)

    kind.get_attention_scores = wrapped
    try:
        yield
    finally:
        kind.get_attention_scores = original


@contextlib.contextmanager
def _named_modules(recorder: _Recorder, root: torch.nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Counts calls of modules of these classes. Their products are seen by nobody else, so the first argument's shape
    [batch, tokens, width] gives the length, and the module's own attributes the heads.
    """
    handles = []
    for module in root.modules():
        if type(module).__name__ not in names:
            continue

        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            context = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
            heads = next(int(getattr(layer, a)) for a in _HEADS if hasattr(layer, a))
            width = _width(layer, tokens)
            length = int(np.prod(tokens.shape[1:-1]))
            keys = length if context is None else int(np.prod(context.shape[1:-1]))
            if not recorder.inside:
                recorder.calls.append(Call(heads, width // heads, length, keys, "unknown", type(layer).__name__))
            recorder.inside += 1

        def after(layer: Any, args: Any, output: Any) -> None:
            recorder.inside -= 1

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_HEADS = ("num_attention_heads", "num_heads", "n_heads", "heads")


def _width(layer: Any, tokens: torch.Tensor) -> int:
    for name in ("all_head_size", "inner_dim", "embed_dim", "hidden_size"):
        if isinstance(getattr(layer, name, None), int):
            return int(getattr(layer, name))
    return int(tokens.shape[-1])
