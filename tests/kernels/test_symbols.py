"""What symbols mean, against the strides that NumPy gives."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import OpCall
from attncompile.core.layout import part, unpacked
from attncompile.kernels import symbols
from attncompile.kernels.expressions import text
from attncompile.kernels.symbols import Strided

LAYOUTS = ("BNHD", "BHND")


def strided(array: np.ndarray) -> Strided:
    return Strided(array.shape, tuple(s // array.itemsize for s in array.strides))


def operand(layout: str, sizes: dict[str, int]) -> np.ndarray:
    return np.zeros([sizes[a] for a in layout], np.float16)


def call(head_dim: int = 64, value_dim: int = 32, inputs: dict[str, str] | None = None, **attributes: Any) -> OpCall:
    return OpCall("Attention", "float16", 6, 2, head_dim, value_dim, attributes=attributes, inputs=inputs or {})


@given(
    st.tuples(*[st.sampled_from(LAYOUTS)] * 4), st.tuples(*[st.integers(1, 9)] * 3), st.sampled_from((16, 64, 72)),
    st.sets(st.integers(0, 11)),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_expressions_give_numpys_strides(
    layouts: tuple[str, str, str, str], lengths: tuple[int, int, int], dim: int, unknown: set[int]
) -> None:
    """Whatever is dynamic, the node's expressions say what the tensors' own strides say."""
    batch, queries, keys = lengths
    orders = dict(zip(symbols.OPERANDS, layouts, strict=True))
    sizes = {
        "query": {"B": batch, "N": queries, "H": 6, "D": dim}, "key": {"B": batch, "N": keys, "H": 2, "D": dim},
        "value": {"B": batch, "N": keys, "H": 2, "D": 32}, "output": {"B": batch, "N": queries, "H": 6, "D": 32},
    }  # fmt: skip
    arrays = {name: operand(orders[name], sizes[name]) for name in symbols.OPERANDS}
    shapes = {
        name: tuple(None if 4 * i + j in unknown else n for j, n in enumerate(arrays[name].shape))
        for i, name in enumerate(symbols.OPERANDS[:3])
    }
    node = symbols.table(call(dim), shapes, orders)
    ours = symbols.values(node, {name: arrays[name].shape for name in symbols.OPERANDS[:3]})
    theirs = symbols.of_tensors({n: strided(a) for n, a in arrays.items()}, {}, orders)
    for name, value in theirs.items():
        # An axis of size 1 is never stepped along: any stride is right.
        axis = name.rpartition("_stride_")[2]
        single = "_stride_" in name and sizes[name.partition("_")[0]][axis] == 1
        assert single or ours[name] == value, name


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("bias", (2, 6, 5, 7), {"B": 210, "H": 35, "Q": 7, "K": 1}),
        ("bias", (1, 6, 5, 7), {"B": 0, "H": 35, "Q": 7, "K": 1}),
        ("bias", (6, 1, 7), {"B": 0, "H": 7, "Q": 0, "K": 1}),
        ("bias", (5, 1), {"B": 0, "H": 0, "Q": 1, "K": 0}),
        ("bias", (7,), {"B": 0, "H": 0, "Q": 0, "K": 1}),
        ("bias", (), {"B": 0, "H": 0, "Q": 0, "K": 0}),
        ("mask", (2, 1, 5, 7), {"B": 35, "H": 0, "Q": 7, "K": 1}),
        ("key_mask", (2, 1, 1, 7), {"B": 7, "K": 1}),
        ("key_mask", (1, 1, 1, 7), {"B": 0, "K": 1}),
        ("key_mask", (7,), {"B": 0, "K": 1}),
        ("sinks", (6,), {"H": 1}),
        ("sinks", (1,), {"H": 0}),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_broadcast(name: str, shape: tuple[int, ...], wanted: dict[str, int], dynamic: bool) -> None:
    shapes: dict[str, Any] = {"query": (2, 5, 6, 64), "key": (2, 7, 2, 64), "value": (2, 7, 2, 32)}
    shapes[name] = tuple(None for _ in shape) if dynamic else shape
    orders = dict.fromkeys(symbols.OPERANDS, "BNHD")
    node = symbols.table(call(inputs={name: "float16"}), shapes, orders)
    ours = symbols.values(node, {**shapes, name: shape})
    assert {a: ours[f"{name}_stride_{a}"] for a in wanted} == wanted
    if not dynamic:
        assert all(text(node[f"{name}_stride_{a}"]) == str(n) for a, n in wanted.items()), "known, so a number"
    tensors = {n: Strided.contiguous(s) for n, s in {**shapes, name: shape, "output": (2, 5, 6, 32)}.items()}
    theirs = symbols.of_tensors(tensors, {})
    assert {a: theirs[f"{name}_stride_{a}"] for a in wanted} == wanted


def test_broadcast_walks_numpys_broadcast() -> None:
    """Element [b, h, q, k] of the broadcast bias lies at the sum of index times stride."""
    bias = np.arange(6 * 7, dtype=np.float32).reshape(6, 1, 7)
    whole = np.broadcast_to(bias, (2, 6, 5, 7))
    tensors = {n: Strided.contiguous((2, 5, 6, 32)) for n in symbols.OPERANDS} | {"bias": strided(bias)}
    s = symbols.of_tensors(tensors, {})
    place = sum(np.indices(whole.shape)[i] * s[f"bias_stride_{a}"] for i, a in enumerate("BHQK"))
    assert np.array_equal(bias.ravel()[place], whole)


def test_gaps_are_strides_too() -> None:
    """A slice of packed QKV: rows lie three apart."""
    packed = np.zeros((2, 5, 3, 6, 64), np.float16)
    tensors = {n: strided(packed[:, :, i]) for i, n in enumerate(("query", "key", "value"))}
    found = symbols.of_tensors({**tensors, "output": Strided.contiguous((2, 5, 6, 64))}, {})
    assert (found["key_stride_B"], found["key_stride_N"], found["key_stride_H"]) == (5 * 3 * 48, 3 * 48, 8)


def test_an_axis_of_one_may_have_any_stride() -> None:
    """As NumPy makes it by ``x[None]``."""
    assert Strided((1, 4, 3), (0, 3, 1)).gapless
    assert not Strided((2, 4, 3), (0, 3, 1)).gapless and not Strided((4, 3), (6, 1)).gapless


@pytest.mark.parametrize(
    "orders", [("BN0HD", "BN1HD", "BN2HD"), ("2BHND", "BNH1D", "BNHD"), ("B0NHD", "BHND", "B1HND")]
)
@pytest.mark.parametrize("known", [False, True])
def test_parts_of_packed_tensors(orders: tuple[str, str, str], known: bool) -> None:
    """An operand lies where NumPy's view of the part lies."""
    sizes = {"B": 2, "N": 5, "H": 6, "D": 64, **dict.fromkeys("012", 3)}
    layouts = dict(zip(symbols.OPERANDS, (*orders, "BNHD"), strict=True))
    arrays = {n: operand(layouts[n], sizes) for n in symbols.OPERANDS}
    shapes = {n: tuple(sizes[a] if known or a in "HD012" else None for a in layouts[n]) for n in symbols.OPERANDS[:3]}
    made = OpCall("Attention", "float16", 6, 6, 64, 64, packed=True)
    node = symbols.table(made, shapes, layouts)
    ours = symbols.values(node, {n: arrays[n].shape for n in symbols.OPERANDS[:3]})
    theirs = symbols.of_tensors({n: strided(a) for n, a in arrays.items()}, {}, layouts)
    for name, array in arrays.items():
        chosen = part(layouts[name])
        seen = array if chosen is None else np.moveaxis(array, chosen[0], 0)[chosen[1]]
        start = seen.__array_interface__["data"][0] - array.__array_interface__["data"][0]
        for axis, stride in zip(unpacked(layouts[name]), seen.strides, strict=True):
            if axis != "D":
                assert ours[f"{name}_stride_{axis}"] * 16 == theirs[f"{name}_stride_{axis}"] * 16 == stride, axis
        if name != "output":
            assert ours[f"{name}_offset"] * 16 == theirs[f"{name}_offset"] * 16 == start
    assert "query_offset" not in symbols.table(replace(made, packed=False), shapes, layouts)


