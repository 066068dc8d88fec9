"""``attncompile env --selftest``: an engine of TensorRT for every op with kernels, built, run and compared here.

Each op is one small float16 model (float32 where it holds states) with its body: ONNX Runtime runs the body on the CPU,
the engine our kernels.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper

from attncompile import verify
from attncompile.core.errors import AttncompileError, MissingDependency
from attncompile.core.model import Model
from attncompile.core.profile import Range, ShapeProfile
from attncompile.outputs import FP16_BUDGET
from attncompile.plugins import kernels
from attncompile.plugins.attention import dense
from attncompile.plugins.attention import op as dense_op
from attncompile.plugins.block_select import function as select
from attncompile.plugins.block_select import op as select_op
from attncompile.plugins.block_sparse import listed
from attncompile.plugins.block_sparse import op as sparse_op
from attncompile.plugins.body import DOMAIN
from attncompile.plugins.linear_attention import function as linear
from attncompile.plugins.linear_attention import op as linear_op
from attncompile.plugins.linear_attention.form import Form, Sizes
from attncompile.plugins.neighborhood import function as grid
from attncompile.plugins.neighborhood import op as grid_op
from attncompile.plugins.neighborhood.call import Call
from attncompile.targets.tensorrt import TARGET, TensorRT
from attncompile.tensorrt_plugins import for_this_gpu
from attncompile.verify import ModelComparison

OPSET = 18
HEADS, DIM = 4, 64
PROFILE = ShapeProfile({"batch": Range(1, 2, 4), "tokens": Range(1, 333, 1024)})
Feed = Mapping[str, np.ndarray]
Compare = Callable[[Path, Path, list[Feed]], ModelComparison]


@dataclass(frozen=True, slots=True)
class Row:
    """One op. ``error``: relative L2 of the engine against the body; ``said``: why it failed, or what was built."""

    op: str
    ok: bool
    error: float | None
    seconds: float
    said: str


def compare(model: Path, engine: Path, feeds: list[Feed]) -> ModelComparison:
    return verify.compare_models(model, engine, feeds, budget=FP16_BUDGET)


def run(judge: Compare = compare, target: TensorRT | None = None) -> list[Row]:
    """One row an op with kernels, in their order.

    Raises:
        MissingDependency: TensorRT is not there, does not load, or there is no GPU. One line says it all.
    """
    available = TARGET.available()
    if not available.ok:
        hint = f" ({available.hint})" if available.hint else ""
        raise MissingDependency(f"target tensorrt: {available.reason}{hint}")
    rows = []
    for op, kernel in kernels().items():
        make = MODELS.get(op) or getattr(kernel, "selftest", None)
        if make is None:
            rows.append(Row(op, False, None, 0.0, "not tested: it has no model for this test"))
            continue
        rows.append(_row(op, make(), judge, target or replace(TARGET, plugins=for_this_gpu(kernels()))))
    return rows


def _row(op: str, proto: ModelProto, judge: Compare, target: TensorRT) -> Row:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="attncompile-selftest-") as scratch:
        folder = Path(scratch)
        path = folder / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        model = Model(path, proto, "sha256:selftest", OPSET)
        try:
            lowered = target.lower(proto, model)
            made = [n.op_type for n in lowered.graph.node if n.domain == DOMAIN]
            if not made:
                return Row(op, False, None, time.perf_counter() - start, "no plugin was made of its node")
            result = target.build(lowered, model, PROFILE, folder)
            assert result.engine is not None
            found = judge(path, result.engine, [_feed(proto, 2, 333), _feed(proto, 1, 97)])
        except AttncompileError as error:
            return Row(op, False, None, time.perf_counter() - start, error.message)
        seconds = time.perf_counter() - start
        said = made[0] if found.passed else found.verdict.reason
        return Row(op, found.passed, found.error, seconds, said)


def _feed(proto: ModelProto, batch: int, tokens: int) -> Feed:
    rng = np.random.default_rng(0)
    sizes = {"batch": batch, "tokens": tokens}
    feed = {}
    delta = bool({"beta", "solved"} & {v.name for v in proto.graph.input})
    for v in proto.graph.input:
        tensor = v.type.tensor_type
        drawn = rng.standard_normal([sizes.get(d.dim_param, d.dim_value) for d in tensor.shape.dim])
        drawn = -np.abs(drawn) / 4 if v.name == "log_decay" else drawn
        if delta and v.name in ("key", "solved"):  # so that what is written does not grow from tile to tile
            drawn = drawn / np.sqrt(DIM)
        drawn = 1 / (1 + np.exp(-drawn)) if v.name in ("beta", "amount") else drawn
        feed[v.name] = drawn.astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return feed


Value = tuple[int, Sequence[int | str]]


def _model(
    node: NodeProto, body: FunctionProto, tokens: int | str, inputs: Mapping[str, Value] | None = None,
    outputs: Mapping[str, Value] | None = None, stored: Sequence[TensorProto] = (),
) -> ModelProto:  # fmt: skip
    """``inputs`` and ``outputs``: type and sizes; without them query, key, value, and the output."""
    operand = TensorProto.FLOAT16, ("batch", tokens, HEADS, DIM)
    given, results = (
        [helper.make_tensor_value_info(name, kind, list(sizes)) for name, (kind, sizes) in values.items()]
        for values in (inputs or dict.fromkeys(("query", "key", "value"), operand), outputs or {"output": operand})
    )
    graph = helper.make_graph([node], "selftest", given, results, initializer=list(stored))
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10)


def _call(tokens: int | None) -> Call:
    return Call(
        heads=HEADS, kv_heads=HEADS, head_dim=DIM, value_dim=DIM, scale=DIM**-0.5, dtype="float16",
        softmax_dtype="float32", layouts=("BNHD",) * 4, query_length=tokens, key_length=tokens, self_attention=True,
        key_mask=False, block=64, dense_below=0, opset=OPSET, bias=False, sinks=False,
    )  # fmt: skip


def _attention() -> ModelProto:
    """Causal, any length."""
    dense_op.register()
    form, call = dense_op.Dense(right=0), _call(None)
    node = dense_op.node(form, call, ("query", "key", "value"), ("output",), "attention")
    return _model(node, dense.function(form, call), "tokens")


def _neighborhood() -> ModelProto:
    """7 x 7 windows on a grid of 16 x 24."""
    grid_op.register()
    hood = grid_op.Neighborhood.of({"kernel_size": [7, 7], "grid": [16, 24], "border": "clamp"})
    call = _call(16 * 24)
    node = grid.node(hood, call, ("query", "key", "value"), "output", "neighborhood")
    return _model(node, grid.function(hood, call), 16 * 24)


def _lists() -> ModelProto:
    """Every third key hidden from the second half of 333 queries, which see no key of the second half at all."""
    sparse_op.register()
    tokens = 333
    seen = np.ones((tokens, tokens), bool)
    seen[tokens // 2 :, ::3] = seen[tokens // 2 :, tokens // 2 :] = False
    made = sparse_op.lists(seen, 64)
    form, call = sparse_op.Form(64, inputs=("order",)), _call(tokens)
    names = {name: f"{sparse_op.OP_TYPE}/{made.digest}/{name}" for name in made.arrays()}
    inputs = form.place({"query": "query", "key": "key", "value": "value", **names})
    node = sparse_op.node(form, call, inputs, ("output",), "lists")
    return _model(node, listed.function(node, form, call), tokens, stored=made.initializers())


def _linear(op: str, form: Form, inputs: Mapping[str, Value], outputs: Mapping[str, Value],
            tokens: int | None = None) -> ModelProto:  # fmt: skip
    linear_op.register()
    sizes = Sizes(HEADS, HEADS, DIM, DIM, "float16", ("BNHD",) * 4, tokens, tokens, OPSET)
    given, made = {name: name for name in inputs}, {name: name for name in outputs}
    node = linear.node(op, form, sizes, given, made, "linear")
    return _model(node, linear.function(op, form, sizes, given, made), 0, inputs, outputs)


def _of(tokens: int | str) -> Value:
    return TensorProto.FLOAT16, ("batch", tokens, HEADS, DIM)


def _state(chunks: int | str) -> Value:
    return TensorProto.FLOAT, ("batch", HEADS, chunks, DIM, DIM)


def _linear_state() -> ModelProto:
    """All tokens in one chunk."""
    return _linear(
        linear_op.STATE, Form("relu", "relu"), {"key": _of("tokens"), "value": _of("tokens")}, {"state": _state(1)}
    )


def _linear_combine() -> ModelProto:
    return _linear(linear_op.COMBINE, Form(), {"state": _state(5)}, {"whole_state": _state(1)})


def _linear_apply() -> ModelProto:
    given = {"query": _of("tokens"), "state": _state(1)}
    return _linear(linear_op.APPLY, Form("relu", "relu", scale=0.125), given, {"output": _of("tokens")})


RETENTION = Form(causal=True, decay="token", chunk=64, scale=0.125)


def _linear_states() -> ModelProto:
    """160 tokens, in chunks of 64."""
    decay = TensorProto.FLOAT, ("batch", 160, HEADS)
    given = {"key": _of(160), "value": _of(160), "log_decay": decay}
    return _linear(linear_op.STATES, RETENTION, given, {"state": _state(3)}, 160)


def _linear_output() -> ModelProto:
    """160 tokens, in chunks of 64."""
    decay = TensorProto.FLOAT, ("batch", 160, HEADS)
    given = {"query": _of(160), "key": _of(160), "value": _of(160), "state": _state(3), "log_decay": decay}
    return _linear(linear_op.OUTPUT, RETENTION, given, {"output": _of(160)}, 160)


CHOICE = select.Sizes(HEADS, HEADS, DIM, "float16", ("BNHD", "BNHD"), OPSET)


def _scores() -> ModelProto:
    """160 tokens, blocks of 64 in tiles of 16."""
    select_op.register()
    said = {"scale": DIM**-0.5, "stride": 16, "block": 64, "causal": 0}
    given = {"query": _of(160), "key": _of(160)}
    node = select.node(select_op.SCORES, said, CHOICE, tuple(given), ("scores",), "scores")
    scores = TensorProto.FLOAT, ("batch", HEADS, 10, 3)
    return _model(node, select.function(select_op.SCORES, said, CHOICE), 0, given, {"scores": scores})


def _select() -> ModelProto:
    """Of 9 blocks a share. ``columns`` and ``kinds`` are no outputs: what lies between their rows is not written."""
    select_op.register()
    said = {"tiles": 4, "rule": "share", "causal": 1, "sinks": 1, "window": 0}
    given = {"scores": (TensorProto.FLOAT, ("batch", HEADS, 36, 9)), "amount": (TensorProto.FLOAT, (1,))}
    made = (*select_op.LISTS, "mass")
    node = select.node(select_op.SELECT, said, CHOICE, tuple(given), made, "select")
    mass = TensorProto.FLOAT, ("batch", HEADS, 9, 9)
    rows = TensorProto.INT32, ("batch", HEADS, 9, 3)
    return _model(node, select.function(select_op.SELECT, said, CHOICE), 0, given, {"rows": rows, "mass": mass})


DELTA = Form(causal=True, delta=True, decay="token", chunk=64)


def _linear_solve() -> ModelProto:
    """160 tokens, in tiles of 64."""
    numbers = TensorProto.FLOAT, ("batch", 160, HEADS)
    given = {"key": _of(160), "log_decay": numbers, "beta": (TensorProto.FLOAT16, numbers[1])}
    return _linear(linear_op.SOLVE, DELTA, given, {"solved": _tiles(3)}, 160)


def _linear_delta() -> ModelProto:
    """160 tokens, in tiles and chunks of 64."""
    decay = TensorProto.FLOAT, ("batch", 160, HEADS)
    given = {"key": _of(160), "value": _of(160), "solved": _tiles(3), "log_decay": decay}
    return _linear(linear_op.DELTA, DELTA, given, {"written": _of(160), "state": _state(3)}, 160)


def _tiles(count: int) -> Value:
    return TensorProto.FLOAT, ("batch", HEADS, count, DELTA.tile, DELTA.tile)


def _linear_step() -> ModelProto:
    """One token for each of a batch, and the states before it."""
    state = TensorProto.FLOAT, ("batch", HEADS, DIM, DIM)
    given = {"query": _of(1), "key": _of(1), "value": _of(1),
             "log_decay": (TensorProto.FLOAT, ("batch", 1, HEADS)), "initial_state": state}  # fmt: skip
    return _linear(linear_op.STEP, RETENTION, given, {"output": _of(1), "final_state": state}, 1)


MODELS: Mapping[str, Callable[[], ModelProto]] = {
    "Attention": _attention, "NeighborhoodAttention": _neighborhood, sparse_op.OP_TYPE: _lists,
    linear_op.STATE: _linear_state, linear_op.COMBINE: _linear_combine, linear_op.APPLY: _linear_apply,
    select_op.SCORES: _scores, select_op.SELECT: _select,
    linear_op.STATES: _linear_states, linear_op.OUTPUT: _linear_output,
    linear_op.STEP: _linear_step, linear_op.SOLVE: _linear_solve, linear_op.DELTA: _linear_delta,
}  # fmt: skip
"""By op. The kernel of another op may have a method ``selftest`` that gives such a model."""
