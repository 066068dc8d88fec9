"""tools/sampling_compare.py: what it says of a search's report, and of the sampler's steps."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("torch")
from attncompile.core.keep_dense import KeepDense
from attncompile.models.trained.recipe import load

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("sampling_compare", ROOT / "tools" / "sampling_compare.py")
assert _spec is not None and _spec.loader is not None
sampling = importlib.util.module_from_spec(_spec)
sys.modules["sampling_compare"] = sampling
_spec.loader.exec_module(sampling)


def test_the_steps_of_the_sampler() -> None:
    recipe = load(None).dit
    times = sampling.times_of(recipe)
    assert len(times) == recipe.steps and times[0] == 1.0 and (np.diff(times) < 0).all() and times[-1] > 0
    assert sampling.share_kept(None, times) == 0.0
    assert sampling.share_kept(KeepDense.parse("time >= 0.7"), times) == np.mean(np.array(times) >= 0.7) > 0
    assert sampling.share_kept(KeepDense.parse("time > 1"), times) == 0.0


def report(folder: Path, rule: str, density: float | None) -> Path:
    points = [{"time": 0.9, "bound": 0.01, "chosen": False}, {"time": 0.25, "bound": 0.04, "chosen": True}]
    search = {"density": density, "keep_dense": rule, "set_aside": 3, "calibration": 5, "held": [0.1] * 4,
              "points": points, "metric": "psnr"}  # fmt: skip
    (folder / "report.json").write_text(json.dumps({"search": search, "options": {"max_error": 25.0}}))
    return folder


def test_a_row_over_all_steps(tmp_path: Path) -> None:
    row = sampling.row_of(report(tmp_path, "time >= 0.5", 0.2), [1.0, 0.5, 0.25, 0.2])
    assert (row["kept"], row["inputs"], row["set_aside"], row["bound"]) == (0.5, 12, 3, 0.04)
    assert row["density_of_steps"] == pytest.approx(0.5 + 0.5 * 0.2)
    assert (row["predicted_gain"], row["predicted_gain_of_steps"]) == (4.0, pytest.approx(1 / (0.5 + 0.5 * 0.25)))
    assert sampling.row_of(report(tmp_path, "", 0.2), [1.0, 0.5])["density_of_steps"] == pytest.approx(0.2)
    with pytest.raises(SystemExit, match="was undone later"):
        sampling.row_of(report(tmp_path, "", None), [1.0])


def test_cpu_seconds(tmp_path: Path) -> None:
    """A model with a hundred products takes longer than one with a single product."""
    paths = {}
    for name, count in (("file", 1), ("ours", 100)):
        nodes = [helper.make_node("MatMul", [f"x{i}" if i else "x", "x"], [f"x{i + 1}"]) for i in range(count)]
        square = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [129, 129]) for n in ("x", f"x{count}")]
        graph = helper.make_graph(nodes, "g", square[:1], square[1:])
        paths[name] = tmp_path / f"{name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), paths[name])
    found = sampling.cpu_seconds(paths, {"x": np.eye(129, dtype=np.float32)}, 5)
    assert 0 < found["file"] < found["ours"]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "bench").glob("sampling-*.json")), ids=lambda p: p.stem)
def test_rows_of_the_docs(path: Path) -> None:
    """Each row of a committed result stands in docs/sparse.md, and is what its own numbers give."""
    told = json.loads(path.read_text(encoding="utf-8"))
    lines = (ROOT / "docs" / "sparse.md").read_text(encoding="utf-8").splitlines()
    shown = [{cell.strip() for cell in line.strip("|").split("|")} for line in lines if line.startswith("|")]
    assert told["steps"] == load(None).dit.steps and told["rows"]
    times = sampling.times_of(load(None).dit)
    for row in told["rows"]:
        rule = KeepDense.parse(row["keep_dense"]) if row["keep_dense"] else None
        assert row["kept"] == sampling.share_kept(rule, times)
        assert row["density_of_steps"] == pytest.approx(row["kept"] + (1 - row["kept"]) * row["density"])
        images = ", ".join(f"{value:.1f}" for value in row["psnr"])
        cells = {f"`{rule.text}`" if rule else "none", f"{row['max_error']:g} dB", f"{row['density']:.1%}",
                 f"{row['density_of_steps']:.1%}", images, f"{row['gain_of_steps']:.2f}x",
                 f"{row['predicted_gain_of_steps']:.2f}x"}  # fmt: skip
        assert any(cells <= there for there in shown), cells
    assert re.search(r"tools/sampling_compare\.py", told["command"])
