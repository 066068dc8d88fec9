"""``FittedLinearAttention``: linear attention in the place of softmax attention, with feature maps that were fitted to
the site. Always an approximation; without fitted maps it offers nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.feature_map import EPSILON, KINDS, FeatureMaps
from attncompile.core.mechanism import Candidate, Cost, Lowering, Parameters, Shape
from attncompile.core.site import AttentionSite, Need, Operand
from attncompile.core.verdict import Verdict
from attncompile.plugins.body import float_type
from attncompile.plugins.linear_attention.causal import CAUSAL_CHUNK, chunk_of
from attncompile.plugins.linear_attention.form import Form, Sizes
from attncompile.plugins.linear_attention.function import function, node
from attncompile.plugins.linear_attention.op import APPLY, OUTPUT, STATE, STATES, register
from attncompile.plugins.linear_attention.reference import reference

Fitted = Mapping[str, Sequence[FeatureMaps]]
"""Site -> its maps, one of a kind."""


class FittedLinearAttention:
    """Parameters: ``map`` (``hedgehog``, ``relu`` or ``mala``) and ``fit``, the digest of the maps. The maps themselves
    are the instance's (``having``), not the plan's.
    """

    name = "FittedLinearAttention"
    skips_keys = False
    understands: frozenset[Need] = frozenset()

    def __init__(self, fitted: Fitted | None = None) -> None:
        self._fitted = dict(fitted or {})

    def having(self, fitted: Fitted) -> FittedLinearAttention:
        """The same with these maps."""
        return FittedLinearAttention(fitted)

    def fits(self, site: AttentionSite, kind: str) -> Verdict:
        """Whether maps of this kind could stand at ``site`` at all."""
        try:
            _require(site, kind)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("its weights are a softmax of q k alone")

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        return ()

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        return [
            Candidate(self.name, {"map": m.kind, "fit": m.digest}, False, f"linear, with a fitted {m.kind} map")
            for m in self._fitted.get(site.id, ())
            if self.fits(site, m.kind).ok
        ]

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        try:
            self._maps(site, parameters)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes("linear attention with fitted maps")

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        return Verdict.no("approximate", "a fitted map is an approximation of the softmax")

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        """Projections, features (written out), two products with the state; under a triangle scores inside of chunks.
        A map that is not there is taken to be as wide as the head.
        """
        kind = str(parameters["map"])
        known = self._find(site.id, str(parameters.get("fit", "")))
        width = (known.width if known else 0) or site.head_dim
        features = 2 * width if kind == "hedgehog" else width
        tokens = float(shape.batch * (shape.key_length * site.kv_heads + shape.query_length * site.heads))
        flops = 2.0 * tokens * (features * site.value_dim + (site.head_dim * width if kind != "mala" else 0))
        written = tokens * features
        if not site.mask.parts:
            return Cost(flops, 0.0, written)
        scores = float(shape.batch * site.heads * shape.query_length * CAUSAL_CHUNK)
        states = float(shape.batch * site.kv_heads * -(-shape.key_length // CAUSAL_CHUNK) * features * site.value_dim)
        return Cost(flops + 2.0 * scores * (features + site.value_dim), CAUSAL_CHUNK, written + scores + states)

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Parameters, **extra: Any
    ) -> np.ndarray:
        """``extra``: ``maps``, and ``causal``."""
        return fitted_reference(q, k, v, extra["maps"], bool(extra.get("causal", False)))

    def without_branches(self, parameters: Parameters) -> Parameters:
        return parameters

    def lower(self, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        """Raises ``Unsupported`` where ``supports`` says no."""
        register()
        return _Writer(site, self._maps(site, parameters), opset).lowering()

    def _find(self, site: str, digest: str) -> FeatureMaps | None:
        return next((m for m in self._fitted.get(site, ()) if m.digest == digest), None)

    def _maps(self, site: AttentionSite, parameters: Parameters) -> FeatureMaps:
        unknown = sorted(set(parameters) - {"map", "fit"})
        kind, digest = parameters.get("map"), parameters.get("fit")
        if unknown or kind not in KINDS or not isinstance(digest, str):
            raise Unsupported("parameters", f"FittedLinearAttention does not know {unknown or dict(parameters)}",
                              f"map, one of {', '.join(KINDS)}, and fit, what the fit is known by")  # fmt: skip
        _require(site, str(kind))
        found = self._find(site.id, digest)
        if found is None or found.kind != kind:
            raise Unsupported("parameters", f"the fitted maps {kind} {digest} of {site.id} are not there",
                              "give the file that holds them with --fitted")  # fmt: skip
        wanted = found.shapes(site.heads, site.kv_heads, site.head_dim)
        wrong = next((n for n, shape in wanted.items() if found.arrays[n].shape != shape), None)
        if wrong:
            raise Unsupported("parameters", f"the fitted maps of {site.id} have a {wrong} of "
                              f"{list(found.arrays[wrong].shape)}, not {list(wanted[wrong])}")  # fmt: skip
        return found


def _require(site: AttentionSite, kind: str) -> None:
    """Raises ``Unsupported`` where linear attention with such maps has no form."""
    if site.kind != "softmax":
        raise Unsupported("kind", f"a {site.kind} attention site")
    if site.softcap or site.heads % site.kv_heads:
        raise Unsupported("heads", "a softcap" if site.softcap else f"{site.heads} heads over {site.kv_heads}")
    float_type(site.dtype)
    if site.cache is not None:
        raise Unsupported("cache", "a KV cache: its state would be another one")
    if any(p.kind != "causal" for p in site.mask.parts):
        raise Unsupported("mask", f"the mask is {site.mask.kind}: a sum over all keys cannot leave some out")
    if any(o.layout not in ("BNHD", "BHND") for o in (site.query, site.key, site.value)):
        raise Unsupported("layout", "operands with tokens last")
    if not site.mask.parts:
        return
    if site.query_length != site.key_length:
        raise Unsupported("lengths", f"{site.query_length} queries and {site.key_length} keys under a triangle")
    if kind == "mala":
        raise Unsupported("causal", "MALA has no causal form: its mean is that of all values")
    if kind == "hedgehog" and site.dtype not in ("float32", "float64", "double"):
        raise Unsupported("dtype", f"under a triangle exponentials would be rounded to {site.dtype}")


def fitted_reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, maps: FeatureMaps, causal: bool) -> np.ndarray:
    """Naive, float64: q [B, Nq, H, D], k [B, Nk, G, D], v [B, Nk, G, E] -> [B, Nq, H, E]."""
    arrays = {n: np.asarray(a, np.float64) for n, a in maps.arrays.items()}
    given: dict[str, Any] = {"causal": causal}
    if maps.kind == "hedgehog":
        given |= {"query_map": "hedgehog", "key_map": "hedgehog", "normaliser": "sum"}
        return reference(q, k, v, given, feature_weight=arrays["key_weight"], query_weight=arrays["query_weight"])
    if maps.kind == "relu":
        given |= {"query_map": "relu", "key_map": "relu", "normaliser": "sum", "epsilon": EPSILON}
        heads = ((q, "query"), (k, "key"))
        q, k = (
            np.stack([x[:, :, h].astype(np.float64) @ arrays[f"{n}_weight"][h] + arrays[f"{n}_bias"][h]
                      for h in range(x.shape[2])], axis=2)
            for x, n in heads
        )  # fmt: skip
        return reference(q, k, v, given)
    given |= {"key_map": "elu+1", "normaliser": "mala"}
    x = np.asarray(q, np.float64)
    features = np.where(x > 0, 1 + x, np.exp(np.minimum(x, 0)))
    return reference(features * arrays["magnitude"][None, None, :, None], k, v, given)


class _Writer:
    """The nodes of one site, their functions and their constants. What no op takes as a weight (``relu``'s projection,
    ``mala``'s magnitude, all maps under a triangle) is computed in front of the ops, in float32.
    """

    def __init__(self, site: AttentionSite, maps: FeatureMaps, opset: int) -> None:
        self.site, self.maps, self.opset = site, maps, opset
        self.causal = bool(site.mask.parts)
        self.prefix = f"fitted/{site.id or site.output.value}"
        self.nodes: list[NodeProto] = []
        self.functions: list[FunctionProto] = []
        self.stored: list[TensorProto] = []
        self.half = site.dtype in ("float16", "bfloat16")

    def lowering(self) -> Lowering:
        site, kind = self.site, self.maps.kind
        query, key, dim = site.query, site.key, site.head_dim
        given: dict[str, Any] = {"normaliser": "sum"}
        weights: dict[str, str] = {}
        if kind == "hedgehog" and not self.causal:
            given |= {"query_map": "hedgehog", "key_map": "hedgehog"}
            weights = {n: self.store(f"{n}_weight", self.maps.arrays[f"{n}_weight"]) for n in ("query", "key")}
        elif kind == "hedgehog":
            query, key, dim = self.exponentials(query, "query"), self.exponentials(key, "key"), 2 * self.maps.width
        elif kind == "relu":
            given |= {"query_map": "relu", "key_map": "relu", "epsilon": EPSILON}
            query, key, dim = self.projected(query, "query"), self.projected(key, "key"), self.maps.width
        else:
            given |= {"normaliser": "mala"}
            query, key = self.scaled(query, "query"), self.scaled(key, "key")
        form = Form(causal=self.causal, chunk=chunk_of(self.site.key_length) if self.causal else 0, **given)
        sizes = self.sizes(query, key, dim)
        v, out = site.value.value, {"output": site.output.value}
        made = {n: self.value(n) for n in ("state", "total", *(["mean"] if form.means else []))}
        if self.causal:
            self.op(STATES, form, sizes, {"key": key.value, "value": v}, made)
            self.op(OUTPUT, form, sizes, {"query": query.value, "key": key.value, "value": v, **made}, out)
        else:
            of_key = {"feature_weight": weights["key"]} if weights else {}
            of_query = {"feature_weight": weights["query"]} if weights else {}
            self.op(STATE, form, sizes, {"key": key.value, "value": v} | of_key, made)
            self.op(APPLY, form, sizes, {"query": query.value, **made} | of_query, out)
        return Lowering(tuple(self.nodes), tuple(self.functions), tuple(self.stored))

    def sizes(self, query: Operand, key: Operand, dim: int) -> Sizes:
        s = self.site
        queries, keys = (n if isinstance(n, int) else None for n in (s.query_length, s.key_length))
        layouts = (query.layout, key.layout, s.value.layout, s.output.layout)
        return Sizes(s.heads, s.kv_heads, dim, s.value_dim, s.dtype, layouts, queries, keys, self.opset)

    def op(self, op_type: str, form: Form, sizes: Sizes, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        name = f"{op_type}/{self.site.id or self.site.output.value}"
        self.nodes.append(node(op_type, form, sizes, inputs, outputs, name))
        self.functions.append(function(op_type, form, sizes, inputs, outputs))

    # In front of the ops.

    def exponentials(self, operand: Operand, name: str) -> Operand:
        """[exp(x W), exp(-x W)], BHND."""
        inner = self.product(self.wide(operand, name), operand.layout, name)
        both = [self.plain("Exp", inner, name=name), self.plain("Exp", self.plain("Neg", inner, name=name), name=name)]
        return Operand(self.narrow(self.plain("Concat", *both, name=name, axis=-1), name), "BHND")

    def projected(self, operand: Operand, name: str) -> Operand:
        """x W + b, BHND."""
        bias = self.store(f"{name}_bias", self.maps.arrays[f"{name}_bias"][:, None, :])
        inner = self.product(self.wide(operand, name), operand.layout, name)
        return Operand(self.narrow(self.plain("Add", inner, bias, name=name), name), "BHND")

    def scaled(self, operand: Operand, name: str) -> Operand:
        """(elu(x) + 1) times the root of the magnitude, whose sign the queries have. Both sides have a part of it, or
        float16 would not hold the queries'. Keys of a group of heads have the mean of their roots.
        """
        heads, group = self.site.kv_heads, self.site.heads // self.site.kv_heads
        magnitude = self.maps.arrays["magnitude"].astype(np.float64)
        of_key = np.sqrt(np.abs(magnitude)).reshape(heads, group).mean(axis=1)
        factor = magnitude / np.repeat(of_key, group) if name == "query" else of_key
        shape = (-1, 1) if operand.layout == "BNHD" else (-1, 1, 1)
        stored = self.store(f"{name}_magnitude", factor.reshape(shape))
        zero = self.store(f"{name}_zero", np.zeros(()))
        x = self.wide(operand, name)
        low = self.plain("Exp", self.plain("Min", x, zero, name=name), name=name)
        features = self.plain("Add", self.plain("Relu", x, name=name), low, name=name)
        return Operand(self.narrow(self.plain("Mul", features, stored, name=name), name), operand.layout)

    def product(self, x: str, layout: str, name: str) -> str:
        weight = self.store(f"{name}_weight", self.maps.arrays[f"{name}_weight"])
        if layout == "BNHD":
            x = self.plain("Transpose", x, name=name, perm=[0, 2, 1, 3])
        return self.plain("MatMul", x, weight, name=name)

    def wide(self, operand: Operand, name: str) -> str:
        return self.plain("Cast", operand.value, name=name, to=TensorProto.FLOAT) if self.half else operand.value

    def narrow(self, value: str, name: str) -> str:
        return self.plain("Cast", value, name=name, to=float_type(self.site.dtype)[0]) if self.half else value

    def plain(self, op_type: str, *inputs: str, name: str, **attributes: Any) -> str:
        made = self.value(f"{name}_{op_type.lower()}{len(self.nodes)}")
        self.nodes.append(helper.make_node(op_type, list(inputs), [made], name=made, **attributes))
        return made

    def value(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def store(self, name: str, array: np.ndarray) -> str:
        kind = np.float64 if self.site.dtype in ("float64", "double") else np.float32
        self.stored.append(numpy_helper.from_array(np.ascontiguousarray(array, kind), self.value(name)))
        return self.value(name)
