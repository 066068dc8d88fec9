"""Inputs at the ends of what a float type can hold, and masks of every kind: where attention rewrites go wrong.

The extreme scores lie on one coordinate of the head dim, so that the product of a query and a key has one term that is
not zero: every right formulation then gives equal scores for equal keys, in whatever order it sums, and the difference
that is left is a mistake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)

BEYOND_FLOAT16 = 1e5
"""Above 65504, the largest float16."""

LEVELS = 16
STEP = 40.0
"""Keys of one level outweigh those of the level below by exp(40)."""

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def extremes(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float | None, seed: int, fill: float = -math.inf
) -> Iterator[tuple[str, Arrays]]:
    """Named (query, key, value), each of its array's shape and type; the head dim is the last axis.

    ``scale``: what the product is multiplied by, default 1 / sqrt(head dim). ``fill``: the largest score that hides a
    key. Where logits of both signs would reach it, so that the original itself shows hidden keys, all keys get the same
    large score instead.
    """
    kind = query.dtype
    half = kind == np.float16
    scale = abs(scale) if scale else 1 / math.sqrt(query.shape[-1])
    rng = np.random.default_rng([seed, 2])
    zero: Arrays = (np.zeros_like(query), np.zeros_like(key), np.zeros_like(value))
    yield "equal keys", (query, np.broadcast_to(key.reshape(-1, key.shape[-1])[0], key.shape).astype(kind), value)
    yield "zeros", zero
    levels = rng.integers(0, LEVELS, key.shape[:-1]).astype(np.float64)
    yield "one key dominates", (*_on_one(query, key, np.ones(query.shape[:-1]), levels, STEP / scale), value)
    signs = [rng.integers(-1, 2, x.shape[:-1]).astype(np.float64) for x in (query, key)]
    same = [np.abs(signs[0]), np.ones(key.shape[:-1])]
    sizes = [("logits of 10,000", 1e4 / scale, 1e4)]
    if half:  # -inf is below every finite fill
        sizes += [("products beyond float16", BEYOND_FLOAT16, math.inf)]
        sizes += [("logits beyond float16", BEYOND_FLOAT16 / scale, math.inf)]
    for name, product, logit in sizes:
        left, right = signs if 2 * logit < -fill or fill == -math.inf else same
        yield name, (*_on_one(query, key, left, right, product), value)
    small = 1e-6 if half else 1e-40
    with np.errstate(under="ignore"):
        tiny = [(x.astype(np.float64) * small).astype(kind) for x in (query, key, value)]
    yield "denormals", (tiny[0], tiny[1], tiny[2])
    # Normal values stay within 6 deviations here; float16 leaves room for that below 65504.
    yield "huge values", (query, key, (value.astype(np.float64) * (1e4 if half else 1e30)).astype(value.dtype))


def _on_one(
    query: np.ndarray, key: np.ndarray, left: np.ndarray, right: np.ndarray, size: float
) -> tuple[np.ndarray, np.ndarray]:
    """Query and key that are zero but for coordinate 0, so that their products are ``left * right * size``."""
    side = math.sqrt(size)
    out = []
    for array, factors in ((query, left), (key, right)):
        made = np.zeros(array.shape, np.float64)
        made[..., 0] = factors * side
        out.append(made.astype(array.dtype))
    return out[0], out[1]


def biased(bias: np.ndarray, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Named values for an input that is added to the scores; a quarter of the entries is extreme."""
    rng = np.random.default_rng([seed, 3])
    hit = rng.random(bias.shape) < 0.25
    large = 3e4 if bias.dtype == np.float16 else 1e4
    for name, extreme in (("bias of -inf", -np.inf), ("bias of the lowest number", _lowest(bias.dtype)),
                          ("bias of 10,000s", large), ("bias of -10,000s", -large)):  # fmt: skip
        yield name, np.where(hit, np.array(extreme, bias.dtype), bias)


def paddings(shape: Sequence[int], elem_type: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Named masks of ``shape`` (keys on the last axis, batch first if there is a batch)."""
    n = shape[-1]
    hidden = max(1, n // 3) if n > 1 else 0
    yield "left padding", padded(shape, elem_type, slice(hidden, None))
    yield "right padding", padded(shape, elem_type, slice(0, n - hidden))
    middle = np.ones(n, bool)
    middle[hidden : 2 * hidden] = n < 3
    yield "middle padding", padded(shape, elem_type, middle)
    # Every row of the mask hides other keys, and every row keeps one at least.
    rng = np.random.default_rng([seed, 4])
    scattered = rng.random(tuple(shape)) < 0.6
    scattered[..., 0] |= ~scattered.any(axis=-1)
    yield "scattered padding", padded(shape, elem_type, scattered)
    nothing = np.ones(tuple(shape), bool)
    nothing.reshape(-1, n)[0] = False
    yield "fully masked", padded(shape, elem_type, nothing)
    if elem_type in FLOATS:
        yield "left padding, -inf", padded(shape, elem_type, slice(hidden, None), -np.inf)
        yield "fully masked, -inf", padded(shape, elem_type, nothing, -np.inf)


def padded(
    shape: Sequence[int], elem_type: int, visible: slice | np.ndarray, hidden: float | None = None
) -> np.ndarray:
    """Keys in ``visible`` (of the last axis, or a bool array over it or over all axes) are seen. Additive floats add
    ``hidden`` elsewhere, by default the type's lowest number, as exporters do.
    """
    dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    seen = np.zeros(tuple(shape), bool)
    if isinstance(visible, slice):
        seen[..., visible] = True
    else:
        seen[...] = visible
    if elem_type not in FLOATS:
        return seen.astype(dtype)
    low = _lowest(dtype) if hidden is None else hidden
    return np.where(seen, np.zeros((), dtype), np.array(low, dtype))


def _lowest(dtype: np.dtype[Any]) -> float:
    return float(np.finfo(dtype).min) if dtype.kind == "f" else -3.0e38  # bfloat16 is no float to NumPy
