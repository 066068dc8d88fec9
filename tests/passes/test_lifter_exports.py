"""Real exports of the forms with sinks, scales of heads and latent keys: every site rebuilt from its facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.passes.rebuild import Unaligned, found_in, random_feeds, rebuilt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2}


class Logits(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any) -> Any:
        return self.model(input_ids=ids, use_cache=False).logits


class States(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Any) -> Any:
        return self.model(pixels).last_hidden_state


class NoExperts(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Routers are looked at elsewhere."""

    def forward(self, x: Any) -> Any:
        return x, None


def gpt_oss() -> tuple[Any, Any]:
    config = transformers.GptOssConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_local_experts=2, num_experts_per_tok=1,
        sliding_window=5, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
        layer.mlp = NoExperts()
    return Logits(model), torch.randint(0, 32, (2, 11))


def deepseek() -> tuple[Any, Any]:
    config = transformers.DeepseekV3Config(
        **SMALL, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=10, kv_lora_rank=7, qk_rope_head_dim=4,
        qk_nope_head_dim=5, v_head_dim=6, first_k_dense_replace=2, moe_intermediate_size=8, attn_implementation="eager",
    )  # fmt: skip
    return Logits(transformers.DeepseekV3ForCausalLM(config)), torch.randint(0, 32, (2, 11))


def swin_v2() -> tuple[Any, Any]:
    config = transformers.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=12, depths=[2], num_heads=[3], window_size=4
    )  # fmt: skip
    return States(transformers.Swinv2Model(config)), torch.randn(2, 3, 16, 16)


CASES: dict[str, tuple[Callable[[], tuple[Any, Any]], dict[str, Any]]] = {
    "gpt-oss": (gpt_oss, {"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 6, "query_length": 11}),
    "deepseek": (deepseek, {"heads": 3, "kv_heads": 3, "head_dim": 9, "value_dim": 6, "query_length": 11}),
    "swin-v2": (swin_v2, {"heads": 3, "kv_heads": 3, "head_dim": 4, "value_dim": 4, "query_length": 16}),
}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", CASES)
def test_sites_of_real_exports(name: str, exporter: str, tmp_path: Path) -> None:
    if (name, exporter) == ("deepseek", "torchscript"):
        pytest.skip("torch's exporter has no diff operator")
    make, facts = CASES[name]
    torch.manual_seed(0)
    model, inputs = make()
    path = tmp_path / "export.onnx"
    dynamo = exporter == "dynamo"
    torch.onnx.export(model.eval(), (inputs,), path, dynamo=dynamo, opset_version=18 if dynamo else 17)
    found, detection = found_in(onnx.load(path), tmp_path)
    assert not detection.near_misses and len(detection.sites) == 2
    checked = 0
    for site in detection.sites:
        assert {fact: getattr(site, fact) for fact in facts} == facts
        assert bool(site.sinks) == (name == "gpt-oss") and bool(site.head_scale) == (name == "swin-v2")
        try:
            rebuilt(found.proto, site, random_feeds(found.proto)).check(1e-4)
            checked += 1
        except Unaligned:
            assert name == "swin-v2"  # the shifted windows' mask is added where batch and window are apart
    assert checked >= 1
    kinds = [s.mask.kind for s in detection.sites]
    assert name != "gpt-oss" or kinds == ["window", "causal"]
