"""``attncompile env --selftest``: without TensorRT one line, with a double of it one row an op."""

from __future__ import annotations

from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from attncompile import env, selftest, tensorrt_plugins
from attncompile.cli import main
from attncompile.core.verdict import Verdict
from attncompile.kernels import calls
from attncompile.plugins import kernels
from attncompile.targets import engine
from attncompile.targets import tensorrt as target
from tests.kernels.tensorrt.conftest import opened, packages
from tests.kernels.tensorrt.machine import as_package

__all__ = ["opened", "packages"]


def test_without_tensorrt_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    if env.installed("tensorrt"):
        pytest.skip("TensorRT is here")
    assert main(["env", "--selftest"]) == 2
    out, err = capsys.readouterr()
    wanted = "error: target tensorrt: tensorrt is not installed (pip install 'attncompile[tensorrt]')"
    assert (out, err.splitlines()) == ("", [wanted])


@pytest.mark.parametrize("op", selftest.MODELS)
def test_the_models_run_through_their_bodies(op: str) -> None:
    """Their nodes are what kernels are made for, and ONNX Runtime computes them."""
    proto = selftest.MODELS[op]()
    onnx.checker.check_model(proto, full_check=True)
    (node,) = calls.find(proto, kernels(), "float32")
    assert node.call is not None and node.op == op
    assert kernels()[node.call.op].supports(node.call, 90).ok
    feed = selftest._feed(proto, 2, 33)
    results = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)
    sizes = {"batch": 2, "tokens": 33}
    for value, got in zip(proto.graph.output, results, strict=True):
        wanted = [sizes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        assert list(got.shape) == wanted and np.isfinite(got).all() and got.any()


def test_every_op_with_kernels_has_a_model() -> None:
    assert not [op for op, kernel in kernels().items() if op not in selftest.MODELS and not hasattr(kernel, "selftest")]


@pytest.mark.slow
def test_one_row_an_op(
    opened: Any,
    packages: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines of the double: all but running them."""
    pytest.importorskip("triton")
    opened("11.4")
    monkeypatch.setenv("PYTHONPATH", str(as_package(tmp_path / "site", Path(packages["11.4"]), "11.4.0")))
    monkeypatch.setattr(target.TensorRT, "available", lambda _: Verdict.yes())
    monkeypatch.setattr(engine, "capabilities", lambda: [80])
    chosen = target.TensorRT(plugins=tensorrt_plugins.KernelPlugins(kernels(), 80, 108))
    errors = chain((1e-4, 0.5), repeat(1e-4))

    def judge(model: Path, made: Path, feeds: Any) -> Any:
        assert model.is_file() and made.is_file() and len(feeds) == 2
        error = next(errors)
        verdict = Verdict.yes() if error < 1e-2 else Verdict.no("over_budget", "too far")
        return SimpleNamespace(passed=verdict.ok, error=error, verdict=verdict)

    rows = {r.op: r for r in selftest.run(judge, chosen) if r.op in selftest.MODELS}
    assert set(rows) == set(selftest.MODELS)
    said = [(r.ok, r.error) for r in rows.values()]
    assert said == [(True, 1e-4), (False, 0.5), *[(True, 1e-4)] * (len(rows) - 2)], [r.said for r in rows.values()]
    assert all(r.said.startswith(f"{op}_") for op, r in rows.items() if r.ok)
    assert rows["Attention"].said.startswith("Attention_") and rows["NeighborhoodAttention"].said == "too far"
