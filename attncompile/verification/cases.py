"""Inputs on which a site is checked: random, and adversarial in the ways in which attention rewrites go wrong."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from attncompile.core.errors import BadArguments
from attncompile.verification.adversarial import FLOATS, biased, extremes, padded, paddings

LARGE_SCORE = 80.0
"""exp(80) overflows neither float32 nor a float16 score (the product before scaling stays below 65504 for d <= 4096),
but exp without max-subtraction in float16, or a wrong running maximum, does not survive it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One set of inputs. ``large`` cases amplify rounding: they need a float64 reference to be judged. Where the
    original gives NaN or infinity in an ``extreme`` one, nothing is asked of the replacement; in others it must give
    the same. ``extra`` ones are left out where one run of the site takes very long.
    """

    name: str
    feed: Mapping[str, np.ndarray]
    large: bool = False
    extreme: bool = False
    extra: bool = False


def cases(
    inputs: Mapping[str, tuple[Sequence[int], int]],
    fixed: Mapping[str, np.ndarray],
    roles: Mapping[str, str],
    seed: int = 0,
    *,
    scale: float | None = None,
    biases: Sequence[str] = (),
    fill: float = -math.inf,
    dims: tuple[int, int, int] = (-1, -1, -1),
) -> tuple[Case, ...]:
    """Seeded cases for a site's standalone subgraph.

    ``inputs``: name -> (concrete shape, ONNX element type). ``fixed``: values that are fed as they are. ``roles``
    maps ``query``, ``key``, ``value`` and, if there is one, ``padding`` (keys on its last axis; bool True = visible,
    integers 1 = visible, floats additive) to input names. ``scale`` is the site's, default 1 / sqrt(head dim).
    ``biases``: further float inputs that are added to the scores. ``fill``: the largest score that hides a key.
    ``dims``: the head dim's axis in query, key and value.

    - ``random``: standard normal.
    - ``large logits``: scores up to about +-80, so that nearly all mass is on one key.
    - ``uniform``: query near zero, so every visible key weighs the same, and values +-1 at random per position: one key
      more or less, or a shifted window, changes every row by far more than rounding.
    - with padding: ``left padding``, ``right padding``, ``middle padding``, ``scattered padding`` (other keys in each
      batch entry), ``fully masked`` (batch entry 0 sees no key); additive padding has each hidden key at the type's
      lowest number, and ``left padding, -inf`` and ``fully masked, -inf``.
    - those of ``extremes``, and of ``biased`` for additive inputs.

    Raises BadArguments if a role names no input or q, k, v are not all given.
    """
    for role in ("query", "key", "value"):
        if role not in roles:
            raise BadArguments(f"no input has the role {role!r}", "name the site's operands in `roles`")
    for role, name in roles.items():
        if name not in inputs:
            raise BadArguments(f"role {role!r} names {name!r}, which is not an input", f"inputs: {', '.join(inputs)}")
    base = {n: _plain(n, shape, t, seed) for n, (shape, t) in inputs.items() if n not in fixed}
    padding = roles.get("padding")
    if padding is not None and padding not in fixed:
        base[padding] = padded(*inputs[padding], visible=slice(None))
    base.update(fixed)

    out = [Case("random", base)]
    movable = {roles[r] for r in ("query", "key", "value")} - set(fixed)
    if {roles["query"], roles["key"]} <= movable:
        out.append(Case("large logits", {**base, **_large(inputs, roles, base, scale, dims[0])}, large=True))
    if {roles["query"], roles["value"]} <= movable:
        out.append(Case("uniform", {**base, **_uniform(inputs, roles, base, seed)}))
    if padding is not None and padding not in fixed:
        for name, mask in paddings(*inputs[padding], seed):
            out.append(Case(name, {**base, padding: mask}))
    if {roles["query"], roles["key"], roles["value"]} <= movable:
        q, k, v = (roles[r] for r in ("query", "key", "value"))
        last = [np.moveaxis(base[n], axis, -1) for n, axis in zip((q, k, v), dims, strict=True)]
        for name, arrays in extremes(last[0], last[1], last[2], scale, seed, fill):
            moved = [np.ascontiguousarray(np.moveaxis(x, -1, axis)) for x, axis in zip(arrays, dims, strict=True)]
            feed = {**base, **dict(zip((q, k, v), moved, strict=True))}
            out.append(Case(name, feed, large=True, extreme=True, extra=True))
    for name in biases:
        if name in inputs and name not in fixed and inputs[name][1] in FLOATS:
            for what, bias in biased(base[name], seed):
                label = f"{what} in {name}" if len(biases) > 1 else what
                out.append(Case(label, {**base, name: bias}, large=True, extra=True))
    return tuple(out)


def _plain(name: str, shape: Sequence[int], elem_type: int, seed: int) -> np.ndarray:
    """Normal floats, all-true bools, ones for integers; each input has its own stream, whatever the order."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    if elem_type in FLOATS:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return rng.standard_normal(tuple(shape), np.float32).astype(dtype)
    return np.ones(tuple(shape), dtype)


def _large(
    inputs: Mapping[str, tuple[Sequence[int], int]],
    roles: Mapping[str, str],
    base: Mapping[str, np.ndarray],
    scale: float | None,
    axis: int,
) -> dict[str, np.ndarray]:
    """Query and key scaled so that the largest of many normal scores comes to about 80."""
    query, key = base[roles["query"]], base[roles["key"]]
    head_dim = inputs[roles["query"]][0][axis]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    # A normal score has deviation scale * sqrt(d) * f^2 and the largest of n pairs lies near sqrt(2 ln n) of them.
    pairs = max(2, query.size // head_dim * (key.size // head_dim))
    deviation = abs(scale) * math.sqrt(head_dim) * math.sqrt(2 * math.log(pairs))
    factor = math.sqrt(LARGE_SCORE / deviation)
    return {roles[r]: (base[roles[r]].astype(np.float32) * factor).astype(query.dtype) for r in ("query", "key")}


def _uniform(
    inputs: Mapping[str, tuple[Sequence[int], int]],
    roles: Mapping[str, str],
    base: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 1])
    query, value = base[roles["query"]], base[roles["value"]]
    signs = rng.integers(0, 2, value.shape) * 2 - 1
    return {
        roles["query"]: (query.astype(np.float32) * 1e-3).astype(query.dtype),
        roles["value"]: signs.astype(value.dtype),
    }
