"""A model at concrete sizes: every shape, and every value that depends on nothing but constants and shapes.

Exporters compute scales, reshapes and masks in the graph from ``Shape`` nodes. Binding each dynamic dimension to a
number turns all of that into constants: shapes come from ONNX's own inference node by node, small values are
evaluated on the way, large ones (masks) on demand by ONNX Runtime on the slice of the graph that makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from attncompile.core.errors import Unsupported
from attncompile.core.sums import size_of
from attncompile.passes.index import GraphIndex, symbol_of
from attncompile.passes.infer import SMALL, Facts
from attncompile.passes.load import node_inputs, tensor_value
from attncompile.passes.sweep import Sweep

__all__ = ["MAX_ELEMENTS", "SMALL", "GraphIndex", "World", "slice_model", "symbol_of"]

MAX_ELEMENTS = 1 << 27
"""A value above this (a mask of about 11,500 tokens squared) is not evaluated."""


class World:
    """The model with its symbolic dimensions bound to numbers.

    Attributes:
        shapes: value -> shape. Absent where inference cannot tell (values after unknown custom ops).
        types: value -> ONNX element type.
        traced: what the detector found out about a value, so that shared values are followed once.
        kept: what other parts found out once, by their own names. It lives as long as the world: a table of worlds
            elsewhere, whose entries refer to their worlds, would never let go of them.

    Worlds of one model at one binding share what was inferred, those of its bodies included.
    """

    def __init__(self, index: GraphIndex, binding: Mapping[str, int]) -> None:
        self.index = index
        self.binding = dict(binding)
        self.traced: dict[str, object] = {}
        self.kept: dict[str, object] = {}
        self._large: dict[str, np.ndarray] = {}
        key = (index.scope, tuple(sorted(binding.items())))
        if key not in index.shared.sweeps:
            index.shared.sweeps[key] = self._inferred()
        inferred: _Inferred = index.shared.sweeps[key]
        self._sweep, self.shapes, self.types, self._known = inferred

    def without_idle(self, also: frozenset[str] = frozenset()) -> World:
        """The same sizes over an index in which nodes that change nothing are stepped over: Identity, and a Cast to the
        type that its input has; and the nodes that make ``also``.
        """
        idle = frozenset(n.output[0] for n in self.index.nodes if self._is_idle(n)) | also
        return World.over(self, self.index.stepping_over(idle)) if idle else self

    def _is_idle(self, node: NodeProto) -> bool:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Identity", "Cast") or not node.output[0]:
            return False
        kind, before = self.types.get(node.output[0]), self.types.get(node.input[0])
        return node.op_type == "Identity" or (kind is not None and kind == before)

    @staticmethod
    def over(world: World, index: GraphIndex) -> World:
        """``world`` as seen through another index of the same model."""
        other = object.__new__(World)
        other.__dict__.update(world.__dict__)
        other.index, other.traced, other.kept = index, {}, {}
        return other

    def within(self, scope: str) -> World:
        """The same sizes, as seen from inside the body that ``scope`` names; this world for an empty one."""
        return World(self.index.at(scope), self.binding) if scope != self.index.scope else self

    def value(self, name: str) -> np.ndarray:
        """The value of ``name``, which must depend on shapes and constants only.

        Raises:
            Unsupported: it depends on an input's data, is too large, or cannot be evaluated.
        """
        if name in self._known:
            return self._known[name]
        if name in self._large:
            return self._large[name]
        if name in self.index.initializers:
            return self._initializer(name)
        data = self.index.data_inputs(name)
        if data:
            raise Unsupported("data-dependent", f"'{name}' depends on the data of input {', '.join(sorted(data))}")
        self._large[name] = self._run_slice(name)
        return self._large[name]

    def forget(self, names: Iterable[str]) -> None:
        """Drops these values, if they are large ones that can be computed again."""
        for name in names:
            self._large.pop(name, None)

    def scalar(self, name: str) -> float | None:
        """The value if it has exactly one element and is computed from constants and shapes, else None."""
        shape = self.shapes.get(name)
        if shape is None or int(np.prod(shape)) != 1 or self.index.data_inputs(name):
            return None
        array = self.value(name)
        return float(array.reshape(-1)[0]) if array.dtype.kind in "fiuV" else None

    def is_stored(self, name: str) -> bool:
        """Whether ``known_initializers`` has a value for ``name``: it need not be computed."""
        return name in self._known or name in self.index.initializers

    def _initializer(self, name: str) -> np.ndarray:
        tensor = self.index.initializers[name]
        if int(np.prod(tensor.dims)) > MAX_ELEMENTS:
            raise Unsupported("too-large", f"constant '{name}' has {int(np.prod(tensor.dims))} elements")
        array = tensor_value(tensor, self.index.folder)
        self._large[name] = array
        return array

    def _inferred(self) -> _Inferred:
        """Everything inferred at this binding, by value."""
        index = self.index
        if index.outer is None or index.body is None:
            sweep = Sweep(index.shared.inference, index.shared.plan, self._bound_inputs())
            return _spread(sweep, {}, {}, {})
        outer = World(index.outer, self.binding)
        sweep = outer._sweep.bodies[index.body.key, index.body.attribute]
        return _spread(sweep, dict(outer.shapes), dict(outer.types), dict(outer._known))

    def _bound_inputs(self) -> dict[str, Facts]:
        bound = {}
        for info in self.index.inputs.values():
            kind = TypeProto()
            kind.CopyFrom(info.type)
            for axis, dim in enumerate(kind.tensor_type.shape.dim if kind.HasField("tensor_type") else ()):
                symbol = symbol_of(info.name, axis, dim)
                size = size_of(symbol, self.binding) if symbol is not None else None
                if size is not None:
                    dim.dim_value = size
            bound[info.name] = self.index.shared.inference.facts(kind)
        return bound

    def _run_slice(self, name: str) -> np.ndarray:
        shape = self.shapes.get(name)
        if shape is not None and int(np.prod(shape)) > MAX_ELEMENTS:
            raise Unsupported("too-large", f"'{name}' has shape {list(shape)} at {self.binding}")
        model, _ = slice_model(self, [name])
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return np.asarray(session.run([name], {})[0])
        except Exception as first:  # ONNX Runtime raises its own untyped errors, and has no kernels for bfloat16
            try:
                return np.asarray(next(iter(ReferenceEvaluator(model).run([name], {}))))
            except Exception:
                reason = str(first)[:200]
        raise Unsupported("not-evaluated", f"'{name}' could not be evaluated: {reason}")

    def known_initializers(self, names: set[str]) -> list[TensorProto]:
        """Initializers (weights loaded) or evaluated small values, for the names that have one."""
        result = []
        for name in sorted(names):
            if name in self._known:
                result.append(numpy_helper.from_array(np.asarray(self._known[name], order="C"), name))
            elif name in self.index.initializers:
                tensor = TensorProto()
                tensor.CopyFrom(self.index.initializers[name])
                if tensor.data_location == TensorProto.EXTERNAL:
                    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.index.folder))
                    tensor.data_location = TensorProto.DEFAULT
                    del tensor.external_data[:]
                result.append(tensor)
        return result


_Inferred = tuple[Sweep, dict[str, tuple[int, ...]], dict[str, int], dict[str, np.ndarray]]


def _spread(
    sweep: Sweep, shapes: dict[str, tuple[int, ...]], types: dict[str, int], known: dict[str, np.ndarray]
) -> _Inferred:
    """The facts of ``sweep`` added to those of the graphs around it."""
    for name, facts in sweep.facts.items():
        types[name] = facts.elem_type
        if facts.shape is not None:
            shapes[name] = facts.shape
        if facts.known is not None:
            known[name] = facts.known
    return sweep, shapes, types, known


def slice_model(world: World, outputs: list[str]) -> tuple[ModelProto, list[str]]:
    """A model that computes ``outputs`` from constants and shapes alone; values already known become initializers.

    Returns the model and the graph inputs it still needs (empty for shape-only values).
    """
    index = world.index
    nodes: list[NodeProto] = []
    taken: set[int] = set()
    for output in outputs:
        for node in index.slice_nodes(output):
            if id(node) not in taken and not all(o in world._known for o in node.output if o):
                taken.add(id(node))
                nodes.append(node)
    # Nodes needed only by values that are already known fall away.
    live = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if live & set(node.output):
            kept.append(node)
            live |= set(node_inputs(node))
    kept.reverse()
    made = {o for n in kept for o in n.output}
    reads = {v for n in kept for v in node_inputs(n)} | set(outputs)
    initializers = world.known_initializers(reads - made)
    missing = sorted(reads - made - {t.name for t in initializers})
    graph = helper.make_graph(
        kept,
        "slice",
        [index.inputs[m] for m in missing if m in index.inputs],
        [onnx.ValueInfoProto(name=o) for o in outputs],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=index.model.proto.opset_import, ir_version=10)
    model.functions.extend(index.model.proto.functions)
    return model, missing
