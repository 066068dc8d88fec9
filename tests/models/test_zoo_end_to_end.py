"""The two models that other fusers break: GPT-2 (a lost reshape before Gemm) and BERT with padding on the left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from attncompile import pipeline
from attncompile.models import export
from attncompile.pipeline import Options

pytestmark = pytest.mark.usefixtures("brief")

PADDED = 11


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_left_padding(tmp_path: Path, name: str, exporter: str) -> None:
    """The second row is padded on the left, in the user's own inputs: both layers are replaced, nothing changes
    anywhere, and the valid tokens are those of the torch model.
    """
    path = tmp_path / "model.onnx"
    padding = {"padding_mask": True} if name == "gpt2" else {}
    built = export(name, path, exporter=exporter, batch=2, **padding).built
    inputs = {key: tensor.clone() for key, tensor in built.inputs.items()}
    mask = inputs["attention_mask"]
    mask.fill_(1)
    mask[1, :PADDED] = 0
    feeds = {key: tensor.numpy() for key, tensor in inputs.items()}
    np.savez(tmp_path / "inputs.npz", **feeds)
    out = tmp_path / "out"
    options = Options(policy="exact", target="onnx", out=out, inputs=tmp_path / "inputs.npz", keep_slower=True)
    result = pipeline.compile(path, options)
    assert result.outcome == "replaced" and result.exit_code == 0, result.warnings
    assert len(result.sites) == 2 and not any(s.rolled_back for s in result.sites)
    assert all(s.exactness is not None and s.exactness.passed for s in result.sites)
    assert all(s.site.mask.part("padding") is not None for s in result.sites)
    assert result.parity is not None and result.parity.passed
    assert any(c.label == "inputs" for c in result.parity.comparisons)
    before, after = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for p in (path, out / "model.onnx")
    )
    assert np.isfinite(before).all()
    assert np.linalg.norm(after - before) <= 1e-6 * np.linalg.norm(before)
    with torch.no_grad():
        original = built.module(*inputs.values()).numpy()
    for got, want in ((after[0], original[0]), (after[1, PADDED:], original[1, PADDED:])):
        assert np.linalg.norm(got - want) <= 2e-6 * np.linalg.norm(want)
    # Attending to the padding would be seen: with the mask open, the valid tokens are others.
    with torch.no_grad():
        opened = built.module(*{**inputs, "attention_mask": torch.ones_like(mask)}.values()).numpy()
    assert np.linalg.norm(opened[1, PADDED:] - original[1, PADDED:]) > 1e-3 * np.linalg.norm(original[1, PADDED:])
