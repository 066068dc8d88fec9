"""What TensorRT-RTX's parser reads and drops is refused before it can change what a model means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from onnx import ModelProto, TensorProto, helper

from attncompile.targets import tensorrt_rtx as rtx

SHAPE = [1, 2, 8, 16]


def attention(inputs: Sequence[str] = (), **attributes: Any) -> ModelProto:
    """q, k, v in half precision, and the lengths ``n`` where ``inputs`` names them."""
    node = helper.make_node("Attention", ["q", "k", "v", *inputs], ["y"], name="it", **attributes)
    infos = [helper.make_tensor_value_info(x, TensorProto.FLOAT16, SHAPE) for x in "qkv"]
    infos += [helper.make_tensor_value_info("n", TensorProto.INT64, [1])] if "n" in inputs else []
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", TensorProto.FLOAT16, SHAPE)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=10)


@pytest.mark.parametrize(
    ("proto", "what"),
    [
        (attention(left_window_size=2), "window"),
        (attention(right_window_size=0), "window"),
        (attention(is_causal=1, left_window_size=0), "window"),
        (attention(["", "", "", "n"]), "nonpad_kv_seqlen"),
    ],
)
def test_dropped_masks_are_refused(proto: ModelProto, what: str) -> None:
    verdict = rtx.TARGET.supports(proto)
    assert (verdict.ok, verdict.code) == (False, "dropped")
    assert what in verdict.reason
    assert "'it'" in verdict.reason


@pytest.mark.parametrize("attributes", [{}, {"left_window_size": -1, "right_window_size": -1}, {"is_causal": 1}])
def test_what_is_not_dropped_is_taken(attributes: dict[str, int]) -> None:
    assert rtx.TARGET.supports(attention(**attributes)).ok


@pytest.mark.parametrize("proto", [attention(left_window_size=2, right_window_size=1), attention(["", "", "", "n"])])
def test_the_parser_still_drops_them(proto: ModelProto) -> None:
    """The reason for the refusal: the network is that of the operator without them. When this fails, lift it."""
    trt = pytest.importorskip("tensorrt_rtx")

    def layers(model: ModelProto) -> list[tuple[str, int]]:
        network = trt.Builder(logger := trt.Logger(trt.Logger.ERROR)).create_network(0)
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(model.SerializeToString())
        found = [network.get_layer(i) for i in range(network.num_layers)]
        reads = {layer.get_input(j).name for layer in found for j in range(layer.num_inputs)}
        assert "n" not in reads
        return [(str(layer.type), layer.num_inputs) for layer in found]

    assert layers(proto) == layers(attention())
