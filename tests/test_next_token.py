"""Metric perplexity: which input holds the tokens, what is refused, and what two models are judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile import metrics, verify
from attncompile.cli import main
from attncompile.core.errors import BadArguments
from attncompile.verification.next_token import NextToken, next_token

VOCABULARY, WIDTH, TOKENS = 19, 8, 13


def model(*names: str, scale: float = 1.0, tied: str = "input_ids", length: int | str = TOKENS) -> ModelProto:
    """logits = (embedding[tied] + table[each other input]) @ head, with tables of 32 rows."""
    rng = np.random.default_rng(3)
    stored = [
        numpy_helper.from_array(rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32), "embedding"),
        numpy_helper.from_array(rng.standard_normal((32, WIDTH)).astype(np.float32), "table"),
        numpy_helper.from_array((scale * rng.standard_normal((WIDTH, VOCABULARY))).astype(np.float32), "head"),
    ]
    nodes = []
    for name in names:
        nodes.append(helper.make_node("Cast", [name], [f"{name}_64"], to=TensorProto.INT64))
        nodes.append(
            helper.make_node("Gather", ["embedding" if name == tied else "table", f"{name}_64"], [f"{name}_x"])
        )
    nodes.append(helper.make_node("Sum", [f"{n}_x" for n in names], ["x"]))
    nodes.append(helper.make_node("MatMul", ["x", "head"], ["logits"]))
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, [1, length]) for n in names]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, length, VOCABULARY])
    graph = helper.make_graph(nodes, "lm", inputs, [output], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def feed(seed: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.random.default_rng(seed).integers(0, VOCABULARY, (1, TOKENS))}


def test_the_only_integer_input_of_the_shape_holds_the_tokens() -> None:
    assert next_token(model("input_ids")) == NextToken("input_ids", "logits")
    assert next_token(model("any", tied="any", length="n")) == NextToken("any", "logits")


def test_positions_of_the_same_shape_are_told_apart_by_the_table_that_they_index() -> None:
    assert next_token(model("position_ids", "input_ids")) == NextToken("input_ids", "logits")
    with pytest.raises(BadArguments, match="not clear which of the inputs a, b"):
        next_token(model("a", "b", tied=""))


def test_tokens_that_are_reshaped_before_they_are_looked_up() -> None:
    """GPT-2 of transformers does, whatever their shape was."""
    proto = model("position_ids", "input_ids")
    graph = proto.graph
    graph.initializer.append(numpy_helper.from_array(np.array([-1, TOKENS]), "view"))
    cast = next(n for n in graph.node if n.output[0] == "input_ids_64")
    cast.output[0] = "flat"
    graph.node.insert(3, helper.make_node("Reshape", ["flat", "view"], ["input_ids_64"]))
    assert next_token(proto) == NextToken("input_ids", "logits")


def test_what_looks_up_no_table_of_the_vocabularys_size_is_no_token() -> None:
    """The mask beside embedded inputs; the tokens where outputs are labels of them."""
    with pytest.raises(BadArguments, match="not clear which of the inputs attention_mask"):
        next_token(model("attention_mask", tied=""))
    labels = model("input_ids")
    labels.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.ones((WIDTH, 9), np.float32), "head"))
    labels.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 9
    with pytest.raises(BadArguments, match="not clear which of the inputs input_ids"):
        next_token(labels)


def test_a_quantised_table_is_one() -> None:
    given = model("attention_mask", "input_ids")
    table = next(t for t in given.graph.initializer if t.name == "embedding")
    table.CopyFrom(numpy_helper.from_array(np.zeros((VOCABULARY, WIDTH), np.int8), "quantised"))
    given.graph.initializer.append(numpy_helper.from_array(np.float32(0.1).reshape(()), "step"))
    given.graph.node.insert(0, helper.make_node("DequantizeLinear", ["quantised", "step"], ["embedding"]))
    assert next_token(given) == NextToken("input_ids", "logits")


def test_numbers_that_are_no_tokens_are_refused() -> None:
    told, logits = NextToken("t", "y"), {"y": np.zeros((1, 3, 5), np.float32)}
    with pytest.raises(BadArguments, match="none of 5 tokens"):
        told.loss(logits, {"t": np.array([[0, 5, 1]])})
    with pytest.raises(BadArguments, match="none of 5 tokens"):
        told.loss(logits, {"t": np.array([[0, -100, 1]])})
    with pytest.raises(BadArguments):
        told.loss({"y": np.zeros((1, 1, 5), np.float32)}, {"t": np.array([[0]])})


def test_a_model_without_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = model("input_ids")
    images.graph.input[0].type.tensor_type.shape.dim[1].dim_value = TOKENS + 1
    with pytest.raises(BadArguments, match="needs an integer input"):
        next_token(images)
    path = tmp_path / "model.onnx"
    onnx.save(images, path)
    np.savez(tmp_path / "inputs.npz", input_ids=np.zeros((1, TOKENS + 1), np.int64))
    given = ["compile", str(path), "--policy", "sparse", "--inputs", str(tmp_path / "inputs.npz"),
             "--metric", "perplexity", "--max-error", "0.01", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(given) == 2
    told = capsys.readouterr().err
    assert "error: metric perplexity needs an integer input" in told and "hint: use kl" in told
    assert not (tmp_path / "out").exists()


def test_the_loss_is_that_of_the_following_tokens_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, tokens = rng.standard_normal((2, 7, 5)), rng.integers(0, 5, (2, 7))
    by_hand = [np.log(np.exp(logits[b, i]).sum()) - logits[b, i, tokens[b, i + 1]] for b in range(2) for i in range(6)]
    assert metrics.next_token_loss(logits, tokens) == pytest.approx(np.mean(by_hand))
    other = logits + rng.standard_normal(logits.shape)
    divergence = metrics.kl_divergence(logits, other)
    monkeypatch.setattr(metrics, "_PART", 15)
    assert metrics.next_token_loss(logits, tokens) == pytest.approx(np.mean(by_hand))
    assert metrics.kl_divergence(logits, other) == pytest.approx(divergence)
    assert np.isnan(metrics.next_token_loss(np.where(logits > 1, np.nan, logits), tokens))


def test_two_models_are_judged_by_the_rise_over_all_inputs(tmp_path: Path) -> None:
    """One input may lose what another gains."""
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path, scale in zip(paths, (0.2, 0.21), strict=True):
        onnx.save(model("input_ids", scale=scale), path)
    feeds = [feed(s) for s in range(4)]
    losses = []
    for path in paths:
        session = verify.Baseline(path)
        results = session.results(path, feeds)
        losses.append(
            [
                metrics.next_token_loss(np.asarray(r["logits"]), f["input_ids"])
                for r, f in zip(results, feeds, strict=True)
            ]
        )
    each = np.expm1(np.subtract(losses[1], losses[0]))
    together = np.exp(np.mean(losses[1]) - np.mean(losses[0])) - 1
    assert each.min() < together < each.max()
    between = (together + each.max()) / 2
    found = verify.compare_models(*paths, feeds, metric="perplexity", budget=between)
    assert found.passed, found.verdict
    assert found.worst == pytest.approx(together)
    assert [o.metrics.perplexity for o in found.outputs if o.metrics] == pytest.approx(list(each))
    found = verify.compare_models(*paths, feeds, metric="perplexity", budget=together - 1e-6)
    assert not found.passed and found.verdict.code == "over_budget"
    assert found.to_json()["outputs"][0]["metrics"]["perplexity"] == pytest.approx(each[0])
