"""What looks like attention and is not: each is left alone, with the reason where it came near.

Some are sites all the same (attention pooling with a learned query, additive attention): those rebuild.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.passes.rebuild import found_in, only_site, random_feeds, rebuilt
from tests.passes.test_lifter_forms import B, D, Graph, H, N, W, model_of

F32 = np.float32
Form = Callable[[Graph], str | tuple[str, ...]]
E = 5


def weight(b: Graph, *shape: int) -> str:
    return b.const((b.rng.standard_normal(shape) / 3).astype(F32))


def router_of_constants(b: Graph) -> str:
    """Softmax over experts, then a product with a table."""
    return b.op("MatMul", b.op("Softmax", b.linear("x", E), axis=-1), weight(b, E, W))


def router_of_experts(b: Graph) -> str:
    """Softmax over experts, then the experts' outputs for each token: [B, N, 1, E] with [B, N, E, W]."""
    gate = b.op("Unsqueeze", b.op("Softmax", b.linear("x", E), axis=-1), b.const([2]))
    experts = b.op("Reshape", b.linear("x", E * W), b.const([B, N, E, W]))
    return b.op("Squeeze", b.op("MatMul", gate, experts), b.const([2]))


def router_of_the_best(b: Graph) -> str:
    """Softmax, then TopK."""
    b.nodes.append(helper.make_node("TopK", [b.op("Softmax", b.linear("x", W), axis=-1), b.const([3])], ["best", "at"]))
    return b.op("Mul", "x", b.op("ReduceSum", "best", b.const([-1]), keepdims=1))


def soft_router(b: Graph) -> str:
    """Soft mixture of experts: slots from constants, dispatch over the tokens (softmax over the token axis)."""
    logits = b.op("MatMul", "x", weight(b, W, E))
    slots = b.op("MatMul", b.op("Transpose", b.op("Softmax", logits, axis=1), perm=[0, 2, 1]), "x")
    return b.op("MatMul", b.op("Softmax", logits, axis=2), slots)


def pointer(b: Graph) -> tuple[str, ...]:
    """The distribution over the tokens is the result."""
    return "x", b.op("Softmax", b.scores(), axis=-1)


def pointer_read_too(b: Graph) -> tuple[str, ...]:
    p = b.op("Softmax", b.scores(), axis=-1)
    return b.merge(b.op("MatMul", p, b.heads())), p


def scores_out(b: Graph) -> tuple[str, ...]:
    s = b.scores()
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads())), s


def scores_reused(b: Graph) -> str:
    """Residual attention: the scores go on to the next layer too."""
    s = b.scores()
    out = b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))
    return b.op("Add", out, b.op("ReduceMean", s, keepdims=0))


def weights_averaged(b: Graph) -> tuple[str, ...]:
    p = b.op("Softmax", b.scores(), axis=-1)
    return b.merge(b.op("MatMul", p, b.heads())), b.op("ReduceMean", p, b.const([1]), keepdims=0)


def codebook(b: Graph) -> str:
    """Soft lookup in a table: softmax(x W^T) W."""
    table = weight(b, E, W)
    return b.op("MatMul", b.op("Softmax", b.op("MatMul", "x", b.op("Transpose", table, perm=[1, 0])), axis=-1), table)


def codebook_of_heads(b: Graph) -> str:
    """The same with heads and the shapes of keys and values: still no tokens, the rows are weights."""
    keys, values = weight(b, 1, H, D, E), weight(b, 1, H, E, D)
    return b.merge(b.op("MatMul", b.op("Softmax", b.op("MatMul", b.heads(), keys), axis=-1), values))


