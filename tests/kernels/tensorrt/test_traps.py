"""What breaks a plugin of TensorRT: a careless one fails over the real package, ours takes care."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, helper, shape_inference

from attncompile.core.errors import KernelError
from attncompile.core.kernel import Argument
from attncompile.kernels import calls
from attncompile.kernels.build import general
from attncompile.kernels.entry import Compiled
from attncompile.kernels.expressions import Binary, Expression, Literal, Symbol, evaluate, text
from attncompile.kernels.tensorrt import generate, plugin
from attncompile.kernels.tensorrt.register import register, register_folder, renamed
from attncompile.plugins import kernels
from tests.kernels.conftest import PTX, made_up
from tests.kernels.tensorrt import native
from tests.kernels.tensorrt.conftest import SMS, VERSIONS, Prepared
from tests.kernels.tensorrt.samples import dense
from tests.kernels.tensorrt.toys import made, node, run, toy
from tests.kernels.tensorrt.walk import Refused, check_entry, created, importer, walk


def register_one(one: Prepared, load: Any = None, **more: Any) -> Any:
    return register(list(one.made.plugins.values()), load or one.bundle.load, SMS, **more)


def loader(one: Prepared, **changes: Any) -> Callable[[str], Compiled]:
    """The kernels of ``one`` with other facts in their entries."""
    return lambda i: replace(one.bundle.load(i), entry=replace(one.bundle.entries[i], **changes))


# Names and namespaces.


@pytest.mark.parametrize("namespace", ["", "trt", "tensorrt", "std", "a.b"])
def test_namespaces_that_tensorrt_refuses(tensorrt: Any, namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        tensorrt[1].register(f"{namespace}::name")(lambda x: x)
    assert namespace != plugin.NAMESPACE


def test_names_differ_where_anything_does(prepared: dict[str, Prepared]) -> None:
    (one,) = prepared["dense"].made.plugins.values()
    others = [
        replace(one, symbols={**one.symbols, "scale_bits": "7"}), replace(one, entries=one.entries[:1]),
        replace(one, inputs=one.inputs[:2]), replace(one, outputs=()), replace(one, op="Other"),
    ]  # fmt: skip
    names = {p.name for p in (one, *others)}
    assert len(names) == 6
    assert not any("." in n or ":" in n for n in names)


def test_names_of_entries_are_those_of_their_code(newest: Any, prepared: dict[str, Prepared]) -> None:
    """Every kernel of ours is called after its function: two plugins in one engine must not look alike."""
    names = []
    for sample in ("dense", "key mask"):
        register_one(prepared[sample])
        names += [launch.name for launch in walk(newest[0], prepared[sample].rewritten, SHAPES)["node"]]
    assert len(set(names)) == len(names) == 4
    with pytest.raises(KernelError, match="names its entry in other places"):
        renamed(PTX.replace("ret;", "call kernel;"), "kernel", "other")
    assert ".entry other(" in renamed("// kernel\n" + PTX, "kernel", "other")


SHAPES = {"B": (1, 2, 3), "N": (1, 100, 333), "M": (1, 130, 401)}


def test_registering_again_is_no_clash(newest: Any, prepared: dict[str, Prepared]) -> None:
    first, second = register_one(prepared["dense"]), register_one(prepared["dense"])
    assert first.names == second.names and len(first.names) == 1


# Attributes.


def test_plugins_have_no_attributes(tensorrt: Any, prepared: dict[str, Prepared]) -> None:
    """All are baked in: none is serialized into an engine, and three kinds of them break (below)."""
    one = prepared["dense"]
    register_one(one)
    (name,) = one.made.plugins
    definition = getattr(tensorrt[1].op.attncompile, name)
    assert definition.input_attrs == {} and definition.input_tensor_names == ["query", "key", "value"]
    (written,) = one.rewritten.graph.node
    assert {a.name for a in written.attribute} == {"plugin_namespace", "plugin_version", "aot"}


@pytest.mark.parametrize("kind", [float, int])
def test_a_scalar_attribute_breaks_before_11_2(opened: Any, kind: type) -> None:
    """Its field is an array of one element, which NumPy 2.4 does not take for a number."""
    broken = []
    for version in VERSIONS:
        with opened(version) as both:
            toy(both, "scalar", attribute=kind)
            try:
                run(both, "scalar", a=kind(3))
            except TypeError:
                broken.append(version)
    new_numpy = np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    assert broken == (["10.9", "10.10", "10.15", "10.16"] if new_numpy else [])


def test_a_numpy_attribute_works(tensorrt: Any) -> None:
    toy(tensorrt, "array", attribute=npt.NDArray[np.float32])
    assert len(run(tensorrt, "array", a=[0.5])) == 1


def test_a_text_arrives_with_a_zero_byte(tensorrt: Any) -> None:
    seen: list[str] = []

    def launch(x: Any, a: str) -> Any:
        seen.append(a)
        return made(tensorrt)

    toy(tensorrt, "word", launch, attribute=str)
    run(tensorrt, "word", a="BNHD")
    assert seen == ["BNHD\0"]


def test_a_missing_attribute_is_an_error(tensorrt: Any) -> None:
    toy(tensorrt, "missing", attribute=npt.NDArray[np.float32])
    with pytest.raises(TypeError, match="missing 1 required"):
        run(tensorrt, "missing")


def test_a_half_tensor_attribute_cannot_be_read(tensorrt: Any) -> None:
    toy(tensorrt, "half", attribute=npt.NDArray[np.float16])
    tensor = helper.make_tensor("a", 10, [1], np.array([0.5], np.float16).tobytes(), raw=True)
    with pytest.raises(AttributeError, match="No known conversion"):
        run(tensorrt, "half", a=tensor)


# Launch arguments.


def careless(both: Any, name: str, extra: Callable[[Any], Any]) -> None:
    toy(both, name, lambda x: made(both, extras=(extra(x),)))


def test_bare_numbers_are_refused(tensorrt: Any) -> None:
    careless(tensorrt, "bare", lambda x: 3)
    with pytest.raises(TypeError, match=r"Extra args must be a 'tensorrt\.plugin\.SymInt32'"):
        run(tensorrt, "bare")


@pytest.mark.parametrize(
    "extra", [lambda n: 2 * n, lambda n: 2 + n, lambda n: 100 - n, lambda n: n % 2, lambda n: -n], ids=list("*+-%n")
)
def test_a_number_on_the_left_is_refused(tensorrt: Any, extra: Callable[[Any], Any]) -> None:
    careless(tensorrt, "left", lambda x: tensorrt[1].SymInt32(extra(x.shape_expr[0])))
    with pytest.raises(TypeError, match=r"unsupported operand|bad operand"):
        run(tensorrt, "left")


def test_a_float_is_refused(tensorrt: Any) -> None:
    toy(tensorrt, "real", lambda x: tensorrt[1].SymExprs.from_tuple((0.5,)))
    with pytest.raises(ValueError, match="Float symbolic expressions are not supported"):
        run(tensorrt, "real")


def expressions() -> st.SearchStrategy[Expression]:
    """Of the language, over two sizes, without a division that has no meaning."""
    leaf = st.one_of(st.integers(0, 50).map(Literal), st.sampled_from(("N", "M")).map(lambda n: Symbol(_AXES[n])))

    def grown(parts: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        plain = st.builds(Binary, st.sampled_from(("+", "-", "*", "min", "max")), parts, parts)
        divisor = st.integers(1, 9).map(Literal)
        above = parts.map(lambda p: Binary("max", p, Literal(0)))
        return plain | st.builds(Binary, st.sampled_from(("//", "cdiv")), above, divisor)

    return st.recursive(leaf, grown, max_leaves=6)


_AXES = {"N": "query[1]", "M": "key[1]"}


@given(st.lists(expressions(), min_size=1, max_size=4), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_every_expression_of_the_language(drawn: list[Expression], n: int, m: int) -> None:
    """Whatever an argument says, TensorRT computes what we compute; numbers stand on either side."""
    one, both = _SHARED["one"], _SHARED["both"]
    arguments = [Argument("query", "input", "float16")]
    arguments += [Argument(n, "input", "float16") for n in ("key", "value")]
    arguments += [Argument(f"a{i}", "int32", expression=text(e)) for i, e in enumerate(drawn)]
    arguments.append(Argument("output", "output", "float16"))
    ptx = entry_of(3, len(drawn), 1)
    # The numbers may be negative or large: what is checked here is the translation, so the profile is one point.
    (spec,) = one.made.plugins.values()
    changed = replace(spec, symbols={}, op=f"Toy{len(_SHARED)}_{abs(hash(tuple(drawn))) % 10**9}", entries=("e",))
    sizes = {"B": 1, "N": n, "M": m}
    values = [evaluate(e, {"query[1]": n, "key[1]": m}) for e in drawn]
    symbols = {f"query[{i}]": f"query[{i}]" for i in range(4)} | {f"key[{i}]": f"key[{i}]" for i in range(4)}
    changed = replace(changed, symbols=symbols)
    first = next(iter(one.bundle.entries.values()))
    kernel = Compiled(replace(first, arguments=tuple(arguments), name="kernel", grid=("1", "1", "1")), ptx, b"")
    register([changed], lambda _: kernel, SMS)
    model = generate.rewritten(one.model, generate.Generated({}, {"node": changed}))
    point = {name: (size, size, size) for name, size in sizes.items()}
    if any(not -(2**31) <= v < 2**31 for v in values):
        with pytest.raises(KernelError, match="is no int32"):
            walk(both[0], model, point)
        return
    (launch,) = walk(both[0], model, point)["node"]
    check_entry(launch)
    assert launch.arguments(sizes) == values


_SHARED: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _shared(request: pytest.FixtureRequest) -> Any:
    """For the test with drawn expressions, which takes no fixtures of a function's scope."""
    if request.node.originalname == "test_every_expression_of_the_language":
        _SHARED["one"] = request.getfixturevalue("prepared")["dense"]
        _SHARED["both"] = request.getfixturevalue("newest")
    yield
    _SHARED.clear()


