"""The cases of all ops, small enough for an interpreter: sizes are odd, a sequence is more than one tile of 16."""

from __future__ import annotations

from typing import Any

from attncompile.core.kernel import OpCall
from attncompile.core.layout import part
from tests.conformance.block_lists import Drawn
from tests.conformance.case import Case, Hiding, Values

HALF = "float16"
PLAIN = {"left": -1, "right": -1, "softcap": 0.0, "masked_rows": "zero"}
BHND = ("BHND",) * 4
MIXED = ("BNHD", "BHND", "BNHD", "BHND")
OTHER = ("BHND", "BNHD", "BHND", "BNHD")
PACKED = ("BN0HD", "BN1HD", "BN2HD", "BNHD")
PIECES = ("BHND", "B0HND", "BNH2D", "BHND")
FIRST = ("0BHND", "1BHND", "2BHND", "BNHD")
"""Parts of one product, pieces from here and there, and what a transpose has put first."""

Shape = tuple[int | None, ...]
Inputs = dict[str, tuple[str, Shape]]
"""Element type and shape of each optional input."""


def dense(
    name: str, batch: int = 1, queries: int = 37, keys: int | None = None, heads: int = 2, kv_heads: int | None = None,
    head_dim: int = 32, value_dim: int | None = None, dtype: str = HALF, inputs: Inputs | None = None,
    layouts: tuple[str, str, str, str] = ("BNHD",) * 4, values: Values = "ordinary", hiding: Hiding = "scattered",
    lse: bool = False, seed: int = 1, **attributes: Any,
) -> Case:  # fmt: skip
    """A case of ``Attention``. ``inputs``: element type and shape of each optional input."""
    given = inputs or {}
    call = OpCall(
        "Attention", dtype, heads, heads if kv_heads is None else kv_heads, head_dim,
        head_dim if value_dim is None else value_dim,
        attributes={**PLAIN, "scale": head_dim**-0.5, **attributes},
        inputs={n: kind for n, (kind, _) in given.items()}, shapes={n: shape for n, (_, shape) in given.items()},
        outputs=("output", "log_sum_exp") if lse else ("output",), batch=batch, query_length=queries,
        key_length=queries if keys is None else keys, packed=any(map(part, layouts)),
    )  # fmt: skip
    return Case(name, call, layouts, values, hiding, seed)


def grid(
    name: str, batch: int = 1, heads: int = 2, kv_heads: int | None = None, head_dim: int = 32,
    value_dim: int | None = None,
    dtype: str = HALF, inputs: Inputs | None = None, layouts: tuple[str, str, str, str] = ("BNHD",) * 4,
    values: Values = "ordinary", hiding: Hiding = "scattered", seed: int = 1, **attributes: Any,
) -> Case:  # fmt: skip
    """A case of ``NeighborhoodAttention`` on a static grid."""
    given = inputs or {}
    tokens = attributes.get("prefix", 0) + attributes.get("suffix", 0)
    size = 1
    for n in attributes["grid"]:
        size *= n
    call = OpCall(
        "NeighborhoodAttention", dtype, heads, heads if kv_heads is None else kv_heads, head_dim,
        head_dim if value_dim is None else value_dim,
        attributes={"masked_rows": "zero", "scale": head_dim**-0.5, **attributes},
        inputs={n: kind for n, (kind, _) in given.items()}, shapes={n: shape for n, (_, shape) in given.items()},
        batch=batch, query_length=size + tokens, key_length=size + tokens, packed=any(map(part, layouts)),
    )  # fmt: skip
    return Case(name, call, layouts, values, hiding, seed)