def keys_of_weights(b: Graph) -> str:
    """Keys from weights, values from the input (Synthesizer with a dense projection): [N, N] scores from one token."""
    s = b.op("MatMul", b.heads(), weight(b, 1, H, D, N))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def dynamic_convolution(b: Graph) -> str:
    """Kernels of 3 taps from each token, softmax over the taps, applied to the token's neighbours."""
    taps = b.op("Softmax", b.op("Reshape", b.linear("x", 3), b.const([B, N, 1, 3])), axis=-1)
    padded = b.op("Pad", "x", b.const([0, 1, 0, 0, 1, 0]))
    near = [b.op("Slice", padded, b.const([i]), b.const([i + N]), b.const([1])) for i in range(3)]
    stacked = b.op("Concat", *(b.op("Unsqueeze", n, b.const([2])) for n in near), axis=2)
    return b.op("Squeeze", b.op("MatMul", taps, stacked), b.const([2]))


def gated(b: Graph) -> str:
    """A gate over a convolution: no softmax at all."""
    kernel = weight(b, W, 1, 3)
    x = b.op("Transpose", "x", perm=[0, 2, 1])
    conv = b.op("Transpose", b.op("Conv", x, kernel, group=W, pads=[1, 1]), perm=[0, 2, 1])
    return b.op("Mul", b.op("Sigmoid", b.linear("x", W)), conv)


def pooling(b: Graph) -> str:
    """PoolFormer: the mean of the neighbours less the token."""
    pooled = b.op("AveragePool", b.op("Transpose", "x", perm=[0, 2, 1]), kernel_shape=[3], pads=[1, 1])
    return b.op("Sub", b.op("Transpose", pooled, perm=[0, 2, 1]), "x")


def state_space(b: Graph) -> str:
    """One step of a selective scan: decay by exp(delta A), input by delta B, read by C."""
    delta = b.op("Softplus", b.linear("x", W))
    decay = b.op("Exp", b.op("Mul", delta, b.const(-b.rng.random(W).astype(F32))))
    state = b.op("Add", b.op("Mul", decay, "x"), b.op("Mul", delta, "x"))
    return b.op("Mul", b.op("CumSum", state, b.const(np.array(1))), b.op("Sigmoid", b.linear("x", W)))


def mixed_layers(b: Graph) -> str:
    """ELMo: softmax of three weights, one a layer."""
    p = b.op("Softmax", b.const(b.rng.standard_normal(3).astype(F32)), axis=0)
    layers = b.op("Concat", *(b.op("Unsqueeze", b.linear("x", W), b.const([3])) for _ in range(3)), axis=3)
    return b.op("Squeeze", b.op("MatMul", layers, b.op("Unsqueeze", p, b.const([1]))), b.const([3]))


def sinkhorn(b: Graph) -> str:
    """Rows and columns normalised in turn before the values."""
    s = b.scores()
    for axis in (-1, -2, -1, -2):
        s = b.op("Sub", s, b.op("ReduceLogSumExp", s, b.const([axis]), keepdims=1))
    return b.merge(b.op("MatMul", b.op("Exp", s), b.heads()))


def slots(b: Graph) -> str:
    """Slot attention: softmax over the queries, then weights normalised over the keys."""
    p = b.op("Softmax", b.scores(), axis=2)
    p = b.op("Div", p, b.op("ReduceSum", p, b.const([-1]), keepdims=1))
    return b.merge(b.op("MatMul", p, b.heads()))


def expectation(b: Graph) -> tuple[str, ...]:
    """Soft argmax: a distribution over places, times their coordinates."""
    heat = b.op("Softmax", b.op("Transpose", b.linear("x", E), perm=[0, 2, 1]), axis=-1)
    return "x", b.op("MatMul", heat, b.const(np.arange(2.0 * N, dtype=F32).reshape(N, 2)))


def classifier(b: Graph) -> tuple[str, ...]:
    """Cosine similarity with constant prototypes, softmax, out."""
    x = b.op("Div", "x", b.op("ReduceL2", "x", b.const([-1]), keepdims=1))
    return "x", b.op("Softmax", b.op("MatMul", x, weight(b, W, E)), axis=-1)


def clip(b: Graph) -> tuple[str, ...]:
    """CLIP: similarities of image and text features, softmax, out."""
    q, k = b.op("ReduceMean", "x", b.const([1]), keepdims=0), b.op("ReduceMax", "x", b.const([1]), keepdims=0)
    return "x", b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[1, 0])), axis=-1)


