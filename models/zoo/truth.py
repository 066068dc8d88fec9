"""Counts the attention calls of a torch model while it runs. Knows nothing of ONNX or of the detector."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from attncompile.models.recipe import Built
from attncompile.models.zoo.entry import Call
from attncompile.models.zoo.seen import HIDDEN, mask_words, structure
from attncompile.models.zoo.watch import Seen, Watch


def calls_of(
    built: Built, modules: tuple[str, ...] = (), linear: tuple[str, ...] = (), sparse: tuple[str, ...] = (),
    varied: tuple[str, ...] = (),
) -> list[Call]:  # fmt: skip
    """Every attention call of one run of ``built`` on its example inputs, in order.

    Recorded are torch's ``scaled_dot_product_attention`` and ``nn.MultiheadAttention``, the eager attention functions
    of transformers, diffusers' attention scores, what module classes named in ``modules`` compute themselves, and the
    linear attention of those named in ``linear``. A call inside another counts once. Each call of a class named in
    ``sparse`` counts once too; a token sees those that change its result when they are changed.

    The inputs named in ``varied`` are changed for a second run: a mask that differs then depends on data, and a call
    whose queries, keys and values do not is constant and left out, as exporters fold it.
    """
    first = _run(built, list(built.inputs.values()), modules, linear, sparse)
    if not varied:
        return first.calls
    other = [_changed(t) if name in varied else t for name, t in built.inputs.items()]
    second = _run(built, other, modules, linear, sparse)
    calls = []
    for i, (call, again) in enumerate(zip(first.calls, second.calls, strict=True)):
        if first.sums[i] != second.sums[i]:
            calls.append(call if call.mask == again.mask else replace(call, mask="none+data"))
    return calls


def _changed(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)).to(tensor.dtype)
    return tensor - 4 if tensor.ndim == 0 else tensor.flip(-1)


def _run(built: Built, inputs: list[torch.Tensor], modules: tuple[str, ...], linear: tuple[str, ...],
         sparse: tuple[str, ...]) -> Recorder:  # fmt: skip
    recorder = Recorder()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(_eager_functions(recorder))
        stack.enter_context(_diffusers_scores(recorder))
        stack.enter_context(_multi_head(recorder))
        stack.enter_context(_sdpa(recorder))
        stack.enter_context(_inside_modules(recorder, built.module, modules))
        if linear:
            from attncompile.models.zoo.truth_linear import linear_modules

            stack.enter_context(linear_modules(recorder, built.module, linear))
        if sparse:
            from attncompile.models.zoo.truth_sparse import sparse_modules

            stack.enter_context(sparse_modules(recorder, built.module, sparse))
        built.module(*inputs)
    return recorder


class Recorder:
    """Takes down calls. While ``inside`` is not 0 another recorded function runs, and nothing counts."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.sums: list[float] = []
        self.inside = 0
        self.watched: list[Any] = []

    def note(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, causal: bool, how: str,
        sinks: bool = False,
    ) -> None:  # fmt: skip
        """``query``, ``key`` and ``value`` are [.., heads, length, dim]; ``mask`` a tensor or nothing."""
        if self.inside:
            return
        if query.ndim == 3 and self.watched:  # batch and heads are one axis
            query, key, value = (t.unflatten(0, (-1, heads_of(self.watched[-1]))) for t in (query, key, value))  # type: ignore[no-untyped-call]
            if isinstance(mask, torch.Tensor) and mask.ndim == 3:
                mask = mask.unflatten(0, (-1, query.shape[1]))  # type: ignore[no-untyped-call]
        lengths = (int(query.shape[-2]), int(key.shape[-2]))
        if causal:
            seen = np.tril(np.ones(lengths, dtype=bool))
            words = structure(seen)
        elif isinstance(mask, torch.Tensor):
            words = _words_of(mask, lengths)
        else:
            words = "none"
        self.add(query, key, value, words, how, sinks)

    def add(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, words: str, how: str, sinks: bool = False
    ) -> None:
        heads = int(np.prod(query.shape[1:-2]))
        self.sums.append(sum(float(t.double().abs().sum()) for t in (query, key, value)))
        self.calls.append(
            Call(heads, min(distinct_heads(key), distinct_heads(value), heads) if heads > 1 else 1,
                 int(query.shape[-1]), int(value.shape[-1]), int(query.shape[-2]), int(key.shape[-2]), words, how,
                 sinks=sinks)
        )  # fmt: skip