def entry_of(inputs: int, extras: int, outputs: int) -> str:
    kinds = [*["u64"] * inputs, *["u32"] * extras, *["u64"] * outputs]
    parameters = ",\n".join(f".param .{k} kernel_param_{i}" for i, k in enumerate(kinds))
    return f".version 8.7\n.target sm_80\n.visible .entry kernel(\n{parameters}\n)\n{{\nret;\n}}\n"


def test_a_number_that_would_wrap_is_refused_at_build(newest: Any, prepared: dict[str, Prepared]) -> None:
    """TensorRT passes the low 32 bits of an expression and says nothing."""
    one = prepared["dense"]
    registered = register_one(one)
    large = {**SHAPES, "N": (1, 100, 1 << 30), "B": (1, 2, 64)}
    with pytest.raises(KernelError, match="which is no int32"):
        walk(newest[0], one.rewritten, large)
    assert "max shapes of the profile" in registered.problems[-1]
    assert next(iter(one.made.plugins)) in registered.problems[-1]


def test_an_empty_grid_is_refused_at_build(newest: Any, prepared: dict[str, Prepared]) -> None:
    one = prepared["dense"]
    register_one(one)
    with pytest.raises(KernelError, match="nothing to launch at the min shapes"):
        walk(newest[0], one.rewritten, {**SHAPES, "N": (0, 100, 300)})


