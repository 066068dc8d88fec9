"""Predicted time of a site, before anything is run. Used to rank candidates; what ships is decided by measurement."""

from __future__ import annotations

from collections.abc import Mapping

from attncompile.core.mechanism import FLOPS_PER_GUARD, Cost, Shape
from attncompile.core.site import AttentionSite, Dim

FLOPS_PER_ELEMENT = 40.0
"""A score element costs about as much as this many flops of a matrix product: it is written and read by the mask, by
the softmax and by the second product. Set by hand from ONNX Runtime profiles of a few sites on 2 CPU cores: good
enough to rank candidates, not to promise a time."""


def dense_cost(site: AttentionSite, shape: Shape) -> Cost:
    """Work of the site as it is: every query meets every key, unless it is linear attention in a linear form."""
    if site.linear is not None and site.linear.form != "parallel":
        return _linear_cost(site, shape)
    scores = float(shape.batch * site.heads * shape.query_length * shape.key_length)
    return Cost(2.0 * scores * (site.head_dim + site.value_dim), shape.key_length, scores)


def _linear_cost(site: AttentionSite, shape: Shape) -> Cost:
    """A state for every token is written out by running sums; else two products with a state a token."""
    queries, keys = shape.batch * site.heads * shape.query_length, shape.batch * site.kv_heads * shape.key_length
    state = float(site.head_dim * site.value_dim)
    running = site.linear is not None and site.linear.form == "cumulative"
    return Cost(2.0 * (queries + keys) * state, 0.0, queries * state if running else 0.0)


def predicted_gain(site: AttentionSite, cost: Cost, shape: Shape) -> float:
    """Time of the site as it is over the time of ``cost``."""
    before = dense_cost(site, shape)
    guard = FLOPS_PER_GUARD * before.elements if site.mask.guarded and site.form != "attention-op" else 0.0
    return (_time(before) + guard) / max(_time(cost), 1.0)


def _time(cost: Cost) -> float:
    return cost.flops + FLOPS_PER_ELEMENT * cost.elements


def shape_of(site: AttentionSite, binding: Mapping[str, int]) -> Shape:
    """The site's sizes at ``binding``."""
    return Shape(
        _bind(site.batch, binding), _bind(site.query_length, binding), _bind(site.key_length, binding), binding
    )


def _bind(dim: Dim, binding: Mapping[str, int]) -> int:
    """A dimension such as ``2*seq + 1`` in numbers; of ``f(h,w)=196..784`` only the usual size is known."""
    if isinstance(dim, int):
        return dim
    if dim.startswith("f("):
        return int(dim.rpartition("=")[2].partition("..")[0])
    total = 0
    terms = dim.split(" + ")
    while terms:
        # A symbol may hold a plus itself (``past + sequence``), so the longest one is looked for first.
        for end in range(len(terms), 0, -1):
            term = " + ".join(terms[:end])
            factor, _, symbol = ("1", "", term) if term in binding else term.partition("*")
            if symbol in binding and factor.removeprefix("-").isdigit():
                total += int(factor) * binding[symbol]
                break
        else:
            total, end = total + int(terms[0]), 1
        terms = terms[end:]
    return total
