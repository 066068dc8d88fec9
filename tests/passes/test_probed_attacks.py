"""Regions that nearly are attention: what running them must not take for it, each with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.probed.lift import digest
from attncompile.passes.detect.probed.reading import check_logits, read
from attncompile.passes.detect.probed.region import regions_around
from attncompile.passes.detect.probed.visible import Sizes
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.load import load
from tests.passes.attention_graphs import save
from tests.passes.mutations import Graph
from tests.passes.rebuild import found_in, only_site, random_feeds, rebuilt, run_for
from tests.passes.test_probed import BATCH, CHUNK, CHUNKS, DIM, FIRST, HEADS, pieces

QUERIES, KEYS = CHUNK * CHUNKS, FIRST + CHUNK * CHUNKS


class Places(Graph):
    """``pieces()`` with names for its places."""

    def __init__(self) -> None:
        super().__init__(pieces())
        (self.softmax,) = (n for n in self.nodes if n.op_type == "Softmax")
        (joined,) = (n for n in self.nodes if self.softmax.input[0] in n.output)
        self.scores = str(self.softmax.input[0])  # [B, H, chunks, chunk, FIRST + chunk]
        self.weights = str(self.softmax.output[0])
        self.far, self.near = (str(v) for v in joined.input)
        (summed,) = (n for n in self.nodes if n.op_type == "Add" and len(self.shapes[n.output[0]]) == 5)
        self.out = str(summed.output[0])  # [B, H, chunks, chunk, D]
        (product,) = (n for n in self.nodes if summed.input[1] in n.output)
        self.values = str(product.input[1])
        einsum = [n for n in self.nodes if n.op_type == "Einsum"]
        self.queries = str(einsum[0].input[0])
        self.keys = str(einsum[0].input[1])

    def random(self, shape: tuple[int, ...], size: float) -> str:
        return self.const((np.random.default_rng(1).standard_normal(shape) * size).astype(np.float32))

    def added(self, value: str, constant: np.ndarray) -> None:
        self.wrap(value, lambda v: self.op("Add", v, self.const(constant.astype(np.float32))))

    def times(self, value: str, constant: np.ndarray) -> None:
        self.wrap(value, lambda v: self.op("Mul", v, self.const(constant.astype(np.float32))))


def _mask(fill: float, *, heads: int = 1, batch: int = 1) -> np.ndarray:
    """Hides one key of one query from the first head and batch entry (of those that it tells apart)."""
    mask = np.zeros((batch, heads, CHUNKS, CHUNK, FIRST + CHUNK))
    mask[0, 0, 1, 2, 4] = fill
    return mask


def _ratio(entries: int, size: float) -> np.ndarray:
    return 1 + size * np.arange(entries)


def _cast(places: Places, kind: int) -> None:
    places.wrap(places.near, lambda v: places.op("Cast", places.op("Cast", v, to=kind), to=1))


def _dropped(places: Places, ratio: float, training: bool) -> None:
    numbers = places.const(np.array(ratio, np.float32)), places.const(np.array(training))
    places.wrap(places.weights, lambda v: places.op("Dropout", v, *numbers, seed=3))


def _by_data(places: Places) -> None:
    """Keys are hidden where a score of another product is negative."""
    places.wrap(
        places.near,
        lambda v: places.op("Where", places.op("Less", v, places.scalar(-3.0)), places.scalar(-1e9), v),
    )


def _twice(places: Places) -> None:
    """The first key of every chunk counts twice."""
    order = places.const(np.array([0, 0, 1, 2, 3, 4]))
    for value, axis in ((places.near, 4), (places.values, 3)):
        places.wrap(value, lambda v, axis=axis: places.op("Gather", v, order, axis=axis))  # type: ignore[misc]
    ends = [t for t in places.stored.values() if onnx.numpy_helper.to_array(t).tolist() == [FIRST + CHUNK]]
    for tensor in ends:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([FIRST + CHUNK + 1]), tensor.name))


def _axis(places: Places) -> None:
    places.softmax.attribute[0].i = 3


def _padding_by_data(places: Places) -> None:
    total = places.op("ReduceSum", places.far, keepdims=0)
    pads = places.const(np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 0]))
    cut = [places.const(np.array([n])) for n in (1, FIRST + 1, 4)]
    places.wrap(places.far, lambda v: places.op("Slice", places.op("Pad", v, pads, total), *cut),
                [n for n in places.readers(places.far) if n.op_type == "Concat"])  # fmt: skip


REFUSED: dict[str, Callable[[Places], object]] = {
    "tiny bias": lambda p: p.added(p.near, np.full((1, 1, 1, 1, CHUNK), 1e-5) * np.arange(CHUNK)),
    "bias of one key": lambda p: p.added(p.scores, _mask(-3e-6)),
    "mask of -20": lambda p: p.added(p.scores, _mask(-20)),
    "mask of -100": lambda p: p.added(p.scores, _mask(-100)),
    "mask of -5000": lambda p: p.added(p.scores, _mask(-5000)),
    "mask, then scaled": lambda p: (p.times(p.scores, np.array(0.01)), p.added(p.scores, _mask(-1e4))),
    "mask of one batch entry": lambda p: p.added(p.scores, _mask(-np.inf, batch=BATCH)),
    "scale of heads": lambda p: p.times(p.scores, _ratio(HEADS, 1e-5).reshape(1, HEADS, 1, 1, 1)),
    "scale of queries": lambda p: p.times(p.queries, _ratio(CHUNK, 1e-5).reshape(1, 1, 1, CHUNK, 1)),
    "scale of a channel": lambda p: p.times(p.queries, _ratio(DIM, 1e-5).reshape(1, 1, 1, 1, DIM)),
    "scale of some keys": lambda p: p.times(p.near, np.array(1.00005)),
    "shifted output": lambda p: p.added(p.out, np.array(1e-6)),
    "shifted values": lambda p: p.added(p.values, np.array(1e-7)),
    "shifted queries": lambda p: p.added(p.queries, np.array(1e-6)),
    "shifted keys": lambda p: p.added(p.keys, np.arange(CHUNK).reshape(1, 1, 1, CHUNK, 1) * 1e-6),
    "weight of 1e-5": lambda p: p.added(p.scores, _mask(float(np.log(1e-5)))),
    "weights with a factor": lambda p: p.times(p.weights, np.where(_mask(1.0) > 0, 0.99, 1.0)),
    "half precision inside": lambda p: _cast(p, onnx.TensorProto.FLOAT16),
    "integers inside": lambda p: _cast(p, onnx.TensorProto.INT32),
    "hidden by data": _by_data,
    "training": lambda p: _dropped(p, 1e-3, True),
    "other softmax axis": _axis,
    "padding by data": _padding_by_data,
    "divided by data": lambda p: p.wrap(p.near, lambda v: p.op("Div", v, p.op("Exp", v))),
    "softcap of 1e4": lambda p: p.wrap(
        p.near, lambda v: p.op("Mul", p.op("Tanh", p.op("Div", v, p.scalar(1e4))), p.scalar(1e4))
    ),
    "heads of K exchanged": lambda p: p.wrap(p.keys, lambda v: p.op("Gather", v, p.const(np.array([1, 0, 2])), axis=1)),
    "batch of V exchanged": lambda p: p.wrap(p.values, lambda v: p.op("Gather", v, p.const(np.array([1, 0])), axis=0)),
    "square of scores": lambda p: p.wrap(
        p.near, lambda v: p.op("Add", v, p.op("Mul", p.op("Mul", v, v), p.scalar(1e-3)))
    ),
}  # fmt: skip

KEPT: dict[str, Callable[[Places], object]] = {
    "nothing": lambda p: p.scores,
    "mask of -1e4": lambda p: p.added(p.scores, _mask(-1e4)),
    "mask of -inf": lambda p: p.added(p.scores, _mask(-np.inf)),
    "idle dropout": lambda p: _dropped(p, 0.5, False),
    "scaled at two places": lambda p: (p.times(p.near, np.array(2.0)), p.times(p.far, np.array(2.0))),
    "one more for all scores of zero": lambda p: p.added(p.scores, np.zeros(1)),
    "mask of one head": lambda p: p.added(p.scores, _mask(-np.inf, heads=HEADS)),
    "a key twice": _twice,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    places = Places()
    REFUSED[name](places)
    proto = places.model()
    _, found = found_in(proto, tmp_path)
    assert run_for(proto, random_feeds(proto), ["y"])["y"].shape == (BATCH, QUERIES, HEADS * DIM)
    assert found.sites == ()
    assert found.near_misses


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str, tmp_path: Path) -> None:
    places = Places()
    KEPT[name](places)
    _, site = only_site(places.model(), tmp_path)
    assert site.form == "probed analytic-region"


def _symbolic(axis: int) -> onnx.ModelProto:
    proto = pieces()
    proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "n"
    for node in proto.graph.node:  # a Reshape that keeps its batch
        for tensor in proto.graph.initializer:
            if node.op_type == "Reshape" and tensor.name == node.input[1]:
                shape = onnx.numpy_helper.to_array(tensor).copy()
                shape[0] = 0
                tensor.CopyFrom(onnx.numpy_helper.from_array(shape, tensor.name))
    return proto


def test_a_dynamic_batch_is_refused(tmp_path: Path) -> None:
    _, found = found_in(_symbolic(0), tmp_path)
    assert found.sites == ()
    assert [m.code for m in found.near_misses] == ["dynamic"]
    assert "'n' is 2 only" in found.near_misses[0].reason


def test_in_a_body(tmp_path: Path) -> None:
    whole = pieces()
    body = onnx.GraphProto()
    body.CopyFrom(whole.graph)
    body.name = "body"
    del body.input[:]
    other = helper.make_graph(
        [helper.make_node("Slice", ["x", "from", "to", "one"], ["z"])], "other", [],
        [helper.make_tensor_value_info("z", 1, None)],
    )  # fmt: skip
    for name, number in (("from", FIRST), ("to", KEYS), ("one", 1)):
        other.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
    made = helper.make_node("If", ["yes"], ["out"], name="choice", then_branch=body, else_branch=other)
    graph = helper.make_graph(
        [made], "outer", [whole.graph.input[0], helper.make_tensor_value_info("yes", 9, [])],
        [helper.make_tensor_value_info("out", 1, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    _, found = found_in(model, tmp_path)
    (site,) = found.sites
    assert site.scope == "If 'choice'/then_branch"
    inner = onnx.ModelProto()
    inner.CopyFrom(whole)
    rebuilt(inner, site, random_feeds(inner)).check()


def test_two_wirings_are_two_texts(tmp_path: Path) -> None:
    digests = set()
    for at in range(2):
        places = Places()
        if at:
            (joined,) = (n for n in places.nodes if n.op_type == "Concat")
            joined.input[0], joined.input[1] = joined.input[1], joined.input[0]
        index = GraphIndex(load(save(places.model(), tmp_path)))
        world = World(index, {}).without_idle()
        (softmax,) = (n for n in world.index.nodes if n.op_type == "Softmax")
        digests |= {digest(world.index, world, r) for r in regions_around(world.index, world, softmax)[:1]}
    assert len(digests) == 2


SIZES = Sizes(2, 3, 9, 9, 4, 5)
SEEN = np.abs(np.arange(9)[None] - np.arange(9)[:, None]) < 3


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.where(SEEN, 0.3 * (q @ k.swapaxes(2, 3)), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: np.ndarray = (weights / weights.sum(axis=-1, keepdims=True)) @ v
    return out.astype(np.float32)


def test_not_a_number_is_no_agreement() -> None:
    def run(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        out = _attention(q, k, v)
        return np.where(np.abs(q).max() > 3, np.nan, out)

    with pytest.raises(Unsupported):
        read(run, SIZES)


def test_the_scale_is_read_to_six_digits() -> None:
    assert read(_attention, SIZES).scale == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("fill", [-20.0, 1e-7, -8000.0, np.nan])
def test_logits_that_are_more_than_a_product(fill: float) -> None:
    def logits(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
        return [np.where(SEEN, q @ k.swapaxes(2, 3), fill)]

    with pytest.raises(Unsupported, match="more than a product"):
        check_logits(logits, SIZES)
