"""What samples of the ops that choose blocks are given, and what they must give: by ``tests/conformance/selection``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from attncompile.core.kernel import OpCall
from attncompile.plugins.block_select.op import SCORES, SELECT
from tests.conformance.selection import Selection, wrong_lists, wrong_scores

CHOOSING = {SCORES, SELECT}
BLOCK = 64
"""Edge of a block where only the number of its tiles counts."""


def selection_of(call: OpCall, at: Mapping[str, tuple[int, ...]]) -> Selection:
    """The call at these shapes of its inputs, operands in BNHD."""
    said = {k: v for k, v in call.attributes.items() if k in ("rule", "sinks", "window")}
    causal = bool(call.attributes.get("causal", 0))
    if call.op == SELECT:
        batch, heads = at["scores"][:2]
        amount = tuple(float(x) for x in np.linspace(0.9, 0.3, at["amount"][0], dtype=np.float32))
        stride = BLOCK // call.attributes["tiles"]
        return Selection(call.op, "float32", batch, (heads, heads), stride=stride, causal=causal, amount=amount, **said)
    (batch, queries, heads, dim), (_, keys, groups, _) = at["query"], at["key"]
    cut = {k: call.attributes[k] for k in ("stride", "block", "reduce", "span")} | {"factor": call.attributes["scale"]}
    return Selection(call.op, call.dtype, batch, (heads, groups), (queries, keys), dim, causal=causal, **cut)


def inputs(call: OpCall, at: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Operands in BNHD, float32."""
    case = selection_of(call, at)
    if call.op == SCORES:
        return case.operands()
    shape = at["scores"]
    scores = np.random.default_rng(shape).standard_normal(shape).astype(np.float32) * 2
    if case.causal:
        scores[..., np.arange(shape[2])[:, None] // case.tiles < np.arange(shape[3])] = -np.inf
    return {"scores": scores, "amount": np.array(case.amount, np.float32)}


def problems(
    call: OpCall, at: Mapping[str, tuple[int, ...]], given: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]
) -> Iterator[str]:
    case = selection_of(call, at)
    said = wrong_scores(case, got["scores"]) if call.op == SCORES else wrong_lists(case, given["scores"], got)
    if said:
        yield said
