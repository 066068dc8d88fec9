"""Writes attention operators of ``com.microsoft`` out: what they hold becomes nodes and values of the graph.

``Attention`` becomes its projection and a ``MultiHeadAttention``, packed operands are split, biases added, and a mask
of integers becomes what it adds to the scores. What is left is an operator that does nothing to its operands. Names
follow from those of the node, and the node itself keeps its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.passes.detect.fused import attributes_of, hidden_sizes, inputs_of, shape_of, whole
from attncompile.passes.evaluate import World
from attncompile.passes.index import graph_at, graphs_within, local_names

DOMAIN = "com.microsoft"
_FILTER = -10000.0
"""What the operators add to masked scores where ``mask_filter_value`` does not say."""


def write_out(proto: ModelProto, world: World, outputs: Collection[str]) -> None:
    """Writes out, in ``proto``, the operators of the world's graph whose first named outputs are in ``outputs``.
    Detection said of each that it can be (``Fused``).
    """
    graph = graph_at(proto.graph, world.index.scope)
    names = {name for inner in graphs_within(proto.graph) for name in local_names(inner)}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if next((o for o in node.output if o), "") in outputs:
            writer = _Writer(node, world, names)
            nodes += writer.write()
            graph.initializer.extend(writer.stored)
        else:
            nodes.append(node)
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)


class _Writer:
    """One node: ``made`` are the nodes in its place, ``stored`` their constants."""

    def __init__(self, node: NodeProto, world: World, names: set[str]) -> None:
        self.node, self.world, self.names = node, world, names
        self.given = inputs_of(node)
        self.made: list[NodeProto] = []
        self.stored: list[TensorProto] = []
        self.base = node.name or next(o for o in node.output if o)

    def write(self) -> list[NodeProto]:
        {"Attention": self._attention, "MultiHeadAttention": self._multi_head, "GroupQueryAttention": self._grouped}[
            self.node.op_type
        ]()
        return self.made

    def _attention(self) -> None:
        """Input, weights, bias, mask_index, past, attention_bias; outputs: output, present."""
        x, weights, bias, mask, past, added = self.given[:6]
        rows = self._op("MatMul", [x, weights], "projected")
        rows = self._op("Add", [rows, bias], "biased") if bias else rows
        sizes = hidden_sizes(self.node) or [shape_of(self.world, weights)[1] // 3] * 3
        query, key, value = self._split(rows, 2, sizes)
        pasts = [self._op("Squeeze", [p, self._ints([0])], f"past_{n}")
                 for n, p in zip(("key", "value"), self._split(past, 0, [1, 1], "past"), strict=True)
                 ] if past else ["", ""]  # fmt: skip
        mask, added = self._mask(mask, added, x, [(x, 1), *([(past, 3)] if past else [])])
        outputs = [self.node.output[0]]
        present = self.node.output[1] if len(self.node.output) > 1 else ""
        if present:
            outputs += [self._name("present_key"), self._name("present_value")]
        kept = ("num_heads", "unidirectional", "mask_filter_value", "scale")
        self._core("MultiHeadAttention", [query, key, value, "", mask, added, *pasts], outputs, kept)
        if present:
            both = [self._op("Unsqueeze", [o, self._ints([0])], f"stacked_{w}")
                    for o, w in zip(outputs[1:], ("key", "value"), strict=True)]  # fmt: skip
            self.made.append(helper.make_node("Concat", both, [present], name=f"{self.base}/present", axis=0))

    def _multi_head(self) -> None:
        """Query, key, value, bias, key_padding_mask, attention_bias, past_key, past_value."""
        query, key, value, bias, mask, added = self.given[:6]
        heads, like = whole(self.node, "num_heads"), query
        if not key:
            query, key, value = self._unpacked(query, 3)
        elif not value:
            key, value = self._unpacked(key, 2)
        if bias:
            shapes = [shape_of(self.world, v) for v in self.given[:3] if v]
            dim = next((s[4] for s in shapes if len(s) == 5), 0)  # of what is packed
            widths = [s[2] if len(s) == 3 else heads * dim for s in shapes]
            widths += [heads * dim] * (3 - len(widths))
            parts = self._split(bias, 0, widths, "bias")
            query, key, value = (
                self._op("Add", [x, b], f"biased_{n}")
                for x, b, n in zip((query, key, value), parts, ("query", "key", "value"), strict=True)
            )
        past = [(self.given[6], 2)] if self.given[6] else []
        own = (key, 2 if self.given[1] and len(shape_of(self.world, self.given[1])) == 4 else 1)
        mask, added = self._mask(mask, added, like, [own, *past])
        inputs = [query, key, value, "", mask, added, *self.given[6:8]]
        self._core("MultiHeadAttention", inputs, self.node.output, tuple(attributes_of(self.node)))

    def _grouped(self) -> None:
        """Query, key, value, then what is passed on."""
        heads, shared = whole(self.node, "num_heads"), whole(self.node, "kv_num_heads")
        dim = shape_of(self.world, self.given[0])[2] // (heads + 2 * shared)
        parts = self._split(self.given[0], 2, [heads * dim, shared * dim, shared * dim])
        inputs = [*parts, *self.node.input[3:]]
        self._core("GroupQueryAttention", inputs, self.node.output, tuple(attributes_of(self.node)))

    def _unpacked(self, value: str, parts: int) -> Sequence[str]:
        """[batch, sequence, heads, parts, dim] as ``parts`` values [batch, sequence, heads * dim]."""
        found = []
        for n, part in enumerate(self._split(value, 3, [1] * parts)):
            part = self._op("Squeeze", [part, self._ints([3])], f"part_{n}_heads")
            found.append(self._op("Reshape", [part, self._ints([0, 0, -1])], f"part_{n}_flat"))
        return found

    def _mask(self, mask: str, added: str, like: str, keys: Sequence[tuple[str, int]]) -> tuple[str, str]:
        """key_padding_mask and attention_bias: integers [batch, keys] or lengths [batch] become a part of the second.
        ``like`` holds as many rows as there are queries.
        """
        if not mask or len(shape_of(self.world, mask)) > 2:
            return mask, added
        kind = helper.tensor_dtype_to_np_dtype(self.world.types[like])
        attribute = attributes_of(self.node).get("mask_filter_value")
        fill = attribute.f if attribute is not None else _FILTER
        visible = self._visible(mask, keys)
        visible = self._op("Unsqueeze", [visible, self._ints([1, 2])], "visible_keys")
        numbers = [self._constant(np.array(n, kind), w) for n, w in ((0.0, "seen"), (fill, "hidden"))]
        bias = self._op("Where", [visible, *numbers], "padding")
        if added:
            return "", self._op("Add", [added, bias], "attention_bias")
        queries = self._op("Shape", [like], "queries", start=1, end=2)
        one = self._ints([1])
        shape = self._op("Concat", [one, one, queries, one], "rows", axis=0)
        return "", self._op("Expand", [bias, shape], "attention_bias")

    def _visible(self, mask: str, keys: Sequence[tuple[str, int]]) -> str:
        """Bool [batch, keys]: what is not 0 in a mask, or the keys before an end. ``keys`` are values and axes whose
        sizes together are the number of keys.
        """
        if len(shape_of(self.world, mask)) == 2:
            kind = helper.tensor_dtype_to_np_dtype(self.world.types[mask])
            return self._op("Greater", [mask, self._constant(np.zeros((), kind), "zero")], "visible")
        counts = [self._op("Shape", [v], "count", start=axis, end=axis + 1) for v, axis in keys]
        total = counts[0] if len(counts) == 1 else self._op("Add", counts, "total")
        total = self._op("Squeeze", [total, self._ints([0])], "number")
        first, step = (self._constant(np.array(n, np.int64), w) for n, w in ((0, "first"), (1, "step")))
        places = self._op("Range", [first, total, step], "places")
        lengths = self._op("Cast", [mask], "lengths", to=TensorProto.INT64)
        return self._op("Less", [places, self._op("Unsqueeze", [lengths, self._ints([1])], "ends")], "visible")

    def _core(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], kept: Collection[str]) -> None:
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        node = helper.make_node(kind, inputs, outputs, name=self.node.name, domain=DOMAIN)
        node.attribute.extend(a for n, a in attributes_of(self.node).items() if n in kept)
        self.made.append(node)

    def _split(self, value: str, axis: int, sizes: Sequence[int], word: str = "part") -> list[str]:
        outputs = [self._name(f"{word}_{i}") for i in range(len(sizes))]
        node = helper.make_node("Split", [value, self._ints(sizes)], outputs, name=f"{self.base}/{word}", axis=axis)
        self.made.append(node)
        return outputs

    def _op(self, kind: str, inputs: Sequence[str], word: str, **attributes: Any) -> str:
        out = self._name(word)
        self.made.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def _ints(self, values: Sequence[int]) -> str:
        return self._constant(np.array(values, np.int64), "shape")

    def _constant(self, array: np.ndarray, word: str) -> str:
        tensor = numpy_helper.from_array(array, self._name(word))
        self.stored.append(tensor)
        return str(tensor.name)

    def _name(self, word: str) -> str:
        name, n = f"{self.base}/{word}", 0
        while name in self.names:
            n += 1
            name = f"{self.base}/{word}_{n}"
        self.names.add(name)
        return name
