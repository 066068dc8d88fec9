"""Follows tokens through operators that move them, and through those that work on each token alone.

An operator works on each token alone where every element of its output depends on elements of one token, and on
constants that are the same for all tokens: then it gives the same for tokens in any order.
"""

from __future__ import annotations

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.gathers.origins import MOVES, Coordinate, Mover, Origins
from attncompile.passes.detect.views import Atoms, Axes, Axis
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.load import node_inputs

_ELEMENTWISE = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "PRelu", "Clip", "Cast", "Sqrt", "Reciprocal", "Neg",
    "Abs", "Exp", "Log", "Erf", "Tanh", "Sigmoid", "Relu", "LeakyRelu", "Gelu", "Elu", "Selu", "Swish", "Softplus",
    "HardSwish", "HardSigmoid", "Mish",
})  # fmt: skip
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization"})
_REDUCTIONS = frozenset({"ReduceL2", "ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceMax", "ReduceMin"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
TOKEN_WISE = _ELEMENTWISE | _NORMS | _REDUCTIONS | _PRODUCTS


class Follower(Mover):
    """Follows one source forward; its coordinates are those of the tokens alone. Channels may be made into others."""

    def sources(self, value: str) -> list[str]:
        """All data that ``value`` is made of."""
        return sources_of(self._index, value)

    def scaled(self, node: NodeProto, output: str, sources: list[str]) -> float:
        """Numbers are no concern here: the nodes that multiply stay."""
        return 1.0

    def tokens(self, value: str) -> set[int]:
        """The atoms of ``value`` that its tokens run over."""
        return {a for c in self.origins(value).coordinates for a in c.on_leaves(self._atoms).atoms}

    def leaves(self, value: str) -> Axes:
        """The axes of ``value`` in atoms that are not split any further."""
        return tuple(self._atoms.leaves(axis) for axis in self.origins(value).axes)

    def step(self, node: NodeProto, output: str) -> Origins:
        """The origins of one output of ``node``.

        Raises:
            Unsupported: it looks at several tokens at once, or treats them differently.
        """
        if node.op_type in MOVES:
            return super().step(node, output)
        data = [v for v in dict.fromkeys(node_inputs(node)) if self._index.data_inputs(v)]
        coordinates = self._same(node, data)
        if node.op_type in _ELEMENTWISE:
            return Origins(self._elementwise(node, data, output), coordinates)
        if data != [node.input[0]] or output != node.output[0]:
            raise _refused(node, "reads more than one value made from tokens")
        axes = self._known[data[0]].axes
        if node.op_type in _PRODUCTS:
            return Origins(self._product(node, axes), coordinates)
        if node.op_type in _NORMS:
            first = next((a.i for a in node.attribute if a.name == "axis"), -1) % len(axes)
            last = len(axes) if node.op_type != "LpNormalization" else first + 1
            self._alone(node, axes[first:last])
            return Origins(axes, coordinates)
        return Origins(self._reduced(node, axes), coordinates)

    def _same(self, node: NodeProto, data: list[str]) -> tuple[Coordinate, ...]:
        """The tokens of all data inputs, which must be the same at the same places."""
        first, *others = [
            tuple(c.on_leaves(self._atoms) for c in self._known[v].coordinates) for v in data
        ]  # fmt: skip
        for other in others:
            for a, b in zip(first, other, strict=True):
                if a.atoms != b.atoms or not (a.array == b.array).all():
                    raise _refused(node, "joins values of different tokens")
        return first

    def _token_atoms(self) -> set[int]:
        return {a for o in self._known.values() for c in o.coordinates for a in c.on_leaves(self._atoms).atoms}

    def _alone(self, node: NodeProto, axes: Axes) -> None:
        """None of ``axes`` may run over tokens: ``node`` combines what lies along them."""
        tokens = self._token_atoms()
        if any(a in tokens for axis in axes for a in self._atoms.leaves(axis)):
            raise _refused(node, "combines several tokens")

    def _elementwise(self, node: NodeProto, data: list[str], output: str) -> Axes:
        atoms, world = self._atoms, self._world
        shape, tokens = _shape(world, output), self._token_atoms()
        constants = [_shape(world, v) for v in node_inputs(node) if v not in data]
        out: list[Axis] = []
        for back in range(len(shape), 0, -1):
            axis: Axis = ()
            for value in data:
                axes = self._known[value].axes
                own = atoms.leaves(axes[-back]) if len(axes) >= back else ()
                if own and axis and own != axis and tokens & {*own, *axis}:  # channels may be made anew
                    raise _refused(node, "joins different tokens")
                axis = axis or own
            if any(a in tokens for a in axis) and any(len(c) >= back and c[-back] != 1 for c in constants):
                raise _refused(node, "treats tokens differently by where they stand")
            out.append(axis or atoms.new(shape[-back]))
        return tuple(out)

    def _product(self, node: NodeProto, axes: Axes) -> Axes:
        """``axes`` after a product with a constant matrix from the right."""
        world = self._world
        weights = _shape(world, node.input[1])
        numbers = {a.name: a.i for a in node.attribute}
        if len(weights) != 2 or len(axes) < 2 or numbers.get("transA"):
            raise _refused(node, "is not a product with one matrix from the right")
        self._alone(node, axes[-1:])
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
            added = _shape(world, node.input[2])
            if len(added) > 1 and added[-2] != 1:
                raise _refused(node, "treats tokens differently by where they stand")
        return (*axes[:-1], self._atoms.new(weights[0] if numbers.get("transB") else weights[1]))

    def _reduced(self, node: NodeProto, axes: Axes) -> Axes:
        if len(node.input) < 2 or not node.input[1]:
            raise _refused(node, "combines several tokens")
        over = {int(a) % len(axes) for a in self._world.value(node.input[1]).reshape(-1)}
        self._alone(node, tuple(axes[a] for a in over))
        keeps = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        return tuple(() if i in over else axis for i, axis in enumerate(axes) if keeps or i not in over)


def sources_of(index: GraphIndex, value: str) -> list[str]:
    """The data that ``value`` is made of by a node that moves tokens or works on each alone; none for another node."""
    node = index.producer.get(value)
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in MOVES | TOKEN_WISE:
        return []
    data = [v for v in dict.fromkeys(node_inputs(node)) if index.data_inputs(v)]
    steered = node.op_type in MOVES - {"Concat"} and data != [node.input[0]]  # where to is no constant
    meets = node.op_type in _PRODUCTS and len(data) > 1  # attention itself: nothing is followed through it
    return [] if steered or meets else data


def tokens_of(world: World, source: str) -> tuple[Atoms, Axes]:
    """Fresh atoms, and the axes of ``source`` in them: all but the last are those of tokens."""
    atoms = Atoms()
    return atoms, tuple(atoms.new(size) for size in world.shapes[source])


def _shape(world: World, value: str) -> tuple[int, ...]:
    if value not in world.shapes:
        raise Unsupported("shape-unknown", f"the shape of '{value}' is not known")
    return world.shapes[value]


def _refused(node: NodeProto, reason: str) -> Unsupported:
    return Unsupported("token-wise", f"{node.op_type} '{node.output[0]}' {reason}")
