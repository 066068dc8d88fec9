"""Writes function bodies: lists of standard ONNX nodes with fresh value names.

Every body is generated for one opset (18 or later: ``Pad`` and ``Reduce*`` take their axes as inputs from there on) and
one element type, so nothing in it depends on an attribute of the calling node.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from attncompile.core.errors import Unsupported

DOMAIN = "attncompile"
LAYOUTS = ("BNHD | BHND, or such a one with a digit: that part of a packed tensor, as in BN1HD", "BNHD | BHND")
"""What schemas say of the layouts of operands, and of the output."""
FIRST_OPSET = 18

FLOATS: Mapping[str, tuple[int, Any]] = {
    "float32": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "double": (TensorProto.DOUBLE, np.float64),
    "float64": (TensorProto.DOUBLE, np.float64),
}
"""Element type in lower case, as a site names it -> (ONNX element type, NumPy type)."""


def float_type(name: str) -> tuple[int, Any]:
    """(ONNX element type, NumPy type) of a site's dtype. Raises ``Unsupported`` for anything but a float."""
    if name not in FLOATS:
        raise Unsupported("dtype", f"element type {name} has no body", "float32, float16, bfloat16 and double have")
    return FLOATS[name]


class Body:
    """A growing list of nodes. ``op`` appends one and returns the name of its (first) output."""

    def __init__(self, opset: int, parent: Body | None = None) -> None:
        if opset < FIRST_OPSET:
            raise Unsupported(
                "opset",
                f"function bodies need opset {FIRST_OPSET}, the model imports {opset}",
                "convert the model first",
            )
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self._parent = parent
        self._count: list[int] = parent._count if parent else [0]  # shared: names are unique in the whole function
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def _fresh(self, op_type: str) -> str:
        self._count[0] += 1
        return f"{op_type.lower()}_{self._count[0]}"

    def op(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append a node; an empty string is an omitted optional input."""
        out = output or self._fresh(op_type)
        self.nodes.append(helper.make_node(op_type, list(inputs), [out], name=out, **attributes))
        return out

    def ops(self, op_type: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Append a node of ``count`` outputs and return their names."""
        outs = [self._fresh(op_type) for _ in range(count)]
        self.nodes.append(helper.make_node(op_type, list(inputs), outs, name=outs[0], **attributes))
        return outs

    def constant(self, array: np.ndarray) -> str:
        """A constant; equal ones are stored once per scope."""
        key = (str(array.dtype), array.shape, array.tobytes())
        scope: Body | None = self
        while scope is not None:  # an If branch sees the values of the scopes around it
            if key in scope._constants:
                return scope._constants[key]
            scope = scope._parent
        name = self._fresh("const")
        tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        self.nodes.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
        self._constants[key] = name
        return name

    def ints(self, *values: int) -> str:
        """A 1-D int64 constant."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        """A scalar int64 constant."""
        return self.constant(np.array(value, np.int64))

    def branch(self) -> Body:
        """An empty body for one branch of an ``If`` in this one."""
        return Body(self.opset, self)

    def graph(self, name: str, output: str, element_type: int) -> GraphProto:
        """This body as a branch without inputs and with one output of unknown shape."""
        value: ValueInfoProto = helper.make_tensor_value_info(output, element_type, None)
        return helper.make_graph(_read(self.nodes, [output]), name, [], [value])

    def function(
        self, op_type: str, overload: str, inputs: Iterable[str], output: str | Sequence[str],
        attributes: Iterable[str], doc: str,
    ) -> FunctionProto:  # fmt: skip
        """This body as a model-local function in our domain; ``output`` is the value, or the values, that it gives."""
        outputs = [output] if isinstance(output, str) else list(output)
        function = helper.make_function(
            DOMAIN,
            op_type,
            list(inputs),
            outputs,
            _read(self.nodes, outputs),
            [helper.make_opsetid("", self.opset)],
            sorted(attributes),
        )
        function.overload = overload
        function.doc_string = doc
        return function


def in_graph(body: Body, prefix: str, given: Mapping[str, str]) -> list[NodeProto]:
    """The body's nodes for a graph, where names are the model's: those of ``given`` values become the graph's, all
    others begin anew behind ``prefix``.
    """
    found = []
    for made in body.nodes:
        copy = NodeProto()
        copy.CopyFrom(made)
        copy.name = f"{prefix}/{made.name}"
        for values in (copy.input, copy.output):
            for i, name in enumerate(values):
                if name:
                    values[i] = given.get(name) or f"{prefix}/{name}"
        found.append(copy)
    return found


def _read(nodes: Iterable[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """``nodes`` without the constants that nobody reads: runtimes warn of each."""
    found = list(nodes)
    read = {*outputs, *_inputs(found)}
    return [n for n in found if n.op_type != "Constant" or n.output[0] in read]


def _inputs(nodes: Iterable[NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _inputs(attribute.g.node)
                yield from (o.name for o in attribute.g.output)


def overload_of(configuration: Mapping[str, Any]) -> str:
    """A short stable hash: nodes with equal configurations share one function."""
    text = json.dumps(configuration, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def attribute_names(node: NodeProto) -> list[str]:
    """Names of the attributes that ``node`` carries."""
    return [a.name for a in node.attribute if a.type != AttributeProto.UNDEFINED]
