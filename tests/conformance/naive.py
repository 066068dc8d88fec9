"""The references of the mechanisms, asked for a case."""

from __future__ import annotations

from typing import Any

import numpy as np

from attncompile.plugins.attention import reference as dense
from attncompile.plugins.block_sparse import reference as sparse
from attncompile.plugins.neighborhood import reference as grid
from tests.conformance.case import Case


def expected(case: Case, **changed: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """(output, log-sum-exp or None), one query at a time in float64; ``changed`` attributes are given in place of the
    case's.
    """
    parameters = {**case.call.attributes, **changed}
    given = case.inputs()
    q, k, v = (given.pop(name) for name in ("query", "key", "value"))
    scale = parameters.pop("scale")
    if case.call.op == "Attention":
        return dense.with_log_sum_exp(q, k, v, parameters, scale=scale, **given)
    if case.call.op == "BlockSparseAttention":
        lists = {n: given.pop(n) for n in ("rows", "columns", "kinds", "masks", "order", "counts") if n in given}
        seen = sparse.counts_of(case.sizes[1:], parameters["block"], **{**lists, **parameters.get("lists", {})})
        return sparse.with_log_sum_exp(q, k, v, seen, parameters["masked_rows"], scale=scale, **given)
    return grid.reference(q, k, v, parameters, scale=scale, **given), None