def sparse(
    name: str, block: int = 64, batch: int = 1, queries: int = 110, keys: int | None = None, heads: int = 2,
    kv_heads: int | None = None, head_dim: int = 32, value_dim: int | None = None, dtype: str = HALF,
    inputs: Inputs | None = None, layouts: tuple[str, str, str, str] = ("BNHD",) * 4, values: Values = "ordinary",
    hiding: Hiding = "scattered", lse: bool = False, seed: int = 1, lists: Drawn | None = None, **attributes: Any,
) -> Case:  # fmt: skip
    """A case of ``BlockSparseAttention``."""
    keys, drawn, given = queries if keys is None else keys, lists or Drawn(), dict(inputs or {})
    given |= {n: ("int32", x.shape) for n, x in drawn.arrays(queries, keys, block, seed).items()}
    call = OpCall(
        "BlockSparseAttention", dtype, heads, heads if kv_heads is None else kv_heads, head_dim,
        head_dim if value_dim is None else value_dim,
        attributes={"block": block, "masked_rows": "zero", "scale": head_dim**-0.5, **attributes},
        inputs={n: kind for n, (kind, _) in given.items()}, shapes={n: shape for n, (_, shape) in given.items()},
        outputs=("output", "log_sum_exp") if lse else ("output",), batch=batch, query_length=queries, key_length=keys,
        packed=any(map(part, layouts)),
    )  # fmt: skip
    return Case(name, call, layouts, values, hiding, seed, lists=drawn)


def having(floats: str = HALF, lengths: str = "int64", **shapes: Shape) -> Inputs:
    """Optional inputs of these shapes: masks are bool, others of these types."""
    kinds = {"key_mask": "bool", "mask": "bool", "key_lengths": lengths}
    return {name: (kinds.get(name, floats), shape) for name, shape in shapes.items()}


def _dims() -> list[Case]:
    dims = ((32, 32), (40, 40), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (64, 40), (40, 72), (16, 136))
    return [
        dense(f"head dim {d}, value dim {v}", queries=19, head_dim=d, value_dim=v, right=0, kv_heads=1) for d, v in dims
    ]


def _lengths() -> list[Case]:
    pairs = ((1, 1), (1, 37), (17, 17), (17, 50), (50, 17), (37, 1), (5, 67))
    windows = {"none": (-1, -1), "causal": (-1, 0), "window": (9, 3), "past": (5, 0), "future": (0, -1)}
    return [
        dense(f"{q} queries, {k} keys, {name}", queries=q, keys=k, left=left, right=right, lse=True)
        for q, k in pairs
        for name, (left, right) in windows.items()
    ]


def _rows() -> list[Case]:
    return [
        dense(
            f"rows without a key: {rule}, {name}", batch=2, masked_rows=rule, hiding="empty", right=right, lse=True,
            inputs=having(key_mask=(2, 1, 1, 37)), value_dim=40,
        )
        for rule in ("zero", "uniform", "nan")
        for name, right in (("dense", -1), ("causal", 0))
    ]  # fmt: skip


