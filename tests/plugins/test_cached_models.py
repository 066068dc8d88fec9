"""Decoders with a cache, compiled: the prefill, single steps and a whole generation equal those of the input file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from attncompile import pipeline, whole
from attncompile.core.profile import Range
from attncompile.passes.load import load
from attncompile.passes.symbols import symbols
from attncompile.pipeline import Options
from tests.passes.attention_graphs import save
from tests.passes.cache_graphs import model_of, window
from tests.passes.test_lifter_forms import KV, D, W

pytestmark = pytest.mark.usefixtures("brief")

WIDTH, LAYERS, STEPS = 9, 2, 20
PAIRS = ((0, 1), (0, 2), (0, 9), (0, 70), (1, 1), (8, 1), (9, 1), (10, 1), (9, 9), (31, 17), (203, 1), (203, 7))
RANGES = {"batch": Range(1, 1, 2), "n": Range(1, 12, 40), "p": Range(1, 30, 203), "p + n": Range(2, 42, 243)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "TIMING_SECONDS", 0.1)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def both(path: Path, folder: Path, ranges: dict[str, Range], sites: int) -> tuple[Any, Any]:
    """The input file and what it is compiled to, with every site replaced exactly."""
    known = symbols(load(path))
    given = {name: r for name, r in ranges.items() if name in known}
    options = Options(target="onnx", out=folder / "out", keep_slower=True, profile=given, threads=1, seed=1)
    report = pipeline.compile(path, options)
    assert report.outcome == "replaced", report.warnings
    made = next((folder / "out").rglob("*.onnx"))
    ops = [n.op_type for n in onnx.load(made, load_external_data=False).graph.node]
    assert ops.count("NeighborhoodAttention") == sites
    return session(path), session(made)


def close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("padded", [False, True])
def test_prefill_steps_and_generation(padded: bool, tmp_path: Path) -> None:
    original, ours = both(save(model_of(window(WIDTH), padded, LAYERS), tmp_path), tmp_path, RANGES, LAYERS)
    rng = np.random.default_rng(0)
    names = [f"{x}{layer}" for layer in range(LAYERS) for x in "kv"]
    for past, new in PAIRS:
        feeds = {"x": rng.standard_normal((2, new, W)).astype(np.float32)}
        feeds |= {n: rng.standard_normal((2, KV, past, D)).astype(np.float32) for n in names}
        if padded:
            feeds["mask"] = np.ones((2, past + new), np.int64)
            feeds["mask"][1, : (past + new) // 2] = 0  # left padding
        close(ours.run(None, feeds), original.run(None, feeds))
        if padded:
            feeds["mask"][0, 1:] = 0  # queries that see no key
            close(ours.run(None, feeds), original.run(None, feeds))

    table, head = (rng.standard_normal((50, W)).astype(np.float32) for _ in range(2))
    prompt = rng.integers(0, 50, (2, 13))
    told = [generated(s, table, head, prompt, names, padded) for s in (original, ours)]
    assert np.array_equal(told[0][0], told[1][0]) and len(np.unique(told[0][0])) > 3
    close([told[1][1]], [told[0][1]])


def generated(
    run: Any, table: np.ndarray, head: np.ndarray, prompt: np.ndarray, names: list[str], padded: bool
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Tokens [2, STEPS + 1] and their logits: the prefill without a past, then one token at a time."""
    cache = [np.zeros((2, KV, 0, D), np.float32)] * len(names)
    ids, tokens, scores = prompt, [], []
    keep = np.ones((2, prompt.shape[1]), np.int64)
    keep[1, :4] = 0
    for _ in range(STEPS + 1):
        feeds = {"x": table[ids], **dict(zip(names, cache, strict=True)), **({"mask": keep} if padded else {})}
        out, *cache = run.run(None, feeds)
        scores.append(out[:, -1] @ head.T)
        ids = scores[-1].argmax(axis=-1)[:, None]
        tokens.append(ids)
        keep = np.concatenate([keep, np.ones((2, 1), np.int64)], axis=1)
    assert cache[0].shape[2] == prompt.shape[1] + STEPS
    return np.concatenate(tokens, axis=1), np.stack(scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exporter", "attention", "masked"),
    [("torchscript", "sdpa", True), ("dynamo", "eager", True), ("dynamo", "sdpa", False)],
)
def test_mistral(exporter: str, attention: str, masked: bool, tmp_path: Path) -> None:
    """transformers' DynamicCache as inputs and outputs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, sliding_window=WIDTH,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()

    class WithCache(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, *rest: Any) -> Any:
            mask, past = (rest[0], rest[1:]) if masked else (None, rest)
            state = transformers.DynamicCache()
            for layer in range(LAYERS):
                state.update(past[2 * layer], past[2 * layer + 1], layer)
            result = model(input_ids=ids, attention_mask=mask, past_key_values=state, use_cache=True)
            return result.logits, *(t for layer in result.past_key_values.layers for t in (layer.keys, layer.values))

    past, new = 24, 5
    args = [torch.randint(0, 64, (1, new))]
    args += [torch.ones(1, past + new, dtype=torch.int64)] if masked else []
    args += [torch.randn(1, 2, past, 8) for _ in range(2 * LAYERS)]
    names = ["ids", *(["mask"] if masked else []), *(f"past.{i}" for i in range(2 * LAYERS))]
    outputs = ["logits", *(f"present.{i}" for i in range(2 * LAYERS))]
    path = tmp_path / "mistral.onnx"
    if exporter == "dynamo":
        free = torch.export.Dim.DYNAMIC
        rest = [*([{1: free}] if masked else []), *([{2: free}] * (2 * LAYERS))]
        torch.onnx.export(WithCache(), tuple(args), path, dynamo=True, opset_version=18, input_names=names,
                          output_names=outputs, dynamic_shapes=({1: free}, tuple(rest)))  # fmt: skip
    else:
        axes = {name: {2: "past"} for name in names if name.startswith("past")}
        axes |= {"ids": {1: "sequence"}, "mask": {1: "past + sequence"}}
        torch.onnx.export(WithCache(), tuple(args), path, dynamo=False, opset_version=18, input_names=names,
                          output_names=outputs, dynamic_axes=axes)  # fmt: skip

    ranges = {}
    for name, (low, usual, high) in zip(names, [(1, 12, 40), *([(2, 42, 243)] if masked else []),
                                                *[(1, 30, 203)] * (2 * LAYERS)], strict=True):  # fmt: skip
        info = next(i for i in onnx.load(path, load_external_data=False).graph.input if i.name == name)
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                ranges[dim.dim_param] = Range(low, usual, high)
    original, ours = both(path, tmp_path, ranges, LAYERS)

    rng = np.random.default_rng(1)
    state = [np.zeros((1, 2, 0, 8), np.float32)] * (2 * LAYERS)
    twin, ids = state, rng.integers(0, 64, (1, 21))
    for _ in range(STEPS + 1):
        length = state[0].shape[2] + ids.shape[1]
        mask = {"mask": np.ones((1, length), np.int64)} if masked else {}
        if masked:
            mask["mask"][0, :3] = 0
        want, *state = original.run(None, {"ids": ids, **mask, **dict(zip(names[-4:], state, strict=True))})
        got, *twin = ours.run(None, {"ids": ids, **mask, **dict(zip(names[-4:], twin, strict=True))})
        seen = slice(3, None) if want.shape[1] > 3 and masked else slice(None)
        close([got[:, seen]], [want[:, seen]])
        ids = want[:, -1].argmax(axis=-1)[:, None]
        assert ids[0, 0] == got[0, -1].argmax()
    assert state[0].shape[2] == 21 + STEPS
