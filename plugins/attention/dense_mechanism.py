"""``DenseAttention``: exact dense attention as one op, without the work that exporters leave in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.assumption import Assumption
from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import FLOPS_PER_GUARD, Candidate, Cost, Lowering, Parameters, Shape
from attncompile.core.site import AttentionSite, Need
from attncompile.core.verdict import Verdict
from attncompile.plugins.attention.dense import function
from attncompile.plugins.attention.dense_site import Reading, read
from attncompile.plugins.attention.op import OP_TYPE, Dense, node, register
from attncompile.plugins.attention.reference import reference
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.head_scale import scaled_query
from attncompile.plugins.parameters import flag, number, whole

CHUNK = 128
"""Fewest queries in a chunk of a causal site: smaller products run slower than the saved scores are worth."""

MAX_CHUNKS = 8
DYNAMIC_CHUNKS = 4
DENSE_BELOW = 256
"""A causal sequence of a dynamic length up to this is not cut."""


class DenseAttention:
    """Parameters: ``left`` and ``right`` (int, -1: unlimited), ``softcap`` (float, 0: none), ``masked_rows`` (zero |
    uniform | nan), ``chunks`` (int), ``guard`` (bool); see ``op.Dense``.

    Every site that the op can express is a candidate, also where its body saves nothing: then the predicted gain is 1,
    and the site is kept on a CPU.
    """

    name = "DenseAttention"
    skips_keys = False
    understands: frozenset[Need] = frozenset({"body", "sinks", "head-scale", "key-ends"})

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        try:
            found = read(site)
        except Unsupported as error:
            return (Verdict.of(error),)
        chunks = self._chunks(site, found)
        parameters = {
            "left": found.left, "right": found.right, "softcap": site.softcap, "masked_rows": found.masked_rows,
            "chunks": chunks, **({"guard": True} if _guard(site) and site.dtype != "float32" else {}),
        }  # fmt: skip
        exact = self.is_exact_for(site, parameters)
        if not exact.ok:
            return (exact,)
        words = []
        if chunks > 1:
            words.append(f"the causal half in {chunks} chunks")
        if _guard(site) and "guard" not in parameters:
            words.append("no NaN guard over the weights")
        reason = "dense, " + ", ".join(words) if words else "dense as it is: the body leaves nothing out"
        return (Candidate(self.name, parameters, True, reason),)

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        return ()

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        try:
            _form(parameters)
            read(site)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("dense attention")

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        supported = self.supports(site, parameters)
        if not supported.ok:
            return supported
        form, found = _form(parameters), read(site)
        if (form.left, form.right) != (found.left, found.right):
            return Verdict.no("other-mask", f"the site's mask is {site.mask.kind}")
        if form.softcap != site.softcap:
            return Verdict.no("softcap", f"the site's softcap is {site.softcap}")
        static = isinstance(site.query_length, int) and isinstance(site.key_length, int)
        for part in found.bounds:
            if not part.certificate.general and not static:
                return Verdict.no(
                    "certificate", f"the {part.kind} mask was shown for some lengths only and the length is dynamic"
                )
        if form.masked_rows != found.masked_rows:
            return Verdict.no("masked-rows", f"fully masked rows give {found.masked_rows} in the source")
        if _guard(site) and site.dtype != "float32" and not form.guard:
            return Verdict.no("guard", f"in {site.dtype} the NaN guard may catch scores that overflow")
        return Verdict.yes("every query sees a key, or gets what the source gives it")

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        """Scores that are computed; the dense branch of short sequences is counted where it is taken."""
        form, queries, keys = _form(parameters), shape.query_length, shape.key_length
        chunks = form.chunks
        if not isinstance(site.query_length, int) and queries <= DENSE_BELOW:
            chunks = 1
        scores = 0
        for first, last in pairwise(queries * t // chunks for t in range(chunks + 1)):
            start = max(0, first + keys - queries - form.left) if form.left >= 0 and chunks > 1 else 0
            end = min(keys, last + keys - queries + form.right) if form.right >= 0 and chunks > 1 else keys
            scores += (last - first) * max(1, end - start)
        elements = float(shape.batch * site.heads * scores)
        guard = FLOPS_PER_GUARD * elements if form.guard else 0.0
        return Cost(2 * elements * (site.head_dim + site.value_dim) + guard, scores / max(1, queries), elements)

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Parameters, **extra: Any
    ) -> np.ndarray:
        return reference(q, k, v, parameters, **extra)

    def without_branches(self, parameters: Parameters) -> Parameters:
        return parameters

    def assumptions(self, site: AttentionSite, parameters: Parameters) -> Sequence[Assumption]:
        if not _guard(site):
            return ()
        if site.dtype != "float32":
            return (Assumption("finite", f"no score of finite operands overflows {site.dtype}",
                               "taken to be so: else the source's NaN guard gives 0, as the op's body does, but a "
                               "kernel, whose scores are float32, the exact value"),)  # fmt: skip
        return (Assumption("finite", "the NaN guard over the weights catches rows without a visible key and no others",
                           "scores of finite float32 operands are taken to stay finite"),)  # fmt: skip

    def lower(self, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        """Raises ``Unsupported`` where ``supports`` says no, or for an opset without a body."""
        register()
        found = read(site)
        form = replace(_form(parameters), inputs=tuple(found.values))
        call = Call.of(site, opset, CHUNK, 0 if isinstance(site.query_length, int) else DENSE_BELOW)
        scaled, query, stored = scaled_query(site)
        before, values, more = _vectors(site, found)
        names = {"query": query, "key": site.key.value, "value": site.value.value, **values}
        inputs = tuple(names.get(name, "") for name in form.given)
        name = f"{OP_TYPE}/{site.id or site.output.value}"
        made = node(form, call, inputs, (site.output.value,), name)
        return Lowering((*scaled, *before, made), (function(form, call),), (*stored, *more))

    def _chunks(self, site: AttentionSite, found: Reading) -> int:
        """Windows with a left bound are those of ``NeighborhoodAttention``, whose body skips more of their keys."""
        if found.right < 0 or found.left >= 0:
            return 1
        if isinstance(site.query_length, int):
            return max(1, min(MAX_CHUNKS, site.query_length // CHUNK))
        return DYNAMIC_CHUNKS


def _guard(site: AttentionSite) -> bool:
    """Whether the source has a NaN guard over its weights, which the op does without."""
    return site.mask.guarded and site.form != "attention-op"


def _vectors(
    site: AttentionSite, found: Reading
) -> tuple[list[NodeProto], dict[str, str], list[TensorProto]]:  # fmt: skip
    """Nodes that give sinks and key lengths the one axis that the op wants, the values of all optional inputs, and the
    initializers of those nodes.
    """
    values, nodes, stored = dict(found.values), [], []
    prefix = f"dense/{site.id or site.output.value}"
    for name in ("sinks", "key_lengths"):
        if name not in values:
            continue
        shape = numpy_helper.from_array(np.array([-1], np.int64), f"{prefix}/{name}/shape")
        stored.append(shape)
        nodes.append(helper.make_node("Reshape", [values[name], shape.name], [f"{prefix}/{name}"]))
        values[name] = f"{prefix}/{name}"
    if found.plus:
        plus = numpy_helper.from_array(np.array([found.plus], np.int64), f"{prefix}/plus")
        stored.append(plus)
        nodes.append(helper.make_node("Cast", [values["key_lengths"]], [f"{prefix}/ends"], to=TensorProto.INT64))
        nodes.append(helper.make_node("Add", [f"{prefix}/ends", plus.name], [f"{prefix}/lengths"]))
        values["key_lengths"] = f"{prefix}/lengths"
    return nodes, values, stored


def _form(parameters: Parameters) -> Dense:
    chunks, left, right = (
        whole("DenseAttention", parameters, *x) for x in (("chunks", 1), ("left", -1), ("right", -1))
    )
    rows, softcap = str(parameters.get("masked_rows", "zero")), number("DenseAttention", parameters, "softcap", 0.0)
    unknown = sorted(set(parameters) - {"left", "right", "softcap", "masked_rows", "chunks", "guard"})
    if unknown:
        hint = "causal is right = 0" if "causal" in unknown else "left, right, softcap, masked_rows, chunks, guard"
        raise Unsupported("parameters", f"DenseAttention has no parameter {', '.join(unknown)}", hint)
    if chunks < 1 or (chunks > 1 and right < 0 and left < 0) or rows not in ("zero", "uniform", "nan"):
        raise Unsupported("parameters", f"chunks {chunks}, left {left}, right {right}, masked_rows {rows}",
                          "chunks >= 1 (1 without a bound); masked_rows is zero, uniform or nan")  # fmt: skip
    if min(left, right) < -1 or softcap < 0:
        raise Unsupported("parameters", f"left {left}, right {right}, softcap {softcap}",
                          "left and right are -1 or a number of keys, softcap is 0 or positive")  # fmt: skip
    return Dense(left, right, softcap, rows, chunks, flag("DenseAttention", parameters, "guard"))
