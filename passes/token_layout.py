"""Which axes of which values are the tokens of an image or a video, followed from its input through the graph.

Every axis is a product of atoms (see ``detect.views``). The axes of image inputs and of convolutions' outputs are
places; a Reshape splits them into patches and joins patches into tokens, a Concat puts other tokens around them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from onnx import NodeProto, TensorProto

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.passes.detect.scores import FLOATS
from attncompile.passes.detect.views import VIEW_OPS, Atoms, Axes, Axis, forward
from attncompile.passes.evaluate import GraphIndex, World

_FIRST_ONLY = frozenset({
    "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "InstanceNormalization",
    "GroupNormalization", "BatchNormalization", "RotaryEmbedding", "Attention", "MultiHeadAttention",
    "GroupQueryAttention", "QuantizeLinear", "DequantizeLinear", "CastLike", "Clip", "Dropout",
})  # fmt: skip
"""Operators whose output has a place where their first input has it. Attention gives one row for each query."""

_ELEMENTWISE = _FIRST_ONLY | frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Where", "Min", "Max", "Sqrt", "Reciprocal", "Neg", "Abs", "Exp", "Log", "Erf",
    "Tanh", "Sigmoid", "Relu", "LeakyRelu", "PRelu", "Gelu", "Elu", "Selu", "Silu", "Swish", "Softplus", "HardSwish",
    "HardSigmoid", "Cast", "Cos", "Sin", "Softmax", "LpNormalization", "FastGelu", "QuickGelu", "BiasGelu",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
})  # fmt: skip
"""Operators whose output has a place where any input has it."""

_PLACING = frozenset({"Conv", "MaxPool", "AveragePool", "LpPool", "Resize", "Upsample", "SpaceToDepth", "ConvInteger"})


@dataclass(frozen=True, slots=True)
class _Place:
    """An atom that is one axis of ``source``, the ``axis``-th."""

    source: str
    axis: int


@dataclass(frozen=True, slots=True)
class _Joined:
    """An atom that is other tokens, then a grid's, then others."""

    prefix: int
    inner: Axis
    suffix: int