ALL: Inputs = {
    "key_mask": ("bool", (2, 1, 1, 41)), "bias": ("float16", (1, 4, 41, 41)), "sinks": ("float32", (4,)),
    "mask": ("bool", (2, 1, 41, 41)), "key_lengths": ("int64", (2,)),
}  # fmt: skip
DENSE = (
    *_dims(),
    *_lengths(),
    *_rows(),
    dense("GQA, batch 2, heads first", batch=2, queries=50, heads=6, kv_heads=2, layouts=BHND),
    dense("MQA, mixed layouts", batch=2, heads=3, kv_heads=1, layouts=MIXED, right=0),
    dense("other layouts", batch=2, keys=50, heads=4, kv_heads=2, layouts=OTHER, left=20),
    dense("packed", batch=2, heads=3, layouts=PACKED),
    dense("packed, pieces, causal", batch=2, keys=50, heads=4, kv_heads=2, layouts=PIECES, right=0),
    dense("packed, parts first, 72", batch=2, heads=3, head_dim=72, layouts=FIRST, left=9, right=4),
    dense("bfloat16", dtype="bfloat16", queries=50, right=0, lse=True),
    dense("bfloat16, all inputs", dtype="bfloat16", batch=2, queries=41, heads=4, kv_heads=2, inputs=ALL, left=30,
          right=3, softcap=5.0, lse=True),
    dense("all inputs", batch=2, queries=41, heads=4, kv_heads=2, inputs=ALL, left=30, right=3, softcap=5.0, lse=True),
    dense("key mask", batch=2, inputs=having(key_mask=(2, 1, 1, 37))),
    dense("key mask of one axis", batch=2, inputs=having(key_mask=(37,)), right=0),
    dense("key mask on the left, causal", batch=2, inputs=having(key_mask=(2, 1, 1, 37)), hiding="left", right=0),
    dense("bias by heads", batch=2, heads=3, inputs=having(bias=(1, 3, 37, 37)), right=0),
    dense("bias of all axes in float32", batch=2, heads=3, inputs=having("float32", bias=(2, 3, 37, 50)), keys=50),
    dense("ALiBi: bias by heads and keys", heads=4, kv_heads=2, inputs=having(bias=(4, 1, 37)), right=0),
    dense("bias of one row", batch=2, inputs=having(bias=(37,))),
    dense("sinks", heads=4, kv_heads=2, inputs=having(sinks=(4,)), left=7, right=0, lse=True),
    dense("one sink for all heads", heads=4, inputs=having("float32", sinks=(1,)), lse=True),
    dense("sinks, windows without a key", queries=50, keys=17, inputs=having("float32", sinks=(2,)), left=5, right=0,
          lse=True),
    dense("sinks, rows without a key", batch=2, inputs=having(sinks=(2,), key_mask=(2, 1, 1, 37)),
          hiding="empty", masked_rows="nan", lse=True),
    dense("mask of all axes", batch=2, heads=3, inputs=having(mask=(2, 3, 37, 50)), keys=50),
    dense("mask of queries and keys", batch=2, inputs=having(mask=(37, 37))),
    dense("mask, rows without a key", batch=2, inputs=having(mask=(2, 1, 37, 37)), hiding="empty",
          masked_rows="uniform", lse=True),
    dense("key lengths", batch=3, inputs=having(lengths="int32", key_lengths=(3,)), right=0, lse=True),
    dense("key lengths from 0", batch=3, inputs=having(key_lengths=(3,)), hiding="empty", masked_rows="nan"),
    dense("softcap", queries=50, softcap=2.5, right=0, lse=True),
    dense("softcap, large scores", queries=50, softcap=30.0, values="large"),
    dense("softcap and bias", heads=3, softcap=2.5, inputs=having(bias=(1, 3, 37, 37))),
    dense("large scores", queries=50, values="large", lse=True),
    dense("large scores, windows", queries=50, values="large", left=9, right=0),
    dense("one key dominates", queries=50, values="dominant", lse=True),
    dense("equal keys", queries=50, values="equal", lse=True),
    dense("scale", queries=50, scale=0.31),
    dense("bfloat16, large scores", dtype="bfloat16", queries=50, values="large"),
)  # fmt: skip

