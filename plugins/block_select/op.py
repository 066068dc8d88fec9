"""The ops ``attncompile::BlockScores`` and ``attncompile::BlockSelect`` (version 1): schemas, nodes, sizes of outputs.

``BlockScores`` estimates how much each block of keys weighs. Queries and keys are cut into tiles of ``stride`` tokens;
the score of a tile of queries a and a tile of keys c is the sum of the products on one antidiagonal of their square,

    s[a, c] = scale / stride * sum_{i < stride} q[a * stride + stride - 1 - i] . k[c * stride + i],

tokens past the end counting as zero. ``scores`` [B, H, T, C] float32 are log sum exp s[a, c] over the tiles c of each
block of keys, with T = ceil(Nq / stride) tiles of queries and C = ceil(Nk / block) blocks of keys; -inf where there is
none: tiles past the end do not exist, and with ``causal`` tiles c >= (a + 1) * ``span`` are hidden, where a query
stands for ``span`` keys (Nq = ceil(Nk / span)). ``block`` is a multiple of ``stride``. With stride and block of 1 on
pooled operands it is the score of their means. With ``reduce`` = max it is the highest s[a, c] of a block instead: with
a stride of 1 and queries that are means of blocks (``span`` = ``block``) that of the one key which they look at most.

``BlockSelect`` makes the lists of ``BlockSparseAttention`` of such scores. ``tiles`` rows of scores make one row of
blocks; the weights of its blocks are the mean over the rows that exist of their softmax over all blocks. Blocks are
ranked: first those that are always kept (the first ``sinks``, and those at most ``window`` away from the row's own),
then by falling weight, equal ones by their place. Of each head

- ``rule`` = mass: the shortest beginning of this order that holds a weight of ``amount``;
- ``rule`` = share: its first ``amount`` * (blocks that the row may see), rounded up, but for 2^-10 of a block, so that
  a tenth of 10 is 1 in every precision;
- ``rule`` = anchor: not ranked, but every block whose score is at least the anchor, the highest score of those that are
  always kept, less ``amount`` (in float32; -inf where none is, so that all are kept); ``tiles`` is 1.

Blocks that are always kept are kept whatever ``amount`` says; from 1 on (share), above 1 (mass) or of infinity
(anchor) a head keeps all.
``rows`` [B, H, R, 3], ``columns`` and ``kinds`` [B * H * R * C] are as ``BlockSparseAttention`` takes them: every row
has room for C entries, the rest of which are not written. Partial, and of kind 0, is the row's own block with
``causal``, else the last block of keys, since how far it reaches is not known; columns rise from there. ``mass``
[B, H, R, C] float32 are the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, TensorShapeProto, TypeProto, defs, helper
from onnx.defs import OpSchema

from attncompile.core.block_selection import SLACK as SLACK
from attncompile.plugins import schemas
from attncompile.plugins.body import DOMAIN, LAYOUTS, overload_of

SCORES, SELECT = "BlockScores", "BlockSelect"
VERSION = 1
RULES = ("mass", "share", "anchor")
REDUCTIONS = ("sum", "max")
LISTS = ("rows", "columns", "kinds")
"""Outputs of ``BlockSelect`` that ``BlockSparseAttention`` reads."""

Dim = Any
"""A ``TensorShapeProto.Dimension``, or None."""


def masks(block: int, causal: bool) -> np.ndarray:
    """int32 [1, block, block / 32]: the mask of kind 0 that goes with the lists of ``BlockSelect``."""
    bits = np.ones((block, block), bool)
    packed = np.packbits(np.tril(bits) if causal else bits, axis=1, bitorder="little")
    return packed.view("<u4").astype(np.uint32).view(np.int32).reshape(1, block, block // 32)


def node(op: str, said: Mapping[str, Any], inputs: Sequence[str], outputs: Sequence[str], name: str,
         configuration: Mapping[str, Any]) -> NodeProto:  # fmt: skip
    """``configuration``: all that its body was made for beside its attributes."""
    made = helper.make_node(op, list(inputs), list(outputs), name=name, domain=DOMAIN, **said)
    made.overload = overload_of({"op": op, **said, **configuration})
    return made


def register() -> None:
    """Make the ops known to onnx (checker and shape inference); later calls do nothing."""
    for op, make in ((SCORES, _scores), (SELECT, _select)):
        if not defs.has(op, VERSION, DOMAIN):
            schemas.register(make())


def _attribute(name: str, value: Any, doc: str) -> OpSchema.Attribute:
    return OpSchema.Attribute(name, helper.make_attribute(name, value), doc)


def _required(name: str, doc: str) -> OpSchema.Attribute:
    return OpSchema.Attribute(name, OpSchema.AttrType.INT, doc, required=True)


def _scores() -> OpSchema:
    operand = OpSchema.FormalParameter
    floats = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")]
    schema = OpSchema(
        SCORES, DOMAIN, VERSION, __doc__ or "", inputs=[operand("query", "T"), operand("key", "T")],
        outputs=[operand("scores", "tensor(float)")], type_constraints=[("T", floats, "")],
        attributes=[
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "of the products", required=True),
            _required("stride", "edge of a tile"), _required("block", "keys of a block"),
            _attribute("causal", 0, "whether later tiles are hidden"),
            _attribute("reduce", REDUCTIONS[0], " | ".join(REDUCTIONS)), _attribute("span", 1, "keys of a query"),
            *(_attribute(f"{x}_layout", "BNHD", LAYOUTS[0]) for x in "qk"),
        ],
    )  # fmt: skip
    schema.set_type_and_shape_inference_function(_of_scores)
    return schema


def _select() -> OpSchema:
    operand = OpSchema.FormalParameter
    schema = OpSchema(
        SELECT, DOMAIN, VERSION, __doc__ or "",
        inputs=[operand("scores", "tensor(float)"), operand("amount", "tensor(float)")],
        outputs=[*(operand(n, "tensor(int32)") for n in LISTS), operand("mass", "tensor(float)")],
        attributes=[
            _required("tiles", "rows of scores that make a row of blocks"),
            _attribute("rule", RULES[0], " | ".join(RULES)), _attribute("causal", 0, "whether later blocks are hidden"),
            _attribute("sinks", 1, "first blocks that are always kept"),
            _attribute("window", 0, "how far from a row's own block they are always kept"),
        ],
    )  # fmt: skip
    schema.set_type_and_shape_inference_function(_of_select)
    return schema


def _of_scores(context: Any) -> None:
    query, key = (_dims(context, i, n) for i, n in enumerate("qk"))
    if query is None or key is None:
        return
    stride, block = _int(context, "stride", 1), _int(context, "block", 1)
    _give(context, 0, TensorProto.FLOAT, [query["B"], query["H"], _parts(query["N"], stride), _parts(key["N"], block)])


def _of_select(context: Any) -> None:
    given = context.get_input_type(0)
    if given is None or not given.tensor_type.HasField("shape") or len(given.tensor_type.shape.dim) != 4:
        return
    batch, heads, tiles, columns = given.tensor_type.shape.dim
    rows = _parts(tiles, _int(context, "tiles", 1))
    room = _product([batch, heads, rows, columns])
    _give(context, 0, TensorProto.INT32, [batch, heads, rows, TensorShapeProto.Dimension(dim_value=3)])
    _give(context, 1, TensorProto.INT32, [room])
    _give(context, 2, TensorProto.INT32, [room])
    _give(context, 3, TensorProto.FLOAT, [batch, heads, rows, columns])


def _dims(context: Any, place: int, letter: str) -> dict[str, Dim] | None:
    given = context.get_input_type(place)
    if given is None or not given.tensor_type.HasField("shape"):
        return None
    said = context.get_attribute(f"{letter}_layout")
    axes = said.s.decode() if said is not None and said.s else "BNHD"
    dims = given.tensor_type.shape.dim
    return dict(zip(axes, dims, strict=True)) if len(dims) == len(axes) else None


def _int(context: Any, name: str, default: int) -> int:
    found = context.get_attribute(name)
    return default if found is None else int(found.i)


def _parts(dim: Dim, size: int) -> Dim:
    """ceil(dim / size), of an axis that has a name as an expression, as launch arguments are written."""
    if size == 1:
        return dim
    made = TensorShapeProto.Dimension()
    if dim.HasField("dim_value"):
        made.dim_value = -(-dim.dim_value // size)
    elif dim.dim_param:
        made.dim_param = f"cdiv({dim.dim_param}, {size})"
    return made


def _product(dims: Sequence[Dim]) -> Dim:
    """Their product, numbers behind expressions."""
    made = TensorShapeProto.Dimension()
    known = prod(d.dim_value for d in dims if d.HasField("dim_value"))
    names = [d.dim_param for d in dims if not d.HasField("dim_value")]
    if not names:
        made.dim_value = known
    elif all(names):
        made.dim_param = " * ".join([*(n if n.isidentifier() else f"({n})" for n in names), str(known)])
    return made


def _give(context: Any, place: int, element: int, dims: Sequence[Dim]) -> None:
    if place >= context.get_num_outputs():
        return
    made = TypeProto()
    made.tensor_type.elem_type = element
    shape = made.tensor_type.shape
    for dim in dims:
        shape.dim.add().CopyFrom(dim)
    context.set_output_type(place, made)
