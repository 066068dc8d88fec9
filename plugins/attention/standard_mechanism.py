"""Exact dense attention as ONNX's own ``Attention`` op, where that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Candidate, Cost, Lowering, Parameters, Shape
from attncompile.core.site import AttentionSite, Need
from attncompile.core.verdict import Verdict
from attncompile.plugins.attention.reference import reference
from attncompile.plugins.attention.standard import FIRST_OPSET, OP_TYPE, nodes
from attncompile.plugins.parameters import check_names, flag

WINDOW = (
    "a window: opset 25 has it, but ONNX Runtime 1.32 runs it slower than the mask written out, and TensorRT-RTX 1.7 "
    "reads the op and drops the window"
)
"""Why windows are not emitted: see README.md for the times; the parser's network has no mask and no other attribute for
one.
"""


class Attention:
    """Parameters: ``causal`` (bool)."""

    name = OP_TYPE
    skips_keys = False
    understands: frozenset[Need] = frozenset({"body"})

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        if site.form == "attention-op":
            return (Verdict.no("already", "the site is the standard Attention op already"),)
        parameters = {"causal": site.mask.part("causal") is not None}
        for verdict in (self.supports(site, parameters), self.is_exact_for(site, parameters)):
            if not verdict.ok:
                return (verdict,)
        return (Candidate(self.name, parameters, True, "the standard Attention op says the same"),)

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        return ()

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        try:
            _check(site, parameters)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("dense attention")

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        supported = self.supports(site, parameters)
        if not supported.ok:
            return supported
        causal = site.mask.part("causal")
        if (causal is not None) != bool(parameters.get("causal")):
            return Verdict.no("other-mask", f"the site's mask is {site.mask.kind}")
        static = isinstance(site.query_length, int) and isinstance(site.key_length, int)
        if causal is not None and not causal.certificate.general and not static:
            return Verdict.no(
                "certificate", "the causal mask was shown for some lengths only and the length is dynamic"
            )
        if site.mask.part("padding") is not None and site.mask.masked_rows != "zero":
            return Verdict.no(
                "masked-rows", f"fully masked rows give {site.mask.masked_rows} in the source, zero in the op"
            )
        return Verdict.yes("no mask, or one that the op has as an attribute or as an input")

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        elements = float(shape.batch * site.heads * shape.query_length * shape.key_length)
        return Cost(2 * elements * (site.head_dim + site.value_dim), float(shape.key_length), elements)

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Parameters, **extra: Any
    ) -> np.ndarray:
        return reference(q, k, v, {"right": 0 if parameters.get("causal") else -1}, **extra)

    def without_branches(self, parameters: Parameters) -> Parameters:
        return parameters

    def lower(self, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        """Raises ``Unsupported`` below opset 23 and where ``supports`` says no."""
        if opset < FIRST_OPSET:
            raise Unsupported(
                "opset",
                f"the Attention op exists from opset {FIRST_OPSET}, the model imports {opset}",
                "export at 23 or later",
            )
        _check(site, parameters)
        made, initializers = nodes(site, flag(self.name, parameters, "causal"))
        return Lowering(tuple(made), (), tuple(initializers))


def _check(site: AttentionSite, parameters: Parameters) -> None:
    """Raise ``Unsupported`` for a site that the op cannot express, or wrong parameters."""
    check_names("Attention", parameters, ("causal",))
    causal = flag("Attention", parameters, "causal")
    if site.kind != "softmax":
        raise Unsupported("kind", f"a {site.kind} attention site")
    if site.softcap:
        raise Unsupported("softcap", f"softcap {site.softcap}: TensorRT-RTX 1.7 does not parse the op's softcap")
    if site.heads % site.kv_heads:
        raise Unsupported("heads", f"{site.heads} query heads over {site.kv_heads} key heads")
    if site.scale <= 0:
        raise Unsupported("scale", f"scale {site.scale}: the op takes its square root")
    if sum(p.kind == "padding" for p in site.mask.parts) > 1:
        raise Unsupported("mask", "several padding masks")
    if site.mask.part("window") is not None:
        raise Unsupported("window", WINDOW)
    for part in site.mask.parts:
        if part.kind not in ("causal", "padding") or part.additive:
            raise Unsupported(
                "mask", f"a mask of kind {part.kind}{' (additive)' if part.additive else ''} stays as it is"
            )
    if causal:
        if site.query_length != site.key_length:
            raise Unsupported("lengths", "is_causal is aligned at the first key: it needs as many queries as keys")
        if site.mask.part("padding") is not None:
            raise Unsupported("mask", "causal and padding at once: TensorRT-RTX does not parse is_causal beside a mask")