GRID = (
    grid("1-D", grid=[50], kernel_size=[7]),
    grid("1-D, clamp, even", grid=[37], kernel_size=[8], border="clamp", kv_heads=1),
    grid("1-D, causal", grid=[50], kernel_size=[9], causal=[1]),
    grid("1-D, causal, groups", grid=[50], kernel_size=[9], causal=[1], stride=[3]),
    grid("1-D, dilation, prefix", grid=[37], kernel_size=[5], dilation=[3], border="clamp", prefix=2),
    grid("1-D, left", grid=[37], kernel_size=[8], left=[2]),
    grid("1-D, one token", grid=[1], kernel_size=[3]),
    grid("2-D, clamp", batch=2, grid=[7, 5], kernel_size=[3, 3], border="clamp", heads=4, kv_heads=2, layouts=BHND),
    grid("2-D, clamp, even, prefix, suffix", grid=[7, 5], kernel_size=[4, 3], border="clamp", prefix=1, suffix=2),
    grid("packed", batch=2, grid=[7, 5], kernel_size=[3, 3], border="clamp", heads=3, layouts=PACKED),
    grid("packed, pieces", batch=2, grid=[37], kernel_size=[5], stride=[2], heads=4, kv_heads=2, layouts=PIECES),
    grid("packed, 3-D, prefix", grid=[3, 4, 5], kernel_size=[3, 3, 3], layouts=FIRST, prefix=1),
    grid("2-D, truncate", grid=[7, 6], kernel_size=[5, 3], layouts=MIXED),
    grid("2-D, left", grid=[7, 6], kernel_size=[5, 3], left=[1, 0], border="clamp", layouts=OTHER),
    grid("2-D, dilation", grid=[11, 7], kernel_size=[3, 2], border="clamp", dilation=[3, 2]),
    grid("2-D, groups", grid=[9, 10], kernel_size=[4, 3], border="clamp", stride=[2, 3]),
    grid("2-D, causal rows", grid=[7, 5], kernel_size=[3, 3], border="clamp", causal=[1, 0], stride=[2, 1]),
    grid("2-D, windows", grid=[8, 12], kernel_size=[4, 4], stride=[4, 4]),
    grid("2-D, windows, ragged", grid=[9, 7], kernel_size=[4, 4], stride=[4, 4]),
    grid("2-D, ball", grid=[7, 6], kernel_size=[5, 5], shape="ball"),
    grid("2-D, ball of unequal axes", grid=[9, 8], kernel_size=[5, 7], shape="ball", suffix=3),
    grid("2-D, ball of 9x14 tokens", grid=[9, 14], kernel_size=[7, 7], shape="ball"),
    grid("3-D, ball", grid=[4, 5, 7], kernel_size=[3, 5, 7], shape="ball", prefix=1),
    grid("2-D, wider than 127", grid=[2, 150], kernel_size=[1, 141], head_dim=16),
    grid("3-D, clamp", grid=[4, 5, 3], kernel_size=[2, 3, 3], border="clamp"),
    grid("3-D, causal frames", grid=[4, 5, 3], kernel_size=[2, 3, 2], border="clamp", causal=[1, 0, 0]),
    grid("3-D, groups, dilation, suffix", grid=[5, 4, 6], kernel_size=[2, 3, 3], stride=[2, 1, 3], dilation=[1, 1, 2],
         suffix=5),
    grid("bfloat16", grid=[7, 6], kernel_size=[5, 3], dtype="bfloat16", border="clamp"),
    grid("head dim 72, value dim 40", grid=[7, 6], kernel_size=[5, 3], head_dim=72, value_dim=40, border="clamp"),
    grid("head dim 128", grid=[5, 6], kernel_size=[3, 3], head_dim=128, kv_heads=1, border="clamp"),
    grid("head dim 80", grid=[5, 6], kernel_size=[3, 3], head_dim=80, prefix=1),
    *(
        grid(f"rows without a key: {rule}", batch=2, grid=[7, 5], kernel_size=[3, 3], masked_rows=rule, hiding="empty",
             inputs=having(key_mask=(2, 1, 1, 35)), border="clamp")
        for rule in ("zero", "uniform", "nan")
    ),
    *(
        grid(f"windows without a key: {rule}", grid=[30], kernel_size=[2], causal=[1], stride=[5], masked_rows=rule)
        for rule in ("zero", "uniform", "nan")
    ),
    grid("windows without a key, far away", grid=[300], kernel_size=[2], causal=[1], stride=[150], heads=1),
    grid("key mask", grid=[7, 6], kernel_size=[5, 3], inputs=having(key_mask=(42,))),
    grid("key mask, prefix", batch=2, grid=[7, 5], kernel_size=[3, 3], prefix=3, inputs=having(key_mask=(2, 1, 1, 38))),
    grid("bias", batch=2, grid=[7, 6], kernel_size=[5, 3], inputs=having(bias=(1, 2, 42, 42)), border="clamp"),
    grid("bias in float32 for windows", grid=[8, 8], kernel_size=[4, 4], stride=[4, 4],
         inputs=having("float32", bias=(2, 64, 64))),
    grid("large scores", grid=[7, 6], kernel_size=[5, 3], values="large", border="clamp"),
    grid("one key dominates", grid=[50], kernel_size=[21], values="dominant"),
    grid("scale", grid=[50], kernel_size=[7], scale=0.31),
)  # fmt: skip

