"""What the facts of a softmax site mean, in NumPy and float64, at some query rows: masked attention, written naively.

It stands in for the original graph where that holds too much in float64 and cannot be cut to query rows: keys gathered
into windows, or chunks that were read by running them. It is no truth of its own. The original, in its own precision,
must give the same on ordinary inputs, and again in every case as far as rounding allows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskPart
from attncompile.core.site import AttentionSite, Operand
from attncompile.core.verdict import Verdict
from attncompile.metrics import rms
from attncompile.verification.judge import compare_output
from attncompile.verification.rows import Rows

FORMS = ("gathered ", "probed ")
"""Beginnings of the forms of sites whose graph holds more than scores and cannot be cut to query rows."""

UNITS, ROW_UNITS = 32.0, 256.0
"""Rounding units by which the original's RMS, and its worst row, may differ from the facts on inputs that amplify
rounding. Scores of 80 are rounded by up to 40 units, which mostly cancel (4 were measured); a wrong key, scale or bias
changes a row by thousands."""

_UNDERSTOOD = frozenset({"sinks", "body", "head-mask", "key-counts", "token-padding"})


class FactsReference:
    """The reference that ``site``'s facts give, for ``original`` at fixed sizes. ``witness`` is an ordinary feed on
    which it has to be shown before it is used.

    Attributes:
        shown: whether it agrees with the original on ``witness``; None as long as nobody looked.
    """

    def __init__(self, site: AttentionSite, original: ModelProto, witness: Mapping[str, np.ndarray]) -> None:
        self.site = site
        self.witness = witness
        self.shown: Verdict | None = None
        self._stored = {t.name: t for t in original.graph.initializer}

    def output(self, feed: Mapping[str, np.ndarray], rows: Rows) -> tuple[np.ndarray, Rows]:
        """The site's output at these query rows, in float64 and its output's layout, and the rows with its axis.

        Raises:
            Unsupported: the site has something that is not done here, or a value that is not among the inputs.
        """
        values = {name: feed[name] if name in feed else self._value(name) for name in _read(self.site)}
        return site_rows(self.site, values, rows.index), Rows(rows.index, 1 if self.site.output.layout == "BNHD" else 2)

    def show(self, original: np.ndarray, rows: Rows) -> None:
        """Sets ``shown``: ``original`` is what the original gives for ``witness``. Raises ``Unsupported`` as above."""
        truth, placed = self.output(self.witness, rows)
        own = placed.take(original)
        check = compare_output(own, truth.astype(own.dtype), None) if own.shape == truth.shape else None
        if check is not None and check.verdict.ok:
            self.shown = Verdict.yes()
            return
        what = f"shape {list(truth.shape)} for {list(own.shape)}" if check is None else check.verdict.reason
        self.shown = Verdict.no("facts_differ", f"the facts do not describe the subgraph: {what}")

    def _value(self, name: str) -> np.ndarray:
        if name not in self._stored:
            raise Unsupported("facts", f"'{name}' is neither an input nor stored")
        return np.asarray(numpy_helper.to_array(self._stored[name]))


def ordinary(feed: Mapping[str, np.ndarray], site: AttentionSite) -> dict[str, np.ndarray]:
    """``feed`` of standard normal operands with the query shrunk where the scores would deviate by more than one: a
    site whose queries are scaled before it (scale 1) would be shown on scores that amplify rounding.
    """
    query = feed[site.query.value]
    shrink = min(1.0, 1.0 / (abs(site.scale) * site.head_dim**0.5))
    return {**feed, site.query.value: (query.astype(np.float32) * np.float32(shrink)).astype(query.dtype)}


def far(original: np.ndarray, truth: np.ndarray) -> str:
    """Why ``original`` is farther from ``truth`` than rounding explains; empty if it is not, or nowhere finite."""
    both = np.isfinite(original)
    if not both.any():
        return ""
    difference = np.where(both, original.astype(np.float64) - truth, 0.0)
    limits = np.finfo(original.dtype)
    unit = float(limits.eps) * rms(truth[both]) + float(limits.tiny)
    rows = np.sqrt(np.square(difference).sum(axis=-1) / np.maximum(1, both.sum(axis=-1)))
    for what, error, units in (("", rms(difference[both]), UNITS), (" in the worst row", float(rows.max()), ROW_UNITS)):
        if not error <= units * unit:
            return f"the original differs from them by {error / unit:.3g} rounding units{what}, {units:g} are allowed"
    return ""


def site_rows(site: AttentionSite, values: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """softmax(scale * Q K^T + mask) V at the query ``rows``, in the layout of the output. ``values`` by graph name.

    Raises:
        Unsupported: the facts hold something that is not done here.
    """
    other = site.needs - _UNDERSTOOD
    if other or site.kind != "softmax":
        raise Unsupported("facts", f"no float64 reference is made for {', '.join(sorted(other)) or site.kind}")
    query, key, value = (_bhnd(values[o.value], o) for o in (site.query, site.key, site.value))
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    seen = _structure(site, rows, queries, keys)
    counts = _counts(site, rows, queries, keys)
    sources = [p for p in site.mask.parts if p.kind in ("padding", "bias") and p.counts is None]
    added = [_rows_of(values[p.source or ""], rows, queries) for p in sources if p.additive]
    selects = [_rows_of(_selected(p, values), rows, queries) for p in sources if not p.additive]
    out = np.zeros((batch, heads, len(rows), value.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            scores = site.scale * (query[b, h, rows] @ key[b, g].T)
            if site.softcap:
                scores = site.softcap * np.tanh(scores / site.softcap)
            for bias in added:
                scores = scores + _of(bias, b, h).astype(np.float64)
            scores = scores + _of(counts, b, h)
            visible = np.array(_of(seen, b, h))
            for select in selects:
                visible &= np.broadcast_to(_of(select, b, h).astype(bool), visible.shape)
            scores = np.where(visible, scores, -np.inf)
            sink = float(values[site.sinks].reshape(-1)[h]) if site.sinks else -np.inf
            out[b, h] = _attend(scores, sink, value[b, g], site.mask.masked_rows)
    if site.mask.zeroed:
        (hidden,) = [values[p.source or ""] for p in site.mask.parts if p.tokens]
        out[(hidden[:, rows] == 0)[:, None].repeat(heads, axis=1)] = 0.0
    return out.transpose(0, 2, 1, 3) if site.output.layout == "BNHD" else out


def _selected(part: MaskPart, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """What broadcasts to [batch, heads, query, key]."""
    data = values[part.source or ""]
    return data[:, None, None] if part.tokens else data


def _attend(scores: np.ndarray, sink: float, value: np.ndarray, masked_rows: str) -> np.ndarray:
    top = np.maximum(scores.max(axis=1, keepdims=True), sink)
    with np.errstate(invalid="ignore"):  # -inf minus -inf in rows that see nothing: they are filled in below
        weights = np.exp(scores - top)
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.exp(sink - top))
    blind = np.isneginf(top[:, 0])
    weights[blind] = {"zero": 0.0, "nan": np.nan, "uniform": 1.0 / scores.shape[1]}[masked_rows]
    return np.asarray(weights @ value)


def _structure(site: AttentionSite, rows: np.ndarray, queries: int, keys: int) -> np.ndarray:
    """Bool [1, heads or 1, len(rows), keys]: what the mask's parts that come from no input let these queries see."""
    seen = np.ones((1, 1, len(rows), keys), bool)
    distance = np.arange(keys)[None, :] - (rows[:, None] + keys - queries)
    for part in site.mask.parts:
        if part.kind in ("causal", "window"):
            left, right = (-1, 0) if part.kind == "causal" else (part.left, part.right)
            seen &= (left < 0) | (distance >= -left)
            seen &= (right < 0) | (distance <= right)
        elif part.pattern is not None and part.kind != "bias":
            seen = seen & part.pattern.rows(rows, queries, keys)
        elif part.counts is not None:
            continue
        elif part.kind not in ("padding", "bias", "none") or not part.source:
            raise Unsupported("facts", f"no float64 reference is made for a mask that is {part.kind}")
        elif part.kind == "bias" and (not part.additive or part.certificate.method == "structure"):
            raise Unsupported("facts", "no float64 reference is made for a bias that is not added to the scores")
    return seen


