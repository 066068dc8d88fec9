"""``DenseAttention``: exact dense attention without the work that exporters leave in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attncompile.core.assumption import Assumption
from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Candidate, Cost, Lowering, Parameters, Shape
from attncompile.core.site import AttentionSite, Need
from attncompile.core.verdict import Verdict
from attncompile.plugins.attention.dense import OP_TYPE, Dense, function, node, register
from attncompile.plugins.attention.reference import reference
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.facts import check_padding, check_plain

CHUNK = 128
"""Fewest queries in a chunk of a causal site: smaller products run slower than the saved scores are worth."""

MAX_CHUNKS = 8
DYNAMIC_CHUNKS = 4
DENSE_BELOW = 256
"""A causal sequence of a dynamic length up to this is not cut."""


class DenseAttention:
    """Parameters: ``causal`` (bool), ``masked_rows`` (zero | uniform | nan), ``chunks`` (int; see ``dense.Dense``)."""

    name = "DenseAttention"
    skips_keys = False
    understands: frozenset[Need] = frozenset({"body"})

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        causal = site.mask.part("causal") is not None
        padded = site.mask.part("padding") is not None
        chunks = self._chunks(site) if causal else 1
        guard = site.mask.guarded and site.form != "attention-op"
        if chunks == 1 and not guard:
            return (Verdict.no("nothing-to-skip", "dense attention without anything to leave out"),)
        parameters = {
            "causal": causal, "masked_rows": site.mask.masked_rows if padded else "nan", "chunks": chunks,
        }  # fmt: skip
        exact = self.is_exact_for(site, parameters)
        if not exact.ok:
            return (exact,)
        words = []
        if chunks > 1:
            words.append(f"the causal half in {chunks} chunks")
        if guard:
            words.append("no NaN guard over the weights")
        return (Candidate(self.name, parameters, True, "dense, " + ", ".join(words)),)

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        return ()

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        try:
            form = _form(parameters)
            self._check(site, form)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("dense attention")

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        supported = self.supports(site, parameters)
        if not supported.ok:
            return supported
        form = _form(parameters)
        causal, padding = site.mask.part("causal"), site.mask.part("padding")
        if (causal is not None) != form.causal:
            return Verdict.no("other-mask", f"the site's mask is {site.mask.kind}")
        static = isinstance(site.query_length, int) and isinstance(site.key_length, int)
        if causal is not None and not causal.certificate.general and not static:
            return Verdict.no(
                "certificate", "the causal mask was shown for some lengths only and the length is dynamic"
            )
        if padding is not None and form.masked_rows != site.mask.masked_rows:
            return Verdict.no("masked-rows", f"fully masked rows give {site.mask.masked_rows} in the source")
        if site.mask.guarded and site.form != "attention-op" and site.dtype != "float32":
            return Verdict.no("guard", f"in {site.dtype} the NaN guard may catch scores that overflow")
        return Verdict.yes("every query sees a key, or gets what the source gives it")

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        """Scores that are computed; the dense branch of short sequences is counted where it is taken."""
        chunks = _form(parameters).chunks
        if not isinstance(site.query_length, int) and shape.query_length <= DENSE_BELOW:
            chunks = 1
        share = (chunks + 1) / (2 * chunks)
        elements = share * shape.batch * site.heads * shape.query_length * shape.key_length
        return Cost(2 * elements * (site.head_dim + site.value_dim), share * shape.key_length, elements)

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Parameters, **extra: Any
    ) -> np.ndarray:
        return reference(q, k, v, parameters, **extra)

    def without_branches(self, parameters: Parameters) -> Parameters:
        return parameters

    def assumptions(self, site: AttentionSite, parameters: Parameters) -> Sequence[Assumption]:
        if not site.mask.guarded or site.form == "attention-op":
            return ()
        return (Assumption("finite", "the NaN guard over the weights catches rows without a visible key and no others",
                           "scores of finite float32 operands are taken to stay finite"),)  # fmt: skip

    def lower(self, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        """Raises ``Unsupported`` where ``supports`` says no, or for an opset without a body."""
        register()
        form = _form(parameters)
        self._check(site, form)
        call = Call.of(site, opset, CHUNK, 0 if isinstance(site.query_length, int) else DENSE_BELOW)
        mask = check_padding(site.mask)
        inputs = (site.query.value, site.key.value, site.value.value, *([mask] if mask else []))
        name = f"{OP_TYPE}/{site.id or site.output.value}"
        made = node(form, call, inputs, site.output.value, name)
        return Lowering((made,), (function(form, call),))

    def _chunks(self, site: AttentionSite) -> int:
        if site.mask.part("padding") is not None and site.mask.masked_rows == "uniform":
            return 1
        if isinstance(site.query_length, int):
            return max(1, min(MAX_CHUNKS, site.query_length // CHUNK))
        return DYNAMIC_CHUNKS

    def _check(self, site: AttentionSite, form: Dense) -> None:
        """Raise ``Unsupported`` for a site that this op cannot express."""
        check_plain(site)
        for part in site.mask.parts:
            if part.kind not in ("causal", "padding"):
                raise Unsupported("mask", f"a mask of kind {part.kind} stays as it is")
        padded = bool(check_padding(site.mask))
        if padded and form.masked_rows == "uniform" and form.chunks > 1:
            raise Unsupported("masked-rows", "chunks do not meet all values that such rows average")
        if form.causal and site.query_length != site.key_length:
            raise Unsupported("lengths", "causal needs as many queries as keys")


def _form(parameters: Parameters) -> Dense:
    chunks, rows = int(parameters.get("chunks", 1)), str(parameters.get("masked_rows", "nan"))
    causal = bool(parameters.get("causal", False))
    if chunks < 1 or (chunks > 1 and not causal) or rows not in ("zero", "uniform", "nan"):
        raise Unsupported("parameters", f"chunks {chunks}, causal {causal}, masked_rows {rows}",
                          "chunks >= 1 (1 without causal); masked_rows is zero, uniform or nan")  # fmt: skip
    return Dense(causal, rows, chunks)
