"""Options of engines, in our spelling and in trtexec's."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from attncompile import engine_options, outputs
from attncompile.core.errors import BadArguments
from attncompile.core.profile import Range
from attncompile.targets.engine import EngineOptions


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x [batch, seq, 8], y [batch, ?], z [past + seq]."""
    half = TensorProto.FLOAT16
    values = [
        helper.make_tensor_value_info("x", half, ["batch", "seq", 8]),
        helper.make_tensor_value_info("y", half, ["batch", None]),
        helper.make_tensor_value_info("z", half, ["past + seq"]),
    ]
    out = helper.make_tensor_value_info("o", half, None)
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["o"])], "g", values, [out])
    path = tmp_path / "m.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("text", "size"), [("4G", 4 << 30), ("512M", 512 << 20), ("1024", 1 << 30), ("7k", 7 << 10), ("3B", 3)]
)
def test_sizes(text: str, size: int) -> None:
    assert engine_options.size(text) == size


@pytest.mark.parametrize("text", ["", "four", "-1", "4T", "1.5G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadArguments, match="is no size"):
        engine_options.size(text)


def test_ours() -> None:
    made = engine_options.parse("1G", Path("t"), True, False, 3, ["seq=1:1:1,past=1:8:9", "seq=2:5:9"])
    profiles = ({"seq": Range(1, 1, 1), "past": Range(1, 8, 9)}, {"seq": Range(2, 5, 9)})
    assert made == EngineOptions(1 << 30, Path("t"), True, False, 3, profiles)


def test_a_target_without_engines_refuses_them() -> None:
    """A timing cache that nothing writes would be found missing after the build."""
    asked = EngineOptions(timing_cache=Path("t"))
    for name in ("onnx", "onnxruntime-cuda"):
        with pytest.raises(BadArguments, match=f"target {name} builds no engine") as raised:
            outputs.target(name, None, asked)
        assert "--target tensorrt-rtx" in raised.value.hint
        assert outputs.target(name, None, EngineOptions()).name == name
    assert outputs.target("tensorrt", None, asked).name == "tensorrt"


def test_trtexecs(model: Path) -> None:
    found = engine_options.ranges(model, ["x:1x2x8,y:1x3"], ["x:2x4x8", "y:2x6"], ["x:3x9x8,y:3x7,z:9"])
    assert found == {"batch": Range(1, 2, 3), "seq": Range(2, 4, 9), "y:1": Range(3, 6, 7)}
    assert engine_options.ranges(model, [], ["x:2x4x8"], []) == {"batch": Range(2, 2, 2), "seq": Range(4, 4, 4)}
    assert engine_options.ranges(model, ["x:1x1x8"], [], []) == {"batch": Range(1, 1, 1), "seq": Range(1, 1, 1)}
    assert engine_options.ranges(model, [], [], []) == {}


@pytest.mark.parametrize(
    ("usual", "why"),
    [
        (["w:1"], "no input 'w'"), (["x:1x1"], "has 3 axes"), (["x:1x1x9"], "size 8 where 9 was given"),
        (["x:1x1x8,y:2x1"], "'batch' has two ranges"), (["x"], "is no shape"), (["x:axb"], "is no shape"),
    ],
)  # fmt: skip
def test_trtexecs_that_do_not_fit(model: Path, usual: list[str], why: str) -> None:
    with pytest.raises(BadArguments, match=why):
        engine_options.ranges(model, [], usual, [])


def test_a_range_that_falls(model: Path) -> None:
    with pytest.raises(BadArguments, match="is not increasing"):
        engine_options.ranges(model, ["x:9x9x8"], ["x:2x4x8"], [])
