"""The op ``attncompile::BlockSparseAttention`` (version 1): its schema and the lists that say what a query sees.

Inputs: ``query`` [B, Nq, H, D], ``key`` [B, Nk, Hkv, D], ``value`` [B, Nk, Hkv, Dv], each in the axis order that its
layout attribute says, and optionally ``key_mask`` bool, broadcastable to [B, 1, 1, Nk], True = visible, and ``bias``,
broadcastable to [B, H, Nq, Nk], which is added to the scores. Output: [B, Nq, H, Dv] in ``o_layout``.

Scores are cut into squares of ``block`` queries and keys. There are ``lists`` sets of lists: one for all heads, or one
for each. Row r of blocks in set s, counted as n = s * rows + r, meets the blocks of keys ``columns[i]`` for i in
offsets[n] .. offsets[n + 1] - 1, in ascending order; ``kinds[i]`` = 0 says that all pairs of the block are visible,
u > 0 that those are which are set in ``masks[u - 1]``: the rows of the block, packed 8 bits a byte, highest bit first.
``counts[i]`` says how often these keys count in the softmax: their weights are multiplied by it (left out: once). A
block whose keys count differently is listed once for each count, its bits apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import defs, helper, numpy_helper
from onnx.defs import OpSchema

from attncompile.plugins.body import DOMAIN
from attncompile.plugins.neighborhood.op import infer_output

OP_TYPE = "BlockSparseAttention"
VERSION = 1
BLOCK = 64
"""Edge of the blocks in the op's lists. The body does not use them: it packs keys more tightly."""


def lists(counts: np.ndarray, block: int = BLOCK) -> Mapping[str, Any]:
    """The attributes for ``counts`` ([Nq, Nk], or [lists, Nq, Nk]): how often each key counts, 0 or False where it is
    hidden.
    """
    sets = counts.reshape((-1, *counts.shape[-2:]))
    height, width = sets.shape[1:]
    rows, columns = -(-height // block), -(-width // block)
    padded = np.zeros((len(sets), rows * block, columns * block), np.uint8)
    padded[:, :height, :width] = sets
    blocks = padded.reshape(len(sets), rows, block, columns, block).swapaxes(2, 3)  # [lists, rows, columns, ., .]
    # What lies beyond the lengths does not make a block partial.
    high, wide = (np.minimum(block, n - np.arange(0, n, block)) for n in (height, width))
    whole = high[:, None] * wide[None, :]
    where: list[np.ndarray] = []
    bits: list[np.ndarray] = []
    for times in np.unique(padded[padded > 0]):
        same = blocks == times
        count = same.sum(axis=(3, 4), dtype=np.int64)
        at = np.argwhere(count > 0)
        full = (count == whole)[tuple(at.T)]
        where.append(np.concatenate([at, np.full((len(at), 1), times), full[:, None]], axis=1))
        bits.append(np.packbits(same[tuple(at[~full].T)], axis=2).reshape(-1, block * block // 8))
    entries = np.concatenate(where) if where else np.zeros((0, 5), np.int64)
    partial = np.concatenate(bits) if bits else np.zeros((0, block * block // 8), np.uint8)
    masks, kind = np.unique(partial, axis=0, return_inverse=True)
    kinds = np.zeros(len(entries), np.int64)
    kinds[entries[:, 4] == 0] = kind.reshape(-1) + 1
    order = np.lexsort((entries[:, 3], entries[:, 2], entries[:, 1], entries[:, 0]))
    met = np.bincount(entries[:, 0] * rows + entries[:, 1], minlength=len(sets) * rows)
    said: dict[str, Any] = {
        "block": block, "lengths": [height, width], "lists": len(sets), "offsets": [0, *np.cumsum(met).tolist()],
        "columns": entries[order, 2].tolist(), "kinds": kinds[order].tolist(),
        "masks": numpy_helper.from_array(masks, "masks"),
    }  # fmt: skip
    return {**said, "counts": entries[order, 3].tolist()} if (entries[:, 3] > 1).any() else said


def register() -> None:
    """Make the op known to onnx (checker and shape inference); later calls do nothing."""
    if defs.has(OP_TYPE, VERSION, DOMAIN):
        return
    operand, kinds = OpSchema.FormalParameter, OpSchema.AttrType
    optional = OpSchema.FormalParameterOption.Optional
    texts = (
        ("masked_rows", "nan", "what a query without any visible key gives: zero | uniform | nan"),
        *((f"{x}_layout", "BNHD", "axis order: BNHD | BHND") for x in "qkvo"),
    )
    floats = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")]
    schema = OpSchema(
        OP_TYPE, DOMAIN, VERSION, __doc__ or "",
        inputs=[
            *(operand(n, "T") for n in ("query", "key", "value")),
            operand("key_mask", "B", param_option=optional), operand("bias", "TB", param_option=optional),
        ],
        outputs=[operand("output", "T")],
        type_constraints=[("T", floats, ""), ("TB", floats, ""), ("B", ["tensor(bool)"], "")],
        attributes=[
            OpSchema.Attribute("scale", kinds.FLOAT, "of the products", required=True),
            OpSchema.Attribute("block", kinds.INT, "edge of a block", required=True),
            OpSchema.Attribute("lengths", kinds.INTS, "queries, keys", required=True),
            OpSchema.Attribute("offsets", kinds.INTS, "of each row of blocks in columns", required=True),
            OpSchema.Attribute("columns", kinds.INTS, "blocks of keys", required=True),
            OpSchema.Attribute("kinds", kinds.INTS, "0: full, u: masks[u - 1]", required=True),
            OpSchema.Attribute("masks", kinds.TENSOR, "uint8 [U, block * block / 8]", required=True),
            OpSchema.Attribute("counts", kinds.INTS, "how often the keys count, once without it", required=False),
            OpSchema.Attribute("lists", helper.make_attribute("lists", 1), "sets of lists: 1, or one for each head"),
            *(OpSchema.Attribute(name, helper.make_attribute(name, value), doc) for name, value, doc in texts),
        ],
    )  # fmt: skip
    schema.set_type_and_shape_inference_function(infer_output)
    defs.register_schema(schema)
