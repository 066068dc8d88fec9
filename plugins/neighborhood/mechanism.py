"""``NeighborhoodAttention`` as a mechanism: which sites it takes, exactly or as an approximation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskFacts
from attncompile.core.mechanism import Candidate, Cost, Lowering, Parameters, Shape
from attncompile.core.site import AttentionSite, Need
from attncompile.core.verdict import Verdict
from attncompile.plugins.body import float_type
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.function import function, node
from attncompile.plugins.neighborhood.op import OP_TYPE, Neighborhood, register
from attncompile.plugins.neighborhood.reference import reference
from attncompile.plugins.neighborhood.tiles import tiling

MINIMUM_GAIN = 1.15
"""A predicted gain below this is not worth a candidate."""

BLOCK = 64
"""Queries per tile. 128 is 5% faster at N = 4096 in ONNX Runtime and twice slower below N = 128."""

GATHER_OVERHEAD = 1.15
"""Time of a touched score element relative to one of masked dense attention: copying the windows of K and V."""

UNMASKED = 0.6
"""Time of a score element of dense attention without a mask, likewise."""

LAUNCHES = 20_000.0
"""Time of the body's small nodes, in score elements: what makes short sequences lose. All three were measured with
ONNX Runtime 1.32 on 2 cores, on windows of 4,096 tokens and grids of 8x8 to 64x64.
"""

UNIFORM_FILL = -1e30
"""A score plus a number below this is that number in every float type that has it, so hidden scores are all equal."""

SINKS = 4
"""First tokens that approximations of causal sites keep (StreamingLLM, arXiv:2309.17453)."""


class NeighborhoodAttention:
    """Windows in 1-D, 2-D and 3-D; see ``op.Neighborhood`` for what each parameter means.

    Beside those, ``block`` (queries per tile) and ``dense_below`` (a sequence with Nq * Nk <= dense_below ** 2 takes a
    dense branch; 0 writes no such branch) are parameters of the body.
    """

    name = OP_TYPE
    skips_keys = True
    understands: frozenset[Need] = frozenset()

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        window = _window(site.mask)
        if isinstance(window, Verdict):
            return (window,)
        left, right = window
        size = left + 1 + right
        parameters: dict[str, Any] = {
            "kernel_size": [size], "left": [left], "causal": [int(right == 0)], "border": "truncate", "grid": [-1],
            "masked_rows": site.mask.masked_rows if site.mask.part("padding") is not None else "zero",
            **_body_parameters(site, size),
        }  # fmt: skip
        for verdict in (self.supports(site, parameters), self.is_exact_for(site, parameters)):
            if not verdict.ok:
                return (verdict,)
        gain = self._gain(site, parameters)
        if gain is not None and gain < MINIMUM_GAIN:
            return (
                Verdict.no(
                    "too-wide",
                    f"a window of {size} in {site.key_length} keys: predicted gain {gain:.2f}, below {MINIMUM_GAIN}",
                ),
            )
        return (
            Candidate(self.name, parameters, True, f"{_words(left, right)}, done in blocks of {parameters['block']}"),
        )

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        if site.query_length != site.key_length or site.mask.part("window", "neighborhood") is not None:
            return ()
        options = [*self._grid_windows(site), *self._sequence_windows(site)]
        found: list[tuple[float, Candidate]] = []
        for parameters, reason in options:
            if not self.supports(site, parameters).ok:
                continue
            gain = self._gain(site, parameters)
            if gain is not None and gain < MINIMUM_GAIN:
                continue
            work = self.cost(site, parameters, _static_shape(site, fallback=4096)).elements
            found.append((work, Candidate(self.name, parameters, False, reason)))
        return tuple(candidate for _, candidate in sorted(found, key=lambda x: x[0]))

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        try:
            hood = Neighborhood.of(parameters)
            block, dense_below = _block(parameters)
            self._check(site, hood)
            if not hood.sliding:
                tiling(hood, block)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes(f"window {list(hood.kernel_size)}, blocks of {block}, dense up to {dense_below}")

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        """Exact when the site's own mask is this window, shown for every length that can come."""
        window = _window(site.mask)
        if isinstance(window, Verdict):
            return window
        supported = self.supports(site, parameters)
        if not supported.ok:
            return supported
        hood = Neighborhood.of(parameters)
        if not hood.sliding or hood.prefix or hood.suffix or (hood.left[0], hood.right[0]) != window:
            return Verdict.no("other-window", f"the site's window is left {window[0]}, right {window[1]}")
        static = isinstance(site.query_length, int) and isinstance(site.key_length, int)
        for part in site.mask.parts:
            if part.kind in ("window", "causal") and not part.certificate.general and not static:
                return Verdict.no(
                    "certificate",
                    f"the {part.kind} mask was shown for some lengths only and the length is dynamic",
                    "export with a mask that is computed from the sequence length, or with a fixed length",
                )
        if site.mask.part("padding") is not None and hood.masked_rows != site.mask.masked_rows:
            return Verdict.no("masked-rows", f"fully masked rows give {site.mask.masked_rows} in the source")
        return Verdict.yes(f"the mask is this window ({site.mask.parts[0].certificate.method})")

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        """Touched keys include masked ones and rows of padding; the dense branch is counted where it is taken."""
        hood = Neighborhood.of(parameters)
        block, dense_below = _block(parameters)
        queries, keys = shape.query_length, shape.key_length
        if hood.sliding:
            if 0 < queries * keys <= dense_below**2:
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
        mask = check_padding(site.mask)
        inputs = (site.query.value, site.key.value, site.value.value, *([mask] if mask else []))
        made = node(hood, call, inputs, site.output.value, f"{OP_TYPE}/{site.id or site.output.value}")
        return Lowering((made,), (function(hood, call),))

    def _check(self, site: AttentionSite, hood: Neighborhood) -> None:
        """Raise ``Unsupported`` for a site that this op cannot express with these parameters."""
        if site.kind != "softmax":
            raise Unsupported("kind", f"a {site.kind} attention site")
        if site.softcap:
            raise Unsupported("softcap", f"softcap {site.softcap}: the op has none")
        if site.heads % site.kv_heads:
            raise Unsupported("heads", f"{site.heads} query heads over {site.kv_heads} key heads")
        float_type(site.dtype)
        for part in site.mask.parts:
            if part.kind not in ("window", "causal", "padding"):
                raise Unsupported("mask", f"a mask of kind {part.kind} cannot go into the op")
        check_padding(site.mask)
        nq, nk = site.query_length, site.key_length
        if isinstance(nq, int) and isinstance(nk, int) and nq > nk:
            raise Unsupported("lengths", f"{nq} queries over {nk} keys: some queries would have no position")
        if hood.sliding:
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

    def _gain(self, site: AttentionSite, parameters: Parameters) -> float | None:
        """Predicted dense time / time, or None when a length is dynamic."""
        if not isinstance(site.query_length, int) or not isinstance(site.key_length, int):
            return None
        shape = _static_shape(site, fallback=1)
        dense = shape.batch * site.heads * shape.query_length * shape.key_length
        before = dense * (1.0 if site.mask.parts else UNMASKED)
        return before / (GATHER_OVERHEAD * self.cost(site, parameters, shape).elements + LAUNCHES)

    def _sequence_windows(self, site: AttentionSite) -> list[tuple[dict[str, Any], str]]:
        """Windows of N/16 to N/2 (or fixed sizes for a dynamic N); causal sites keep their first tokens."""
        length = site.key_length
        sizes = [length // x for x in (16, 8, 4, 2)] if isinstance(length, int) else [128, 256, 512, 1024]
        causal = site.mask.part("causal") is not None
        grid = site.grid
        out: list[tuple[dict[str, Any], str]] = []
        for size in sizes:
            if size < 16:
                continue
            prefix = SINKS if causal else (grid.prefix if grid is not None else 0)
            suffix = 0 if causal or grid is None else grid.suffix
            left = size - 1 if causal else size // 2
            parameters = {
                "kernel_size": [size], "left": [left], "causal": [int(causal)], "border": "truncate", "grid": [-1],
                "prefix": prefix, "suffix": suffix, "masked_rows": "nan" if site.mask.masked_rows == "nan" else "zero",
                **_body_parameters(site, size + prefix + suffix),
            }  # fmt: skip
            first = f"the first {prefix} tokens and " if prefix else ""
            out.append((parameters, f"{first}a window of {size} of {length} tokens"))
        return out

    def _grid_windows(self, site: AttentionSite) -> list[tuple[dict[str, Any], str]]:
        """Clamped neighborhoods of a quarter to three quarters of each side of the site's grid."""
        grid = site.grid
        if grid is None or len(grid.shape) < 2 or site.mask.part("causal") is not None:
            return []
        out: list[tuple[dict[str, Any], str]] = []
        seen: set[tuple[int, ...]] = set()
        for share in (0.25, 0.375, 0.5, 0.625, 0.75):
            kernel = tuple(min(side, 2 * int(side * share / 2) + 1) for side in grid.shape)  # odd where it fits
            if kernel in seen or kernel == grid.shape or min(kernel) < 3:
                continue
            seen.add(kernel)
            parameters: dict[str, Any] = {
                "kernel_size": list(kernel), "border": "clamp", "grid": list(grid.shape), "prefix": grid.prefix,
                "suffix": grid.suffix, "masked_rows": "nan" if site.mask.masked_rows == "nan" else "zero",
                "block": BLOCK, "dense_below": 0,
            }  # fmt: skip
            size, side = ("x".join(map(str, x)) for x in (kernel, grid.shape))
            out.append((parameters, f"a neighborhood of {size} on the grid of {side} tokens"))
        return out


def _window(mask: MaskFacts) -> tuple[int, int] | Verdict:
    """(left, right) of the intersection of all window and causal factors, or why there is none."""
    left, right = -1, -1
    for part in mask.parts:
        if part.kind in ("window", "causal"):
            left = part.left if left < 0 else min(left, part.left) if part.left >= 0 else left
            right = part.right if right < 0 else min(right, part.right) if part.right >= 0 else right
        elif part.kind != "padding":
            return Verdict.no("mask", f"a mask of kind {part.kind} is not a window")
    if not mask.parts:
        return Verdict.no("nothing-to-skip", "every query sees every key")
    if left < 0 and right < 0:
        return Verdict.no("nothing-to-skip", f"a {mask.kind} mask leaves no window to use")
    if left < 0 or right < 0:
        reason = "causal without a window: half of the keys" if right == 0 else "a window with one side unlimited"
        return Verdict.no("nothing-to-skip", f"{reason} cannot be skipped in blocks worth having")
    return left, right


def check_padding(mask: MaskFacts) -> str:
    """The graph value of the one boolean padding factor, or an empty string without padding.

    Raises:
        Unsupported: several factors, an additive one (a float input may hold anything), or fully masked rows whose
            result the mask alone does not decide: they average all values only where every hidden score is the same
            huge number.
    """
    paddings = [p for p in mask.parts if p.kind == "padding"]
    if not paddings:
        return ""
    if len(paddings) > 1:
        raise Unsupported("mask", f"{len(paddings)} padding masks from different values", "join them into one input")
    (padding,) = paddings
    if padding.additive or padding.source is None:
        raise Unsupported("mask", "padding that is added as floats may hold anything", "export with a boolean mask")
    if mask.masked_rows == "uniform" and (len(mask.fills) != 1 or mask.fills[0] > UNIFORM_FILL):
        raise Unsupported(
            "masked-rows", "what fully masked rows give in the source depends on the scores or on several masks",
            "export with one boolean or -inf mask",
        )  # fmt: skip
    return padding.source


def _words(left: int, right: int) -> str:
    return f"causal window of {left + 1}" if right == 0 else f"window {left} left, {right} right"


def _body_parameters(site: AttentionSite, window: int) -> dict[str, int]:
    """``dense_below``: up to this length the dense form costs less than blocks (measured: window + 2 blocks)."""
    static = isinstance(site.query_length, int) and isinstance(site.key_length, int)
    return {"block": BLOCK, "dense_below": 0 if static else window + 2 * BLOCK}


def _block(parameters: Mapping[str, Any]) -> tuple[int, int]:
    block, dense_below = int(parameters.get("block", BLOCK)), int(parameters.get("dense_below", 0))
    if block < 1 or dense_below < 0:
        raise Unsupported("parameters", f"block {block}, dense_below {dense_below}", "block >= 1, dense_below >= 0")
    return block, dense_below


def _static_shape(site: AttentionSite, fallback: int) -> Shape:
    batch, queries, keys = (
        x if isinstance(x, int) else y
        for x, y in ((site.batch, 1), (site.query_length, fallback), (site.key_length, fallback))
    )
    return Shape(batch, queries, keys)
