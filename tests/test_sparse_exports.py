"""transformers' sparse attention in pieces, exported and compiled: one op a layer, proved, the same outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from attncompile import pipeline
from attncompile.core.site import AttentionSite
from attncompile.pipeline import Options
from tests.passes.block_graphs import Blocks, graph
from tests.passes.rebuild import random_feeds

pytestmark = pytest.mark.usefixtures("brief")


def bigbird(path: Path, exporter: str, tokens: int) -> dict[str, np.ndarray]:
    """Two layers with blocks of 16 tokens; inputs to feed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BigBirdConfig(
        vocab_size=64, num_hidden_layers=2, hidden_size=48, num_attention_heads=3, intermediate_size=64,
        attention_type="block_sparse", block_size=16, num_random_blocks=1, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BigBirdModel(config, add_pooling_layer=False).eval()

    class Hidden(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any) -> Any:
            return self.model(ids).last_hidden_state

    ids = torch.randint(3, 64, (2, tokens), generator=torch.Generator().manual_seed(1))
    opset = {"opset_version": 18} if exporter == "dynamo" else {"opset_version": 17}
    torch.onnx.export(Hidden(), (ids,), str(path), dynamo=exporter == "dynamo", input_names=["ids"], **opset)
    return {"ids": ids.numpy()}


def longformer(path: Path, tokens: int) -> dict[str, np.ndarray]:
    """Two layers with windows of 16 tokens to both sides and an attention mask; inputs to feed. TorchScript: the dynamo
    exporter stops at a choice that depends on the mask.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LongformerConfig(
        vocab_size=64, num_hidden_layers=2, hidden_size=48, num_attention_heads=3, intermediate_size=64,
        attention_window=32, max_position_embeddings=tokens + 8, pad_token_id=0, sep_token_id=2, onnx_export=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LongformerModel(config, add_pooling_layer=False).eval()

    class Hidden(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.model(ids, attention_mask=mask).last_hidden_state

    ids = torch.randint(3, 64, (2, tokens), generator=torch.Generator().manual_seed(1))
    feed = (ids, torch.ones_like(ids))
    torch.onnx.export(Hidden(), feed, str(path), dynamo=False, opset_version=17, input_names=["ids", "mask"])
    return {"ids": ids.numpy(), "mask": np.ones((2, tokens), np.int64)}


def compiled(path: Path, out: Path, feed: dict[str, np.ndarray]) -> tuple[pipeline.Result, onnx.ModelProto]:
    """What the pipeline says and the file that it wrote, whose outputs are those of the input file."""
    result = pipeline.compile(path, Options(target="onnx", out=out, keep_slower=True))
    ours, theirs = (ort.InferenceSession(str(p)).run(None, feed)[0] for p in (out / "model.onnx", path))
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    return result, onnx.load(out / "model.onnx", load_external_data=False)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_bigbird(exporter: str, tmp_path: Path) -> None:
    feed = bigbird(tmp_path / "model.onnx", exporter, 304)
    result, made = compiled(tmp_path / "model.onnx", tmp_path / "out", feed)
    assert result.outcome == "replaced" and len(result.sites) == 2
    for site in result.sites:
        assert site.decision.mechanism == "BlockSparseAttention" and site.exactness is not None
        assert site.exactness.passed and site.exactness.cases >= 9
    assert [n.op_type for n in made.graph.node if n.domain == "attncompile"] == ["BlockSparseAttention"] * 2
    assert not any(n.op_type in ("Softmax", "Einsum") for n in made.graph.node)
    assert len({n.overload for n in made.graph.node if n.domain == "attncompile"}) == len(made.functions) == 1


@pytest.mark.slow
def test_longformer_with_padding(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    feed = longformer(path, 288)
    result, made = compiled(path, tmp_path / "out", feed)
    assert result.outcome == "replaced" and len(result.sites) == 2
    for site in result.sites:
        assert site.decision.mechanism == "NeighborhoodAttention" and site.site.mask.zeroed
        assert site.exactness is not None and site.exactness.passed
    assert not any(n.op_type in ("Softmax", "Einsum") for n in made.graph.node)
    sessions = [ort.InferenceSession(str(p)) for p in (tmp_path / "out" / "model.onnx", path)]
    place = np.arange(288)
    for kept in (place >= 50, place < 211, (place < 30) | (place > 90), place == 7, place < 0, place % 40 > 20):
        feed["mask"] = np.stack([kept, place >= 0]).astype(np.int64)
        ours, theirs = (session.run(None, feed)[0] for session in sessions)
        assert np.isfinite(theirs).all()
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def in_blocks(seed: int, folder: Path) -> Path:
    """20 blocks of 16, drawn for each head; a few blocks count several times."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(20, size=(3, 18, 2))
    drawn[:, ::5] = 0
    given = Blocks(2, 3, 8, 16, 20, drawn, rng.integers(20, size=(3, 3)))
    onnx.save(graph(given), folder / "blocks.onnx")
    return folder / "blocks.onnx"


def test_heads_with_blocks_of_their_own(tmp_path: Path) -> None:
    path = in_blocks(0, tmp_path)
    result, made = compiled(path, tmp_path / "out", random_feeds(onnx.load(path)))
    (site,) = result.sites
    assert site.site.needs == {"head-mask", "key-counts"}
    assert result.outcome == "replaced" and site.decision.mechanism == "BlockSparseAttention"
    (node,) = [n for n in made.graph.node if n.domain == "attncompile"]
    lists = [i for i in made.graph.initializer if i.name in node.input]
    stored = {i.name.rpartition("/")[2]: onnx.numpy_helper.to_array(i) for i in lists}
    assert stored["rows"].shape[1] == 3 and stored["counts"].max() >= 2


def test_a_wrong_count_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mechanism is told of a mask in which one key counts once too often: the graph itself is the judge."""
    from attncompile.plugins.block_sparse.mechanism import BlockSparseAttention

    original = BlockSparseAttention.lower

    def wrong(self: Any, site: AttentionSite, parameters: Any, opset: int) -> Any:
        parts = []
        for part in site.mask.parts:
            if part.counts is not None:
                times = part.counts.times(320, 320).copy()
                head, query, key = np.argwhere(times)[1234]
                times[head, query, key] += 1
                part = replace(part, counts=type(part.counts).of(times))
            parts.append(part)
        other = {k: v for k, v in parameters.items() if k != "mask"}
        return original(self, replace(site, mask=replace(site.mask, parts=tuple(parts))), other, opset)

    monkeypatch.setattr(BlockSparseAttention, "lower", wrong)
    result = pipeline.compile(in_blocks(0, tmp_path), Options(target="onnx", out=tmp_path / "out", keep_slower=True))
    (site,) = result.sites
    assert result.outcome != "replaced" and "not exact" in site.rolled_back
