"""A node as the runtime library in ``attncompile/runtime`` launches it: its op's name, its tensors, its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from attncompile.core.errors import Unsupported
from attncompile.kernels.entry import Entry
from attncompile.kernels.expressions import parse, symbols_of
from attncompile.kernels.records import Built, CallKernels, NodeCall
from attncompile.kernels.symbols import OF_THE_DEVICE


@dataclass(frozen=True, slots=True)
class LaunchRecord:
    """``op_type`` names the op that the library registers for the call. ``inputs`` and ``outputs``: positions among the
    node's own, in the order of that op's. ``text`` is what the op's attribute says, as JSON.
    """

    op_type: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    text: str


def ports(entries: Sequence[Entry]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and outputs of the op of a call: all that its kernels take, in the order of their first appearance."""
    found: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for argument in (a for entry in entries for a in entry.arguments):
        if argument.kind != "int32":
            found[argument.kind == "output"].setdefault(argument.name)
    return tuple(found[0]), tuple(found[1])


def entries_of(built: Built, call: CallKernels) -> list[Entry]:
    """By architecture, then rank."""
    return [built.compiled[i].entry for architecture in sorted(call.kernels) for i in call.kernels[architecture]]


def record(node: NodeCall, built: Built, key: str) -> LaunchRecord:
    """Raises ``Unsupported``: a kernel of the call takes a tensor that the node does not have."""
    call = next(c for c in built.calls if c.key == key)
    if node.tensors is None or node.symbols is None:
        raise Unsupported(node.verdict.code, node.verdict.reason, node.verdict.hint)
    tensors = node.tensors
    entries = entries_of(built, call)
    inputs, outputs = ports(entries)
    for wanted, there in ((inputs, tensors.inputs), (outputs, tensors.outputs)):
        absent = [name for name in wanted if name not in there]
        if absent:
            raise Unsupported("tensors", f"the kernels of {call.call.op} take '{absent[0]}', which the node lacks")
    if set(filter(None, tensors.outputs)) - set(outputs):
        raise Unsupported("tensors", f"the kernels of {call.call.op} do not write all outputs of the node")
    numbers = [x for e in entries for x in (*e.grid, *(a.expression for a in e.arguments if a.kind == "int32"))]
    unknown = {name for x in numbers for name in symbols_of(parse(x))} - {*node.symbols, *OF_THE_DEVICE}
    if unknown:
        raise Unsupported(
            "symbols", f"the kernels of {call.call.op} take '{min(unknown)}', which the node's layouts do not say"
        )
    said = {
        "symbols": dict(node.symbols), "outputs": {name: list(tensors.output_sizes[name]) for name in outputs},
        "shapes": {name: list(sizes) for name, sizes in tensors.input_sizes.items() if name in inputs},
    }  # fmt: skip
    return LaunchRecord(
        f"{call.call.op}_{key}", tuple(tensors.inputs.index(n) for n in inputs),
        tuple(tensors.outputs.index(n) for n in outputs), json.dumps(said, sort_keys=True, separators=(",", ":")),
    )  # fmt: skip
