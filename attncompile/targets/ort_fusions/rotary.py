"""Rotary position codes: pairs that were written by ScatterND, the rotation itself, transposes between it and ours.

The rotation of ONNX Runtime takes cos and sin as tables [N, D / 2], and positions; here the tables are what the model
computes for its tokens, and the first position is 0.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from attncompile.targets.ort_fusions.view import CONTRIB, KINDS, TABLE, Dims, View, attribute, reshape_target


def identities(view: View) -> int:
    """Copies, which exporters leave between writes to one tensor, are passed by."""
    return sum(view.pass_by(node.output[0], node.input[0]) for node in view.nodes("Identity"))


def sizes(view: View) -> int:
    """Sizes that are read from a tensor and known."""
    done = 0
    for node in view.nodes("Shape"):
        shape = view.shape(node.input[0])
        if shape is None or not all(isinstance(n, int) for n in shape):
            continue
        part = np.array(shape[attribute(node, "start", 0) : attribute(node, "end", None)], np.int64)
        done += view.pass_by(node.output[0], view.tensor("fusions/sizes", part))
    return done


def interleaved(view: View) -> int:
    """Two ScatterNDs that write the even and the odd rows of one tensor, as a stack of their updates."""
    done = 0
    for second in view.nodes("ScatterND"):
        first = view.maker(second.input[0], "ScatterND")
        shape = view.shape(second.output[0])
        if first is None or not shape or not isinstance(shape[0], int):
            continue
        halves = _halves(view, first, second, shape[0])
        if halves is None:
            continue
        kind, rows = view.kind(second.output[0]), shape[0] // 2
        if any(view.shape(v) != (rows, *shape[1:]) for v in halves):
            continue
        perms = [_permutation(view, v) for v in halves]
        if perms[0] is not None and perms[0] == perms[1] and perms[0][0] == len(shape) - 1:
            perm = perms[0]
            sources = [view.maker(v, "Transpose").input[0] for v in halves]  # type: ignore[union-attr]
            inner = view.shape(sources[0]) or ()
            dims = (*inner[:-1], shape[0])
            stacked = _stack(view, sources, -1, kind, (*inner, 2))
            joined = view.reshaped(stacked, kind, dims)
            if joined is None:
                continue
            view.put("Transpose", [joined], [second.output[0]], perm=perm)
        else:
            stacked = _stack(view, halves, 1, kind, (rows, 2, *shape[1:]))
            target = reshape_target(shape)
            if target is None:
                continue
            sizes = view.tensor("fusions/shape", target)
            view.put("Reshape", [stacked, sizes], [second.output[0]])
        done += 1
    return done


def _halves(view: View, first: NodeProto, second: NodeProto, rows: int) -> list[str] | None:
    """The updates of the even and of the odd rows, if the indices are just these."""
    if any(attribute(n, "reduction", b"none") != b"none" for n in (first, second)) or rows % 2:
        return None
    found: dict[int, str] = {}
    for node in (first, second):
        indices = view.constant(node.input[1])
        if indices is None or indices.shape != (rows // 2, 1):
            return None
        known = indices.reshape(-1) % rows if (indices >= -rows).all() and (indices < rows).all() else None
        for start in (0, 1):
            if known is not None and np.array_equal(known, np.arange(start, rows, 2)):
                found[start] = node.input[2]
    return [found[0], found[1]] if len(found) == 2 else None


def _permutation(view: View, value: str) -> list[int] | None:
    node = view.maker(value, "Transpose")
    perm = None if node is None else attribute(node, "perm", None)
    return None if perm is None else list(perm)


def _stack(view: View, values: list[str], axis: int, kind: int, dims: Dims) -> str:
    axes = view.tensor("fusions/axis", np.array([axis], np.int64))
    one = (*dims[:-1], 1) if axis == -1 else (*dims[:axis], 1, *dims[axis + 1 :])
    parts = [view.node("Unsqueeze", [v, axes], kind, one) for v in values]
    return view.node("Concat", parts, kind, dims, axis=axis)


def transposes(view: View) -> int:
    """A transpose of a transpose as one."""
    done = 0
    for node in view.nodes("Transpose"):
        inner = view.maker(node.input[0], "Transpose")
        if inner is None:
            continue
        first, second = (attribute(n, "perm", None) for n in (inner, node))
        if first is not None and second is not None:
            perm = [first[i] for i in second]
            view.put("Transpose", [inner.input[0]], [node.output[0]], perm=perm)
            done += 1
    return done


def rotary_pairs(view: View) -> int:
    """Rotation of neighbouring elements as ``RotaryEmbedding``: the even ones x0 c - x1 s, the odd ones x0 s + x1 c."""
    done = 0
    for node in view.nodes("Reshape"):
        out = node.output[0]
        stacked, shape, kind = view.maker(node.input[0], "Concat"), view.shape(out), view.kind(out)
        if stacked is None or not shape or len(shape) != 4 or kind not in KINDS or len(stacked.input) != 2:
            continue
        inner = view.shape(stacked.output[0])
        if inner is None or attribute(stacked, "axis", 0) not in (-1, 4) or inner[:3] != shape[:3] or inner[4] != 2:
            continue
        sources = [view.maker(v, "Unsqueeze") for v in stacked.input]
        if any(s is None or view.shape(s.output[0]) != (*inner[:4], 1) for s in sources):
            continue
        found = _rotation(view, *(s.input[0] for s in sources if s is not None))
        if found is None:
            continue
        pairs, cos, sin = found
        if view.shape(pairs) != inner or any(_table_shape(view, t) != (shape[1], inner[3]) for t in (cos, sin)):
            continue
        _, tokens, heads, width = shape
        if not isinstance(heads, int) or not isinstance(width, int):
            continue
        flat = (shape[0], tokens, heads * width)
        before, made = view.maker(pairs, "Reshape"), None
        if before is not None and view.shape(before.input[0]) == flat:
            made = before.input[0]
        made = made or view.reshaped(pairs, kind, flat)
        tables = [view.reshaped(t, kind, (tokens, width // 2)) for t in (cos, sin)]
        target = reshape_target(shape, flat)
        if made is None or target is None or any(t is None for t in tables):
            continue
        turned = _embedding(view, made, tables, kind, flat, heads, pairs=True)
        view.put("Reshape", [turned, view.tensor("fusions/shape", target)], [out])
        done += 1
    return done


def _embedding(
    view: View, x: str, tables: list[str | None], kind: int, shape: Dims, heads: int, pairs: bool
) -> str:  # fmt: skip
    start = view.tensor("fusions/position", np.zeros(1, np.int64))
    turned = view.value(f"{x}/rotated", kind, shape)
    inputs = [x, start, *(t for t in tables if t)]
    view.put("RotaryEmbedding", inputs, [turned], CONTRIB, interleaved=int(pairs), num_heads=heads)
    return turned


def _table_shape(view: View, value: str) -> tuple[int | str, int | str] | None:
    """``(N, width)`` of cos or sin as [1, N, 1, width]."""
    shape = view.shape(value)
    return (shape[1], shape[3]) if shape and len(shape) == 4 and shape[0] == shape[2] == 1 else None


def _rotation(view: View, even: str, odd: str) -> tuple[str, str, str] | None:
    """``(pairs, cos, sin)``."""
    minus, plus = view.maker(even, "Sub"), view.maker(odd, "Add")
    if minus is None or plus is None:
        return None
    products = [view.maker(v, "Mul") for v in (*minus.input, *plus.input)]
    if any(p is None for p in products):
        return None
    left, right, *both = (set(p.input) for p in products if p is not None)
    for x0 in left:
        for x1 in right:
            (c,), (s,) = left - {x0} or {x0}, right - {x1} or {x1}
            a, b = _element(view, x0), _element(view, x1)
            if a is None or b is None or a[0] != b[0] or (a[1], b[1]) != (0, 1):
                continue
            if both in ([{x0, s}, {x1, c}], [{x1, c}, {x0, s}]):
                return a[0], c, s
    return None


def _element(view: View, value: str) -> tuple[str, int] | None:
    """``(x, i)`` where ``value`` is x[..., i]."""
    node = view.maker(value, "Squeeze", "Gather")
    if node is None:
        return None
    if node.op_type == "Gather":
        index, rank = view.constant(node.input[1]), len(view.shape(node.input[0]) or ())
        last = attribute(node, "axis", 0) in (-1, rank - 1)
        return (node.input[0], int(index)) if last and index is not None and index.shape == () else None
    cut = view.maker(node.input[0], "Slice")
    if cut is None or len(node.input) < 2 or len(cut.input) < 4:
        return None
    rank = len(view.shape(cut.input[0]) or ())
    numbers = [view.scalar(v) for v in (*cut.input[1:5], node.input[1])]
    if any(n is None for n in numbers) or rank == 0:
        return None
    start, end, axis, *step, squeezed = numbers
    if axis not in (-1, rank - 1) or squeezed not in (-1, rank - 1) or step not in ([], [1.0]):
        return None
    assert start is not None and end is not None
    return (cut.input[0], int(start)) if start >= 0 and end == start + 1 else None


def rotary_halves(view: View) -> int:
    """``x cos + [-x1, x0] sin`` with x = [x0, x1] and tables whose halves are equal, as ``RotaryEmbedding``."""
    done = 0
    for total in view.nodes("Add"):
        out = total.output[0]
        shape, kind = view.shape(out), view.kind(out)
        if (
            not shape
            or len(shape) != 4
            or kind not in KINDS
            or not all(isinstance(d, int) for d in (shape[1], shape[3]))
        ):
            continue
        found = _half_rotation(view, total, shape)
        if found is None:
            continue
        x, cos, sin = found
        heads, tokens, width = int(shape[1]), shape[2], int(shape[3])
        tables = [_half(view, t, tokens, width, kind) for t in (cos, sin)]
        if width % 2 or view.shape(x) != shape or any(t is None for t in tables):
            continue
        flat = _before_heads(view, x, shape)
        if flat is None:
            turned = _embedding(view, x, tables, kind, shape, heads, pairs=False)
            view.put("Identity", [turned], [out])
        else:
            rows = (shape[0], tokens, heads * width)
            turned = _embedding(view, flat, tables, kind, rows, heads, pairs=False)
            split = view.reshaped(turned, kind, (shape[0], tokens, heads, width))
            assert split is not None  # its sizes are those of shape
            view.put("Transpose", [split], [out], perm=[0, 2, 1, 3])
        done += 1
    return done


def _half_rotation(view: View, total: NodeProto, shape: Dims) -> tuple[str, str, str] | None:
    """``(x, cos, sin)``."""
    for straight, crossed in view.sides(total):
        plain, turned = view.maker(straight, "Mul"), view.maker(crossed, "Mul")
        if plain is None or turned is None:
            continue
        for rotated, sin in view.sides(turned):
            x = _turned(view, rotated, shape)
            cos = next((b for a, b in view.sides(plain) if a == x), None)
            if x is not None and cos is not None:
                return x, cos, sin
    return None


def _turned(view: View, value: str, shape: Dims) -> str | None:
    """x where ``value`` is [-x1, x0]."""
    joined, half = view.maker(value, "Concat"), int(shape[-1]) // 2
    if joined is None or len(joined.input) != 2 or attribute(joined, "axis", 0) not in (-1, 3):
        return None
    negative = view.maker(joined.input[0], "Neg")
    if negative is None:
        return None
    high, low = (_part(view, v, int(shape[-1])) for v in (negative.input[0], joined.input[1]))
    if high is None or low is None or high[0] != low[0]:
        return None
    return high[0] if high[1:] == (half, 2 * half) and low[1:] == (0, half) else None


def _part(view: View, value: str, width: int) -> tuple[str, int, int] | None:
    """``(x, start, end)`` where ``value`` is a part of the last axis of x."""
    cut = view.maker(value, "Slice")
    if cut is not None and len(cut.input) >= 4:
        start, end, axis, *step = (view.scalar(v) for v in cut.input[1:5])
        if axis not in (-1, 3) or step not in ([], [1.0]) or start is None or end is None or start < 0 or end < 0:
            return None
        return cut.input[0], int(start), int(min(end, width))
    split = view.maker(value, "Split")
    if split is not None and len(split.output) == 2 and attribute(split, "axis", 0) in (-1, 3):
        place = list(split.output).index(value)
        sizes = view.shape(value)
        if sizes and sizes[-1] == width // 2:
            return split.input[0], place * (width // 2), (place + 1) * (width // 2)
    return None


def _half(view: View, table: str, tokens: int | str, width: int, kind: int) -> str | None:
    """[tokens, width / 2] of a table [1, 1, tokens, width] whose halves are shown to be equal."""
    shape = view.shape(table)
    if shape != (1, 1, tokens, width) or not _repeats(view, table, width):
        return None
    ends = [view.tensor("fusions/number", np.array([n], np.int64)) for n in (0, width // 2, 3)]
    cut = view.node("Slice", [table, *ends], kind, (1, 1, tokens, width // 2))
    return view.reshaped(cut, kind, (tokens, width // 2))


def _repeats(view: View, value: str, width: int) -> bool:
    """Whether both halves of the last axis are equal: it was concatenated from one value twice, and only pointwise ops
    and new axes came after.
    """
    while True:
        known = view.constant(value, TABLE)
        if known is not None:
            return known.shape[-1] == width and np.array_equal(known[..., : width // 2], known[..., width // 2 :])
        node = view.maker(value, "Cast", "Cos", "Sin", "Mul", "Unsqueeze", "Concat")
        if node is None:
            return False
        shape = view.shape(node.output[0])
        if not shape or shape[-1] != width:  # an axis that was added last, or another one
            return False
        if node.op_type == "Concat":
            twice = len(node.input) == 2 and node.input[0] == node.input[1]
            return twice and attribute(node, "axis", 0) in (-1, len(shape) - 1)
        if node.op_type == "Mul":
            value = next((a for a, b in view.sides(node) if view.scalar(b) is not None), "")
            if not value:
                return False
        else:
            value = node.input[0]


def _before_heads(view: View, x: str, shape: Dims) -> str | None:
    """[B, N, H * D] where ``x`` is its heads, transposed."""
    turned = view.maker(x, "Transpose")
    if turned is None or list(attribute(turned, "perm", [])) != [0, 2, 1, 3]:
        return None
    split = view.maker(turned.input[0], "Reshape")
    heads, width = int(shape[1]), int(shape[3])
    if split is None or view.shape(split.output[0]) != (shape[0], shape[2], heads, width):
        return None
    flat = split.input[0]
    wide = (shape[0], shape[2], heads * width)
    if view.shape(flat) != wide or reshape_target((*wide[:2], heads, width), wide) is None:
        return None
    return str(flat)
