"""``constructed``'s heads behind an embedding of tokens and before logits of the next one."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.search import constructed

VOCABULARY, WIDTH = 37, 64


def build(tokens: int, layers: int = 1) -> onnx.ModelProto:
    """input_ids int64 [1, N] -> logits [1, N, 37]."""
    rng = np.random.default_rng(5)
    model = constructed.build(tokens, layers)
    graph = model.graph
    for name, shape in (("embedding", (VOCABULARY, WIDTH)), ("head", (WIDTH, VOCABULARY))):
        graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    graph.node.insert(0, helper.make_node("Gather", ["embedding", "input_ids"], ["x"]))
    graph.node.append(helper.make_node("MatMul", ["y", "head"], ["raw"]))
    graph.node.append(helper.make_node("Mul", ["raw", "cool"], ["logits"]))
    graph.initializer.append(numpy_helper.from_array(np.float32(0.2), "cool"))
    del graph.input[:], graph.output[:]
    graph.input.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, tokens]))
    graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, tokens, VOCABULARY]))
    return model


def feeds(model: onnx.ModelProto, count: int, tokens: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Tokens of which every next one was drawn as ``model`` says from the first half of the rows: a text of its own."""
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = rng.integers(0, VOCABULARY, (1, tokens))
        for _ in range(3):  # towards what the model expects
            logits = session.run(None, {"input_ids": ids})[0][0]
            ids[0, 1:] = (logits + rng.gumbel(size=logits.shape)).argmax(-1)[:-1]
        found.append({"input_ids": ids})
    return found