def weights_times_values_elementwise(b: Graph) -> str:
    """Softmax over features as a gate."""
    return b.op("Mul", b.op("Softmax", b.linear("x", W), axis=-1), "x")


def sharpened(b: Graph) -> str:
    p = b.op("Pow", b.op("Softmax", b.scores(), axis=-1), b.number(2.0))
    return b.merge(b.op("MatMul", p, b.heads()))


def talking_heads(b: Graph) -> str:
    """Weights mixed over heads between softmax and values."""
    p = b.op("Transpose", b.op("Softmax", b.scores(), axis=-1), perm=[0, 2, 3, 1])
    p = b.op("Transpose", b.op("MatMul", p, weight(b, H, H)), perm=[0, 3, 1, 2])
    return b.merge(b.op("MatMul", p, b.heads()))


def talking_before(b: Graph) -> str:
    """Scores mixed over heads before the softmax."""
    s = b.op("Transpose", b.scores(), perm=[0, 2, 3, 1])
    s = b.op("Transpose", b.op("MatMul", s, weight(b, H, H)), perm=[0, 3, 1, 2])
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def convolved_scores(b: Graph) -> str:
    s = b.op("Conv", b.scores(), weight(b, H, H, 3, 3), pads=[1, 1, 1, 1])
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


def softmin(b: Graph) -> str:
    """1 - softmax: weights that do not sum to one."""
    p = b.op("Sub", b.number(1.0), b.op("Softmax", b.scores(), axis=-1))
    return b.merge(b.op("MatMul", p, b.heads()))