def _counts(site: AttentionSite, rows: np.ndarray, queries: int, keys: int) -> np.ndarray:
    """[1, heads or 1, len(rows), keys]: the logarithm of how often each key counts."""
    if site.mask.counts is None:
        return np.zeros((1, 1, 1, 1))
    with np.errstate(divide="ignore"):  # keys that are not seen
        return np.log(site.mask.counts.times(queries, keys)[None, :, rows].astype(np.float64))


def _read(site: AttentionSite) -> list[str]:
    sources = [p.source for p in site.mask.parts if p.kind in ("padding", "bias") and p.source]
    return [site.query.value, site.key.value, site.value.value, *sources, *([site.sinks] if site.sinks else [])]


def _bhnd(array: np.ndarray, operand: Operand) -> np.ndarray:
    order = {"BHND": (0, 1, 2, 3), "BNHD": (0, 2, 1, 3), "BHDN": (0, 1, 3, 2)}[operand.layout]
    return array.astype(np.float64).transpose(order)


def _rows_of(array: np.ndarray, rows: np.ndarray, queries: int) -> np.ndarray:
    """What broadcasts to [batch, heads, query, key], at ``rows`` of the queries, with all four axes."""
    if array.ndim > 4:
        raise Unsupported("facts", f"a mask of rank {array.ndim} does not fit [batch, heads, query, key]")
    whole = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return whole[:, :, rows] if whole.shape[2] == queries and queries > 1 else whole


def _of(array: np.ndarray, batch: int, head: int) -> np.ndarray:
    """[query or 1, key or 1] of one batch entry and head."""
    return np.asarray(array[batch if array.shape[0] > 1 else 0, head if array.shape[1] > 1 else 0])
