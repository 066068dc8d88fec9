"""Brings a model into the form that replacements are made in: no local functions, opset 18 or later, and no value in a
body of control flow with the name of one outside.

A local function of another exporter is put in the place of every call, so its attention lies in the graph that calls
it: as many sites as there are calls, each with the scope of its call.
"""

from __future__ import annotations

from dataclasses import replace

import onnx
from onnx import ModelProto, helper, inliner, version_converter

from attncompile.core.errors import Unsupported
from attncompile.core.model import Model
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.index import graph_at
from attncompile.passes.load import graphs
from attncompile.passes.rename import rename_inner
from attncompile.passes.symbols import symbols

OLDEST = 18
"""The oldest opset that function bodies are written for."""

OURS = "attncompile"
"""The domain of our own ops: their bodies stay what they are."""

_FLEX = ("ai.onnx.preview", "FlexAttention")

NEWEST = onnx.defs.onnx_opset_version()


def normalise(model: Model) -> Model:
    """``model`` unchanged, or a copy whose ``notes`` say what was done.

    Raises:
        Unsupported: the opset is newer than the installed onnx knows, local functions cannot be inlined, or the
            conversion to opset 18 failed; nothing can be replaced then.
    """
    proto, notes = model.proto, list(model.notes)
    if model.opset > NEWEST:
        raise Unsupported("opset", f"opset {model.opset} is newer than the installed onnx knows ({NEWEST})",
                          "install a newer onnx")  # fmt: skip
    foreign = sorted({(f.domain, f.name) for f in proto.functions if f.domain != OURS})
    if foreign:
        try:
            proto = inliner.inline_selected_functions(proto, foreign)
        except Exception as error:
            reason = " ".join(str(error).split()) or "no reason given"
            raise Unsupported("functions", f"the model-local functions could not be inlined: {reason}") from None
        notes.append(f"{len(foreign)} model-local functions were inlined")
    if any((n.domain, n.op_type) == _FLEX for n in proto.graph.node):
        proto = _written_out(proto, notes)
    opset = model.opset
    if 0 < opset < OLDEST:
        proto = _convert(model, proto)
        notes.append(f"converted from opset {opset} to {OLDEST}, the oldest that function bodies are written for")
        opset = OLDEST
    renamed = rename_inner(proto)
    if renamed is not proto:
        proto = renamed
        notes.append("values inside bodies that had the name of one outside were renamed")
    if proto is model.proto:
        return model
    return replace(model, proto=proto, opset=opset, notes=tuple(notes))


def _written_out(proto: ModelProto, notes: list[str]) -> ModelProto:
    """FlexAttention as its body: its modifiers are then nodes like any others. No runtime has a kernel for it yet."""
    try:
        inlined = inliner.inline_selected_functions(proto, [_FLEX], inline_schema_functions=True)
    except Exception:  # the inliner raises untyped errors; detection then says that the operator is kept
        return proto
    notes.append("FlexAttention operators were written out as their bodies")
    return inlined


def _convert(model: Model, proto: ModelProto) -> ModelProto:
    opset = model.opset
    try:
        converted = version_converter.convert_version(_imported(_last_axis(model, proto)), OLDEST)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
        raise Unsupported("opset", f"the conversion from opset {opset} to {OLDEST} failed: {reason}",
                          f"export the model with opset {OLDEST} or later") from None  # fmt: skip
    # The converter drops what its own representation does not hold.
    converted.metadata_props.extend(p for p in proto.metadata_props if p not in converted.metadata_props)
    for name in ("producer_name", "producer_version", "domain", "doc_string", "model_version"):
        setattr(converted, name, getattr(proto, name))
    return converted


def _imported(proto: ModelProto) -> ModelProto:
    """With an import for every domain that nodes are of: ONNX Runtime's optimizer leaves out its own, and the converter
    stops there.
    """
    known = {o.domain for o in proto.opset_import} | {"", "ai.onnx"}
    missing = sorted({n.domain for graph in graphs(proto) for n in graph.node} - known)
    if not missing:
        return proto
    result = ModelProto()
    result.CopyFrom(proto)
    result.opset_import.extend(helper.make_opsetid(domain, 1) for domain in missing)
    return result


def _last_axis(model: Model, proto: ModelProto) -> ModelProto:
    """Softmax over the last axis, named -1: elsewhere the converter puts Flatten and Reshape around it (opset 13)."""
    if model.opset >= 13:
        return proto
    index = GraphIndex(replace(model, proto=proto))
    result = ModelProto()
    result.CopyFrom(proto)
    pending = [World(index, dict.fromkeys(symbols(model), 8))]
    while pending:
        world = pending.pop()
        pending += [world.within(b.scope) for group in world.index.bodies.values() for b in group]
        for node in graph_at(result.graph, world.index.scope).node:
            rank = len(world.shapes.get(node.input[0], ())) if node.op_type in ("Softmax", "LogSoftmax") else 0
            for attribute in node.attribute:
                if rank and attribute.name == "axis" and attribute.i == rank - 1:
                    attribute.i = -1
    return result
