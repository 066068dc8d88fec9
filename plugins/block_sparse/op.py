"""The op ``attncompile::BlockSparseAttention`` (version 1): its schema and the lists that say what a query sees.

Inputs: ``query`` [B, Nq, H, D], ``key`` [B, Nk, Hkv, D], ``value`` [B, Nk, Hkv, Dv], each in the axis order that its
layout attribute says, and optionally ``key_mask`` bool, broadcastable to [B, 1, 1, Nk], True = visible, and ``bias``,
broadcastable to [B, H, Nq, Nk], which is added to the scores. Output: [B, Nq, H, Dv] in ``o_layout``.

Scores are cut into squares of ``block`` queries and keys. Row r of blocks meets the blocks of keys ``columns[i]`` for i
in offsets[r] .. offsets[r + 1] - 1, in ascending order; ``kinds[i]`` = 0 says that all pairs of the block are visible,
u > 0 that those are which are set in ``masks[u - 1]``: the rows of the block, packed 8 bits a byte, highest bit first.
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


def lists(visible: np.ndarray, block: int = BLOCK) -> Mapping[str, Any]:
    """The attributes that say what ``visible`` (bool [Nq, Nk]) says."""
    rows, columns = (-(-n // block) for n in visible.shape)
    padded = np.zeros((rows * block, columns * block), bool)
    padded[: visible.shape[0], : visible.shape[1]] = visible
    blocks = padded.reshape(rows, block, columns, block).swapaxes(1, 2)  # [rows, columns, block, block]
    count = blocks.sum(axis=(2, 3), dtype=np.int64)
    # What lies beyond the lengths does not make a block partial.
    height, width = (np.minimum(block, n - np.arange(0, n, block)) for n in visible.shape)
    full, met = count == height[:, None] * width[None, :], count > 0
    where = np.argwhere(met)  # row-major, so columns ascend within a row
    partial = met & ~full
    bits = np.packbits(blocks[partial], axis=2).reshape(-1, block * block // 8)
    masks, kind = np.unique(bits, axis=0, return_inverse=True)
    kinds = np.zeros(met.shape, np.int64)
    kinds[partial] = kind.reshape(-1) + 1
    return {
        "block": block, "lengths": list(visible.shape),
        "offsets": [0, *np.cumsum(met.sum(axis=1)).tolist()], "columns": where[:, 1].tolist(),
        "kinds": kinds[met].tolist(),
        "masks": numpy_helper.from_array(masks, "masks"),
    }  # fmt: skip


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
            *(OpSchema.Attribute(name, helper.make_attribute(name, value), doc) for name, value, doc in texts),
        ],
    )  # fmt: skip
    schema.set_type_and_shape_inference_function(infer_output)
    defs.register_schema(schema)