def distinct_heads(tensor: torch.Tensor) -> int:
    """How many heads of [batch, .., heads.., length, dim] differ: runs of equal heads are one that was repeated."""
    flat = tensor.detach().flatten(1, -3) if tensor.ndim > 4 else tensor.detach()
    if flat.ndim < 4:
        return 1
    heads = int(flat.shape[1])
    for count in range(1, heads):
        if heads % count == 0:
            groups = flat.unflatten(1, (count, heads // count))  # type: ignore[no-untyped-call]
            if bool((groups == groups[:, :, :1]).all()):
                return count
    return heads


def _words_of(mask: torch.Tensor, lengths: tuple[int, int]) -> str:
    array = mask.detach().cpu().numpy() if mask.dtype == torch.bool else mask.detach().cpu().float().numpy()
    seen = array if array.dtype == bool else array > HIDDEN
    bias = array.dtype != bool and bool(np.any(seen & (array != 0)))
    shape = (1,) * max(0, 4 - seen.ndim) + seen.shape
    seen = seen.reshape(shape)[..., : lengths[1]]
    return mask_words(np.broadcast_to(seen, (*seen.shape[:2], *lengths)), bias)


@contextlib.contextmanager
def _multi_head(recorder: Recorder) -> Iterator[None]:
    """Wraps the function behind ``nn.MultiheadAttention``; its tensors are [length, batch, width]."""
    functional: Any = torch.nn.functional
    original = functional.multi_head_attention_forward

    def wrapped(query: Any, key: Any, value: Any, width: int, heads: int, *rest: Any, **more: Any) -> Any:
        mask, causal = more.get("attn_mask"), bool(more.get("is_causal"))
        if more.get("key_padding_mask") is not None:
            raise NotImplementedError("a key padding mask is not recorded")
        q, k, v = (t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for t in (query, key, value))
        recorder.note(q, k, v, mask, causal, "nn.MultiheadAttention")
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
def _sdpa(recorder: Recorder) -> Iterator[None]:
    """Wraps torch's function under every name that a loaded module of the libraries has for it."""
    original = torch.nn.functional.scaled_dot_product_attention

    def wrapped(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
                is_causal: bool = False, **more: Any) -> Any:  # fmt: skip
        recorder.note(query, key, value, attn_mask, is_causal, "sdpa")
        recorder.inside += 1
        try:
            return original(query, key, value, attn_mask, dropout_p, is_causal, **more)
        finally:
            recorder.inside -= 1

    holders = [
        (module, name)
        for root, module in list(sys.modules.items())
        if root == "torch.nn.functional" or root.startswith(("transformers.", "diffusers.", "timm."))
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


@contextlib.contextmanager
def _eager_functions(recorder: Recorder) -> Iterator[None]:
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
            # Some add a bias of their own beside the mask.
            added = [more[name] for name in ("position_bias", "relative_position_bias") if more.get(name) is not None]
            mask = sum(added, attention_mask) if added and attention_mask is not None else attention_mask
            mask = sum(added[1:], added[0]) if added and attention_mask is None else mask
            sinks = getattr(layer, "sinks", None) is not None
            recorder.note(query, key, value, mask, False, "transformers eager", sinks)
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
def _diffusers_scores(recorder: Recorder) -> Iterator[None]:
    """Wraps ``Attention.get_attention_scores`` (query and key [batch * heads, length, dim])."""
    module = sys.modules.get("diffusers.models.attention_processor")
    if module is None:
        yield
        return
    kind = module.Attention
    original = kind.get_attention_scores

    def wrapped(self: Any, query: torch.Tensor, key: torch.Tensor, attention_mask: Any = None) -> Any:
        q, k = (t.unflatten(0, (-1, int(self.heads))) for t in (query, key))  # type: ignore[no-untyped-call]
        mask = None if attention_mask is None else attention_mask.unflatten(0, (-1, int(self.heads)))
        recorder.note(q, k, k, mask, False, "diffusers eager")  # values have the head dim of keys there
        return original(self, query, key, attention_mask)

    kind.get_attention_scores = wrapped
    try:
        yield
    finally:
        kind.get_attention_scores = original


_HEADS = ("num_attention_heads", "num_heads", "n_heads", "heads")


def heads_of(layer: Any) -> int:
    """The number of heads that a module says it has; 1 if it says nothing."""
    return next((int(getattr(layer, a)) for a in _HEADS if isinstance(getattr(layer, a, None), int)), 1)


@contextlib.contextmanager
def _inside_modules(recorder: Recorder, root: torch.nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Watches what modules of these classes compute between their call and their return."""
    handles = []

    def before(layer: Any, args: Any) -> None:
        recorder.watched.append(layer)

    def after(layer: Any, args: Any, output: Any) -> None:
        recorder.watched.pop()

    for module in root.modules():
        if type(module).__name__ in names:
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def note(seen: Seen) -> None:
        layer = recorder.watched[-1]
        query, key, value = seen.query, seen.key, seen.value
        visible = seen.visible
        if query.ndim < 4:
            heads = heads_of(layer)
            query, key, value = (t.reshape(-1, heads, *t.shape[-2:]) for t in (query, key, value))
            visible = visible.reshape(-1, heads, *visible.shape[-2:])
        words = mask_words(visible.reshape(visible.shape[0], -1, *visible.shape[-2:]), seen.bias)
        recorder.add(query, key, value, words, type(layer).__name__, seen.sinks)

    try:
        watch = Watch(lambda: bool(recorder.watched) and not recorder.inside, note)
        with watch if handles else contextlib.nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()