@given(st.floats(2.0**-20, 2.0**20, width=32))
def test_bits(value: float) -> None:
    assert struct.unpack("<f", struct.pack("<i", symbols.bits(value)))[0] == value


def test_constants() -> None:
    found = symbols.constants({"softcap": 50.0, "left": 255, "right": 0}, 64)
    assert found == {"scale_bits": symbols.bits(0.125), "softcap_bits": symbols.bits(50.0), "left": 255, "right": 0}
    assert symbols.constants({"left": -1, "right": -1, "softcap": 0.0, "scale": 2.0}, 64) == {"scale_bits": 1 << 30}
    shapes = dict.fromkeys(("query", "key", "value"), (1, 2, 6, 64))
    node = symbols.table(call(scale=-1.0), shapes, dict.fromkeys(symbols.OPERANDS, "BNHD"))
    assert symbols.values(node, {})["scale_bits"] == symbols.bits(-1.0) < 0


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"query": (2, 5, 64)}, "rank"), ({"bias": (1, 2, 6, 5, 7)}, "rank"), ({"key_mask": (2, 1, 5, 7)}, "rank"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(changed: dict[str, Any], code: str) -> None:
    shapes: dict[str, Any] = {"query": (2, 5, 6, 64), "key": (2, 7, 2, 64), "value": (2, 7, 2, 32), **changed}
    with pytest.raises(Unsupported) as caught:
        symbols.table(
            call(inputs=dict.fromkeys(changed, "bool")), shapes, dict.fromkeys(symbols.OPERANDS, "BNHD")
        )  # fmt: skip
    assert caught.value.code == code


def test_strides_that_kernels_do_not_take() -> None:
    tensors = {n: Strided.contiguous((2, 5, 6, 64)) for n in symbols.OPERANDS}
    odd = Strided((2, 5, 6, 64), (5 * 6 * 66, 6 * 66, 66, 1))
    with pytest.raises(Unsupported, match="stride 1980 of B is not a multiple of 8"):
        symbols.of_tensors({**tensors, "key": odd}, {})
    with pytest.raises(Unsupported, match="its last axis has a stride of 2"):
        symbols.of_tensors({**tensors, "key": Strided((2, 5, 6, 64), (3840, 768, 128, 2))}, {})
    with pytest.raises(Unsupported, match="multiples of 8 elements"):
        symbols.table(call(60), dict.fromkeys(("query", "key", "value"), (1, 2, 6, None)),
                      dict.fromkeys(symbols.OPERANDS, "BNHD"))  # fmt: skip