class TokenLayout:
    """The axes of every value that an image or a video reaches, at the sizes of ``world``."""

    def __init__(self, index: GraphIndex, world: World) -> None:
        self.world = world
        self.atoms = Atoms()
        self.axes: dict[str, Axes] = {}
        self._places: dict[int, _Place] = {}
        self._joined: dict[int, _Joined] = {}
        self._conflicts: dict[int, str] = {}
        self._made: dict[object, Axis] = {}
        self._outermost: tuple[tuple[int, int], dict[int, int]] = ((-1, -1), {})
        for name in index.inputs:
            shape = world.shapes.get(name, ())
            if len(shape) in (4, 5) and world.types.get(name) in (*FLOATS, TensorProto.UINT8):
                evidence = f"patches of input '{name}' give"
                places = [self._place((name, i), size, evidence, i) for i, size in enumerate(shape[1:], 1)]
                self.axes[name] = (self.atoms.new(shape[0]), *places)
        for node in index.order:
            self._follow(node)

    def grid(self, value: str, axis: int) -> TokenGrid | str | None:
        """The grid that this axis of ``value`` enumerates; why there is none where two contradict; None without one."""
        found = self.axes.get(value)
        if found is None:
            return None
        leaves = self.atoms.leaves(found[axis])
        for leaf in leaves:
            if leaf in self._conflicts:
                return self._conflicts[leaf]
        prefix, inner, suffix = 0, leaves, 0
        if len(leaves) == 1 and leaves[0] in self._joined:
            joined = self._joined[leaves[0]]
            prefix, inner, suffix = joined.prefix, joined.inner, joined.suffix
        grid = self._grid(inner)
        if grid is None:
            return None
        shape, source = grid
        return TokenGrid(shape, prefix, suffix, f"{source} {'x'.join(map(str, shape))}")

    @cached_property
    def grids(self) -> tuple[TokenGrid, ...]:
        """All grids that some axis of some value enumerates, sorted."""
        found = {self.grid(value, axis) for value, axes in self.axes.items() for axis in range(len(axes))}
        return tuple(sorted((g for g in found if isinstance(g, TokenGrid)), key=lambda g: (g.tokens, repr(g))))

    def _grid(self, axis: Axis) -> tuple[tuple[int, ...], str] | None:
        """Sizes and evidence of an axis that is a product of the outer parts of two or three places, else None."""
        leaves = list(self.atoms.leaves(axis))
        sizes: list[int] = []
        seen: list[_Place] = []
        while leaves:
            place = self._outer().get(leaves[0])
            if place is None:
                return None
            own = self.atoms.leaves((place,))
            count = next(
                (i for i, (a, b) in enumerate(zip(own, leaves, strict=False)) if a != b), min(len(own), len(leaves))
            )
            sizes.append(prod(self.atoms.sizes[a] for a in leaves[:count]))
            seen.append(self._places[place])
            del leaves[:count]
        if len(sizes) not in (2, 3) or len(set(seen)) != len(seen):
            return None
        return tuple(sizes), seen[-1].source

    def _outer(self) -> dict[int, int]:
        """The outermost leaf of each place, and the place."""
        state = (len(self._places), len(self.atoms.children))
        if self._outermost[0] != state:
            self._outermost = state, {self.atoms.leaves((a,))[0]: a for a in self._places}
        return self._outermost[1]

    def _has_grid(self, axis: Axis) -> bool:
        leaves = self.atoms.leaves(axis)
        if len(leaves) == 1 and (leaves[0] in self._joined or leaves[0] in self._conflicts):
            return True
        return self._grid(axis) is not None

    # Making axes.

    def _place(self, key: object, size: int, source: str, axis: int) -> Axis:
        """The axis made for ``key``: the same one for the same key."""
        if key not in self._made:
            self._made[key] = self.atoms.new(size)
            for atom in self._made[key]:
                self._places[atom] = _Place(source, axis)
        return self._made[key]

    def _join(self, prefix: int, inner: Axis, suffix: int) -> Axis:
        """``inner`` between other tokens."""
        leaves = self.atoms.leaves(inner)
        if len(leaves) == 1 and leaves[0] in self._joined:
            within = self._joined[leaves[0]]
            prefix, inner, suffix = prefix + within.prefix, within.inner, suffix + within.suffix
        if prefix == suffix == 0:
            return inner
        key = ("joined", prefix, self.atoms.leaves(inner), suffix)
        if key not in self._made:
            self._made[key] = self.atoms.new(prefix + self.atoms.size(inner) + suffix)
            self._joined[self._made[key][0]] = _Joined(prefix, inner, suffix)
        return self._made[key]

    def _conflict(self, size: int, reason: str) -> Axis:
        axis = self.atoms.new(size)
        for atom in axis:
            self._conflicts[atom] = reason
        return axis

    # Following nodes.

    def _follow(self, node: NodeProto) -> None:
        op, out = node.op_type, node.output[0]
        shape = self.world.shapes.get(out)
        if shape is None or (op != "Conv" and not any(i in self.axes for i in node.input)):
            return
        found: Axes | None = None
        if op in VIEW_OPS and node.input[0] in self.axes:
            try:
                found = forward(self.world, self.atoms, node, self.axes[node.input[0]])
            except Unsupported:
                return
        elif op in _ELEMENTWISE:
            inputs = node.input[:1] if op in _FIRST_ONLY else node.input
            found = self._elementwise(node, list(inputs), shape)
        elif op in _PLACING:
            found = self._convolved(node, shape)
        elif op in ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "Einsum"):
            found = self._product(node, shape)
        elif op == "Concat":
            found = self._concat(node, shape)
        elif op in ("Slice", "Split"):
            self._cut(node)
        elif op == "Gather" and node.input[0] in self.axes:
            axis = _axis(node, 0) % len(self.axes[node.input[0]])
            rank = len(self.world.shapes.get(node.input[1], ()))
            before = self.axes[node.input[0]]
            fresh = tuple(self.atoms.new(s) for s in shape[axis : axis + rank])
            found = (*before[:axis], *fresh, *before[axis + 1 :])
        if found is not None and len(found) == len(shape):
            self.axes[out] = found

    def _elementwise(self, node: NodeProto, inputs: list[str], shape: tuple[int, ...]) -> Axes:
        out: list[Axis] = []
        for back in range(len(shape), 0, -1):
            size = shape[-back]
            options = [self.axes[i][-back] for i in inputs if i in self.axes and len(self.axes[i]) >= back]
            options = [a for a in options if self.atoms.size(a) == size]
            grids = [a for a in options if self._has_grid(a)]
            different = list(dict.fromkeys(self.atoms.leaves(a) for a in grids))
            if len(different) > 1:
                out.append(self._conflict(size, self._words(node, grids)))
            else:
                out.append(grids[0] if grids else options[0] if options else self.atoms.new(size))
        return tuple(out)

    def _words(self, node: NodeProto, axes: list[Axis]) -> str:
        names = []
        for axis in dict.fromkeys(self.atoms.leaves(a) for a in axes):
            joined = self._joined.get(axis[0]) if len(axis) == 1 else None
            grid = self._grid(joined.inner if joined is not None else axis)
            ends = (joined.prefix, joined.suffix) if joined is not None else (0, 0)
            shape, source = grid if grid is not None else ((), "an unclear one")
            names.append(f"{ends[0]}+{'x'.join(map(str, shape))}+{ends[1]} ({source})")
        return f"{node.op_type} '{node.output[0]}' combines tokens of two layouts: {' and '.join(names)}"

    def _convolved(self, node: NodeProto, shape: tuple[int, ...]) -> Axes | None:
        """Places stay where a convolution moves by one and keeps the size; else its output has places of its own."""
        if len(shape) not in (4, 5):
            return None
        before = self.axes.get(node.input[0])
        size = self.world.shapes.get(node.input[0])
        strides = next((list(a.ints) for a in node.attribute if a.name == "strides"), [])
        if before is not None and size is not None and size[2:] == shape[2:] and set(strides) <= {1}:
            return (before[0], self.atoms.new(shape[1]), *before[2:])
        key = tuple(self.atoms.leaves(a) for a in before[2:]) if before is not None else node.input[0]
        kernel = next((list(a.ints) for a in node.attribute if a.name == "kernel_shape"), [])
        word = "patch embedding" if kernel and kernel == strides and max(kernel) > 1 else node.op_type
        source = f"{word} '{node.name or node.output[0]}' gives"
        places = [self._place((key, shape[2:], i), n, source, i) for i, n in enumerate(shape[2:], 2)]
        batch = before[0] if before is not None else self.atoms.new(shape[0])
        return (batch, self.atoms.new(shape[1]), *places)

    def _product(self, node: NodeProto, shape: tuple[int, ...]) -> Axes | None:
        if node.op_type == "Einsum":
            return self._einsum(node, shape)
        left, right = (self.axes.get(i) for i in node.input[:2])
        if node.op_type == "Gemm":
            if left is None or any(a.i for a in node.attribute if a.name == "transA"):
                return None
            return (left[0], self.atoms.new(shape[1]))
        rows = left[-2] if left is not None and len(left) > 1 else self.atoms.new(shape[-2]) if len(shape) > 1 else ()
        columns = right[-1] if right is not None else self.atoms.new(shape[-1])
        outer = self._elementwise(node, list(node.input[:2]), shape)[:-2]
        return (*outer, rows, columns)

    def _einsum(self, node: NodeProto, shape: tuple[int, ...]) -> Axes | None:
        equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
        if "..." in equation or "->" not in equation:
            return None
        terms, out = equation.split("->")
        known: dict[str, Axis] = {}
        for value, term in zip(node.input, terms.split(","), strict=True):
            for letter, axis in zip(term, self.axes.get(value, ()), strict=False):
                if letter not in known or self._has_grid(axis):
                    known[letter] = axis
        return tuple(
            known[x] if x in known and self.atoms.size(known[x]) == n else self.atoms.new(n)
            for x, n in zip(out, shape, strict=True)
        )

    def _concat(self, node: NodeProto, shape: tuple[int, ...]) -> Axes | None:
        axis = _axis(node, 0) % len(shape)
        sizes = [self.world.shapes.get(i, (0,) * len(shape))[axis] for i in node.input]
        if sum(sizes) != shape[axis]:
            return None
        out = list(self._elementwise(node, list(node.input), shape))
        grids = [(i, self.axes[v][axis]) for i, v in enumerate(node.input)
                 if v in self.axes and self._has_grid(self.axes[v][axis])]  # fmt: skip
        if len(grids) == 1:
            ((at, inner),) = grids
            out[axis] = self._join(sum(sizes[:at]), inner, sum(sizes[at + 1 :]))
        elif grids and len(node.input) > 1:
            out[axis] = self._conflict(shape[axis], f"Concat '{node.output[0]}' joins the tokens of {len(grids)} grids")
        else:
            out[axis] = self.atoms.new(shape[axis])
        return tuple(out)

    def _cut(self, node: NodeProto) -> None:
        """Slice and Split: a piece that holds the whole grid keeps it."""
        before, shape = self.axes.get(node.input[0]), self.world.shapes.get(node.input[0])
        if before is None or shape is None:
            return
        if node.op_type == "Split":
            axis = _axis(node, 0) % len(shape)
            at = 0
            for output in node.output:
                size = self.world.shapes.get(output, (0,) * len(shape))[axis]
                cut = self._piece(before[axis], at, at + size, 1, shape[axis])
                self.axes[output] = (*before[:axis], cut, *before[axis + 1 :])
                at += size
            return
        try:
            starts, ends = (self.world.value(i).reshape(-1) for i in node.input[1:3])
            axes = (
                self.world.value(node.input[3]).reshape(-1)
                if len(node.input) > 3 and node.input[3]
                else range(len(starts))
            )
            steps = self.world.value(node.input[4]).reshape(-1) if len(node.input) > 4 else [1] * len(starts)
        except (Unsupported, ValueError):
            return
        out = list(before)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            size = shape[int(axis)]
            first, last, by = slice(int(start), int(end), int(step)).indices(size)
            out[int(axis)] = self._piece(before[int(axis)], first, last, by, size)
        self.axes[node.output[0]] = tuple(out)

    def _piece(self, axis: Axis, start: int, stop: int, step: int, size: int) -> Axis:
        if (start, stop, step) == (0, size, 1):
            return axis
        count = len(range(start, stop, step))
        leaves = self.atoms.leaves(axis)
        if step == 1 and len(leaves) == 1 and leaves[0] in self._joined:
            whole = self._joined[leaves[0]]
            first, last = whole.prefix, whole.prefix + self.atoms.size(whole.inner)
            if start <= first and stop >= last:
                return self._join(first - start, whole.inner, stop - last)
        place = self._places.get(leaves[0]) if len(leaves) == 1 else None
        if place is not None and step > 1 and start < step and size % step == 0 and count == size // step:
            return self._place((leaves, step), count, place.source, place.axis)  # every step-th place: patch merging
        return self.atoms.new(count)


def _axis(node: NodeProto, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), default)
