"""What we are compared with, each on the same inputs and, where it takes a mask, on the same mask bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from math import prod
from typing import Any

import torch
from cases import Case
from torch.nn.attention import SDPBackend, sdpa_kernel
from truth import window

Run = Callable[..., torch.Tensor]
"""Returns [B, N, H, D] or a view of it."""


def peers(case: Case, q: Any, k: Any, v: Any) -> Iterator[tuple[str, Callable[[], Run | str]]]:
    """(name, what makes a function that runs it or says why it cannot)."""
    first = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        yield name, partial(sdpa, case, first, backend)
    if case.kept is not None:
        yield "flex", partial(flex_lists, case, first)
    if case.grid is None:
        return
    tiled = cache(partial(flex_tiled, case, first))
    yield "flex", partial(flex, case, first)
    yield "flex-tiled", tiled
    yield "flex-tiled+permute", lambda: getattr(tiled(), "whole", "as flex-tiled")
    yield "natten", partial(natten, case, q, k, v)


def sdpa(case: Case, qkv: Any, backend: SDPBackend) -> Run:
    """Dense: the time to beat of a neighborhood or of lists, not their result."""
    gqa = case.heads != case.kv_heads

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                *qkv, is_causal=case.causal, enable_gqa=gqa
            ).transpose(1, 2)

    return run


def bounds(case: Case, order: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
    """Places of the tokens in ``order`` on each axis, and the first and last key of their windows, int32."""
    found: tuple[list[torch.Tensor], ...] = ([], [], [])
    for axis, size in enumerate(case.attributes["grid"]):
        place = order // prod(case.attributes["grid"][axis + 1 :]) % size
        for into, x in zip(found, (place, *window(case, axis, place)), strict=True):
            into.append(x.int())
    return found


def flex_of(case: Case, qkv: Any, order: torch.Tensor) -> Run:
    """FlexAttention over tokens in ``order``; windows and places are looked up, the cheapest mask found."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else sizes of the case before become symbols
    places, firsts, lasts = bounds(case, order)

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        found = None
        for place, first, last in zip(places, firsts, lasts, strict=True):
            inside = (place[j] >= first[i]) & (place[j] <= last[i])
            found = inside if found is None else found & inside
        return found

    mask = create_block_mask(seen, None, None, case.tokens, case.tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(operands: Any = qkv) -> torch.Tensor:
        return compiled(*operands, block_mask=mask)

    return run


def flex(case: Case, qkv: Any) -> Run:
    run = flex_of(case, qkv, torch.arange(case.tokens, device="cuda"))
    return lambda: run().transpose(1, 2)


def flex_lists(case: Case, qkv: Any) -> Run:
    """FlexAttention with the same blocks, full and partial ones apart, in blocks of the same edge."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    block, blocks = case.attributes["block"], torch.from_numpy(case.kept).cuda()

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return blocks[h, i // block, j // block] & (i >= j)

    sizes = (None, case.heads, case.tokens, case.tokens)
    mask = create_block_mask(seen, *sizes, device="cuda", BLOCK_SIZE=block, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*qkv, block_mask=mask).transpose(1, 2)


def flex_tiled(case: Case, qkv: Any) -> Run | str:
    """Tokens put in tiles of 128 first: the kernel alone, and (``whole``) with the permutation of all four operands."""
    tile = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}[len(case.attributes["grid"])]
    grid = case.attributes["grid"]
    if len(grid) == 1:
        return "one axis: the same as flex"
    number = torch.arange(case.tokens, device="cuda")
    key = torch.zeros_like(number)
    inner = torch.zeros_like(number)
    for axis, size in enumerate(grid):
        place = number // prod(grid[axis + 1 :]) % size
        key = key * -(-size // tile[axis]) + place // tile[axis]
        inner = inner * tile[axis] + place % tile[axis]
    order = torch.argsort(key * prod(tile) + inner)
    back = torch.argsort(order)
    run = flex_of(case, tuple(x[:, :, order].contiguous() for x in qkv), order)
    run.restore = lambda out: out[:, :, back].transpose(1, 2)  # type: ignore[attr-defined]
    run.whole = lambda: run(tuple(x[:, :, order] for x in qkv))[:, :, back].transpose(1, 2)  # type: ignore
    return run


def natten(case: Case, q: Any, k: Any, v: Any) -> Run | str:
    """NATTEN's pure-Python backend, its permutation of tokens included."""
    try:
        from natten import allow_flex_compile, functional
    except ImportError as error:
        return f"does not import: {error}"
    allow_flex_compile()  # without compilation it is no peer
    grid = case.attributes["grid"]
    call = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}[len(grid)]
    spread = tuple(x.view(case.batch, *grid, case.heads, case.dim) for x in (q, k, v))
    stride = tuple(case.attributes.get("stride", [1] * len(grid)))
    size = tuple(case.attributes["kernel_size"])

    def run() -> torch.Tensor:
        out = call(*spread, kernel_size=size, stride=stride, backend="flex-fna", torch_compile=True)
        return out.reshape(q.shape)

    return run
