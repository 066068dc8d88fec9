"""The op ``attncompile::Attention`` (version 1), exact dense attention: its schema and what a node of it says.

Inputs: ``query`` [B, Nq, H, D], ``key`` [B, Nk, Hkv, D], ``value`` [B, Nk, Hkv, Dv], each in the axis order that its
layout attribute says (a part of a packed tensor too: ``core/layout.py``), and optionally

- ``key_mask``: bool, broadcastable to [B, 1, 1, Nk], True = visible;
- ``bias``: broadcastable to [B, H, Nq, Nk], added to the scores (relative positions, ALiBi). -inf hides a key;
- ``sinks``: [H] logits, or [1] for all heads, finite, that join the softmax and that no value belongs to;
- ``mask``: bool, broadcastable to [B, H, Nq, Nk], True = visible;
- ``key_lengths``: int32 or int64 [B], how many keys each batch entry has: later ones are hidden.

Outputs: ``output`` [B, Nq, H, Dv] in ``o_layout``; ``log_sum_exp`` (optional) [B, H, Nq] float32, the natural logarithm
of what a query's weights were divided by, its sink included, -inf where there is nothing.

Query i stands at i + Nk - Nq and sees the keys from ``left`` before to ``right`` behind that place (-1: no bound;
causal is right = 0). ``softcap`` c > 0 makes c tanh(s / c) of a score s, before bias and masks. ``masked_rows`` is
what a query without any visible key gives; with a sink it gives zero, since the sink takes all the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, TensorProto, TypeProto, defs, helper
from onnx.defs import OpSchema

from attncompile.plugins import schemas
from attncompile.plugins.body import DOMAIN, LAYOUTS, overload_of
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.op import infer_output

OP_TYPE = "Attention"
VERSION = 1
OPTIONAL = ("key_mask", "bias", "sinks", "mask", "key_lengths")
"""Formal inputs after query, key and value, in order."""

HIDING = frozenset(OPTIONAL) - {"sinks"}
"""Those that may leave a query without a key."""

_FLOATS = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")]


@dataclass(frozen=True, slots=True)
class Dense:
    """``inputs``: those of ``OPTIONAL`` that the node has, in order; ``log_sum_exp``: whether it has that output.
    ``chunks``: into how many pieces the body cuts the queries (1: none), each of which meets what is in its reach.
    ``guard``: whether the body turns weights that are NaN into 0, as sources in half precision do whose scores
    overflow; kernels have scores in float32, and nothing to turn.
    """

    left: int = -1
    right: int = -1
    softcap: float = 0.0
    masked_rows: str = "zero"
    chunks: int = 1
    guard: bool = False
    inputs: tuple[str, ...] = ()
    log_sum_exp: bool = False

    def attributes(self) -> dict[str, Any]:
        """What the op says; chunks and guard are the body's own affair."""
        return {"left": self.left, "right": self.right, "softcap": self.softcap, "masked_rows": self.masked_rows}

    @property
    def given(self) -> tuple[str, ...]:
        """Names of all formal inputs up to the last one that is there, empty where one is left out."""
        last = max((OPTIONAL.index(name) + 1 for name in self.inputs), default=0)
        return ("query", "key", "value", *(name * (name in self.inputs) for name in OPTIONAL[:last]))


def register() -> None:
    """Make the op known to onnx (checker and shape inference); later calls do nothing."""
    if defs.has(OP_TYPE, VERSION, DOMAIN):
        return
    operand, kinds = OpSchema.FormalParameter, OpSchema.AttrType
    optional = OpSchema.FormalParameterOption.Optional
    default = helper.make_attribute
    types = {"key_mask": "tensor(bool)", "bias": "TB", "sinks": "TS", "mask": "tensor(bool)", "key_lengths": "TL"}
    schema = OpSchema(
        OP_TYPE, DOMAIN, VERSION, __doc__ or "",
        inputs=[
            *(operand(n, "T") for n in ("query", "key", "value")),
            *(operand(n, types[n], param_option=optional) for n in OPTIONAL),
        ],
        outputs=[operand("output", "T"), operand("log_sum_exp", "tensor(float)", param_option=optional)],
        type_constraints=[
            ("T", _FLOATS, "element type"), ("TB", _FLOATS, "type of the bias"), ("TS", _FLOATS, "type of the sinks"),
            ("TL", ["tensor(int32)", "tensor(int64)"], "type of the lengths"),
        ],
        attributes=[
            OpSchema.Attribute("scale", kinds.FLOAT, "of the products", required=True),
            OpSchema.Attribute("left", default("left", -1), "keys seen before the query's place; -1: all"),
            OpSchema.Attribute("right", default("right", -1), "keys seen behind it; -1: all, 0: causal"),
            OpSchema.Attribute("softcap", default("softcap", 0.0), "bound of the scores; 0: none"),
            OpSchema.Attribute(
                "masked_rows", default("masked_rows", "nan"),
                "what a query without any visible key gives: zero | uniform (the mean of all values) | nan",
            ),
            *(OpSchema.Attribute(f"{x}_layout", default(f"{x}_layout", "BNHD"), LAYOUTS[x == "o"]) for x in "qkvo"),
        ],
    )  # fmt: skip
    schema.set_type_and_shape_inference_function(infer_outputs)
    schemas.register(schema)


def infer_outputs(context: Any) -> None:
    """Output: see ``infer_output``; log_sum_exp: batch, heads and queries of the query."""
    infer_output(context)
    if context.get_num_outputs() < 2:
        return
    out = TypeProto()
    out.tensor_type.elem_type = TensorProto.FLOAT
    query = context.get_input_type(0)
    if query.tensor_type.HasField("shape"):
        layout = context.get_attribute("q_layout")
        axes = layout.s.decode() if layout is not None and layout.s else "BNHD"
        dims = dict(zip(axes, query.tensor_type.shape.dim, strict=True))
        for axis in "BHN":
            out.tensor_type.shape.dim.add().CopyFrom(dims[axis])
    context.set_output_type(1, out)


def node(form: Dense, call: Call, inputs: tuple[str, ...], outputs: tuple[str, ...], name: str) -> NodeProto:
    """The op; its attributes say all that a kernel needs. ``inputs`` and ``outputs`` as the schema orders them."""
    layouts = dict(zip(("q_layout", "k_layout", "v_layout", "o_layout"), call.layouts, strict=True))
    made = helper.make_node(
        OP_TYPE, list(inputs), list(outputs), name=name, domain=DOMAIN, scale=call.scale, **form.attributes(), **layouts
    )
    given = {"chunks": form.chunks, "guard": form.guard, "inputs": list(form.inputs), "log_sum_exp": form.log_sum_exp}
    made.overload = overload_of({"op": OP_TYPE, **given, **form.attributes(), **call.configuration()})
    return made
