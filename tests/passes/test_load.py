"""Bad files give one clear error; good ones are read without their weights."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile.core.errors import BadModel
from attncompile.passes.load import load
from tests.passes.attention_graphs import Spec, build, save


def small() -> onnx.ModelProto:
    return build(Spec())


def test_hash_is_of_the_file_and_opset_is_read(tmp_path: Path) -> None:
    a, b = load(save(small(), tmp_path, "a.onnx")), load(save(small(), tmp_path, "b.onnx"))
    assert a.hash == b.hash and a.hash.startswith("sha256:") and a.opset == 18
    assert load(save(build(Spec(scale=0.7)), tmp_path, "c.onnx")).hash != a.hash


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x08", b"{}", bytes(range(7, 71)), b"\x00" * 100])
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(BadModel) as error:
        load(path)
    assert str(path) in error.value.message and error.value.hint


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, fraction: float) -> None:
    path = save(small(), tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(BadModel):
        load(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="cannot read"):
        load(tmp_path / "none.onnx")
    with pytest.raises(BadModel, match="folder"):
        load(tmp_path)


def external(folder: Path, location: str = "w.bin", size: int = 4 * 24 * 24) -> Path:
    """A model whose first weight lies in ``location``, which holds ``size`` bytes if it is inside ``folder``."""
    model = small()
    tensor = model.graph.initializer[0]
    length = len(numpy_helper.to_array(tensor).tobytes())
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    target = folder / location
    if size and location and not Path(location).is_absolute() and ".." not in location:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"\0" * size)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_accepted(tmp_path: Path) -> None:
    model = load(external(tmp_path, "sub/w.bin"))
    assert [(f.location, f.size) for f in model.external_files] == [("sub/w.bin", 2304)]
    assert not model.proto.graph.initializer[0].raw_data


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "C:\\w.bin", ""])
def test_external_data_outside(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    with pytest.raises(BadModel, match="outside the model's folder"):
        load(external(folder, location))


def test_external_data_missing_short_or_linked(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="missing"):
        load(external(tmp_path, size=0))
    with pytest.raises(BadModel, match="has only 10 bytes"):
        load(external(tmp_path, size=10))
    path = external(tmp_path)
    (tmp_path / "real.bin").write_bytes((tmp_path / "w.bin").read_bytes())
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").symlink_to(tmp_path / "real.bin")
    with pytest.raises(BadModel, match="symbolic link"):
        load(path)


def test_link_to_a_folder(tmp_path: Path) -> None:
    inner, other = tmp_path / "inner", tmp_path / "other"
    inner.mkdir(), other.mkdir()
    (other / "w.bin").write_bytes(b"\0" * 2304)
    (inner / "sub").symlink_to(other)
    with pytest.raises(BadModel, match="symbolic link"):
        load(external(inner, "sub/w.bin", size=0))


def test_cycle(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], name="first"), helper.make_node("Neg", ["a"], ["b"])]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, [2])],
                              [helper.make_tensor_value_info("b", 1, [2])])  # fmt: skip
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(BadModel, match="cycle through node 'first'"):
        load(path)


def test_nodes_out_of_order_are_fine(tmp_path: Path) -> None:
    model = small()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    assert len(load(save(model, tmp_path)).proto.graph.node) == len(nodes)


@pytest.mark.parametrize("dims", [[1 << 40, 1 << 20], [-5, 3]])
def test_impossible_dimensions(tmp_path: Path, dims: list[int]) -> None:
    model = small()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, dims))
    with pytest.raises(BadModel, match="impossible shape"):
        load(save(model, tmp_path))


def test_initializer_that_lies_about_its_size(tmp_path: Path) -> None:
    model = small()
    model.graph.initializer[0].dims[0] = 1 << 20
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BadModel, match="declares"):
        load(path)


def test_13_gb_of_weights_are_not_read(tmp_path: Path) -> None:
    """Inspecting a model with 13 GB of external data takes little memory and time: the file is sparse, never read."""
    model = small()
    rows = 13 * (1 << 30) // (4 * 24)
    tensor = TensorProto(name="huge", data_type=1, dims=[rows, 24], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(rows * 96))):
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    model.graph.node.append(helper.make_node("MatMul", ["huge", model.graph.initializer[0].name], ["big"]))
    with (tmp_path / "w.bin").open("wb") as handle:
        handle.truncate(rows * 96)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    # Not getrusage: a child begins with its parent's maximum there.
    code = """
        import sys
        from pathlib import Path
        from attncompile.cli import main
        assert main(["inspect", sys.argv[1], "--format", "json"]) == 0
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        print(line.split()[1], file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m.onnx")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert '"sites"' in done.stdout
    assert int(done.stderr.splitlines()[-1]) * 1024 < 1.5 * (1 << 30)


def test_float_arrays_in_hash(tmp_path: Path) -> None:
    """Weights in another file change the hash only with hash_weights; their size always does."""
    path = external(tmp_path)
    first, first_full = load(path).hash, load(path, hash_weights=True).hash
    (tmp_path / "w.bin").write_bytes(np.ones(576, np.float32).tobytes())
    assert load(path).hash == first and load(path, hash_weights=True).hash != first_full
    (tmp_path / "w.bin").write_bytes(b"\0" * 4000)
    assert load(path).hash != first