HEADS = Drawn(sets=(1, 6), order="longest")
SPARSE = (
    sparse("64", lse=True),
    sparse("128", 128, queries=300, lse=True, seed=3),
    *(
        sparse(f"tiles {n}", (64, 128)[n % 2], queries=150, lse=True, seed=n, heads=1, lists=Drawn(causal=True))
        for n in range(2, 6)
    ),
    *(
        sparse(f"head dim {d}, value dim {v}", queries=90, head_dim=d, value_dim=v, heads=1, seed=3)
        for d, v in ((40, 40), (72, 72), (80, 80), (128, 128), (40, 72), (16, 136), (256, 256))
    ),
    *(
        sparse(f"{q} queries, {k} keys", block, queries=q, keys=k, lse=True, seed=q, heads=1)
        for q, k, block in ((1, 1, 64), (1, 300, 128), (130, 70, 64), (64, 128, 64), (257, 129, 128), (128, 256, 128))
    ),
    sparse("128, N past the last block", 128, queries=129, keys=257, lists=Drawn(density=1.0), seed=2),
    sparse("64, GQA, lists of heads", batch=2, seed=3, heads=6, kv_heads=2, layouts=BHND, lists=HEADS, lse=True),
    sparse("64, lists of heads, no order", heads=3, lists=Drawn(sets=(1, 3), order="none")),
    sparse("64, lists of batch entries", batch=3, heads=1, lists=Drawn(sets=(3, 1), order="none")),
    sparse("128, lists of heads and batch entries", 128, batch=2, heads=4, kv_heads=2, layouts=MIXED, queries=150,
           lists=Drawn(sets=(2, 4)), lse=True, seed=3),
    sparse("MQA, mixed layouts, no order", batch=2, heads=2, kv_heads=1, layouts=OTHER, lists=Drawn(order="none")),
    sparse("full blocks alone", queries=192, lists=Drawn(partial=0.0, kinds=1), lse=True),
    sparse("partial blocks alone", lists=Drawn(partial=1.0), lse=True),
    sparse("packed lists", lists=Drawn(spread=False, order="longest"), seed=2),
    sparse("no blocks at all", batch=2, lists=Drawn(density=0.0, order="none"), masked_rows="nan", lse=True),
    *(
        sparse(f"rows without a key: {rule}", queries=150, heads=1, lists=Drawn(empty=True), masked_rows=rule, lse=True,
               value_dim=40, seed=seed)
        for seed, rule in enumerate(("zero", "uniform", "nan"))
    ),
    *(
        sparse(f"blind by a key mask: {rule}", batch=2, hiding="empty", inputs=having(key_mask=(2, 1, 1, 110)),
               masked_rows=rule, lse=True)
        for rule in ("zero", "uniform", "nan")
    ),
    sparse("key mask", batch=2, inputs=having(key_mask=(2, 1, 1, 110))),
    sparse("key mask of one axis, on the left", inputs=having(key_mask=(110,)), hiding="left", seed=2),
    sparse("bias by heads", heads=3, inputs=having(bias=(1, 3, 110, 110)), seed=2),
    sparse("bias of all axes in float32", batch=2, keys=200, inputs=having("float32", bias=(2, 2, 110, 200)), seed=3),
    sparse("bias of one row", inputs=having(bias=(110,))),
    sparse("sinks", heads=4, kv_heads=2, inputs=having(sinks=(4,)), lse=True),
    sparse("one sink, rows without a key", inputs=having("float32", sinks=(1,)), lists=Drawn(empty=True),
           masked_rows="nan", lse=True, seed=2),
    sparse("counts", lists=Drawn(times=4), lse=True),
    sparse("counts of heads, 128", 128, queries=300, lists=Drawn(times=4, sets=(1, 2)), head_dim=72, seed=3),
    sparse("all inputs", batch=2, heads=4, kv_heads=2, lists=Drawn(times=3, sets=(2, 4)), lse=True, seed=3,
           inputs=having(key_mask=(2, 1, 1, 110), bias=(4, 110, 110), sinks=(4,))),
    sparse("packed", batch=2, heads=3, layouts=PACKED),
    sparse("packed, pieces", 128, batch=2, keys=150, heads=4, kv_heads=2, layouts=PIECES, lse=True, seed=3),
    sparse("bfloat16", dtype="bfloat16", lse=True, head_dim=64, seed=2),
    sparse("bfloat16, all inputs", dtype="bfloat16", batch=2, heads=4, kv_heads=2, lists=Drawn(times=3), lse=True,
           inputs=having("bfloat16", key_mask=(2, 1, 1, 110), bias=(4, 110, 110), sinks=(4,))),
    sparse("large scores", values="large", lse=True, lists=Drawn(density=0.8)),
    sparse("one key dominates", values="dominant", lse=True, seed=2),
    sparse("equal keys", values="equal", lse=True),
    sparse("scale", scale=0.31),
)  # fmt: skip

CASES = {"Attention": DENSE, "NeighborhoodAttention": GRID, "BlockSparseAttention": SPARSE}


def named(op: str, name: str) -> Case:
    """The case with this name."""
    return next(c for c in CASES[op] if c.name == name)
