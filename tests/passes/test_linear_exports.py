"""Linear attention in what torch's exporters write, rebuilt from the facts of each site."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from attncompile.core.site import AttentionSite
from tests.passes.linear_graphs import detected, error_of, feed_of

torch = pytest.importorskip("torch")

from attncompile.models.export import export_built, quiet  # noqa: E402
from attncompile.models.recipe import Built, Options  # noqa: E402
from attncompile.models.weights import seed_weights  # noqa: E402
from attncompile.models.zoo.check import make  # noqa: E402
from attncompile.models.zoo.entry import Entry  # noqa: E402
from attncompile.models.zoo.table_linear import LINEAR  # noqa: E402


def export(built: Built, entry: Entry, folder: Path) -> onnx.ModelProto:
    path = folder / "exported.onnx"
    with quiet():
        export_built(built, Options(exporter=entry.exporter, opset=entry.opset, dynamic=entry.dynamic), path)
    return onnx.load(path)


def sites(built: Built, entry: Entry, folder: Path, bound: float = 3e-6) -> list[AttentionSite]:
    """The linear sites, each rebuilt at the exported sizes and, where these are dynamic, at others."""
    model, detection = detected(export(built, entry, folder), folder)
    symbols = {
        d.dim_param for i in model.proto.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param
    }  # fmt: skip
    for n in (5, 8) if symbols else (0,):
        feed = feed_of(model, sizes=dict.fromkeys(symbols, n))
        for site in detection.sites:
            if site.kind == "linear":
                assert error_of(model, site, feed) < bound
    return [s for s in detection.sites if s.kind == "linear"]


@pytest.mark.parametrize("entry", LINEAR, ids=lambda e: e.slug)
def test_entries_of_the_zoo(entry: Entry, tmp_path: Path) -> None:
    found = sites(make(entry), entry, tmp_path, bound=3e-3 if entry.dtype == "fp16" else 3e-6)
    assert len(found) == (0 if entry.refused else 1)
    for site in found:
        assert site.linear is not None
        assert site.heads == (4 if "multi-scale" in entry.name else 3)
        assert site.dtype == ("float16" if entry.dtype == "fp16" else "float32")


_PLAIN = Entry("sana", "", "diffusion")
_BOTH = [_PLAIN, replace(_PLAIN, exporter="torchscript", opset=17)]


@pytest.mark.parametrize("entry", _BOTH, ids=lambda e: e.slug)
def test_sana(entry: Entry, tmp_path: Path) -> None:
    """Two blocks of diffusers' SANA: channels before tokens, V K^T first, a channel of ones."""
    diffusers = pytest.importorskip("diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)  # the model draws parameters that seed_weights does not replace

    class Called(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = diffusers.SanaTransformer2DModel(
                in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=8, num_layers=2,
                num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
                sample_size=6, patch_size=1, mlp_ratio=2.0,
            )  # fmt: skip

        def forward(self, x: Any, text: Any, time: Any) -> Any:
            return self.model(hidden_states=x, encoder_hidden_states=text, timestep=time, return_dict=False)[0]

    inputs = {"x": torch.randn(1, 4, 6, 6), "text": torch.randn(1, 5, 16), "time": torch.tensor([500.0])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sites(Built(seed_weights(Called(), 0).eval(), inputs, ("y",), {}), entry, tmp_path)
    assert len(found) == 2
    for site in found:
        assert site.linear is not None
        assert (site.heads, site.head_dim, site.value_dim, site.query_length) == (3, 8, 8, 36)
        assert (site.linear.query_map, site.linear.key_map, site.linear.normaliser) == ("relu", "relu", "sum")
        assert site.query.layout == site.output.layout == "BHDN"


def test_multi_scale_attention_of_dc_ae(tmp_path: Path) -> None:
    """diffusers' SanaMultiscaleLinearAttention: linear above as many tokens as channels, else scores over their sum."""
    processor = pytest.importorskip("diffusers.models.attention_processor")
    for size, form in (((5, 7), "state"), ((2, 3), "parallel")):
        layer = processor.SanaMultiscaleLinearAttention(
            24, 24, attention_head_dim=8, mult=1.0, norm_type="batch_norm", kernel_sizes=(5,)
        )  # fmt: skip
        built = Built(seed_weights(layer, 0).eval(), {"x": torch.randn(2, 24, *size)}, ("y",), {})
        (site,) = sites(built, _PLAIN, tmp_path)
        assert site.linear is not None
        assert (site.linear.form, site.linear.normaliser, site.heads, site.head_dim) == (form, "sum", 6, 8)
        assert site.query_length == int(np.prod(size))


@pytest.mark.parametrize("entry", _BOTH, ids=lambda e: e.slug)
def test_sana_in_half_precision(entry: Entry, tmp_path: Path) -> None:
    """The products are in float32 there; the operands are the half-precision ones before the maps and the casts."""
    processor = pytest.importorskip("diffusers.models.attention_processor")
    layer = processor.Attention(
        query_dim=24, heads=3, dim_head=8, bias=False, processor=processor.SanaLinearAttnProcessor2_0()
    )  # fmt: skip
    built = Built(seed_weights(layer, 0).eval().half(), {"x": torch.randn(2, 11, 24).half()}, ("y",), {})
    (site,) = sites(built, entry, tmp_path, bound=3e-3)
    assert site.linear is not None
    assert (site.dtype, site.softmax_dtype) == ("float16", "float32")
    assert (site.linear.query_map, site.linear.key_map, site.linear.normaliser) == ("relu", "relu", "sum")


@pytest.mark.parametrize("entry", _BOTH, ids=lambda e: e.slug)
@pytest.mark.parametrize("block, form", [(16, "parallel"), (4, "chunked")])
def test_lightning_attention(entry: Entry, block: int, form: str, tmp_path: Path) -> None:
    """transformers' MiniMax layer: 11 tokens in one block, and in three with a state, are one site each."""
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = pytest.importorskip("transformers").MiniMaxConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, block_size=block, max_position_embeddings=64,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip

    class Layer(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = minimax.MiniMaxLightningAttention(config, 0)

        def forward(self, x: Any) -> Any:
            return self.inner(x, position_embeddings=(x, x), attention_mask=None)[0]

    built = Built(seed_weights(Layer(), 0).eval(), {"x": torch.randn(2, 11, 32)}, ("y",), {})
    found = sites(built, entry, tmp_path)
    assert len(found) == 1
    for site in found:
        assert site.linear is not None
        assert site.linear.form == form
        assert (site.linear.causal, site.linear.decay, site.heads, site.query_length) == (True, "head", 4, 11)
        assert site.linear.decay_rates == tuple(sorted(site.linear.decay_rates))
