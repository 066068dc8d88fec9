"""Linear attention as a recurrence in a Loop or Scan body: named, and not taken."""

from __future__ import annotations

from onnx import GraphProto, NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.site import AttentionSite
from attncompile.passes.detect.softmax import MaskAnalysis
from attncompile.passes.detect.views import VIEW_OPS
from attncompile.passes.detect.walks import node_name
from attncompile.passes.evaluate import GraphIndex, World

_PRODUCTS = frozenset({"MatMul", "Einsum", "Mul"})


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite | None:
    """None where the body of ``node`` carries no state that outer products are added to.

    Raises:
        Unsupported: it carries one, and reads it by a product: a recurrence of linear attention.
    """
    body = next((a.g for a in node.attribute if a.name == "body"), None)
    if body is None:
        return None
    first = (2, 1) if node.op_type == "Loop" else (0, 0)  # a Loop's body has a counter and a condition in front
    scanned = next((a.i for a in node.attribute if a.name == "num_scan_inputs"), 0)
    states = len(body.input) - first[0] - scanned
    producer = {o: n for n in body.node for o in n.output}
    carried = list(body.input)[first[0] : first[0] + max(states, 0)]
    for source, result in zip(carried, list(body.output)[first[1] :], strict=False):  # a damaged body may have fewer
        before, after = source.name, result.name
        if _adds_outer_product(producer, after, before) and _is_read(body, producer, {before, after}):
            raise Unsupported("recurrent", f"the {node.op_type} '{node_name(node)}' adds an outer product to its state "
                              f"'{before}' in every step and reads it by a product: linear attention as a recurrence, "
                              "which is not taken")  # fmt: skip
    return None


def _source(producer: dict[str, NodeProto], value: str) -> str:
    """``value`` before views and casts."""
    while (node := producer.get(value)) is not None and node.op_type in VIEW_OPS | {"Cast", "CastLike"}:
        value = node.input[0]
    return value


def _adds_outer_product(producer: dict[str, NodeProto], after: str, before: str) -> bool:
    add = producer.get(_source(producer, after))
    if add is None or add.op_type != "Add":
        return False
    for kept, written in ((add.input[0], add.input[1]), (add.input[1], add.input[0])):
        product = producer.get(_source(producer, written))
        if product is None or product.op_type not in _PRODUCTS or not _comes_from(producer, kept, before):
            continue
        # An Einsum names its axes; the others need each operand to be given one.
        if product.op_type == "Einsum" or all(_is_spread(producer, v) for v in product.input[:2]):
            return True
    return False


def _is_spread(producer: dict[str, NodeProto], value: str) -> bool:
    while (node := producer.get(value)) is not None and node.op_type in VIEW_OPS | {"Cast", "CastLike"}:
        if node.op_type in ("Unsqueeze", "Reshape"):
            return True
        value = node.input[0]
    return False


def _comes_from(producer: dict[str, NodeProto], value: str, state: str, depth: int = 3) -> bool:
    """Whether ``value`` is the state, or the state times something (a decay)."""
    value = _source(producer, value)
    node = producer.get(value)
    if value == state:
        return True
    return node is not None and depth > 0 and node.op_type == "Mul" and any(
        _comes_from(producer, v, state, depth - 1) for v in node.input
    )  # fmt: skip


def _is_read(body: GraphProto, producer: dict[str, NodeProto], states: set[str]) -> bool:
    return any(
        node.op_type in _PRODUCTS and any(_source(producer, v) in states for v in node.input)
        for node in body.node
        if node.op_type != "Mul" or any(n.op_type == "ReduceSum" and n.input[0] == node.output[0] for n in body.node)
    )
