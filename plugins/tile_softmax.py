"""Device functions of the Triton kernels: a tile of scores, the running softmax, and how a row ends.

Scores are in units of log2: p = exp2(score - maximum), score = log2(e) * (scale * q.k + bias). The running maximum
starts at a finite number, so that a row which has seen no key yet needs no guard: exp2(-inf - finite) is 0.

The head dim is cut into a power of two and a rest (72 = 64 + 8, in a tile of 16), each loaded and multiplied alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_KEY = tl.constexpr(-1.0e30)


@triton.jit
def moved(base, offset):
    """``base``, moved by so many times 8 elements to where an operand begins in a packed tensor; None: by nothing."""
    if offset is not None:
        base += offset.to(tl.int64) * 8
    return base


@triton.jit
def load_rows(
    base, rows, stride, first: tl.constexpr, width: tl.constexpr, dim: tl.constexpr, keep, MASKED: tl.constexpr
):
    """[rows, width] elements ``first`` .. ``first + width`` of rows of ``dim``; 0 past ``dim`` and where not ``keep``.
    ``stride`` in elements (int32), ``rows`` int32 or int64.
    """
    cols = first + tl.arange(0, width)
    pointers = base + rows[:, None] * stride + cols[None, :]
    if MASKED:
        if first + width > dim:
            return tl.load(pointers, mask=keep[:, None] & (cols < dim)[None, :], other=0.0)
        return tl.load(pointers, mask=keep[:, None], other=0.0)
    if first + width > dim:
        return tl.load(pointers, mask=(cols < dim)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, rows, stride, first: tl.constexpr, width: tl.constexpr, dim: tl.constexpr, keep, values):
    """Write [rows, width] of rows of ``dim`` where ``keep``."""
    cols = first + tl.arange(0, width)
    pointers = base + rows[:, None] * stride + cols[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=keep[:, None] & (cols < dim)[None, :])


@triton.jit
def products(q1, q2, k1, k2, SPLIT: tl.constexpr):
    """q.k of a tile, [BM, D] x [BN, D] -> [BM, BN] float32."""
    s = tl.dot(q1, tl.trans(k1))
    if SPLIT:
        s = tl.dot(q2, tl.trans(k2), s)
    return s


@triton.jit
def step(s, factor, m, l, acc1, acc2, v1, v2, SPLIT: tl.constexpr):
    """Take a tile of scores ``s`` (hidden ones -inf; times ``factor`` > 0 in log2) into the running softmax."""
    new = tl.maximum(m, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new[:, None])
    alpha = tl.exp2(m - new)
    l = l * alpha + tl.sum(p, 1)
    weights = p.to(v1.dtype)
    acc1 = tl.dot(weights, v1, acc1 * alpha[:, None])
    if SPLIT:
        acc2 = tl.dot(weights, v2, acc2 * alpha[:, None])
    return new, l, acc1, acc2


@triton.jit
def row_end(m, l, acc1, acc2, mean1, mean2, RULE: tl.constexpr):
    """Divide, and give rows without a key what ``RULE`` says: 0 (zero), 1 (the mean of all values) or 2 (nan)."""
    dead = l == 0.0
    inverse = 1.0 / tl.where(dead, 1.0, l)
    out1 = acc1 * inverse[:, None]
    out2 = acc2 * inverse[:, None]
    if RULE == 1:
        out1 = tl.where(dead[:, None], mean1[None, :], out1)
        out2 = tl.where(dead[:, None], mean2[None, :], out2)
    elif RULE == 2:
        out1 = tl.where(dead[:, None], float("nan"), out1)
        out2 = tl.where(dead[:, None], float("nan"), out2)
    lse = tl.where(dead, -float("inf"), (m + tl.log2(tl.where(dead, 1.0, l))) * LN2)
    return out1, out2, lse


@triton.jit
def mean_of_values(V, NK, stride, V1: tl.constexpr, V2: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr):
    """Mean over all keys, [V1] and [V2] float32: what uniform weights give."""
    sum1 = tl.zeros((V1,), tl.float32)
    sum2 = tl.zeros((V2,), tl.float32)
    for start in range(0, NK, BN):
        rows = start + tl.arange(0, BN)
        keep = rows < NK
        sum1 += tl.sum(load_rows(V, rows.to(tl.int64), stride, 0, V1, DV, keep, True).to(tl.float32), 0)
        if DV > V1:
            sum2 += tl.sum(load_rows(V, rows.to(tl.int64), stride, V1, V2, DV, keep, True).to(tl.float32), 0)
    return sum1 / NK, sum2 / NK
