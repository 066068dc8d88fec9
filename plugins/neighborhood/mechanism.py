"""``NeighborhoodAttention`` as a mechanism: which sites it takes, exactly or as an approximation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from math import ceil, prod
from typing import Any

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskPart
from attncompile.core.mechanism import Candidate, Cost, Lowering, Parameters, Shape
from attncompile.core.pattern import GridWindow
from attncompile.core.site import AttentionSite, Need
from attncompile.core.verdict import Verdict
from attncompile.plugins.body import FIRST_OPSET
from attncompile.plugins.neighborhood.approximate import BLOCK, balls, body_parameters, grid_windows, sequence_windows
from attncompile.plugins.neighborhood.cached import kept, met
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.facts import (
    check_bias,
    check_masked_rows,
    check_padding,
    check_plain,
    structures,
    visible,
    window,
)
from attncompile.plugins.neighborhood.function import function, node, slides
from attncompile.plugins.neighborhood.gridded import tiles_of
from attncompile.plugins.neighborhood.head_scale import scaled_query
from attncompile.plugins.neighborhood.op import OP_TYPE, Neighborhood, register
from attncompile.plugins.neighborhood.reference import reference
from attncompile.plugins.neighborhood.ring_sites import check_ring, ring, ring_is_exact, ring_parameters
from attncompile.plugins.neighborhood.rings import rings
from attncompile.plugins.neighborhood.tiles import COPY, tiling
from attncompile.plugins.parameters import check_names, whole
from attncompile.plugins.token_padding import around

MINIMUM_GAIN = 1.15
"""A predicted gain below this is not worth a candidate."""

OVERHEAD = 1.15
"""Time of a touched score element relative to one of masked dense attention: smaller products."""

UNMASKED = 0.6
"""Time of a score element of dense attention without a mask, likewise."""

LAUNCHES = 20_000.0
"""Time of the body's small nodes, in score elements: what makes short sequences lose. All three were measured with
ONNX Runtime 1.32 on 2 cores, on windows of 4,096 tokens and grids of 8x8 to 64x64.
"""

LARGEST_MASK = 1 << 14
"""Tokens of a grid whose mask is still compared element by element (a quarter of a GiB)."""


class NeighborhoodAttention:
    """Windows in 1-D, 2-D and 3-D; see ``op.Neighborhood`` for what each parameter means.

    Beside those, ``block`` (queries per tile) and ``dense_below`` (a sequence with Nq * Nk <= dense_below ** 2 takes a
    dense branch; 0 writes no such branch) are parameters of the body.
    """

    name = OP_TYPE
    skips_keys = True
    understands: frozenset[Need] = frozenset({"body", "sinks", "head-scale", "token-padding"})

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        try:
            parameters, reason = self._exact_parameters(site)
        except Unsupported as error:
            return (kept(site, Verdict.of(error)),)
        for verdict in (self.supports(site, parameters), self.is_exact_for(site, parameters)):
            if not verdict.ok:
                return (verdict,)
        gain = self._gain(site, parameters)
        if gain is not None and gain < MINIMUM_GAIN:
            size = "x".join(map(str, parameters["kernel_size"]))
            return (
                Verdict.no(
                    "too-wide",
                    f"a window of {size} in {site.key_length} keys: predicted gain {gain:.2f}, below {MINIMUM_GAIN}",
                ),
            )
        return (Candidate(self.name, parameters, True, f"{reason}, done in blocks of {parameters['block']}"),)

    def _exact_parameters(self, site: AttentionSite) -> tuple[dict[str, Any], str]:
        """Parameters that say what the site's mask says, and that in words. Raises ``Unsupported`` without any."""
        wrapped = ring(site.mask)
        if wrapped is not None:
            return ring_parameters(wrapped)
        parts = [p for p in site.mask.parts if p.pattern is not None]
        grid = parts[0].pattern if parts else None
        if isinstance(grid, GridWindow):
            if len(structures(site.mask)) > 1:
                raise Unsupported("mask", "a neighborhood and another structure are one mask for BlockSparseAttention")
            return self._grid_parameters(site, grid)
        found = window(site.mask)
        if isinstance(found, Verdict):
            raise Unsupported(found.code, found.reason, found.hint)
        left, right = found
        bias = bool(check_bias(site))
        size = left + 1 + right
        parameters = {
            "kernel_size": [size], "left": [left], "causal": [int(right == 0)], "border": "truncate",
            "grid": [site.key_length if bias else -1],
            "masked_rows": site.mask.masked_rows if site.mask.part("padding") is not None else "zero",
            **body_parameters(site, size),
        }  # fmt: skip
        return parameters, f"causal window of {left + 1}" if right == 0 else f"window {left} left, {right} right"

    def _grid_parameters(self, site: AttentionSite, grid: GridWindow) -> tuple[dict[str, Any], str]:
        if grid.border == "circular":
            raise Unsupported("border", "windows that wrap around are not one box of keys a tile")
        sides, size = ("x".join(map(str, x)) for x in (grid.grid.shape, grid.kernel_size))
        parameters = {
            "kernel_size": list(grid.kernel_size), "dilation": list(grid.dilation), "stride": list(grid.stride),
            "causal": [int(c) for c in grid.causal], "border": grid.border, "shape": grid.shape,
            "grid": list(grid.grid.shape), "prefix": grid.grid.prefix, "suffix": grid.grid.suffix,
            "masked_rows": site.mask.masked_rows, "block": BLOCK, "dense_below": 0,
        }  # fmt: skip
        what = "ball" if grid.shape == "ball" else "neighborhood"
        return parameters, f"a {what} of {size} on the grid of {sides} tokens"

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        if site.query_length != site.key_length or any(p.kind not in ("causal", "padding") for p in site.mask.parts):
            return ()
        options = [(*one, None) for one in (*grid_windows(site), *sequence_windows(site))]
        found: list[tuple[float, Candidate]] = []
        for parameters, reason, inside in (*options, *balls(site)):
            if not self.supports(site, parameters).ok:
                continue
            gain = self._gain(site, parameters)
            if gain is not None and gain < MINIMUM_GAIN:
                continue
            work = self.cost(site, parameters, _static_shape(site, fallback=4096)).elements
            found.append((work, Candidate(self.name, parameters, False, reason, inside)))
        return tuple(candidate for _, candidate in sorted(found, key=lambda x: x[0]))

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        try:
            hood = Neighborhood.of(parameters)
            block, dense_below = _block(parameters)
            self._check(site, hood)
            if hood.circular:
                rings(hood)
            elif not slides(hood, site.mask.part("bias") is not None):
                tiling(hood, block)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes(f"window {list(hood.kernel_size)}, blocks of {block}, dense up to {dense_below}")

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        """Exact when the site's own mask is this window, shown for every length that can come."""
        try:
            structure = structures(site.mask)
        except Unsupported as error:
            return Verdict.of(error)
        supported = self.supports(site, parameters)
        if not supported.ok:
            return supported
        hood = Neighborhood.of(parameters)
        static = isinstance(site.query_length, int) and isinstance(site.key_length, int)
        if hood.circular:
            return ring_is_exact(site, hood, LARGEST_MASK)
        for part in structure:
            if not part.certificate.general and not static:
                return Verdict.no(
                    "certificate",
                    f"the {part.kind} mask was shown for some lengths only and the length is dynamic",
                    "export with a mask that is computed from the sequence length, or with a fixed length",
                )
        if any(p.pattern is not None for p in structure):
            if hood.tokens is not None and hood.tokens > LARGEST_MASK:
                return Verdict.no("size", f"a mask of {hood.tokens} tokens is too large to be compared")
            same = _same_mask(hood, structure)
        else:
            found = window(site.mask)
            if isinstance(found, Verdict):
                return found
            plain = hood.sliding and not hood.prefix and not hood.suffix
            same = plain and (hood.left[0], hood.right[0]) == found
        if not same:
            return Verdict.no("other-window", "the site's mask is not the window of these parameters")
        if site.mask.part("padding") is not None or _has_empty_rows(hood):
            try:
                check_masked_rows(site.mask)
            except Unsupported as error:
                return Verdict.of(error)
            if hood.masked_rows != site.mask.masked_rows:
                return Verdict.no("masked-rows", f"fully masked rows give {site.mask.masked_rows} in the source")
        return Verdict.yes(f"the mask is this window ({structure[0].certificate.method})")

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        """Touched keys include masked ones and rows of padding; the dense branch is counted where it is taken."""
        hood = Neighborhood.of(parameters)
        block, dense_below = _block(parameters)
        queries = shape.query_length
        if hood.circular:
            size = prod(hood.kernel_size)
            elements = float(shape.batch * site.heads * queries * size)
            return Cost(flops=2 * elements * (site.head_dim + site.value_dim), keys=float(size), elements=elements)
        keys, together = met(hood, Call.of(site, FIRST_OPSET, block, dense_below), queries, shape.key_length)
        if slides(hood, site.mask.part("bias") is not None):
            if together or 0 < queries * keys <= dense_below**2:
                pairs = float(queries * keys)
            else:
                width = hood.kernel_size[0] - 1 + block + hood.prefix + hood.suffix
                pairs = float(ceil(queries / block) * block * width)
                pairs += (0 if hood.causal[0] else hood.prefix + hood.suffix) * keys
        else:
            plan = tiling(hood, block)
            pairs = float(plan.tiles * plan.queries * (plan.keys + hood.prefix + hood.suffix))
            pairs += (hood.prefix + hood.suffix) * keys
        elements = shape.batch * site.heads * pairs
        return Cost(flops=2 * elements * (site.head_dim + site.value_dim), keys=pairs / queries, elements=elements)

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Parameters, **extra: Any
    ) -> np.ndarray:
        return reference(q, k, v, parameters, **extra)

    def without_branches(self, parameters: Parameters) -> Parameters:
        return {**parameters, "dense_below": 0}

    def lower(self, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        """Raises ``Unsupported`` where ``supports`` says no, or for an opset without a body."""
        register()
        hood = Neighborhood.of(parameters)
        block, dense_below = _block(parameters)
        self._check(site, hood)
        call = Call.of(site, opset, block, dense_below)

        def lowered(site: AttentionSite) -> Lowering:
            found = ring(site.mask) if hood.circular else None
            mask, bias = check_padding(site.mask), "" if found is not None else check_bias(site)
            places = found.bias if found is not None else ""
            scaled, query, stored = scaled_query(site)
            inputs = [query, site.key.value, site.value.value, mask, bias, site.sinks, places]
            while not inputs[-1]:
                inputs.pop()
            made = node(hood, call, tuple(inputs), site.output.value, f"{OP_TYPE}/{site.id or site.output.value}")
            return Lowering((*scaled, made), (function(hood, call),), stored)

        return around(site, lowered)

    def _check(self, site: AttentionSite, hood: Neighborhood) -> None:
        """Raise ``Unsupported`` for a site that this op cannot express with these parameters."""
        check_plain(site)
        structures(site.mask)
        check_padding(site.mask)
        if hood.circular:
            check_ring(site, hood)
            return
        bias = check_bias(site)
        if bias and (hood.prefix or hood.suffix):
            raise Unsupported("bias", "the rows of prefix and suffix tokens take no bias")
        if site.sinks:
            self._check_sinks(site, hood, bool(bias))
        nq, nk = site.query_length, site.key_length
        if isinstance(nq, int) and isinstance(nk, int) and nq > nk:
            raise Unsupported("lengths", f"{nq} queries over {nk} keys: some queries would have no position")
        if slides(hood, bool(bias)):
            if nq != nk and (hood.suffix or (hood.prefix and not hood.causal[0])):
                raise Unsupported("lengths", "prefix and suffix queries need as many queries as keys")
            if hood.grid != (-1,) and (nq, nk) != (hood.tokens, hood.tokens):
                raise Unsupported("grid", f"the grid has {hood.tokens} tokens, the site {nq} queries and {nk} keys")
            return
        if hood.dynamic:
            raise Unsupported("grid", "only a plain sliding window works on a dynamic length", "give the grid")
        if (nq, nk) != (hood.tokens, hood.tokens):
            raise Unsupported(
                "grid", f"the grid has {hood.tokens} tokens, the site {nq} queries and {nk} keys", "give another --grid"
            )

    def _check_sinks(self, site: AttentionSite, hood: Neighborhood, bias: bool) -> None:
        if not slides(hood, bias) or hood.prefix or hood.suffix:
            raise Unsupported("sinks", "sink logits go with a plain sliding window only")
        if site.mask.part("padding") is not None and site.mask.masked_rows != "zero":
            raise Unsupported("sinks", "a query that sees no key has all its weight on the sink, which gives zero")

    def _gain(self, site: AttentionSite, parameters: Parameters) -> float | None:
        """Predicted dense time / time, or None when a length is dynamic."""
        if not isinstance(site.query_length, int) or not isinstance(site.key_length, int):
            return None
        shape = _static_shape(site, fallback=1)
        dense = shape.batch * site.heads * shape.query_length * shape.key_length
        before = dense * (1.0 if site.mask.parts else UNMASKED)
        block, _ = _block(parameters)
        hood = Neighborhood.of(parameters)
        _, together = met(hood, Call.of(site, FIRST_OPSET, block, 0), shape.query_length, shape.key_length)
        if hood.circular:
            copied = shape.key_length
        elif together:
            copied = 0  # one slice of the last keys
        elif slides(hood, site.mask.part("bias") is not None):
            copied = ceil(shape.query_length / block) * (hood.kernel_size[0] - 1 + block + hood.prefix + hood.suffix)
        else:
            plan = tiling(hood, block)
            copied = plan.tiles * (plan.keys + hood.prefix + hood.suffix)
        after = self.cost(site, parameters, shape).elements + COPY * shape.batch * site.heads * copied
        return before / (OVERHEAD * after + LAUNCHES)


@lru_cache(maxsize=32)
def _same_mask(hood: Neighborhood, structure: tuple[MaskPart, ...]) -> bool:
    """Whether the tables of the body let through what ``structure`` does, element by element."""
    if hood.dynamic or hood.tokens is None:
        return False
    want = visible(structure, hood.tokens, hood.tokens)
    inner = slice(hood.prefix, hood.tokens - hood.suffix)
    if not (want[: inner.start].all() and want[inner.stop :].all()):
        return False
    got = np.ones_like(want)
    got[inner] = False
    for rows, seen in tiles_of(hood, BLOCK).rows(hood.tokens):
        got[rows] = seen
    return bool(np.array_equal(got, want))


def _has_empty_rows(hood: Neighborhood) -> bool:
    """Whether a query may have a window without any key: a group wider than its causal window."""
    return any(c and s > k for c, s, k in zip(hood.causal, hood.stride, hood.kernel_size, strict=True))


_NAMES = (*(f.name for f in fields(Neighborhood)), "block", "dense_below")


def _block(parameters: Mapping[str, Any]) -> tuple[int, int]:
    check_names(OP_TYPE, parameters, _NAMES)
    block, dense_below = (whole(OP_TYPE, parameters, *x) for x in (("block", BLOCK), ("dense_below", 0)))
    if block < 1 or dense_below < 0:
        raise Unsupported("parameters", f"block {block}, dense_below {dense_below}", "block >= 1, dense_below >= 0")
    return block, dense_below


def _static_shape(site: AttentionSite, fallback: int) -> Shape:
    batch, queries, keys = (
        x if isinstance(x, int) else y
        for x, y in ((site.batch, 1), (site.query_length, fallback), (site.key_length, fallback))
    )
    return Shape(batch, queries, keys)
