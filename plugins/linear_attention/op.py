"""The ops of linear attention (domain ``attncompile``, version 1): their schemas. One op is one kernel launch, and what
goes from one to the next is a tensor that everyone sees.

Names of axes: B batch, N tokens, H query heads, G key heads (each serves H / G consecutive query heads), D head dim, F
features, E value dim, C chunks of tokens. ``query``, ``key``, ``value`` and ``output`` are rank 4, in the axis order
that their layout attribute says (BNHD, BHND, BHDN); everything else lies as written here. States and sums are float32
(double where the operands are).

Without a triangle, out[i] = phi(q[i]) sum_j phi(k[j])^T v[j], over a normaliser:

- ``LinearAttentionState``: of every chunk of ``chunk`` tokens (0: all tokens are one), ``state`` [B, G, C, F, E], the
  sum of phi(k)^T v; ``total`` [B, G, C, F], that of phi(k); ``mean`` [B, G, C, E], that of v over the number of all
  tokens. ``key_weight`` [B, N, G] multiplies what a key adds to ``state``. With the map ``softmax`` (over the tokens)
  exponentials are taken of what a key has above its chunk's largest, ``top`` [B, G, C, F].
- ``LinearAttentionCombine``: the chunks of these as one (C = 1), summed in order: ``whole_state``, ``whole_total``,
  ``whole_mean``. With ``top`` (then ``total`` too) the state is divided by the total: the softmax over all tokens.
- ``LinearAttentionApply``: ``output`` of ``query`` and of states whose chunks are summed.

With a triangle, S[t] = exp(g[t]) S[t - 1] + phi(k[t])^T v[t] and out[t] = phi(q[t]) S[t], over a normaliser:

- ``LinearAttentionStates``: ``state`` [B, G, C, F, E] and ``total`` [B, G, C, F] *before* every chunk, and after the
  last token ``final_state`` [B, G, F, E] and ``final_total`` [B, G, F].
- ``LinearAttentionOutput``: ``output`` of each chunk: what its queries read from the state before it, and from the keys
  of the chunk up to their own.
- ``LinearAttentionSolve`` and ``LinearAttentionDelta``: the delta rule in chunks. ``solved`` [B, G, C, L, L] of every
  ``tile`` of L tokens is (I + A)^-1 diag(beta), A below the diagonal beta[i] phi(k[i]) . phi(k[j]) times the decay
  between the two; ``written`` [B, N, G, E] is what each key writes, ``value`` of the ``LinearAttentionOutput`` after.
- ``LinearAttentionStep``: both at once for few tokens (decoding): ``output``, ``final_state`` and ``final_total``.

``log_decay`` is g: [G] (one number a head), [B, N, G], or [B, N, G, F]; at most 0. With ``beta`` [B, N, G] or [B, N, 1]
(the delta rule) v[t] - (exp(g[t]) S[t - 1])^T phi(k[t]) times beta[t] is written
instead of v[t].

Feature maps: ``none``, ``relu``, ``elu+1``, ``exp``, ``softmax`` (queries: over D; keys: over the tokens),
``hedgehog``: [exp(x W), exp(-x W)] with ``feature_weight`` W [heads, D, F / 2].

Normalisers, of the sum s = phi(q) total: ``none``: times ``scale``; ``sum``: times ``scale``, divided by
s + ``epsilon``, which is at least ``floor`` (minus infinity: no bound); ``mala``: (1 + 1 / s) phi(q) state - s mean;
``inline``: phi(q) state - s mean + mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

from onnx import TensorProto, TensorShapeProto, TypeProto, defs, helper
from onnx.defs import OpSchema

from attncompile.core.errors import Unsupported
from attncompile.plugins import schemas
from attncompile.plugins.body import DOMAIN

VERSION = 1
STATE, COMBINE, APPLY = "LinearAttentionState", "LinearAttentionCombine", "LinearAttentionApply"
STATES, OUTPUT, STEP = "LinearAttentionStates", "LinearAttentionOutput", "LinearAttentionStep"
SOLVE, DELTA = "LinearAttentionSolve", "LinearAttentionDelta"

MAPS = ("none", "relu", "elu+1", "exp", "softmax", "hedgehog")
NORMALISERS = ("none", "sum", "mala", "inline")
LAYOUTS = ("BNHD", "BHND", "BHDN")

INPUTS: Mapping[str, tuple[str, ...]] = {
    STATE: ("key", "value", "key_weight", "feature_weight"),
    COMBINE: ("state", "total", "mean", "top"),
    APPLY: ("query", "state", "total", "mean", "feature_weight"),
    STATES: ("key", "value", "log_decay", "initial_state", "initial_total"),
    OUTPUT: ("query", "key", "value", "state", "total", "log_decay"),
    STEP: ("query", "key", "value", "log_decay", "beta", "initial_state", "initial_total"),
    SOLVE: ("key", "log_decay", "beta"),
    DELTA: ("key", "value", "solved", "log_decay", "initial_state"),
}
"""Formal inputs of each op, in order."""

OUTPUTS: Mapping[str, tuple[str, ...]] = {
    STATE: ("state", "total", "mean", "top"),
    COMBINE: ("whole_state", "whole_total", "whole_mean"),
    APPLY: ("output",),
    STATES: ("state", "total", "final_state", "final_total"),
    OUTPUT: ("output",),
    STEP: ("output", "final_state", "final_total"),
    SOLVE: ("solved",),
    DELTA: ("written", "state", "final_state"),
}

_REQUIRED = {"query", "key", "value", "state", "output", "whole_state", "solved", "written"}
_OPERANDS = ("query", "key", "value", "output")
_FLOATS = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")]
_WIDE = ["tensor(float)", "tensor(double)"]
_KEYS = (STATE, STATES, OUTPUT, STEP, SOLVE, DELTA)
CHUNKED = (STATE, STATES, OUTPUT, DELTA)
TILED = (SOLVE, DELTA)
_QUERIES = (APPLY, OUTPUT, STEP)


def register() -> None:
    """Make the ops known to onnx (checker and shape inference); later calls do nothing."""
    for op in INPUTS:
        if not defs.has(op, VERSION, DOMAIN):
            schemas.register(_schema(op))


def _schema(op: str) -> OpSchema:
    parameter, kinds = OpSchema.FormalParameter, OpSchema.FormalParameterOption

    def formal(name: str) -> OpSchema.FormalParameter:
        kind = "T" if name in (*_OPERANDS, "written") else "TX" if name in _TYPES else "TState"
        required = name in _REQUIRED or (op == SOLVE and name == "beta")
        option = kinds.Single if required else kinds.Optional
        return parameter(name, kind if kind != "TX" else _TYPES[name], param_option=option)

    inputs, outputs = [formal(n) for n in INPUTS[op]], [formal(n) for n in OUTPUTS[op]]
    used = {p.type_str for p in (*inputs, *outputs)}
    constraints = [("T", _FLOATS, "element type"), ("TState", _WIDE, "type of states and sums"),
                   ("TW", _FLOATS, "type of weights"), ("TD", _FLOATS, "type of decays"),
                   ("TB", _FLOATS, "type of beta")]  # fmt: skip
    schema = OpSchema(
        op, DOMAIN, VERSION, __doc__ or "", inputs=inputs, outputs=outputs,
        type_constraints=[c for c in constraints if c[0] in used], attributes=_attributes(op),
    )  # fmt: skip
    schema.set_type_and_shape_inference_function(_INFER[op])
    return schema


_TYPES = {"key_weight": "TW", "feature_weight": "TW", "log_decay": "TD", "beta": "TB"}


def _attributes(op: str) -> list[OpSchema.Attribute]:
    made: list[OpSchema.Attribute] = []

    def add(name: str, value: Any, doc: str) -> None:
        made.append(OpSchema.Attribute(name, helper.make_attribute(name, value), doc))

    if op in _KEYS:
        add("key_map", "none", " | ".join(MAPS))
    if op in _QUERIES:
        add("query_map", "none", " | ".join(MAPS))
        add("normaliser", "none", " | ".join(NORMALISERS))
        add("epsilon", 0.0, "added to the sum")
        add("floor", -inf, "least value of the sum")
        add("scale", 1.0, "factor of the result")
    if op in CHUNKED:
        add("chunk", 0, "tokens of a chunk; 0: all of them")
    if op in TILED:
        add("tile", 64, "tokens whose dependence on one another is solved at once")
    for name in _OPERANDS:
        if name in (*INPUTS[op], *OUTPUTS[op]):
            packed = "" if name == "output" else ", or such a one with a digit: that part of a packed tensor"
            add(f"{name[0]}_layout", "BNHD", " | ".join(LAYOUTS) + packed)
    return made


class _Shapes:
    """Sizes by axis that an op's inputs say; each a dimension of onnx, None where it is not known."""

    def __init__(self, context: Any, op: str) -> None:
        self.context, self.op = context, op
        self.type: TypeProto | None = None
        self.sizes: dict[str, Any] = {}
        for place, name in enumerate(INPUTS[op][: context.get_num_inputs()]):
            given = context.get_input_type(place)
            if given is None or not given.tensor_type.HasField("elem_type"):
                continue
            if name in _OPERANDS and self.type is None:
                self.type = given
            if given.tensor_type.HasField("shape"):
                axes = self._axes(name)
                dims = given.tensor_type.shape.dim
                if axes and len(axes) == len(dims):
                    for axis, dim in zip(axes, dims, strict=True):
                        self.sizes.setdefault(axis, dim)

    def _axes(self, name: str) -> str:
        if name in _OPERANDS:
            wanted = {"query": "H", "key": "G", "value": "G"}[name]
            tokens = "N" if name == "query" else "M"
            last = "E" if name == "value" else "D" if name == "query" else "K"
            layout = str(self.attribute(f"{name[0]}_layout", "BNHD"))
            return layout.replace("H", wanted).replace("N", tokens).replace("D", last)
        return {"state": "BGCFE", "total": "BGCF", "mean": "BGCE", "feature_weight": "GDW"}.get(name, "")

    def attribute(self, name: str, default: Any) -> Any:
        found = self.context.get_attribute(name)
        return default if found is None else _text(helper.get_attribute_value(found))

    def known(self, axis: str) -> int | None:
        dim = self.sizes.get(axis)
        return dim.dim_value if dim is not None and dim.HasField("dim_value") else None

    def give(self, place: int, axes: Sequence[Any], element: int) -> None:
        """The type of an output: ``axes`` are names, numbers or dimensions; an axis of unknown size has none."""
        if place >= self.context.get_num_outputs():
            return
        made = TypeProto()
        made.tensor_type.elem_type = element
        shape = made.tensor_type.shape
        for axis in axes:
            dim = shape.dim.add()
            if isinstance(axis, int):
                dim.dim_value = axis
            elif isinstance(axis, TensorShapeProto.Dimension):
                dim.CopyFrom(axis)
            elif axis is not None and axis in self.sizes:
                dim.CopyFrom(self.sizes[axis])
        self.context.set_output_type(place, made)

    @property
    def element(self) -> int:
        return int(self.type.tensor_type.elem_type) if self.type is not None else TensorProto.FLOAT

    @property
    def wide(self) -> int:
        """Element type of states."""
        return TensorProto.DOUBLE if self.element == TensorProto.DOUBLE else TensorProto.FLOAT

    def features(self) -> Any:
        """The axis of features: the head dim of the keys, twice the width of the weights with Hedgehog's map."""
        if self.attribute("key_map", "none") != "hedgehog":
            return "K"
        width = self.context.get_input_type(INPUTS[self.op].index("feature_weight"))
        dims: Sequence[Any] = width.tensor_type.shape.dim if width is not None else []
        return 2 * dims[2].dim_value if len(dims) == 3 and dims[2].HasField("dim_value") else None

    def chunks(self, attribute: str = "chunk") -> Any:
        """Of tokens whose number has a name, an expression over it, as launch arguments are written."""
        chunk, tokens = int(self.attribute(attribute, 0)), self.known("M")
        if not chunk:
            return 1
        if tokens is not None:
            return -(-tokens // chunk)
        name = self.sizes["M"].dim_param if "M" in self.sizes else ""
        return TensorShapeProto.Dimension(dim_param=f"cdiv({name}, {chunk})") if name else None

    def output(self, place: int) -> None:
        layout = str(self.attribute("o_layout", "BNHD"))
        self.give(place, list(layout.replace("D", "E")), self.element)


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _of_state(context: Any) -> None:
    s = _Shapes(context, STATE)
    f, c = s.features(), s.chunks()
    for place, axes in enumerate((("B", "G", c, f, "E"), ("B", "G", c, f), ("B", "G", c, "E"), ("B", "G", c, f))):
        s.give(place, axes, s.wide)


def _of_combine(context: Any) -> None:
    s = _Shapes(context, COMBINE)
    element = int(context.get_input_type(0).tensor_type.elem_type)
    for place, axes in enumerate((("B", "G", 1, "F", "E"), ("B", "G", 1, "F"), ("B", "G", 1, "E"))):
        s.give(place, axes, element)


def _of_apply(context: Any) -> None:
    s = _Shapes(context, APPLY)
    s.output(0)


def _of_states(context: Any) -> None:
    s = _Shapes(context, STATES)
    c = s.chunks()
    for place, axes in enumerate((("B", "G", c, "K", "E"), ("B", "G", c, "K"), ("B", "G", "K", "E"), ("B", "G", "K"))):
        s.give(place, axes, s.wide)


def _of_output(context: Any) -> None:
    _Shapes(context, OUTPUT).output(0)


def _of_step(context: Any) -> None:
    s = _Shapes(context, STEP)
    s.output(0)
    s.give(1, ("B", "G", "K", "E"), s.wide)
    s.give(2, ("B", "G", "K"), s.wide)


def _of_solve(context: Any) -> None:
    s = _Shapes(context, SOLVE)
    tile = int(s.attribute("tile", 64))
    s.give(0, ("B", "G", s.chunks("tile"), tile, tile), s.wide)


def _of_delta(context: Any) -> None:
    s = _Shapes(context, DELTA)
    s.give(0, ("B", "M", "G", "E"), s.element)
    s.give(1, ("B", "G", s.chunks(), "K", "E"), s.wide)
    s.give(2, ("B", "G", "K", "E"), s.wide)


_INFER: Mapping[str, Callable[[Any], None]] = {
    STATE: _of_state, COMBINE: _of_combine, APPLY: _of_apply, STATES: _of_states, OUTPUT: _of_output, STEP: _of_step,
    SOLVE: _of_solve, DELTA: _of_delta,
}  # fmt: skip


def bad(reason: str, hint: str = "") -> Unsupported:
    return Unsupported("parameters", f"LinearAttention: {reason}", hint)
