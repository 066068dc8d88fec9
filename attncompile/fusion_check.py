"""Whether fusions leave a model's outputs what they were: both forms in ONNX Runtime on the CPU, bodies in the place of
kernels, in float32 where the weights are not too large for that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, external_data_helper

from attncompile import verify
from attncompile.core.errors import AttncompileError
from attncompile.core.model import Model
from attncompile.core.verdict import Verdict
from attncompile.kernels.symbols import OPERANDS
from attncompile.plugins.packed import packed
from attncompile.runtime import layout
from attncompile.targets import graph as g
from attncompile.targets import onnx as onnx_target
from attncompile.targets.engine import save
from attncompile.targets.onnxruntime_cuda import ASIDE, set_aside
from attncompile.targets.ort_fusions import AROUND_OURS, BIASES, fuse
from attncompile.targets.ort_fusions.view import OURS

if TYPE_CHECKING:
    from attncompile.targets.base import Precision

WIDENED = 1 << 28
"""Elements of all weights up to which both forms are compared in float32."""
BUDGETS = {TensorProto.FLOAT: 1e-5, TensorProto.FLOAT16: 1e-4, TensorProto.BFLOAT16: 8e-3}
"""Relative L2 at the outputs in float32, by the type whose rounding a model's constants have."""
PLAIN_BUDGET = 1e-2
"""The same where both run in fp16."""
_TO_FLOAT: Mapping[int, int] = {TensorProto.FLOAT16: TensorProto.FLOAT, TensorProto.BFLOAT16: TensorProto.FLOAT}


def check(
    proto: ModelProto, model: Model, precision: Precision | None, feeds: Sequence[Mapping[str, np.ndarray]],
    counts: Mapping[str, int], lowered: ModelProto, unlaunched: ModelProto | None = None,
    half_norms: bool = True,
) -> Verdict:  # fmt: skip
    """``proto``, made from ``model``, with fusions against itself without.

    What is deployed, with bodies in the place of kernels (``unlaunched`` has the nodes), where that can be had: bodies
    are in the types of ``proto``, so that all must be in float32. Else fused again, with bodies written out; then each
    fusion must be found as often as ``counts`` says of what is deployed, ``lowered``, or this would prove nothing.
    """
    folder = model.path.resolve().parent
    plain = onnx_target.TARGET.lower(proto, model, precision) if precision else g.inlined(proto)
    launched = {o for n in lowered.graph.node if n.domain == layout.DOMAIN for o in n.output}
    known = {v.name for v in (*plain.graph.value_info, *plain.graph.output)}
    # A body does not say its sizes as the op does.
    plain.graph.value_info.extend(v for v in lowered.graph.value_info if v.name in launched - known)
    deployed = _with_bodies(proto, unlaunched) if unlaunched is not None and _in_float32(plain, precision) else None
    unseen = [] if deployed is not None else [n for n in AROUND_OURS if n in counts]
    if set(unseen) & set(BIASES):
        return Verdict.no("unseen", "a model without these biases can be compared up to 2^28 weights only")
    if deployed is None:
        fused = fuse(plain, folder, half_norms=half_norms)
        for name, count in counts.items():
            if name not in AROUND_OURS and fused.counts.get(name, 0) < count:
                return Verdict.no(
                    "unlike", f"'{name}' was not found again in the model with bodies, so it was not compared"
                )
        deployed = fused.proto
    try:
        with tempfile.TemporaryDirectory(prefix="attncompile-fusions-") as scratch:
            verdict = _compare(plain, deployed, model, feeds, Path(scratch))
    except AttncompileError as error:
        return Verdict.no("not_compared", error.message, error.hint)
    if verdict.ok and unseen:
        return Verdict.yes(f"{verdict.reason}; not compared: {', '.join(unseen)}")
    return verdict


def _in_float32(plain: ModelProto, precision: Precision | None) -> bool:
    return precision is None or _weights(plain) <= WIDENED


def _weights(proto: ModelProto) -> int:
    return sum(prod(t.dims) for t in proto.graph.initializer)


def _with_bodies(proto: ModelProto, unlaunched: ModelProto) -> ModelProto | None:
    """``unlaunched`` with the bodies that its nodes have in ``proto``, which read and write what its layouts say. None
    where a node is not found there.
    """
    made = ModelProto()
    made.CopyFrom(unlaunched)
    bodies = {(f.name, f.overload): f for f in proto.functions if f.domain == OURS}
    known = {n.name: n for n in _ours(set_aside(proto))}
    for node in _ours(made):
        original = known.get(node.name)
        body = bodies.get((node.op_type, original.overload.removeprefix(ASIDE))) if original is not None else None
        if original is None or body is None:
            return None
        here, there = _layouts(node), _layouts(original)
        named = {n: here.get(n[0], there[n[0]]) for n in OPERANDS if n[0] in there}
        call, function = packed(original, body, {n: x for n, x in named.items() if x != there[n[0]]})
        call.input[:], call.output[:] = node.input, node.output
        node.CopyFrom(call)
        if all((f.name, f.overload) != (function.name, function.overload) for f in made.functions):
            made.functions.append(function)
    return g.inlined(made)


def _ours(proto: ModelProto) -> list[NodeProto]:
    """Our nodes, those in branches and loops too."""
    return [n for graph in g.graphs(proto.graph) for n in graph.node if n.domain == OURS]


def _layouts(node: NodeProto) -> dict[str, str]:
    """By the first letter of the operand."""
    return {a.name[0]: a.s.decode() for a in node.attribute if a.name.endswith("_layout")}


def _compare(
    plain: ModelProto, fused: ModelProto, model: Model, feeds: Sequence[Mapping[str, np.ndarray]], scratch: Path
) -> Verdict:  # fmt: skip
    kind = next((t for t in (TensorProto.BFLOAT16, TensorProto.FLOAT16) if _uses(plain, t)), TensorProto.FLOAT)
    widened = kind != TensorProto.FLOAT and _weights(plain) <= WIDENED
    budget = BUDGETS[kind] if widened or kind == TensorProto.FLOAT else PLAIN_BUDGET
    paths = []
    converted = list(feeds)
    for name, form in (("plain", plain), ("fused", fused)):
        place = scratch / name
        place.mkdir()
        if widened:
            whole = ModelProto()
            whole.CopyFrom(form)
            external_data_helper.load_external_data_for_model(whole, str(model.path.resolve().parent))
            wide = verify.retype(whole, _TO_FLOAT)
            converted = [verify.convert_feed(feed, wide) for feed in feeds]
            paths.append(save(wide, place / "model.onnx")[0])
        else:
            paths.append(onnx_target.write(form, model, place))
    compared = verify.compare_models(paths[0], paths[1], converted, budget=budget)
    if not compared.passed:
        return Verdict.no("parity", compared.verdict.reason)
    said = "in float32" if widened or kind == TensorProto.FLOAT else "in fp16"
    return Verdict.yes(f"with fusions against without, on the CPU {said}: relative L2 {compared.error:.1e}")


def _uses(proto: ModelProto, kind: int) -> bool:
    values = (*proto.graph.initializer, *proto.graph.input)
    return any((v.data_type if isinstance(v, TensorProto) else v.type.tensor_type.elem_type) == kind for v in values)
