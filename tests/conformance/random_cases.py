"""Cases from a seed, of the sizes that models have as far as a float64 reference is affordable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf, prod
from typing import Any

import numpy as np

from attncompile.plugins.linear_attention.form import Form
from tests.conformance.block_lists import Drawn
from tests.conformance.case import Case
from tests.conformance.cases import dense, grid, sparse
from tests.conformance.linear import OPERANDS, Linear

MOST_SCORES = 1 << 24
"""Score elements of a case, over all heads and batch entries: 0.1 s in float64 on a CPU core or two."""

DIMS = (16, 24, 32, 40, 64, 64, 72, 80, 96, 120, 128, 128, 160, 192, 256)
LENGTHS = (1, 2, 15, 17, 37, 50, 63, 65, 127, 129, 196, 197, 255, 257, 300, 577, 729, 1000, 1025, 1370)


def random_cases(op: str, seed: int, count: int, most_scores: int = MOST_SCORES) -> Iterator[Case]:
    """``count`` cases of ``op``; the n-th of a seed is always the same one."""
    make = {"Attention": _dense, "NeighborhoodAttention": _grid, "BlockSparseAttention": _sparse}[op]
    for n in range(count):
        rng = np.random.default_rng([seed, n, len(op)])
        while True:
            case = make(f"{op} {seed}.{n}", rng)
            batch, queries, keys = case.sizes
            if batch * case.call.heads * queries * keys <= most_scores:
                yield case
                break


def _pick(rng: np.random.Generator, *options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _common(rng: np.random.Generator) -> dict[str, Any]:
    kv_heads, dim = _pick(rng, 1, 1, 2, 3), _pick(rng, *DIMS)
    return {
        "batch": _pick(rng, 1, 1, 2, 3), "kv_heads": kv_heads, "heads": kv_heads * _pick(rng, 1, 1, 2, 3, 4),
        "head_dim": dim, "value_dim": dim if rng.random() < 0.7 else _pick(rng, *DIMS),
        "dtype": _pick(rng, "float16", "bfloat16"), "layouts": tuple(_pick(rng, "BNHD", "BHND") for _ in range(4)),
        "values": _pick(rng, *["ordinary"] * 5, "large", "dominant", "equal"),
        "hiding": _pick(rng, "scattered", "scattered", "left", "empty"), "seed": int(rng.integers(1 << 31)),
        "masked_rows": _pick(rng, "zero", "uniform", "nan"),
        "scale": dim**-0.5 if rng.random() < 0.7 else float(rng.uniform(0.01, 0.5)),
    }  # fmt: skip


def _broadcast(rng: np.random.Generator, *sizes: int) -> tuple[int, ...]:
    """``sizes`` with some of them 1, and some leading ones left out."""
    shape = [n if rng.random() < 0.6 else 1 for n in sizes]
    shape[-1] = sizes[-1]
    drop = 0
    while drop < len(shape) - 1 and shape[drop] == 1 and rng.random() < 0.5:
        drop += 1
    return tuple(shape[drop:])


def _dense(name: str, rng: np.random.Generator) -> Case:
    common = _common(rng)
    batch, heads = common["batch"], common["heads"]
    keys = _pick(rng, *LENGTHS)
    queries = keys if rng.random() < 0.6 else _pick(rng, *LENGTHS)
    windows = (
        (-1, -1),
        (-1, 0),
        (int(rng.integers(0, 200)), 0),
        (int(rng.integers(0, 200)), int(rng.integers(0, 200))),
    )
    left, right = _pick(rng, *windows, windows[1], (int(rng.integers(0, 99)), -1), (-1, int(rng.integers(0, 99))))
    floats = ("float32", common["dtype"])
    shapes = {
        "key_mask": ("bool", _pick(rng, (batch, 1, 1, keys), (1, 1, keys), (keys,))),
        "bias": (_pick(rng, *floats), _broadcast(rng, batch, heads, queries, keys)),
        "sinks": (_pick(rng, *floats), _pick(rng, (heads,), (1,))),
        "mask": ("bool", _broadcast(rng, batch, heads, queries, keys)),
        "key_lengths": (_pick(rng, "int32", "int64"), (batch,)),
    }
    chosen = {n: shapes[n] for n in shapes if rng.random() < 0.25}
    softcap = _pick(rng, 0.0, 0.0, 0.0, 5.0, 30.0, 50.0)
    return dense(
        name, queries=queries, keys=keys, inputs=chosen, left=left, right=right, softcap=softcap,
        lse=bool(rng.random() < 0.3), **common,
    )  # fmt: skip


def _grid(name: str, rng: np.random.Generator) -> Case:
    common = _common(rng)
    rank = _pick(rng, 1, 2, 2, 3)
    most = {1: 900, 2: 40, 3: 13}[rank]
    sides = [int(rng.integers(1, most)) for _ in range(rank)]
    dilation = [_pick(rng, 1, 1, 1, 2, 3) for _ in sides]
    border = _pick(rng, "clamp", "clamp", "truncate")
    # A clamped window has to fit into the shortest line of a dilated axis.
    dilation = [d if d <= side else 1 for d, side in zip(dilation, sides, strict=True)]
    size = [
        int(rng.integers(1, max(2, side // d + (border == "truncate") * 3)))
        for side, d in zip(sides, dilation, strict=True)
    ]
    given: dict[str, Any] = {"grid": sides, "kernel_size": size, "border": border, "dilation": dilation}
    given["stride"] = [_pick(rng, 1, 1, 1, int(rng.integers(1, k + 1)), k, k + 2) for k in size]
    kind = _pick(rng, "plain", "plain", "left", "causal", "ball", "windows")
    if kind == "left":
        given["left"] = [int(rng.integers(0, k)) for k in size]
    elif kind == "causal":
        given["causal"] = [int(rng.random() < 0.5) for _ in sides]
    elif kind == "ball":
        given |= {"kernel_size": [k | 1 for k in size], "border": "truncate", "shape": "ball"}
    elif kind == "windows":
        given |= {"stride": size, "dilation": [1] * rank}
    if not any(given.get("causal", [0])):
        given |= {"prefix": _pick(rng, 0, 0, 1, 5), "suffix": _pick(rng, 0, 0, 0, 77)}
    tokens = prod(sides) + given.get("prefix", 0) + given.get("suffix", 0)
    shapes: dict[str, Any] = {
        "key_mask": ("bool", _pick(rng, (common["batch"], 1, 1, tokens), (tokens,))),
        "bias": (
            _pick(rng, "float32", common["dtype"]),
            _broadcast(rng, common["batch"], common["heads"], tokens, tokens),
        ),
    }
    return grid(name, inputs={n: shapes[n] for n in shapes if rng.random() < 0.2}, **given, **common)


def _sparse(name: str, rng: np.random.Generator) -> Case:
    common = _common(rng)
    batch, heads = common["batch"], common["heads"]
    keys = _pick(rng, *LENGTHS)
    queries = keys if rng.random() < 0.6 else _pick(rng, *LENGTHS)
    drawn = Drawn(
        sets=(_pick(rng, 1, 1, batch), _pick(rng, 1, heads)), density=float(rng.uniform(0.1, 1)),
        partial=_pick(rng, 0.0, 0.3, 1.0), empty=bool(rng.random() < 0.2), causal=bool(rng.random() < 0.4),
        kinds=int(rng.integers(1, 6)), times=_pick(rng, 1, 1, 1, 5), order=_pick(rng, "random", "longest", "none"),
        spread=bool(rng.random() < 0.5),
    )  # fmt: skip
    shapes = {
        "key_mask": ("bool", _pick(rng, (batch, 1, 1, keys), (keys,))),
        "bias": (_pick(rng, "float32", common["dtype"]), _broadcast(rng, batch, heads, queries, keys)),
        "sinks": (_pick(rng, "float32", common["dtype"]), _pick(rng, (heads,), (1,))),
    }
    chosen = {n: shapes[n] for n in shapes if rng.random() < 0.2}
    return sparse(
        name, _pick(rng, 64, 128), queries=queries, keys=keys, inputs=chosen, lists=drawn,
        lse=bool(rng.random() < 0.4), **common,
    )  # fmt: skip


LINEAR_DIMS = (16, 24, 32, 32, 40, 64, 64, 72, 96, 128, 128, 136, 256)
MOST_STATE = 1 << 22
"""Elements of all states of a case, in and between chunks."""


def random_linear(seed: int, count: int, most_tokens: int = 1370) -> Iterator[Linear]:
    """``count`` cases of linear attention, every second one under a triangle; of those some a token at a time, some by
    the delta rule, of the others some with learned features.
    """
    lengths = [n for n in LENGTHS if n <= most_tokens]
    dims = [d for d in LINEAR_DIMS if most_tokens > 100 or d <= 40]
    for n in range(count):
        rng = np.random.default_rng([seed, n, 77])
        while True:
            case = _linear(f"LinearAttention {seed}.{n}", rng, bool(n % 2), lengths, dims)
            drawn = int(rng.integers(8))
            if n % 2:
                case = _steps(case, rng) if drawn < 3 else _delta(case, rng) if drawn < 6 else case
            elif drawn < 2:
                case = _hedgehog(case, rng)
            batch, _, keys, _, groups, dim, value_dim = case.sizes
            chunks = -(-keys // case.form.chunk) if case.form.chunk else 1
            if batch * groups * chunks * dim * value_dim <= MOST_STATE:
                yield case
                break


def _linear(name: str, rng: np.random.Generator, causal: bool, lengths: Sequence[int], dims: Sequence[int]) -> Linear:
    keys = _pick(rng, *lengths)
    queries = keys if causal or rng.random() < 0.5 else _pick(rng, *lengths)
    groups, dim = _pick(rng, 1, 1, 2, 3), _pick(rng, *dims)
    # A sum is of features that are positive: what is divided by is not near 0.
    maps = _pick(rng, ("relu", "relu"), ("elu+1", "elu+1"), ("exp", "exp"), ("none", "none"), ("softmax", "elu+1"))
    form = Form(*maps, scale=float(rng.uniform(0.05, 1.0)) / dim)
    if causal:
        decay = _pick(rng, "none", "head", "token", "token", "channel", "channel")
        chunk = _pick(rng, 16, 32, 64, 128, 256, 512)
        form = replace(form, causal=True, chunk=min(chunk, 64) if decay == "channel" else chunk, decay=decay,
                       initial=bool(rng.random() < 0.4))  # fmt: skip
        sums = maps[0] != "none" and rng.random() < 0.5
    else:
        form = replace(form, chunk=_pick(rng, 0, 0, 16, 50, 64, 256), key_weight=bool(rng.random() < 0.25))
        kind = _pick(rng, "none", "sum", "sum", "mala", "inline", "softmax")
        sums = kind == "sum" and maps[0] != "none"
        if kind in ("mala", "inline") and maps[0] in ("elu+1", "exp"):
            form = replace(form, normaliser=kind, scale=1.0, key_weight=False)
        elif kind == "softmax":
            form = replace(form, query_map="softmax", key_map="softmax", key_weight=False)
    if sums:
        floor = _pick(rng, -inf, -inf, 30.0)
        form = replace(form, normaliser="sum", scale=_pick(rng, 1.0, 0.7), epsilon=_pick(rng, 1e-3, 1e-2), floor=floor)
    layouts = tuple(_pick(rng, "BNHD", "BNHD", "BHND", "BHDN") for _ in OPERANDS)
    return Linear(
        name, form, (_pick(rng, 1, 1, 2, 3), queries, keys, groups * _pick(rng, 1, 1, 2, 3), groups, dim,
                     dim if rng.random() < 0.6 else _pick(rng, *dims)),
        layouts, _pick(rng, "float16", "bfloat16"), _pick(rng, "float32", "float16", "bfloat16"),  # type: ignore[arg-type]
        int(rng.integers(1 << 31)),
    )  # fmt: skip


def _hedgehog(case: Linear, rng: np.random.Generator) -> Linear:
    """The same with learned features."""
    normaliser = _pick(rng, "none", "sum")
    form = replace(case.form, query_map="hedgehog", key_map="hedgehog", normaliser=normaliser, key_weight=False,
                   epsilon=0.0, floor=-inf)  # fmt: skip
    return replace(case, form=form, width=_pick(rng, 8, 16, 24, 32, 64, 72, 128))


def _delta(case: Linear, rng: np.random.Generator) -> Linear:
    """The same by the delta rule."""
    form = replace(case.form, query_map="none", key_map="none", normaliser="none", epsilon=0.0, floor=-inf, delta=True,
                   decay="token" if case.form.decay == "channel" else case.form.decay)  # fmt: skip
    return replace(case, form=form, beta=_pick(rng, "a head", "a token"))


def _steps(case: Linear, rng: np.random.Generator) -> Linear:
    """The same for few tokens, one at a time; some by the delta rule."""
    tokens = _pick(rng, 1, 1, 1, 2, 5, 17)
    form = replace(case.form, chunk=1)
    beta = _pick(rng, "a head", "a token")
    if form.decay != "channel" and rng.random() < 0.5:
        form = replace(form, query_map="none", key_map="none", normaliser="none", epsilon=0.0, floor=-inf, delta=True)
    return replace(case, form=form, sizes=(case.sizes[0], tokens, tokens, *case.sizes[3:]), step=True, beta=beta)