NEGATIVE: dict[str, tuple[Form, frozenset[str]]] = {
    "router-of-constants": (router_of_constants, frozenset({"constant-keys"})),
    "router-of-experts": (router_of_experts, frozenset({"constant-keys", "softmax-axis"})),
    "router-of-the-best": (router_of_the_best, frozenset({"constant-keys"})),
    "soft-router": (soft_router, frozenset({"softmax-axis", "constant-keys"})),
    "pointer": (pointer, frozenset({"weights-used"})),
    "pointer-read-too": (pointer_read_too, frozenset({"weights-used"})),
    "scores-out": (scores_out, frozenset({"scores-used"})),
    "scores-reused": (scores_reused, frozenset({"scores-used"})),
    "weights-averaged": (weights_averaged, frozenset({"weights-used"})),
    "codebook": (codebook, frozenset({"constant-keys"})),
    "codebook-of-heads": (codebook_of_heads, frozenset({"constant-keys"})),
    "keys-of-weights": (keys_of_weights, frozenset({"constant-keys"})),
    "dynamic-convolution": (dynamic_convolution, frozenset({"constant-keys", "softmax-axis"})),
    "gated-convolution": (gated, frozenset()),
    "pooling": (pooling, frozenset()),
    "state-space": (state_space, frozenset()),
    "mixed-layers": (mixed_layers, frozenset({"no-product"})),
    "sinkhorn": (sinkhorn, frozenset()),
    "slots": (slots, frozenset({"softmax-axis"})),
    "expectation": (expectation, frozenset({"softmax-axis", "constant-values", "constant-keys"})),
    "classifier": (classifier, frozenset({"constant-keys"})),
    "clip": (clip, frozenset({"weights-used"})),
    "gate": (weights_times_values_elementwise, frozenset({"constant-keys"})),
    "sharpened": (sharpened, frozenset({"no-value-product"})),
    "talking-heads": (talking_heads, frozenset({"value-axis", "value-product", "constant-values"})),
    "talking-before": (talking_before, frozenset({"constant-keys", "score-product", "softmax-axis", "layout"})),
    "convolved-scores": (convolved_scores, frozenset({"unknown-op"})),
    "softmin": (softmin, frozenset({"no-value-product"})),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_left_alone(name: str, tmp_path: Path) -> None:
    """No softmax site; at least one near miss where there is a softmax, with one of the codes that fit.

    Softmax over the tokens and softmax over the slots, both of one projection, is linear attention by its formula.
    """
    form, codes = NEGATIVE[name]
    b = Graph()
    made = form(b)
    out, *others = (made,) if isinstance(made, str) else made
    proto = model_of(b, out, 18, TensorProto.FLOAT, tuple(others))
    model, detection = found_in(proto, tmp_path)
    for site in detection.sites:
        assert site.kind == "linear" and name == "soft-router", site
    found = {m.code for m in detection.near_misses}
    softmaxes = [n for n in model.proto.graph.node if n.op_type == "Softmax"]
    if not detection.sites:
        assert bool(found & codes) == bool(codes), detection.near_misses
        assert len(detection.near_misses) >= len(softmaxes)
    assert all(len(m.reason) > 25 for m in detection.near_misses)


def data_masked(b: Graph, how: str) -> str:
    """Masks that depend on the data: the scores themselves, or a function of the tokens."""
    s = b.scores()
    if how == "threshold":
        s = b.op("Where", b.op("Greater", s, b.number(-0.5)), s, b.number(-1e9))
    elif how == "tokens":
        alive = b.op("Greater", b.op("ReduceMean", "x", b.const([2]), keepdims=0), b.number(-0.3))
        s = b.op("Where", b.op("Unsqueeze", alive, b.const([1, 2])), s, b.number(-1e9))
    else:
        away = b.op("Abs", b.op("Sub", b.op("Unsqueeze", "x", b.const([1])), b.op("Unsqueeze", "x", b.const([2]))))
        s = b.op("Sub", s, b.op("Unsqueeze", b.op("ReduceSum", away, b.const([-1]), keepdims=0), b.const([1])))
    return b.merge(b.op("MatMul", b.op("Softmax", s, axis=-1), b.heads()))


@pytest.mark.parametrize("how", ["threshold", "tokens", "distance"])
def test_masks_that_depend_on_the_data_stay_inputs(how: str, tmp_path: Path) -> None:
    """Refused, or a site whose mask is opaque or a padding and that its own value says."""
    b = Graph()
    model, detection = found_in(model_of(b, data_masked(b, how), 18, TensorProto.FLOAT), tmp_path)
    for site in detection.sites:
        assert {p.kind for p in site.mask.parts} <= {"opaque", "padding"}
        assert all(p.source for p in site.mask.parts)
        rebuilt(model.proto, site, random_feeds(model.proto)).check()
    assert detection.sites or detection.near_misses
    assert bool(detection.sites) == (how == "tokens")


def pooled_by_a_query(b: Graph, additive: bool) -> str:
    """One learned query over all tokens: v . tanh(W x) or q . k, softmax over the tokens, mean of the values."""
    if additive:
        s = b.op("MatMul", b.op("Tanh", b.linear("x", D)), weight(b, D, 1))
        p = b.op("Transpose", b.op("Softmax", s, axis=1), perm=[0, 2, 1])
        pooled = b.op("MatMul", p, b.linear("x", W))
        return b.op("Add", "x", pooled)
    q = b.op("Expand", weight(b, 1, H, 1, D), b.const([B, H, 1, D]))
    pooled = b.op("MatMul", b.op("Softmax", b.op("MatMul", q, b.heads(transposed=True)), axis=-1), b.heads())
    pooled = b.op("Reshape", b.op("Transpose", pooled, perm=[0, 2, 1, 3]), b.const([B, 1, W]))
    return b.op("Add", "x", pooled)


def test_a_learned_query_is_a_site(tmp_path: Path) -> None:
    b = Graph()
    _, site = only_site(model_of(b, pooled_by_a_query(b, False), 18, TensorProto.FLOAT), tmp_path)
    assert (site.query_length, site.key_length, site.heads) == (1, N, H)


def test_additive_attention_is_refused_or_rebuilds(tmp_path: Path) -> None:
    """softmax over the token axis that is not the last: named, not taken."""
    b = Graph()
    _, detection = found_in(model_of(b, pooled_by_a_query(b, True), 18, TensorProto.FLOAT), tmp_path)
    (miss,) = detection.near_misses
    assert not detection.sites and miss.code == "softmax-axis"
