"""Which input holds a language model's tokens and which output its logits: what a perplexity is computed from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto

from attncompile import metrics
from attncompile.core.errors import BadArguments

_INTEGERS = (TensorProto.INT64, TensorProto.INT32)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_KEEPS = frozenset({"Cast", "Identity"})
_SAME_TOKENS = _KEEPS | {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_TABLES = _KEEPS | {"DequantizeLinear"}


@dataclass(frozen=True, slots=True)
class NextToken:
    """``logits`` [..., N, vocabulary], an output, at position i speak of token i + 1 of the input ``tokens``
    [..., N].
    """

    tokens: str
    logits: str

    def loss(self, outputs: Mapping[str, np.ndarray], feed: Mapping[str, np.ndarray]) -> float:
        """Mean negative log-likelihood of the next token in nats; NaN where logits are not finite. Raises
        ``BadArguments`` where there is no next token, or a number that is no token.
        """
        logits, tokens = outputs[self.logits], feed[self.tokens]
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < logits.shape[-1]:
            raise BadArguments(
                f"{self.tokens} holds numbers that are none of {logits.shape[-1]} tokens", "use --metric kl"
            )
        try:
            return metrics.next_token_loss(logits, tokens)
        except ValueError as error:
            raise BadArguments(f"{self.tokens}: {error}", "give inputs of two tokens and more") from None


def next_token(proto: ModelProto) -> NextToken:
    """Raises ``BadArguments`` where the model has no integer input of its logits' shape, or it is not clear which."""
    graph = proto.graph
    stored = {t.name: t for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in stored and v.type.tensor_type.elem_type in _INTEGERS]
    outputs = [v for v in graph.output if v.type.tensor_type.elem_type in _FLOATS]
    pairs = [(i, o) for o in outputs for i in inputs if _alike(i, o)]
    if not pairs:
        raise BadArguments(
            "metric perplexity needs an integer input [batch, tokens] and an output [batch, tokens, vocabulary] of "
            "logits, which this model does not have",
            "use kl or top1_agreement, which need no tokens",
        )
    # Masks and positions have the same shape, and labels of tokens that of logits: tokens look up a table of the
    # vocabulary's size.
    looked_up = {(name, size) for name, size in _lookups(proto, {i.name for i, _ in pairs})}
    pairs = [(i, o) for i, o in pairs if (i.name, _dims(o)[-1]) in looked_up]
    if len(pairs) != 1:
        names = ", ".join(dict.fromkeys(i.name for i in inputs))
        raise BadArguments(
            f"metric perplexity: it is not clear which of the inputs {names} holds the tokens of which output's logits "
            "(tokens look up a stored table with as many rows as there are logits)",
            "use kl or top1_agreement, which need no tokens",
        )
    return NextToken(pairs[0][0].name, pairs[0][1].name)


def _alike(tokens: ValueInfoProto, logits: ValueInfoProto) -> bool:
    a, b = _dims(tokens), _dims(logits)
    return len(a) >= 2 and len(b) == len(a) + 1 and all(x == y or not x or not y for x, y in zip(a, b, strict=False))


def _dims(value: ValueInfoProto) -> list[int | str]:
    return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]


def _lookups(proto: ModelProto, names: set[str]) -> Iterator[tuple[str, int]]:
    """(input, rows of the stored table that it indexes)."""
    sizes = {t.name: t.dims[0] for t in proto.graph.initializer if t.dims}
    origin = {n: n for n in names}
    for node in proto.graph.node:
        if node.op_type in _SAME_TOKENS and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        elif node.op_type in _TABLES and node.input[0] in sizes:
            sizes[node.output[0]] = sizes[node.input[0]]
        elif node.op_type == "Gather" and node.input[1] in origin and node.input[0] in sizes:
            yield origin[node.input[1]], sizes[node.input[0]]