# The code.


def test_hidden_parameters_are_refused(newest: Any, prepared: dict[str, Prepared]) -> None:
    """Triton appends two pointers to scratch memory, and TensorRT passes neither: reading them would be a crash."""
    one = prepared["dense"]

    def unstripped(entry: str) -> Compiled:
        made = one.bundle.load(entry)
        extra = ",\n\t.param .u64 attention_param_98,\n\t.param .u64 attention_param_99\n)"
        return replace(made, ptx=made.ptx.replace("\n)", extra, 1))

    register_one(one, unstripped)
    with pytest.raises(KernelError, match="has 22 parameters for 20 arguments"):
        walk(newest[0], one.rewritten, SHAPES)
    scratch = PTX.replace("\n)", ", .param .u64 p8, .param .u64 p9\n)")
    toy(newest, "hidden", lambda x: made(newest, ptx=scratch))
    with pytest.raises(Refused, match="the entry takes u64 u32 u64 u64 u64, TensorRT passes u64 u32 u64"):
        check_entry(run(newest, "hidden")[0])


def test_the_order_is_inputs_numbers_outputs(newest: Any, prepared: dict[str, Prepared]) -> None:
    toy(newest, "order", lambda x: made(newest, ptx=entry_of(2, 1, 0)))
    with pytest.raises(Refused, match="the entry takes u64 u64 u32, TensorRT passes u64 u32 u64"):
        check_entry(run(newest, "order")[0])
    one = prepared["dense"]
    entry = next(iter(one.bundle.entries.values()))
    turned = (*[a for a in entry.arguments if a.kind == "output"], *[a for a in entry.arguments if a.kind != "output"])
    kernel = replace(one.bundle.load(next(iter(one.bundle.entries))), entry=replace(entry, arguments=turned))
    with pytest.raises(KernelError, match="not inputs, int32s, outputs"):
        generate.generate(one.model, [one.node], lambda _: [kernel])


def test_another_name_than_the_codes_is_refused(newest: Any) -> None:
    toy(newest, "name", lambda x: made(newest, "other"))
    with pytest.raises(Refused, match="the plugin says other"):
        check_entry(run(newest, "name")[0])


