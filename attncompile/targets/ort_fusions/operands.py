"""Operands of our ops, read where they lie: what slices, splits and transposes make of a tensor is a part of it in
another order of axes, and a layout says which (``core/layout.py``).

A value is followed back to the tensor that ops which only move elements made it of. The axes of that tensor are cut
into atoms, as the ops on the way cut them; what is left of an axis of which one part was taken is an atom with a
number.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from onnx import NodeProto, defs, helper

from attncompile.core.layout import DIGITS, unpacked
from attncompile.targets.ort_fusions.view import OURS, Dims, View, attribute, reshape_target

_MOVES = ("Reshape", "Transpose", "Slice", "Split", "Gather", "Squeeze", "Unsqueeze", "Identity")
FREE = ("Reshape", "Squeeze", "Unsqueeze", "Identity")
"""Those that leave elements where they are."""
_COLUMNS = "BHDN"


@dataclass(eq=False)
class _Atom:
    """A factor of an axis. ``number``: the only place of it that is taken."""

    size: int | str
    number: int | None = None


class _Other(Exception):
    """What is read is no part of a tensor, or it is not known to be one."""


def operands(view: View) -> int:
    """How many were found to lie in a tensor that is there without being copied."""
    done = 0
    for node in view.nodes(*_types(view), domain=OURS):
        for place, formal in enumerate(defs.get_schema(node.op_type, 1, OURS).inputs[: len(node.input)]):
            found = [a for a in node.attribute if a.name == f"{formal.name[0]}_layout"]
            if formal.name not in ("query", "key", "value") or not node.input[place]:
                continue
            said = found[0].s.decode() if found else "BNHD"
            lies = _source(view, node.input[place], said, node.op_type.startswith("Linear"))
            if lies is None:
                continue
            value, layout = lies
            for old in found:
                node.attribute.remove(old)
            node.attribute.append(helper.make_attribute(f"{formal.name[0]}_layout", layout))
            view.set_inputs(node, [*node.input[:place], value, *node.input[place + 1 :]])
            done += 1
    return done


def outputs(view: View) -> int:
    """Of outputs that are only transposed: how many are written in the order that the transpose gives them."""
    done = 0
    for node in view.nodes(*_types(view), domain=OURS):
        names = [o.name for o in defs.get_schema(node.op_type, 1, OURS).outputs]
        place = names.index("output") if "output" in names else len(node.output)
        if place < len(node.output) and _written(view, node, place):
            done += 1
    return done


def _written(view: View, node: NodeProto, place: int) -> bool:
    """Whether a transpose of this output went."""
    output, found = node.output[place], [a for a in node.attribute if a.name == "o_layout"]
    sizes, layout = view.shape(output), found[0].s.decode() if found else "BNHD"
    if sizes is None or len(sizes) != len(layout):
        return False
    order = [_Atom(n) for n in sizes]
    letters = {id(a): x for a, x in zip(order, layout, strict=True)}
    axes, value, best = [[a] for a in order], output, None
    turned = False
    while (reader := view.only(value, *_MOVES)) is not None:
        pieces = list(order)
        try:
            axes = _moved(view, reader, reader.output[0], axes, order)
        except _Other:
            break
        if len(order) != len(pieces) or any(a.number is not None for a in order):
            break  # an axis of the output was cut, or only one place of it is read
        value, turned = reader.output[0], turned or reader.op_type == "Transpose"
        said = "".join(letters[id(a)] for axis in axes for a in axis if a.size != 1)
        if turned and said.endswith("D"):
            best = value, "".join(x for x in layout if x not in said) + said
    if best is None or best[1] == layout or view.is_output(output):
        return False
    value, said = best
    size = dict(zip(layout, sizes, strict=True))
    laid = tuple(size[x] for x in said)
    shape = view.shape(value)
    target = None if shape is None else reshape_target(shape, laid)
    if target is None:
        return False
    made = view.value(f"{output}/{said}", view.kind(output), laid)
    for old in found:
        node.attribute.remove(old)
    node.attribute.append(helper.make_attribute("o_layout", said))
    view.set_outputs(node, [*node.output[:place], made, *node.output[place + 1 :]])
    view.put("Reshape", [made, view.tensor("fusions/shape", target)], [value])
    return True


def _types(view: View) -> list[str]:
    return sorted({n.op_type for n in view.all() if n.domain == OURS and defs.has(n.op_type, 1, OURS)})


def _source(view: View, value: str, layout: str, columns: bool) -> tuple[str, str] | None:
    """``(tensor, layout)`` that says the same as ``value`` in ``layout``, with fewer copies; the furthest one.
    ``columns``: whether tokens may be its last axis, which kernels of linear attention alone can read.
    """
    chain: list[NodeProto] = []
    root = value
    while (node := view.maker(root, *_MOVES)) is not None:
        chain.append(node)
        root = node.input[0]
    while chain and any(n.op_type not in FREE for n in chain):
        try:
            found = _layout(view, value, chain, layout)
            if found is not None and (columns or unpacked(found[1]) != _COLUMNS):
                return found
        except _Other:
            pass
        chain.pop()
    return None


def _layout(view: View, value: str, chain: list[NodeProto], layout: str) -> tuple[str, str] | None:
    """By the ops of ``chain``, the last of which reads the tensor."""
    root = chain[-1].input[0]
    sizes, kind = view.shape(root), view.kind(root)
    if sizes is None:
        raise _Other
    order = [_Atom(n) for n in sizes]
    axes = [[a] for a in order]
    steps = [*(n.input[0] for n in chain[::-1][1:]), value]
    for node, output in zip(chain[::-1], steps, strict=True):
        axes = _moved(view, node, output, axes, order)
    if len(axes) != len(layout):
        raise _Other
    letters: dict[int, str] = {}
    for letter, atoms in zip(layout, axes, strict=True):
        atoms = [a for a in atoms if a.size != 1]
        for atom in atoms:
            letters[id(atom)] = letter
        places = [order.index(a) for a in atoms]
        between = order[places[0] : places[-1] + 1] if places else []
        if places != sorted(places) or [a for a in between if a.size != 1] != atoms:
            raise _Other  # an axis whose pieces do not follow one another
    return _named(view, root, kind, order, letters, layout)


def _named(
    view: View, root: str, kind: int, order: list[_Atom], letters: dict[int, str], layout: str
) -> tuple[str, str] | None:  # fmt: skip
    """The tensor, with an axis for each letter and one for the parts, and their layout."""
    said = ""
    dims: list[int | str] = []
    for atom in order:
        if atom.size == 1:
            continue
        letter = letters.get(id(atom), "")
        if atom.number is not None:
            if not isinstance(atom.size, int) or atom.size > len(DIGITS) or unpacked(said) != said:
                raise _Other
            letter = str(atom.number)
        if not letter:
            raise _Other
        if said.endswith(letter):
            dims[-1] = _times(dims[-1], atom.size)
        else:
            said, dims = said + letter, [*dims, atom.size]
    for letter in sorted(set(layout) - set(said)):  # axes of size 1
        place = 0 if letter == "B" else len(said) - said.endswith("D") if letter != "D" else len(said)
        said, dims = said[:place] + letter + said[place:], [*dims[:place], 1, *dims[place:]]
    if not said.endswith("D") and unpacked(said) != _COLUMNS:
        raise _Other  # rows that have gaps
    shape = tuple(dims)
    if shape == view.shape(root):
        return root, said
    made = view.reshaped(root, kind, shape)
    return None if made is None else (made, said)


def _times(a: int | str, b: int | str) -> int | str:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    raise _Other


def _moved(
    view: View, node: NodeProto, output: str, axes: list[list[_Atom]], order: list[_Atom]
) -> list[list[_Atom]]:  # fmt: skip
    """The axes behind ``node``; atoms that it cuts are cut in ``order`` too."""
    match node.op_type:
        case "Identity":
            return axes
        case "Transpose":
            perm = attribute(node, "perm", None)
            return [axes[i] for i in (perm if perm is not None else range(len(axes))[::-1])]
        case "Reshape":
            shape = view.shape(output)
            if shape is None:
                raise _Other
            return _reshaped([a for axis in axes for a in axis], shape, order)
        case "Squeeze":
            given = _numbers(view, node, 1, "axes")
            single = [i for i, axis in enumerate(axes) if _size(axis) == 1]
            gone = single if given is None else _places(given, len(axes))
            if any(_size(axes[i]) != 1 for i in gone):
                raise _Other
            return [axis for i, axis in enumerate(axes) if i not in gone]
        case "Unsqueeze":
            given = _numbers(view, node, 1, "axes")
            if given is None:
                raise _Other
            new = _places(given, len(axes) + len(given))
            left = iter(axes)
            return [[] if i in new else next(left) for i in range(len(axes) + len(new))]
        case "Gather":
            index = view.constant(node.input[1])
            (axis,) = _places([attribute(node, "axis", 0)], len(axes))
            if index is None or index.size != 1 or index.ndim > 1:
                raise _Other
            size = _size(axes[axis])
            if not isinstance(size, int) or not -size <= int(index.reshape(-1)[0]) < size:
                raise _Other
            start = int(index.reshape(-1)[0]) % size
            taken = _taken(axes, axis, start, 1, order)
            return taken if index.ndim else [a for i, a in enumerate(taken) if i != axis]
        case "Split":
            (axis,) = _places([attribute(node, "axis", 0)], len(axes))
            sizes = [(view.shape(o) or ())[axis : axis + 1] for o in node.output]
            lengths = [s[0] if s else "" for s in sizes]
            if not all(isinstance(n, int) for n in lengths):
                raise _Other
            place = list(node.output).index(output)
            start = sum(n for n in lengths[:place] if isinstance(n, int))
            return _taken(axes, axis, start, lengths[place], order)
        case _:
            return _sliced(view, node, axes, order)


def _sliced(view: View, node: NodeProto, axes: list[list[_Atom]], order: list[_Atom]) -> list[list[_Atom]]:
    starts, ends = (_numbers(view, node, i, n) for i, n in ((1, "starts"), (2, "ends")))
    if starts is None or ends is None:
        raise _Other
    given, steps = _numbers(view, node, 3, "axes"), _numbers(view, node, 4, "")
    if (given is None and len(node.input) > 3 and node.input[3]) or (steps is None and len(node.input) > 4):
        raise _Other  # computed
    if steps is not None and set(steps) != {1}:
        raise _Other
    for axis, start, end in zip(_places(given or range(len(starts)), len(axes)), starts, ends, strict=True):
        size = _size(axes[axis])
        if not isinstance(size, int):
            if start == 0 and end >= 1 << 31:
                continue
            raise _Other
        first, last = (min(max(n + size if n < 0 else n, 0), size) for n in (start, end))
        axes = _taken(axes, axis, first, last - first, order)
    return axes


def _numbers(view: View, node: NodeProto, place: int, name: str) -> list[int] | None:
    """Of a constant input, or of the attribute that older opsets have in its place."""
    if len(node.input) > place and node.input[place]:
        found = view.constant(node.input[place])
        return None if found is None else [int(n) for n in found.reshape(-1)]
    given = attribute(node, name, None) if name else None
    return None if given is None else [int(n) for n in given]


def _places(given: list[int] | range, rank: int) -> list[int]:
    if any(not -rank <= n < rank for n in given):
        raise _Other
    return [n % rank for n in given]


def _size(axis: list[_Atom]) -> int | str:
    sizes = [1 if a.number is not None else a.size for a in axis]
    if all(isinstance(n, int) for n in sizes):
        return prod(n for n in sizes if isinstance(n, int))
    return sizes[0] if len(sizes) == 1 else "?"


def _cut(atom: _Atom, inner: int, axis: list[_Atom], order: list[_Atom]) -> tuple[_Atom, _Atom]:
    """``atom`` as two, the second one of this size."""
    assert isinstance(atom.size, int)
    two = _Atom(atom.size // inner), _Atom(inner)
    for atoms in (axis, order):
        place = atoms.index(atom)
        atoms[place : place + 1] = two
    return two


def _taken(axes: list[list[_Atom]], axis: int, start: int, length: int | str, order: list[_Atom]) -> list[list[_Atom]]:
    """One part of ``axis``, which must be one of equal parts."""
    size = _size(axes[axis])
    if (start, length) == (0, size):
        return axes
    atoms = [a for a in axes[axis] if a.size != 1]
    if len(atoms) != 1 or not isinstance(size, int) or not isinstance(length, int) or length < 1:
        raise _Other
    if size % length or start % length:
        raise _Other
    atom = atoms[0]
    axis_atoms = list(atoms)
    if length > 1:
        atom, _ = _cut(atom, length, axis_atoms, order)
    atom.number = start // length
    return [*axes[:axis], [a for a in axis_atoms if a.number is None], *axes[axis + 1 :]]


def _reshaped(atoms: list[_Atom], shape: Dims, order: list[_Atom]) -> list[list[_Atom]]:
    """``atoms``, in their order, as axes of these sizes."""
    left = [a for a in atoms if a.size != 1]
    found: list[list[_Atom]] = []
    for size in shape:
        taken: list[_Atom] = []
        while (so_far := _size(taken)) != size:
            if not left or not isinstance(so_far, int):
                raise _Other
            atom = left.pop(0)
            if isinstance(atom.size, int) and isinstance(size, int) and so_far * atom.size > size:
                outer = size // so_far
                if size % so_far or atom.size % outer:
                    raise _Other
                pair = [atom]
                atom, rest = _cut(atom, atom.size // outer, pair, order)
                left.insert(0, rest)
            elif taken and isinstance(atom.size, str):
                raise _Other
            taken.append(atom)
        found.append(taken)
    if left:
        raise _Other
    return found
