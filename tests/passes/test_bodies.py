"""Attention in the bodies of If, Loop and Scan nodes and in local functions: found, replaced, and run through."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Lowering
from attncompile.core.model import Model
from attncompile.core.profile import Range
from attncompile.core.site import Detection
from attncompile.passes.bodies import beside, route, takes
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.extract import extract_site
from attncompile.passes.load import load
from attncompile.passes.normalise import normalise
from attncompile.passes.replace import apply
from attncompile.passes.separate import separate
from attncompile.passes.symbols import profile_for, symbols
from tests.passes.attention_graphs import Spec, build, save
from tests.passes.body_graphs import branched, called, copied, looped, model, nested, scanned, value
from tests.passes.test_replace import feed_of, run, standard_attention

WINDOW = Spec(mask="window", left=3, right=0, mask_form="where", kv_heads=2)
CAUSAL = Spec(mask="causal", seed=1)
LONG = Spec(mask="window", left=4, right=1, dynamic=True, seed=2)
THEN, ELSE = "If 'merged'/then_branch", "If 'merged'/else_branch"

PLACES: dict[str, tuple[Callable[[], ModelProto], dict[str, str]]] = {
    "merged": (lambda: branched(WINDOW, CAUSAL), {THEN: "window", ELSE: "causal"}),
    "weights inside": (lambda: branched(WINDOW, CAUSAL, hoisted=False), {THEN: "window", ELSE: "causal"}),
    "negated": (lambda: branched(CAUSAL, WINDOW, condition="negated"), {THEN: "causal", ELSE: "window"}),
    "same facts": (lambda: branched(WINDOW, WINDOW), {THEN: "window", ELSE: "window"}),
    "decided by data": (lambda: branched(WINDOW, CAUSAL, condition="data"), {THEN: "window", ELSE: "causal"}),
    "loop": (lambda: looped(WINDOW), {"Loop 'layers'/body": "window"}),
    "loop over an input": (lambda: looped(CAUSAL, rounds=None), {"Loop 'layers'/body": "causal"}),
    "scan": (lambda: scanned(WINDOW), {"Scan 'scan'/body": "window"}),
    "if in loop": (lambda: nested(WINDOW, CAUSAL),
                   {r"Loop 'it\'s /all/'/body/" + THEN: "window", r"Loop 'it\'s /all/'/body/" + ELSE: "causal"}),
}  # fmt: skip


def found_in(proto: ModelProto, folder: Path) -> tuple[Model, Detection]:
    loaded = load(save(proto, folder))
    ranges = {s: Range(1, 13, 29) for s in symbols(loaded)}
    return loaded, detect(loaded, profile_for(loaded, ranges))


def feeds_of(proto: ModelProto) -> list[dict[str, np.ndarray]]:
    """Both values of every flag, and two numbers of rounds."""
    feed = feed_of(proto)
    feeds = [feed]
    for name in ("use_cache", "rounds"):
        if name in feed:
            feeds += [{**f, name: np.full_like(f[name], 0 if name == "use_cache" else 3)} for f in feeds]
    return feeds


@pytest.mark.parametrize("name", PLACES)
def test_found_where_it_is(name: str, tmp_path: Path) -> None:
    make, places = PLACES[name]
    _, found = found_in(make(), tmp_path)
    assert not found.near_misses
    assert {s.scope: s.mask.kind for s in found.sites} == places
    assert len({s.id for s in found.sites}) == len(places)
    for site in found.sites:
        assert (site.batch, site.query_length, site.key_length, site.heads) == (2, 13, 13, 4)
        assert site.needs == {"body"} and site.to_json()["scope"] == site.scope


@pytest.mark.parametrize("name", PLACES)
def test_replaced_in_its_own_body(name: str, tmp_path: Path) -> None:
    """An independent lowering of the facts in the place of each site: the same outputs whatever branch is taken."""
    proto = PLACES[name][0]()
    loaded, found = found_in(proto, tmp_path)
    every = [(s, standard_attention(s)) for s in found.sites]
    for edits in [every, *([e] for e in every)]:
        result = apply(loaded, edits)
        onnx.checker.check_model(result)
        for feed in feeds_of(proto):
            for before, after in zip(run(proto, feed), run(result, feed), strict=True):
                assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before)
        old = sum(n.op_type == "Softmax" for g in graphs(proto.graph) for n in g.node)
        ours = {o for _, lowering in edits for n in lowering.nodes for o in n.output}
        left = [n for g in graphs(result.graph) for n in g.node if n.op_type == "Softmax" and n.output[0] not in ours]
        assert len(left) == old - len(edits), "the softmax of each replaced site is gone, and no other"


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [graph, *(g for x in inner for g in graphs(x))]


@pytest.mark.parametrize("branch", [THEN, ELSE])
def test_the_other_branch_is_byte_equal(branch: str, tmp_path: Path) -> None:
    """Both branches use the same names of values."""
    proto = branched(WINDOW, WINDOW)
    loaded, found = found_in(proto, tmp_path)
    (site,) = [s for s in found.sites if s.scope == branch]
    result = apply(loaded, [(site, standard_attention(site))])
    bodies = [{a.name: a.g.SerializeToString() for a in m.graph.node[0].attribute} for m in (proto, result)]
    changed = {name for name in bodies[0] if bodies[0][name] != bodies[1][name]}
    assert changed == {branch.rpartition("/")[2]}


def test_what_only_the_site_read_outside_goes_too(tmp_path: Path) -> None:
    """A mask computed outside: it stays while the other branch reads it."""
    proto = branched(WINDOW, WINDOW)
    node = proto.graph.node[0]
    masks = [next(n.input[0] for n in a.g.node if n.op_type == "Where") for a in node.attribute]
    for attribute in node.attribute:
        next(n for n in attribute.g.node if n.op_type == "Where").input[0] = "mask"
    kept = [t for t in proto.graph.initializer if t.name not in masks[1:]]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    rest = copied(proto.graph.node)
    del proto.graph.node[:]
    made = [helper.make_node("Not", [masks[0]], ["hidden"]), helper.make_node("Not", ["hidden"], ["mask"])]
    proto.graph.node.extend([*made, *rest])
    loaded, found = found_in(proto, tmp_path)
    first, second = ((s, standard_attention(s)) for s in found.sites)
    names = {o for n in apply(loaded, [first]).graph.node for o in n.output}
    assert {"mask", "hidden"} <= names
    both = apply(loaded, [first, second])
    assert not {"mask", "hidden"} & {o for n in both.graph.node for o in n.output}
    assert masks[0] not in {t.name for t in both.graph.initializer}
    for feed in feeds_of(proto):
        np.testing.assert_allclose(run(both, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["merged", "negated", "loop", "scan", "if in loop", "loop over an input"])
def test_the_site_alone_is_what_the_body_computes(name: str, tmp_path: Path) -> None:
    loaded, found = found_in(PLACES[name][0](), tmp_path)
    world = World(GraphIndex(loaded), {})
    for site in found.sites:
        alone = extract_site(world, site, standard_attention(site))
        rng = np.random.default_rng(3)
        feed = {n: rng.standard_normal(shape).astype(np.float32) for n, (shape, _) in alone.inputs.items()}
        feed |= alone.fixed
        assert {site.query.value, site.key.value, site.value.value} == set(alone.roles.values())
        np.testing.assert_allclose(run(alone.original, feed)[0], run(alone.replaced, feed)[0], rtol=1e-4, atol=1e-5)


def test_lengths_of_a_body_in_symbols(tmp_path: Path) -> None:
    for proto in (branched(LONG, LONG), looped(LONG)):
        _, found = found_in(proto, tmp_path)
        assert found.sites
        for site in found.sites:
            assert (site.batch, site.query_length, site.key_length) == ("b", "n", "n")
            window = site.mask.part("window")
            assert window is not None and (window.left, window.right) == (4, 1) and window.certificate.general


def test_a_length_that_changes_from_round_to_round_is_not_known(tmp_path: Path) -> None:
    _, found = found_in(looped(LONG, grows=True), tmp_path)
    assert not found.sites
    assert [m.code for m in found.near_misses] == ["shape-unknown"]


def test_shapes_after_an_if_are_those_of_both_branches(tmp_path: Path) -> None:
    loaded, _ = found_in(branched(LONG, LONG), tmp_path)
    assert World(GraphIndex(loaded), {"b": 3, "n": 11}).shapes["y"] == (3, 11, 24)
    other = branched(WINDOW, CAUSAL)
    longer = helper.make_node("Concat", ["x", "x"], ["made_longer"], axis=1)
    other.graph.node[0].attribute[0].g.node.append(longer)
    other.graph.node[0].attribute[0].g.output[0].name = "made_longer"
    loaded = load(save(other, tmp_path))
    assert "made" not in World(GraphIndex(loaded), {}).shapes


def test_what_a_round_changes_is_data(tmp_path: Path) -> None:
    """A mask that moves with the number of the round must not be read as the mask of the first."""
    proto = looped(WINDOW)
    body = proto.graph.node[1].attribute[0].g
    where = next(n for n in body.node if n.op_type == "Where")
    shifted = [helper.make_node("Cast", ["round"], ["odd"], to=TensorProto.BOOL),
               helper.make_node("Xor", [where.input[0], "odd"], ["moving"])]  # fmt: skip
    where.input[0] = "moving"
    nodes = copied(body.node)
    del body.node[:]
    body.node.extend([*shifted, *nodes])
    _, found = found_in(proto, tmp_path)
    (site,) = found.sites
    assert site.mask.kind == "opaque" and "round" in site.mask.parts[0].certificate.detail


def test_scores_made_outside_belong_to_both_branches(tmp_path: Path) -> None:
    """The product of queries and keys stands outside, softmax and values in each branch: nothing can be removed."""
    proto = branched(CAUSAL, CAUSAL)
    node = proto.graph.node[0]
    inside = list(node.attribute[0].g.node)
    end = next(i for i, n in enumerate(inside) if n.op_type == "Softmax")
    before = copied(inside[:end])
    for attribute in node.attribute:
        rest = copied(list(attribute.g.node)[end:])
        del attribute.g.node[:]
        attribute.g.node.extend(rest)
    nodes = [*before, *copied(proto.graph.node)]
    _, found = found_in(model(nodes, list(proto.graph.input), ["y"], list(proto.graph.initializer)), tmp_path)
    assert not found.sites
    assert {m.code for m in found.near_misses} == {"scores-used"} and len(found.near_misses) == 2


def test_weights_that_leave_a_body(tmp_path: Path) -> None:
    proto = looped(WINDOW)
    body = proto.graph.node[1].attribute[0].g
    softmax = next(n for n in body.node if n.op_type == "Softmax")
    body.output.append(value(softmax.output[0], shape=[None] * 4))
    proto.graph.node[1].output.append("all_weights")
    proto.graph.output.append(value("all_weights", shape=[None] * 5))
    _, found = found_in(proto, tmp_path)
    assert not found.sites and [m.code for m in found.near_misses] == ["weights-used"]


def test_a_name_used_inside_and_outside(tmp_path: Path) -> None:
    """ONNX forbids it, files have it: refused as it is, and read after normalise has renamed the inner one."""
    proto = branched(WINDOW, CAUSAL)
    name = next(n for n in proto.graph.node[0].attribute[0].g.node if n.op_type == "Softmax").output[0]
    proto.graph.node.append(helper.make_node("Neg", ["x"], [name]))
    loaded, found = found_in(proto, tmp_path)
    assert not found.sites
    assert {m.code for m in found.near_misses} == {"subgraph"} and "of one outside" in found.near_misses[0].reason
    normal = normalise(loaded)
    assert normal.notes == ("values inside bodies that had the name of one outside were renamed",)
    for feed in feeds_of(proto):
        np.testing.assert_array_equal(run(normal.proto, feed)[0], run(proto, feed)[0])
    found = detect(normal, profile_for(normal, {}))
    assert {s.scope for s in found.sites} == {THEN, ELSE} and not found.near_misses
    result = apply(normal, [(s, standard_attention(s)) for s in found.sites])
    for feed in feeds_of(proto):
        np.testing.assert_allclose(run(result, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5)


def test_bodies_of_other_operators_are_not_looked_into(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["e", "e"], ["s"]), helper.make_node("Softmax", ["s"], ["p"], axis=-1),
             helper.make_node("MatMul", ["p", "e"], ["o"])]  # fmt: skip
    body = helper.make_graph(nodes, "body", [value("e")], [value("o")])
    made = [helper.make_node("SequenceConstruct", ["x"], ["xs"]),
            helper.make_node("SequenceMap", ["xs"], ["ys"], "each", body=body),
            helper.make_node("ConcatFromSequence", ["ys"], ["y"], axis=0)]  # fmt: skip
    _, found = found_in(model(made, [value("x", shape=[2, 5, 5])], ["y"], []), tmp_path)
    assert not found.sites
    (miss,) = found.near_misses
    assert miss.code == "subgraph" and "body of SequenceMap 'each': this body is not looked into" in miss.reason


def test_two_nodes_of_one_name(tmp_path: Path) -> None:
    proto = branched(WINDOW, CAUSAL)
    second = copied(proto.graph.node)[0]
    second.output[0] = "made_again"
    proto.graph.node.insert(1, second)
    proto.graph.output.append(value("made_again"))
    loaded, found = found_in(proto, tmp_path)
    again = {s.replace("'/", "'#2/") for s in (THEN, ELSE)}
    assert {s.scope for s in found.sites} == {THEN, ELSE} | again
    (site,) = [s for s in found.sites if s.scope == THEN.replace("'/", "'#2/")]
    result = apply(loaded, [(site, standard_attention(site))])
    assert result.graph.node[0] == proto.graph.node[0] and result.graph.node[1] != proto.graph.node[1]


# What runs a body.


def test_routes() -> None:
    def at(proto: ModelProto, folder: str = "") -> World:
        return World(GraphIndex(Model(Path("m.onnx"), proto, "", 18)), {})

    assert route(at(branched(WINDOW, CAUSAL)), THEN) == {"use_cache": 1}
    assert route(at(branched(WINDOW, CAUSAL)), ELSE) == {"use_cache": 0}
    assert route(at(branched(WINDOW, CAUSAL, condition="negated")), THEN) == {"use_cache": 0}
    assert route(at(branched(WINDOW, CAUSAL, condition="true")), THEN) == {}
    assert route(at(looped(WINDOW)), "Loop 'layers'/body") == {}
    assert route(at(looped(WINDOW, rounds=None)), "Loop 'layers'/body") == {"rounds": 3}
    assert route(at(scanned(WINDOW)), "Scan 'scan'/body") == {}
    inner = r"Loop 'it\'s /all/'/body/" + ELSE
    assert route(at(nested(WINDOW, CAUSAL)), inner) == {"use_cache": 0}
    assert beside(at(nested(WINDOW, CAUSAL)).index, inner) == [inner, inner.replace("else", "then")]
    for never, scope in (
        (branched(WINDOW, CAUSAL, condition="true"), ELSE),
        (looped(WINDOW, rounds=0), "Loop 'layers'/body"),
    ):
        with pytest.raises(Unsupported, match="does not run"):
            route(at(never), scope)
    with pytest.raises(Unsupported, match="not simply a number given as an input"):
        route(at(branched(WINDOW, CAUSAL, condition="data")), THEN)


def test_a_feed_takes_a_route() -> None:
    assert takes({"a": np.array([True])}, {"a": 1}) and not takes({"a": np.array([False])}, {"a": 1})
    assert takes({"r": np.array(2)}, {"r": 3}) and not takes({"r": np.array(0)}, {"r": 3})
    assert takes({}, {}) and not takes({}, {"a": 1})


def test_a_body_that_nothing_can_be_made_to_run_is_not_checked(tmp_path: Path) -> None:
    loaded, found = found_in(branched(WINDOW, CAUSAL, condition="data"), tmp_path)
    for site in found.sites:
        with pytest.raises(Unsupported, match="so no run can be made to go through it"):
            extract_site(World(GraphIndex(loaded), {}), site, Lowering(()))


# Local functions.


@pytest.mark.parametrize("times", [1, 3, 32])
def test_a_function_called_several_times_is_inlined(times: int, tmp_path: Path) -> None:
    """Sites of inlined functions lie in the main graph, one a call."""
    proto = called(WINDOW, times)
    loaded = normalise(load(save(proto, tmp_path)))
    found = detect(loaded, profile_for(loaded, {}))
    assert len(found.sites) == times and not found.near_misses
    assert {s.scope for s in found.sites} == {""} and len({s.output.value for s in found.sites}) == times
    if times < 32:
        result = apply(loaded, [(s, standard_attention(s)) for s in found.sites])
        feed = feed_of(proto)
        np.testing.assert_allclose(run(result, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5)


def test_a_function_called_in_a_body(tmp_path: Path) -> None:
    """A Loop whose body calls a local function that holds the attention; and a function that holds an If."""
    source = called(WINDOW, 1)
    call = copied(source.graph.node)[0]
    call.input[0], call.output[0] = "carried", "next"
    info = [value("round", TensorProto.INT64, []), value("going", TensorProto.BOOL, []), value("carried")]
    nodes = [call, helper.make_node("Identity", ["going"], ["on"])]
    body = helper.make_graph(nodes, "body", info, [value("on", TensorProto.BOOL, []), value("next")])
    stored = [*source.graph.initializer, helper.make_tensor("rounds", TensorProto.INT64, [], [3])]
    loop = helper.make_node("Loop", ["rounds", "", "x"], ["y"], "layers", body=body)
    proto = model([loop], list(source.graph.input), ["y"], stored)
    proto.functions.extend(source.functions)
    proto.opset_import.extend(o for o in source.opset_import if o.domain)
    loaded = normalise(load(save(proto, tmp_path)))
    (site,) = detect(loaded, profile_for(loaded, {})).sites
    assert site.scope == "Loop 'layers'/body" and site.mask.kind == "window"
    result = apply(loaded, [(site, standard_attention(site))])
    feed = feed_of(proto)
    np.testing.assert_allclose(run(result, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5)


def test_an_if_in_a_function(tmp_path: Path) -> None:
    inner = branched(WINDOW, CAUSAL)
    weights = [t.name for t in inner.graph.initializer]
    nodes: list[NodeProto] = copied(inner.graph.node)
    opsets = [helper.make_opsetid("", 18)]
    function = helper.make_function("pkg", "Decoder", ["x", "use_cache", *weights], ["y"], nodes, opsets)
    call = helper.make_node("Decoder", ["x", "use_cache", *weights], ["result"], domain="pkg")
    proto = model([call], list(inner.graph.input), ["result"], list(inner.graph.initializer))
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("pkg", 1))
    loaded = normalise(load(save(proto, tmp_path)))
    found = detect(loaded, profile_for(loaded, {}))
    assert sorted(s.mask.kind for s in found.sites) == ["causal", "window"]
    assert all(s.scope.endswith("_branch") for s in found.sites)
    result = apply(loaded, [(s, standard_attention(s)) for s in found.sites])
    for feed in feeds_of(proto):
        np.testing.assert_allclose(run(result, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5)


# Operands of other ranks.


def test_operands_in_bodies_get_rank_4(tmp_path: Path) -> None:
    """[batch * heads, N, D], as nn.MultiheadAttention is exported: site only after separate, in both branches."""
    spec = Spec(fused_batch=True, mask="none", scale_at="query", merge_output=True)
    proto = branched(spec, Spec(fused_batch=True, mask="none", seed=1))
    flat = without_rank_4(proto)
    loaded, found = found_in(flat, tmp_path)
    assert not found.sites and {m.code for m in found.near_misses} == {"layout"}
    assert all(m.reason.endswith("_branch)") for m in found.near_misses)
    normal = separate(loaded, profile_for(loaded, {}))
    found = detect(normal, profile_for(normal, {}))
    assert {s.scope for s in found.sites} == {THEN, ELSE} and not found.near_misses
    result = apply(normal, [(s, standard_attention(s)) for s in found.sites])
    for feed in feeds_of(flat):
        expected = run(flat, feed)[0]
        np.testing.assert_allclose(run(normal.proto, feed)[0], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(run(result, feed)[0], expected, rtol=1e-4, atol=1e-5)


def without_rank_4(proto: ModelProto) -> ModelProto:
    """The heads are split as [N, batch * heads, D], sequence first, as nn.MultiheadAttention does."""
    nodes, outputs = [], []
    for attribute in proto.graph.node[0].attribute:
        prefix = "w0_" if attribute.name == "then_branch" else "w1_"
        inner: list[NodeProto] = []

        def op(kind: str, *inputs: str, out: str = "", **attributes: object) -> str:
            name = out or f"t{len(inner)}"  # noqa: B023
            node = helper.make_node(kind, list(inputs), [name])
            node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
            inner.append(node)  # noqa: B023
            return name

        turned = op("Transpose", "x", perm=[1, 0, 2])
        weights = [n.input[1] for n in attribute.g.node if n.op_type == "MatMul" and n.input[1].startswith(prefix)]
        q, k, v = (
            op("Transpose", op("Reshape", op("MatMul", turned, w), "split"), perm=[1, 0, 2]) for w in weights[:3]
        )
        scores = op("MatMul", op("Mul", q, "scale"), op("Transpose", k, perm=[0, 2, 1]))
        y = op("MatMul", op("Softmax", scores, axis=-1), v)
        y = op("Reshape", op("Transpose", y, perm=[1, 0, 2]), "join")
        op("Transpose", y, perm=[1, 0, 2], out="o")
        nodes.append(helper.make_graph(inner, attribute.name, [], [value("o")]))
        outputs.append(attribute.name)
    stored = [*proto.graph.initializer, helper.make_tensor("split", TensorProto.INT64, [3], [13, 8, 6]),
              helper.make_tensor("join", TensorProto.INT64, [3], [13, 2, 24]),
              helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5])]  # fmt: skip
    node = helper.make_node("If", ["use_cache"], ["made"], "merged", **dict(zip(outputs, nodes, strict=True)))
    return model([node, helper.make_node("Tanh", ["made"], ["y"])], list(proto.graph.input), ["y"], stored)


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21, 26])
def test_bodies_of_every_opset(opset: int, tmp_path: Path) -> None:
    """The converter goes into bodies; before opset 13 a softmax there named its axis from the left."""
    spec = Spec(mask="window", mask_form="where", length=11)
    proto = branched(spec, Spec(mask="causal", mask_form="where", length=11, seed=1))
    proto.opset_import[0].version = opset
    for attribute in proto.graph.node[0].attribute:
        next(n for n in attribute.g.node if n.op_type == "Softmax").attribute[0].i = 3
    onnx.checker.check_model(proto)
    normal = normalise(load(save(proto, tmp_path)))
    assert normal.opset == max(opset, 18)
    found = detect(normal, profile_for(normal, {}))
    assert {s.scope: s.mask.kind for s in found.sites} == {THEN: "window", ELSE: "causal"}
    result = apply(normal, [(s, standard_attention(s)) for s in found.sites])
    for feed in feeds_of(proto):
        np.testing.assert_allclose(run(result, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5)


# The same attention in any place has the same facts.


def random_spec(rng: np.random.Generator) -> Spec:
    pick = rng.choice
    einsum, fused, key_first = (bool(rng.random() < p) for p in (0.2, 0.25, 0.2))
    heads = int(pick([2, 4, 6]))
    mask = str(pick(["none", "causal", "window"]))
    return Spec(
        batch=int(pick([1, 2, 3])), heads=heads, kv_heads=int(pick([heads, 2])), length=int(pick([7, 13, 17])),
        head_dim=int(pick([5, 6, 8])), scale=float(pick([0.5, 0.25, 1.0])),
        scale_at=str(pick(["query", "key", "both", "scores", "none"])), mask=mask, left=int(rng.integers(0, 5)),
        right=int(rng.integers(0, 3)), mask_form=str(pick(["constant", "where", "computed"])),
        guard=bool(rng.random() < 0.3), key_first=key_first and not fused, einsum=einsum,
        fused_batch=fused, seed=int(rng.integers(1 << 30)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_facts_do_not_depend_on_the_place(seed: int, tmp_path: Path) -> None:
    """``computed`` masks ask the shape of x: where the layer stands in a body, that of a value outside of it."""
    rng = np.random.default_rng(seed)
    spec = random_spec(rng)

    def facts(found: Detection) -> list[dict[str, object]]:
        names = {"id", "scope", "query", "key", "value", "nodes", "output"}
        return [{k: v for k, v in s.to_json().items() if k not in names} for s in found.sites]

    _, plain = found_in(build(spec), tmp_path)
    expected = facts(plain)
    assert len(expected) == 1
    for place in (branched(spec, spec), branched(spec, spec, hoisted=False), looped(spec), nested(spec, spec)):
        _, found = found_in(place, tmp_path)
        one = facts(found)
        assert one and not found.near_misses
        for site in one:
            assert [without_source(site)] == [without_source(e) for e in expected]


def without_source(site: dict[str, object]) -> str:
    """The facts in text, the names of stored values left out."""
    return re.sub(r"'source': '[^']*'", "", repr(site))


def test_random_numbers_in_a_branch_are_data(tmp_path: Path) -> None:
    """A mask that an If draws is not a constant, though the If reads nothing that is fed."""
    proto = branched(WINDOW, CAUSAL)
    sides = []
    for name, kind in (("drawn", "RandomUniform"), ("zeros", "ConstantOfShape")):
        if kind == "RandomUniform":
            made = [helper.make_node(kind, [], [name], shape=[13, 13])]
        else:
            made = [helper.make_node(kind, ["square"], [name])]
        sides.append(helper.make_graph(made, name, [], [value(name, shape=[13, 13])]))
    stored = [helper.make_tensor("square", TensorProto.INT64, [2], [13, 13]),
              helper.make_tensor("yes", TensorProto.BOOL, [], [True])]  # fmt: skip
    drawn = helper.make_node("If", ["yes"], ["picked"], then_branch=sides[0], else_branch=sides[1])
    positive = helper.make_node("Cast", ["picked"], ["mask"], to=TensorProto.BOOL)
    windowed = next(a.g for a in proto.graph.node[0].attribute if a.name == "then_branch")
    next(n for n in windowed.node if n.op_type == "Where").input[0] = "mask"
    nodes = [drawn, positive, *copied(proto.graph.node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(stored)
    _, found = found_in(proto, tmp_path)
    assert {s.scope: s.mask.kind for s in found.sites} == {THEN: "opaque", ELSE: "causal"}