def test_a_kernel_that_tensorrt_cannot_launch_becomes_no_plugin(prepared: dict[str, Prepared]) -> None:
    one = prepared["dense"]
    made = [one.bundle.load(e) for e in one.bundle.entries]
    for change in ({"abi": "tma"}, {"hidden": 2}):
        others = [replace(k, entry=replace(k.entry, **change)) for k in made]  # type: ignore[arg-type]
        assert generate.generate(one.model, [one.node], lambda _, o=others: o).others["node"].code == "no-kernel"  # type: ignore[misc]


def test_a_tactic_of_zero_beside_others_is_refused(newest: Any) -> None:
    toy(newest, "zero")
    newest[1].autotune("toys::zero")(lambda x, outputs: [newest[1].AutoTuneCombination("FP16, FP16", "LINEAR", [0, 1])])
    with pytest.raises(Refused, match="positive"):
        run(newest, "zero")


def test_a_builder_of_the_last_plugin_is_not_used(tensorrt: Any, prepared: dict[str, Prepared]) -> None:
    """10.9 keeps it, and gives it to numbers that are made while only types are asked for."""
    one = prepared["dense"]
    register_one(one)
    for _ in range(2):
        assert len(walk(tensorrt[0], one.rewritten, SHAPES)["node"]) == 2


# The parser.


def with_function(model: ModelProto, name: str) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    body = [helper.make_node("Identity", ["query"], ["output"])]
    copy.functions.append(
        helper.make_function(plugin.NAMESPACE, name, ["query", "key", "value"], ["output"], body,
                             [helper.make_opsetid("", 18)])
    )  # fmt: skip
    return copy


def test_a_body_of_the_same_name_would_be_inlined(newest: Any, prepared: dict[str, Prepared]) -> None:
    """A function comes before a plugin, unless the node has ``plugin_namespace`` and the plugin is registered."""
    one = prepared["dense"]
    (name,) = one.made.plugins
    stray = with_function(one.rewritten, name)
    (written,) = stray.graph.node
    assert importer(newest[0], stray, written) == "function", "nothing is registered yet"
    register_one(one)
    assert importer(newest[0], stray, written) == "plugin"
    del written.attribute[:]
    assert importer(newest[0], stray, written) == "function"
    assert walk(newest[0], stray, SHAPES) == {}, "the plugin would be lost without a word"
    assert importer(newest[0], one.rewritten, one.model.graph.node[0]) == "built-in", "Attention is TensorRT's own"


def test_bodies_that_nobody_calls_are_not_written(prepared: dict[str, Prepared]) -> None:
    one = prepared["dense"]
    with_body = with_function(one.model, "Attention")
    assert len(generate.rewritten(with_body, one.made).functions) == 0
    assert len(with_body.functions) == 1, "the model itself is not changed"
    assert len(generate.rewritten(with_body, generate.Generated({}, {})).functions) == 1


def test_before_10_10_a_namespace_is_not_read_from_the_domain(newest: Any, prepared: dict[str, Prepared]) -> None:
    one = prepared["dense"]
    register_one(one)
    (written,) = one.rewritten.graph.node
    assert created(newest[0], written, by_domain=False) is not None
    bare = NodeProto()
    bare.CopyFrom(written)
    del bare.attribute[:]
    with pytest.raises(Refused, match="Plugin not found"):
        created(newest[0], bare, by_domain=False)


def test_ahead_of_time_whatever_the_network_prefers(tensorrt: Any, prepared: dict[str, Prepared]) -> None:
    one = prepared["dense"]
    register_one(one)
    (written,) = one.rewritten.graph.node
    for preferred in (None, native.QuickPluginCreationRequest.PREFER_JIT):
        made = created(tensorrt[0], written, preferred)
        assert isinstance(made, native.IPluginV3QuickAOTBuild)


def test_no_input_is_left_out(newest: Any) -> None:
    """A node with the sixth input only: its plugin has four, and none of them is empty."""
    with pytest.raises(Refused, match="an input is left out"):
        toy(newest, "gap")
        created(newest[0], node("gap", plugin_namespace="toys", inputs=("x", "", "z")))
    sample = dense("sinks", {"sinks": (1, (4,))})
    (asked,) = calls.find(sample.model(), kernels(), "float32")
    assert asked.call is not None
    kernel = fake(asked)
    result = generate.generate(sample.model(), [asked], lambda _: [kernel])
    assert list(generate.rewritten(sample.model(), result).graph.node[0].input) == ["query", "key", "value", "sinks"]


