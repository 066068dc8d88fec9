"""Errors to be planted in a launch or in device code, each of which a case has to notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import triton
import triton.language as tl

from tests.conformance.cases import named

WORD = tl.constexpr(32)


@dataclass(frozen=True)
class Planted:
    """The case that notices; arguments of the launch by other expressions, other constants or another grid, or another
    device function in place of ``attribute`` of ``module``.
    """

    op: str
    case: str
    expressions: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    grid_of: Sequence[str] | None = None
    attribute: str = ""
    device: Any = None

    def verdict(self, check: Callable[..., str]) -> str:
        """What ``check`` says of the case with the error in it."""
        options = {"expressions": self.expressions, "constants": self.constants, "grid_of": self.grid_of}
        folders = {"NeighborhoodAttention": "neighborhood", "BlockSparseAttention": "block_sparse"}
        folder = folders.get(self.op, "attention")
        module = import_module(f"attncompile.plugins.{folder}.kernel_triton")
        if not self.attribute:
            return check(named(self.op, self.case), **options)
        with patch.object(module, self.attribute, self.device):
            return check(named(self.op, self.case), **options)


@triton.jit
def not_rescaled(s, factor, m, l, acc1, acc2, v1, v2, SPLIT: tl.constexpr):
    """``tile_softmax.step`` that forgets to rescale the output when the maximum grows."""
    new = tl.maximum(m, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new[:, None])
    l = l * tl.exp2(m - new) + tl.sum(p, 1)
    weights = p.to(v1.dtype)
    acc1 = tl.dot(weights, v1, acc1)
    if SPLIT:
        acc2 = tl.dot(weights, v2, acc2)
    return new, l, acc1, acc2


@triton.jit
def nothing_blind(m, l, acc1, acc2, mean1, mean2, RULE: tl.constexpr):
    """``tile_softmax.row_end`` that does not look for rows without a key."""
    inverse = 1.0 / l
    return acc1 * inverse[:, None], acc2 * inverse[:, None], (m + tl.log2(l)) * 0.6931471805599453


@triton.jit
def shifted(words, part, BN: tl.constexpr):
    """``block_sparse.kernel_triton.shown``, one key on."""
    j = part * BN + tl.arange(0, BN) + 1
    bits = tl.load(words[:, None] + (j // WORD)[None, :] % 2)
    return (bits >> (j % WORD)[None, :]) & 1


@triton.jit
def of_the_first_part(words, part, BN: tl.constexpr):
    """``block_sparse.kernel_triton.shown`` that always takes the block's first keys."""
    j = tl.arange(0, BN)
    bits = tl.load(words[:, None] + (j // WORD)[None, :])
    return (bits >> (j % WORD)[None, :]) & 1


@triton.jit
def uncounted(s, factor, times, m, l, acc1, acc2, v1, v2, SPLIT: tl.constexpr):
    """``block_sparse.kernel_triton.counted_step`` that counts only in the sum."""
    new = tl.maximum(m, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new[:, None])
    alpha = tl.exp2(m - new)
    l = l * alpha + tl.sum(p, 1) * times
    acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * alpha[:, None])
    return new, l, acc1, acc2


WINDOW = "17 queries, 50 keys, window"
_DENSE = {
    "left + 1": (WINDOW, {"expressions": {"left": "left + 1"}}),
    "left - 1": (WINDOW, {"expressions": {"left": "left - 1"}}),
    "right + 1": (WINDOW, {"expressions": {"right": "right + 1"}}),
    "one key less": ("17 queries, 50 keys, none", {"expressions": {"NK": "NK - 1"}}),
    "wrong key heads": ("GQA, batch 2, heads first", {"expressions": {"group": "H // HKV + 1"}}),
    "the same value for all keys": ("GQA, batch 2, heads first", {"expressions": {"v_n": "value_stride_N * 0"}}),
    "values of the first part": ("packed", {"expressions": {"v_o": "value_offset * 0"}}),
    "another part of the values": ("packed, pieces, causal", {"expressions": {"v_o": "value_offset // 2"}}),
    "scale": ("scale", {"expressions": {"scale": "scale_bits + 200000"}}),
    "bias of the next head": ("bias by heads", {"expressions": {"bias_h": "bias_stride_H - 1"}}),
    "a mask of one row": ("mask of queries and keys", {"expressions": {"mask_q": "mask_stride_Q * 0"}}),
    "a tile left out": ("scale", {"grid_of": ("cdiv(NQ, 16) - 1", "H", "B")}),
    "another rule": ("rows without a key: uniform, dense", {"constants": {"RULE": 0}}),
    "rows not rescaled": ("large scores", {"attribute": "step", "device": not_rescaled}),
    "blind rows not mended": ("rows without a key: zero, causal", {"attribute": "row_end", "device": nothing_blind}),
}  # fmt: skip
_GRID = {
    "wider": ("2-D, clamp", {"constants": {"W2": 4, "E2": 5}}),
    "a box one key short": ("1-D", {"constants": {"E2": 13}}),
    "keys of the first part": ("packed", {"expressions": {"k_o": "key_offset * 0"}}),
    "left": ("2-D, left", {"constants": {"L1": 2}}),
    "stride": ("2-D, groups", {"constants": {"S2": 2}}),
    "truncated": ("2-D, clamp, even, prefix, suffix", {"constants": {"CLAMP": False}}),
    "a box for a ball": ("2-D, ball", {"constants": {"BALL": False}}),
    "two axes in narrow fields": ("2-D, wider than 127", {"constants": {"NARROW": True}}),
    "bounds far away in narrow fields": ("windows without a key, far away", {"constants": {"NARROW": True}}),
    "wrong key heads": ("2-D, clamp", {"expressions": {"group": "H // HKV + 1"}}),
    "suffix left out": ("2-D, clamp, even, prefix, suffix", {"constants": {"SUFFIX": 1}}),
    "rows not rescaled": ("large scores", {"attribute": "step", "device": not_rescaled}),
    "another rule": ("rows without a key: nan", {"constants": {"RULE": 0}}),
}  # fmt: skip
_LISTS = {
    "one key less": ("128, N past the last block", {"expressions": {"NK": "NK - 1"}}),
    "wrong key heads": ("64, GQA, lists of heads", {"expressions": {"group": "H // HKV + 1"}}),
    "keys one row on": ("packed", {"expressions": {"k_o": "key_offset + key_stride_N"}}),
    "lists of the first head": ("64, lists of heads, no order", {"expressions": {"rows_h": "rows_stride_H * 0"}}),
    "lists of the first batch entry": ("64, lists of batch entries", {"expressions": {"rows_b": "rows_stride_B * 0"}}),
    "a tile left out": ("64", {"grid_of": ("cdiv(NQ, 64) * H * B - 1", "1", "1")}),
    "scale": ("scale", {"expressions": {"scale": "scale_bits + 200000"}}),
    "another rule": ("rows without a key: uniform", {"constants": {"RULE": 0}}),
    "the same value for all keys": ("64", {"expressions": {"v_n": "value_stride_N * 0"}}),
    "bits of the next key": ("partial blocks alone", {"attribute": "shown", "device": shifted}),
    "bits of the first part": ("128", {"attribute": "shown", "device": of_the_first_part}),
    "rows not rescaled": ("large scores", {"attribute": "step", "device": not_rescaled}),
    "keys that count once": ("counts", {"attribute": "counted_step", "device": uncounted}),
    "blind rows not mended": ("rows without a key: zero", {"attribute": "row_end", "device": nothing_blind}),
    "bias of the next head": ("bias by heads", {"expressions": {"bias_h": "bias_stride_H - 1"}}),
    "sinks of the first head": ("sinks", {"expressions": {"sinks_h": "sinks_stride_H * 0"}}),
}  # fmt: skip

PLANTED: dict[str, dict[str, Planted]] = {
    op: {name: Planted(op, case, **options) for name, (case, options) in errors.items()}
    for op, errors in (("Attention", _DENSE), ("NeighborhoodAttention", _GRID), ("BlockSparseAttention", _LISTS))
}
