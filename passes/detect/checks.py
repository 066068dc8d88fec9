"""What a softmax between two products must fulfil to be an attention site, beyond its axes."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskFacts
from attncompile.passes.detect.contraction import Contraction
from attncompile.passes.detect.homes import BYTES, ShapeRead
from attncompile.passes.detect.scores import Path, Step, tensor_scale
from attncompile.passes.detect.views import Atoms, Axes, Axis
from attncompile.passes.detect.walks import dies, node_name
from attncompile.passes.evaluate import GraphIndex, World


def check_keys(index: GraphIndex, product: Contraction, key_label: str) -> None:
    """Keys that are constants are a router's or a codebook's rows, or taps of a dynamic convolution: no tokens."""
    keys = product.left if key_label in product.left_labels else product.right
    if not index.data_inputs(keys):
        raise Unsupported(
            "constant-keys", f"the scores are a product with the constant '{keys}', not with keys made from the input",
            "a router, a codebook or a dynamic convolution: left alone",
        )  # fmt: skip


def check_guard(path: Path, guard: list[NodeProto]) -> None:
    """A guard that asks one mask which rows see nothing knows nothing of rows that two masks hide together."""
    made = {o for n in guard for o in n.output}
    asks_a_mask = any(n.op_type == "Where" and n.input[0] not in made for n in guard)
    if asks_a_mask and sum(s.kind in ("add", "visible", "hidden") for s in path.steps) > 1:
        raise Unsupported("guard", "the rows that become zero are those of one of several masks")


def head_scale(world: World, atoms: Atoms, checkpoints: list[tuple[Step, Axes]], heads: Axis) -> str:
    """The value that the scores of each head are multiplied by; empty where there is none.

    Raises:
        Unsupported: it is not one number a head, there are two, or a mask comes before it.
    """
    found = ""
    for step, axes in checkpoints:
        if step.kind != "head-scale":
            continue
        shape = world.shapes[step.value]
        near = axes[len(axes) - len(shape) :]
        spread = [atoms.leaves(axis) if size > 1 else () for size, axis in zip(shape, near, strict=True)]
        if found or tuple(x for axis in spread for x in axis) != atoms.leaves(heads):
            raise tensor_scale(world, step.node)
        found = step.value
    return found


def with_floor(world: World, path: Path, stable: bool, facts: MaskFacts) -> MaskFacts:
    """``facts`` of a mask after which scores were raised to the lowest finite number: what hid with -inf hides with
    that, so a row that sees no key is the average over all of them (0 / 0 where no maximum is taken off).

    Raises:
        Unsupported: a mask, a scale or a narrower type comes after it, and -inf with it again.
    """
    at = next((i for i, s in enumerate(path.steps) if s.kind == "floor"), None)
    if at is None:
        return facts
    floor = path.steps[at].fill
    for step in path.steps[at + 1 :]:
        sizes = [BYTES.get(world.types.get(v, 0), 0) for v in (step.node.input[0], step.node.output[0])]
        if step.kind not in ("view", "cast", "floor") or (step.kind == "cast" and sizes[1] < sizes[0]):
            raise Unsupported("floor", f"the scores are kept above {floor:.3g} before '{step.node.output[0]}', which "
                              "may bring -inf again")  # fmt: skip
    if not isfinite(floor):
        return facts
    fills = tuple(max(f, floor) for f in facts.fills)
    return replace(facts, fills=fills, masked_rows="uniform" if stable else "nan")


def check_private(index: GraphIndex, core: list[NodeProto], allowed: list[NodeProto], out_value: str) -> None:
    """Scores and weights that someone else reads cannot disappear."""
    ids = {id(n) for n in allowed}
    for node in core:
        for output in node.output:
            if output == out_value or not output:
                continue
            if output in index.outputs:
                raise Unsupported("scores-used", f"the scores or weights '{output}' are an output of the model")
            outside = [n for n in index.consumers.get(output, []) if not dies(index, n, ids)]
            if outside and all(n.op_type == "Shape" for n in outside):
                reason = f"the shape of the scores or weights '{output}' is read by '{node_name(outside[0])}'"
                raise ShapeRead(reason, tuple(n.output[0] for n in outside))
            if outside:
                raise Unsupported(
                    "scores-used", f"the scores or weights '{output}' are also read by '{node_name(outside[0])}'"
                )