def fake(asked: Any) -> Compiled:
    """A kernel of the call's best program that no compiler made."""
    program = kernels()[asked.call.op].programs(general(kernels(), asked.call), 80)[0]
    return made_up(arguments=program.arguments, grid=program.grid)


# What becomes no plugin.


def one_node(sample: Any) -> tuple[ModelProto, Any]:
    model = sample.model()
    (asked,) = calls.find(model, kernels(), "float32")
    return model, asked


def test_a_model_in_float32_has_no_plugins() -> None:
    model, asked = one_node(dense("single", kind=1))
    assert asked.call is not None
    assert kernels()["Attention"].supports(asked.call, 80).code == "dtype"
    result = generate.generate(model, [asked], lambda _: [])
    assert result.others["node"].code == "no-kernel" and not result.nodes


def test_types_that_the_kernel_does_not_take() -> None:
    model, asked = one_node(dense("half"))
    kernel = fake(asked)
    wide = tuple(replace(a, type="float32") if a.name == "output" else a for a in kernel.entry.arguments)
    result = generate.generate(model, [asked], lambda _: [replace(kernel, entry=replace(kernel.entry, arguments=wide))])
    assert "the kernel has output in float32, the node in float16" in result.others["node"].reason
    more = (Argument("bias", "input", "float16"), *kernel.entry.arguments)
    result = generate.generate(model, [asked], lambda _: [replace(kernel, entry=replace(kernel.entry, arguments=more))])
    assert "the kernel reads bias, which the node does not have" in result.others["node"].reason


def test_an_output_that_only_the_node_has() -> None:
    model, asked = one_node(dense("two", outputs=("output", "log_sum_exp")))
    kernel = fake(one_node(dense("one"))[1])
    result = generate.generate(model, [asked], lambda _: [kernel])
    assert result.others["node"].code == "outputs"


def test_an_output_without_a_known_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = one_node(dense("half"))
    kernel = fake(asked)
    for size, ok in (("", False), ("unheard_of", False), ("query[9]", False), ("cdiv(query[1], 64)", True)):
        given = helper.make_tensor_type_proto(10, ["query[0]", size or None, 4, 32])
        monkeypatch.setattr(shape_inference, "infer_node_outputs", lambda *_, g=given, **__: {"output": g})
        result = generate.generate(model, [asked], lambda _: [kernel])
        assert bool(result.nodes) == ok
        if ok:
            (made,) = result.plugins.values()
            assert made.outputs[0].axes == ("query[0]", size, "4", "32")
        else:
            assert "axis 1 of output is not known" in result.others["node"].reason


def test_nodes_in_branches_stay() -> None:
    model, asked = one_node(dense("half"))
    result = generate.generate(model, [replace(asked, scope="loop.body")], lambda _: pytest.fail("no kernel"))
    assert result.others["node"].code == "scope"


# Beside the bundle.


def test_plugins_of_a_folder(newest: Any, prepared: dict[str, Prepared], tmp_path: Path) -> None:
    one = prepared["dense"]
    folder = one.bundle.folder
    assert {p.name for p in plugin.read(folder)} >= set(one.made.plugins)
    (made_one,) = one.made.plugins.values()
    assert plugin.Plugin.of_json(made_one.to_json()) == made_one
    largest = max(e.shared for e in one.bundle.entries.values())
    assert largest > 0
    registered = register_folder(folder, SMS, shared_limit=48 << 10)
    assert set(registered.names) == {p.name for p in plugin.read(folder)}
    assert len(walk(newest[0], one.rewritten, SHAPES)["node"]) == sum(
        one.bundle.entries[e].shared <= 48 << 10 for e in made_one.entries
    )
    for damage in ('"scale_bits": "1', '"format": 1'):
        place = tmp_path / "changed"
        place.mkdir(exist_ok=True)
        written = (folder / plugin.INDEX).read_text()
        assert damage in written
        (place / plugin.INDEX).write_text(written.replace(damage, damage.replace("1", "2")))
        with pytest.raises(KernelError, match=r"was changed|its format is 2"):
            plugin.read(place)
    with pytest.raises(KernelError, match="cannot be read"):
        plugin.read(tmp_path)


def test_no_tactic_within_the_limit(newest: Any, prepared: dict[str, Prepared]) -> None:
    with pytest.raises(KernelError, match="no kernel with at most 0 bytes"):
        register_one(prepared["dense"], loader(prepared["dense"], shared=1), shared_limit=0)
