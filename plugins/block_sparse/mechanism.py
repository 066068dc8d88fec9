"""``BlockSparseAttention`` as a mechanism: any mask that is known at fixed lengths, without the keys that it hides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.mask import MaskPart
from attncompile.core.mechanism import Candidate, Cost, Lowering, Parameters, Shape
from attncompile.core.pattern import GridWindow
from attncompile.core.site import AttentionSite, Need
from attncompile.core.verdict import Verdict
from attncompile.plugins.block_sparse.function import function, node
from attncompile.plugins.block_sparse.op import OP_TYPE, lists, register
from attncompile.plugins.block_sparse.plan import LAUNCH, Plan, plan
from attncompile.plugins.block_sparse.reference import reference
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.facts import (
    check_bias,
    check_masked_rows,
    check_padding,
    check_plain,
    structures,
    visible,
)
from attncompile.plugins.neighborhood.tiles import COPY

MINIMUM_GAIN = 1.15
"""A predicted gain below this is not worth a candidate."""

LARGEST_MASK = 1 << 28
"""Elements of a mask that are looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class _Mask:
    """A site's mask at its lengths: the bits, what they are called in a plan file, and whether a row has none."""

    visible: np.ndarray
    digest: str
    empty_rows: bool


class BlockSparseAttention:
    """Parameters: ``masked_rows`` (zero | uniform | nan) and ``mask``, a digest of the bits of the site's own mask. The
    bits themselves are read from the site.
    """

    name = OP_TYPE
    skips_keys = True
    understands: frozenset[Need] = frozenset({"body"})

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        try:
            parts = structures(site.mask)
            if all(p.kind in ("window", "causal") for p in parts):
                raise Unsupported("nothing-to-skip", "no structure beyond causal or a window, which other ops do")
            mask = _mask(site, parts)
        except Unsupported as error:
            return (Verdict.of(error),)
        parameters = {"masked_rows": site.mask.masked_rows, "mask": mask.digest}
        exact = self.is_exact_for(site, parameters)
        if not exact.ok:
            return (exact,)
        made = _plan(site)
        keys, share = made.elements / len(mask.visible), float(mask.visible.mean())
        gain = prod(mask.visible.shape) / (made.elements + COPY * made.copied + LAUNCH * len(made.groups) / site.heads)
        if gain < MINIMUM_GAIN:
            reason = f"{share:.1%} of the keys are seen: predicted gain {gain:.2f}, below {MINIMUM_GAIN}"
            return (Verdict.no("too-dense", reason),)
        reason = f"{share:.1%} of the keys are seen; {keys:.0f} of {mask.visible.shape[1]} keys a query are met"
        return (Candidate(self.name, parameters, True, reason),)

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        return ()

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        try:
            mask = self._check(site, parameters)
            made = _plan(site)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes(f"{mask.visible.mean():.1%} of the keys, in {len(made.groups)} groups of tiles")

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        """Exact whenever it is supported: the mask is the site's own, bit by bit, at its fixed lengths."""
        supported = self.supports(site, parameters)
        if not supported.ok:
            return supported
        if site.mask.part("padding") is not None or _mask(site, structures(site.mask)).empty_rows:
            try:
                check_masked_rows(site.mask)
            except Unsupported as error:
                return Verdict.of(error)
            if _rows(parameters) != site.mask.masked_rows:
                return Verdict.no("masked-rows", f"fully masked rows give {site.mask.masked_rows} in the source")
        return Verdict.yes("the mask is the site's own, bit by bit")

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        """Touched keys with padding; copying keys and starting groups are counted as flops."""
        made = _plan(site)
        of_element = 2.0 * (site.head_dim + site.value_dim)
        elements = float(shape.batch * site.heads * made.elements)
        copies = COPY * shape.batch * site.heads * made.copied + LAUNCH * len(made.groups)
        return Cost(of_element * (elements + copies), made.elements / shape.query_length, elements)

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Parameters, **extra: Any
    ) -> np.ndarray:
        """``extra`` needs ``visible``, bool [Nq, Nk]."""
        return reference(q, k, v, masked_rows=_rows(parameters), **extra)

    def without_branches(self, parameters: Parameters) -> Parameters:
        return parameters

    def lower(self, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        """Raises ``Unsupported`` where ``supports`` says no, or for an opset without a body."""
        register()
        call = Call.of(site, opset, 0, 0)
        mask = self._check(site, parameters)
        attributes = {**lists(mask.visible), "masked_rows": _rows(parameters)}
        padding, bias = check_padding(site.mask), check_bias(site)
        more = (padding, bias) if bias else (padding,) if padding else ()
        inputs = (site.query.value, site.key.value, site.value.value, *more)
        made = node(attributes, call, inputs, site.output.value, f"{OP_TYPE}/{site.id or site.output.value}")
        return Lowering((made,), (function(_plan(site), attributes, call),))

    def _check(self, site: AttentionSite, parameters: Parameters) -> _Mask:
        """The site's mask. Raises ``Unsupported`` for a site that this op cannot express with these parameters."""
        check_plain(site)
        _rows(parameters)
        check_padding(site.mask)
        check_bias(site)
        mask = _mask(site, structures(site.mask))
        if parameters.get("mask", mask.digest) != mask.digest:
            raise Unsupported("other-mask", "these parameters are for another mask than the site's")
        return mask


def _rows(parameters: Parameters) -> str:
    rows = str(parameters.get("masked_rows", "nan"))
    if rows not in ("zero", "uniform", "nan"):
        raise Unsupported("parameters", f"masked_rows {rows!r}", "masked_rows is zero, uniform or nan")
    return rows


def _mask(site: AttentionSite, parts: tuple[MaskPart, ...]) -> _Mask:
    queries, keys = site.query_length, site.key_length
    if not isinstance(queries, int) or not isinstance(keys, int):
        raise Unsupported("lengths", "a table of blocks holds for one length only", "export with a fixed length")
    if not parts:
        raise Unsupported("nothing-to-skip", "every query sees every key")
    if not 0 < queries * keys <= LARGEST_MASK:
        raise Unsupported("size", f"a mask of {queries}x{keys} is too large to be looked at")
    return _read(parts, queries, keys)


@lru_cache(maxsize=2)
def _read(parts: tuple[MaskPart, ...], queries: int, keys: int) -> _Mask:
    seen = visible(parts, queries, keys)
    digest = hashlib.sha256(repr(seen.shape).encode() + np.packbits(seen, axis=1).tobytes()).hexdigest()[:16]
    return _Mask(seen, digest, not seen.any(axis=1).all())


def _plan(site: AttentionSite) -> Plan:
    grids = [p.pattern.grid for p in site.mask.parts if isinstance(p.pattern, GridWindow)]
    if site.grid is not None:
        grids.append(site.grid)
    wide = tuple(dict.fromkeys(g for g in grids if len(g.shape) > 1))
    parts = structures(site.mask)
    assert isinstance(site.query_length, int) and isinstance(site.key_length, int)
    return _made(parts, site.query_length, site.key_length, site.heads, wide)


@lru_cache(maxsize=16)
def _made(parts: tuple[MaskPart, ...], queries: int, keys: int, heads: int, grids: tuple[TokenGrid, ...]) -> Plan:
    return plan(_read(parts, queries, keys).visible, heads, grids)
