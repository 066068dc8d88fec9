"""A site alone: the original nodes, and their replacement, as two models with the same inputs and output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Lowering
from attncompile.core.site import AttentionSite
from attncompile.passes.bodies import route
from attncompile.passes.evaluate import World
from attncompile.passes.load import node_inputs


@dataclass(frozen=True, slots=True)
class SiteModel:
    """One site at one binding.

    Attributes:
        original: the site's own nodes; inputs are its operands and what else comes from outside.
        replaced: the lowering in their place, with the same inputs and output.
        inputs: name -> (shape, ONNX element type) of every input.
        fixed: values of inputs that follow from shapes alone (masks): to be fed as they are.
        roles: ``query``, ``key``, ``value`` and ``padding`` -> input name.
    """

    original: ModelProto
    replaced: ModelProto
    inputs: dict[str, tuple[tuple[int, ...], int]]
    fixed: dict[str, np.ndarray]
    roles: dict[str, str]


_MAX_FIXED = 1 << 22
"""Elements of a value that depends on shapes alone, above which its nodes are taken in its place."""


def linear_sources(site: AttentionSite) -> set[str]:
    """Values that linear attention reads beside its operands."""
    facts = site.linear
    found = (facts.decay_source, facts.update_source, facts.past_state) if facts is not None else ()
    return {v for v in found if v}


def _reads_shape(node: NodeProto) -> bool:
    return node.op_type in ("Shape", "Size")


def extract_site(world: World, site: AttentionSite, lowering: Lowering) -> SiteModel:
    """The site of ``world.index.model`` at the sizes of ``world``; ``world`` is that of the main graph.

    Raises:
        Unsupported: a shape is not known, a mask cannot be evaluated at this size, or the site lies in a body that no
            input can be made to run.
    """
    if site.scope:
        route(world, site.scope)
        world = world.within(site.scope)
    index = world.index
    operands = {"query": site.query.value, "key": site.key.value, "value": site.value.value}
    sources = [p.source for p in site.mask.parts if p.source and index.data_inputs(p.source)]
    stops = set(operands.values()) | set(sources) | linear_sources(site)
    masks = {p.source for p in site.mask.parts if p.source}
    nodes: list[NodeProto] = []
    constants: set[str] = set()
    inputs: dict[str, tuple[tuple[int, ...], int]] = {}
    fixed: dict[str, np.ndarray] = {}
    done: set[str] = set()
    stack: list[tuple[str, bool]] = [(site.output.value, False)]
    while stack:
        name, expanded = stack.pop()
        if expanded:
            node = index.producer[name]
            if all(n is not node for n in nodes):
                nodes.append(node)
            continue
        if name in done:
            continue
        done.add(name)
        if name in stops or name in index.inputs:
            inputs[name] = _type(world, name)
        elif name in index.initializers:
            constants.add(name)
        elif not index.data_inputs(name):
            elements = int(np.prod(world.shapes[name])) if name in world.shapes else None
            maker = index.producer[name]
            if elements is not None and elements <= 64:
                constants.add(name)
            elif name not in masks and (elements is None or elements > _MAX_FIXED) and not _reads_shape(maker):
                stack.append((name, True))  # indices written out element by element: cheaper computed than carried
                stack.extend((v, False) for v in node_inputs(maker))
            else:
                fixed[name] = world.value(name)
                inputs[name] = _type(world, name)
        else:
            stack.append((name, True))
            stack.extend((v, False) for v in node_inputs(index.producer[name]))
    read = {v for n in lowering.nodes for v in n.input if v}
    for value in read & (stops | set(index.inputs)):
        inputs.setdefault(value, _type(world, value))
    for value in read - set(inputs):  # a bias, say: the original's nodes may start behind it
        if value in index.initializers:
            constants.add(value)
        elif value in index.producer and not index.data_inputs(value):
            fixed[value] = world.value(value)
            inputs[value] = _type(world, value)
    initializers = world.known_initializers(constants)
    for name in constants - {t.name for t in initializers}:
        initializers.append(numpy_helper.from_array(np.asarray(world.value(name), order="C"), name))
    output = helper.make_tensor_value_info(site.output.value, _type(world, site.output.value)[1], None)
    infos = [helper.make_tensor_value_info(n, kind, list(shape)) for n, (shape, kind) in inputs.items()]

    def model(body: list[NodeProto], stored: list[TensorProto]) -> ModelProto:
        graph = helper.make_graph(body, f"{site.id}", infos, [output], stored)
        made = helper.make_model(graph, opset_imports=index.model.proto.opset_import, ir_version=10)
        made.functions.extend(index.model.proto.functions)
        return made

    replaced = model(list(lowering.nodes), [*lowering.initializers, *(t for t in initializers if t.name in read)])
    add_functions(replaced, lowering)
    roles = dict(operands)
    padding = next((p.source for p in site.mask.parts if p.kind == "padding" and p.source in sources), None)
    if padding is not None:
        roles["padding"] = padding
    return SiteModel(model(nodes, initializers), replaced, inputs, fixed, roles)


def add_functions(model: ModelProto, lowering: Lowering) -> None:
    """Adds the lowering's functions and the operator sets that its nodes need; the IR version that overloads need."""
    present = {(f.domain, f.name, f.overload) for f in model.functions}
    for function in lowering.functions:
        if (function.domain, function.name, function.overload) not in present:
            model.functions.append(function)
    domains = {o.domain for o in model.opset_import}
    for node in lowering.nodes:
        if node.domain not in domains and node.domain != "ai.onnx":
            model.opset_import.append(helper.make_opsetid(node.domain, 1))
            domains.add(node.domain)
    if lowering.functions:
        model.ir_version = max(model.ir_version, 10)


def _type(world: World, name: str) -> tuple[tuple[int, ...], int]:
    if name not in world.shapes:
        raise Unsupported("shape-unknown", f"the shape of '{name}' at {world.binding} is not known")
    return world.shapes[name], world.types[name]
