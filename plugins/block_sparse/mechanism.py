"""``BlockSparseAttention`` as a mechanism: any mask that is known at fixed lengths, without the keys that it hides.

Heads may have masks of their own, and keys may count several times in a softmax.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from attncompile.core.block_pattern import BlockGeometry, BlockPattern, density
from attncompile.core.block_selection import Family
from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.head_pattern import HeadMasks, KeyCounts
from attncompile.core.mask import MaskPart
from attncompile.core.mechanism import Candidate, Cost, Lowering, Parameters, Shape
from attncompile.core.pattern import GridWindow
from attncompile.core.site import AttentionSite, Need
from attncompile.core.verdict import Verdict
from attncompile.plugins.block_sparse import chosen, per_head
from attncompile.plugins.block_sparse.function import function
from attncompile.plugins.block_sparse.op import OP_TYPE, Form, lists, node, register
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
from attncompile.plugins.parameters import check_names
from attncompile.plugins.token_padding import around

MINIMUM_GAIN = 1.15
"""A predicted gain below this is not worth a candidate."""

LARGEST_MASK = 1 << 28
"""Elements of a mask that are looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class _Mask:
    """A site's mask at its lengths: ``counts`` bool or uint8 [1 or heads, Nq, Nk] says how often each key counts; what
    that is called in a plan file, and whether a row has no key.
    """

    counts: np.ndarray
    digest: str
    empty_rows: bool

    @property
    def share(self) -> float:
        return float(np.count_nonzero(self.counts) / self.counts.size)


class BlockSparseAttention:
    """Parameters: ``masked_rows`` (zero | uniform | nan) and ``mask``, a digest of the bits of the site's own mask. The
    bits themselves are read from the site. An approximation has ``edge`` and ``heads`` instead of ``mask``: a pattern
    of blocks for each head (``core/block_pattern.py``, ``per_head.py``).
    """

    name = OP_TYPE
    skips_keys = True
    understands: frozenset[Need] = frozenset({"body", "head-mask", "key-counts", "token-padding"})

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        try:
            parts = structures(site.mask)
            if site.mask.counts is None and all(p.kind in ("window", "causal") for p in parts):
                raise Unsupported("nothing-to-skip", "no structure beyond causal or a window, which other ops do")
            mask = _mask(site)
        except Unsupported as error:
            return (Verdict.of(error),)
        parameters = {"masked_rows": site.mask.masked_rows, "mask": mask.digest}
        exact = self.is_exact_for(site, parameters)
        if not exact.ok:
            return (exact,)
        made = _plan(site)
        queries, all_keys = mask.counts.shape[1:]
        keys, share = made.elements / queries, mask.share
        gain = queries * all_keys / (made.elements + COPY * made.copied + LAUNCH * len(made.groups) / site.heads)
        if gain < MINIMUM_GAIN:
            reason = f"{share:.1%} of the keys are seen: predicted gain {gain:.2f}, below {MINIMUM_GAIN}"
            return (Verdict.no("too-dense", reason),)
        reason = f"{share:.1%} of the keys are seen; {keys:.0f} of {all_keys} keys a query are met"
        return (Candidate(self.name, parameters, True, reason),)

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        """None: which blocks a head may do without is seen from its maps alone."""
        return ()

    def head_geometry(self, site: AttentionSite) -> BlockGeometry | Verdict:
        """The blocks that patterns of this site's heads are made of, or why they cannot have any."""
        try:
            return per_head.geometry_of(site)
        except Unsupported as error:
            return Verdict.of(error)

    def head_parameters(self, geometry: BlockGeometry, patterns: Sequence[BlockPattern]) -> Parameters:
        """Parameters that give each head its pattern."""
        return per_head.parameters(geometry, patterns)

    def choice_geometry(self, site: AttentionSite, tokens: int) -> BlockGeometry | Verdict:
        """The blocks that heads of this site choose among at one length, or why they cannot."""
        try:
            chosen.check_site(site)
        except Unsupported as error:
            return Verdict.of(error)
        made = chosen.geometry(site, tokens)
        return made if made.count >= 2 else Verdict.no("size", f"{tokens} tokens are one block")

    def choice_parameters(self, geometry: BlockGeometry, texts: Sequence[str]) -> Parameters:
        """Parameters with one text a head."""
        return {"masked_rows": "zero", "edge": geometry.edge, "heads": list(texts)}

    def choice_cost(
        self, site: AttentionSite, edge: int, family: Family, blocks: float, shape: Shape, rest: int = 0
    ) -> Cost:
        return chosen.cost_of(site, shape, edge, family, blocks, rest)

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        try:
            if _chosen(parameters):
                edge, chooser = chosen.check(site, parameters)
                return Verdict.yes(f"blocks of {edge} that {chooser.way} chooses for each input")
            if "heads" in parameters:
                geometry, _ = per_head.seen_of(site, parameters)
                left = density([BlockPattern(text) for text in parameters["heads"]], geometry)
                return Verdict.yes(f"{left:.1%} of the blocks")
            mask = self._check(site, parameters)
            made = _plan(site)
        except Unsupported as error:
            return Verdict.of(error)
        return Verdict.yes(f"{mask.share:.1%} of the keys, in {len(made.groups)} groups of tiles")

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        """Exact whenever it is supported: the mask is the site's own, bit by bit, at its fixed lengths."""
        supported = self.supports(site, parameters)
        if not supported.ok:
            return supported
        if "heads" in parameters:  # fixed or chosen
            return Verdict.no("approximate", "heads do without blocks that the site's mask shows")
        if site.mask.part("padding") is not None or _mask(site).empty_rows:
            try:
                check_masked_rows(site.mask)
            except Unsupported as error:
                return Verdict.of(error)
            if _rows(parameters) != site.mask.masked_rows:
                return Verdict.no("masked-rows", f"fully masked rows give {site.mask.masked_rows} in the source")
        return Verdict.yes("the mask is the site's own, bit by bit")

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        """Touched keys with padding; copying keys and starting groups are counted as flops."""
        if _chosen(parameters):
            return chosen.cost(site, parameters, shape)
        if "heads" in parameters:
            return per_head.cost(site, parameters, shape)
        made = _plan(site)
        of_element = 2.0 * (site.head_dim + site.value_dim)
        elements = float(shape.batch * site.heads * made.elements)
        copies = COPY * shape.batch * site.heads * made.copied + LAUNCH * len(made.groups)
        return Cost(of_element * (elements + copies), made.elements / shape.query_length, elements)

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Parameters, **extra: Any
    ) -> np.ndarray:
        """``extra`` needs ``visible``, [Nq, Nk] or [H, Nq, Nk], bool or how often each key counts."""
        return reference(q, k, v, masked_rows=_rows(parameters), **extra)

    def without_branches(self, parameters: Parameters) -> Parameters:
        return parameters

    def lower(self, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        """Raises ``Unsupported`` where ``supports`` says no, or for an opset without a body."""
        if _chosen(parameters):
            return chosen.lower(site, parameters, opset)
        if "heads" in parameters:
            return per_head.lower(site, parameters, opset)
        register()
        call = Call.of(site, opset, 0, 0)
        mask = self._check(site, parameters)
        said = lists(mask.counts)
        inputs = [*(["key_mask"] if call.key_mask else []), *(["bias"] if call.bias else []), "order"]
        form = Form(said.block, _rows(parameters), (*inputs, *(["counts"] if said.counts is not None else [])))

        def lowered(site: AttentionSite) -> Lowering:
            stored = said.initializers()
            values = {"query": site.query.value, "key": site.key.value, "value": site.value.value}
            values |= {"key_mask": check_padding(site.mask), "bias": check_bias(site)}
            values |= {x.name.rpartition("/")[2]: x.name for x in stored}
            name = f"{OP_TYPE}/{site.id or site.output.value}"
            made = node(form, call, form.place(values), [site.output.value], name, said.digest)
            return Lowering((made,), (function(_plan(site), made, form, call),), tuple(stored))

        return around(site, lowered)

    def _check(self, site: AttentionSite, parameters: Parameters) -> _Mask:
        """The site's mask. Raises ``Unsupported`` for a site that this op cannot express with these parameters."""
        check_plain(site)
        check_names(OP_TYPE, parameters, ("masked_rows", "mask"))
        _rows(parameters)
        check_padding(site.mask)
        check_bias(site)
        mask = _mask(site)
        if len(mask.counts) > 1:
            _check_heads(site, mask)
        if parameters.get("mask", mask.digest) != mask.digest:
            raise Unsupported("other-mask", "these parameters are for another mask than the site's")
        return mask


def _chosen(parameters: Parameters) -> bool:
    """Whether heads choose their blocks when the model runs."""
    texts = parameters.get("heads", ())
    return isinstance(texts, list | tuple) and chosen.chooses(texts)


def _rows(parameters: Parameters) -> str:
    rows = str(parameters.get("masked_rows", "nan"))
    if rows not in ("zero", "uniform", "nan"):
        raise Unsupported("parameters", f"masked_rows {rows!r}", "masked_rows is zero, uniform or nan")
    return rows


def _check_heads(site: AttentionSite, mask: _Mask) -> None:
    """Raise ``Unsupported`` for what the body does not do where heads have masks of their own."""
    if check_bias(site):
        raise Unsupported("bias", "a bias beside a mask of its own for each head")
    blind = mask.empty_rows or site.mask.part("padding") is not None
    if blind and site.mask.masked_rows == "uniform":
        raise Unsupported("masked-rows", "rows that average all values, beside a mask of its own for each head")


def _mask(site: AttentionSite) -> _Mask:
    queries, keys, parts = site.query_length, site.key_length, structures(site.mask)
    if not isinstance(queries, int) or not isinstance(keys, int):
        raise Unsupported("lengths", "a table of blocks holds for one length only", "export with a fixed length")
    if not parts and site.mask.counts is None:
        raise Unsupported("nothing-to-skip", "every query sees every key")
    if not 0 < queries * keys <= LARGEST_MASK:
        raise Unsupported("size", f"a mask of {queries}x{keys} is too large to be looked at")
    mask = _read(parts, site.mask.counts, queries, keys)
    if len(mask.counts) not in (1, site.heads):
        raise Unsupported("heads", f"{len(mask.counts)} masks for {site.heads} heads")
    return mask


@lru_cache(maxsize=2)
def _read(parts: tuple[MaskPart, ...], times: KeyCounts | None, queries: int, keys: int) -> _Mask:
    shared = tuple(p for p in parts if not isinstance(p.pattern, HeadMasks))
    seen = visible(shared, queries, keys)[None]
    try:
        for part in parts:
            if isinstance(part.pattern, HeadMasks):
                seen = seen & part.pattern.visible(queries, keys)
        counts = seen if times is None else seen * times.times(queries, keys)
    except ValueError as error:
        raise Unsupported("lengths", str(error)) from None
    bits = [np.packbits(one, axis=1).tobytes() for one in seen]
    shape = seen.shape if len(seen) > 1 else seen.shape[1:]
    digest = hashlib.sha256(repr(shape).encode() + b"".join(bits) + (b"" if times is None else counts.tobytes()))
    return _Mask(counts, digest.hexdigest()[:16], not counts.any(axis=-1).all())


def _plan(site: AttentionSite) -> Plan:
    grids = [p.pattern.grid for p in site.mask.parts if isinstance(p.pattern, GridWindow)]
    if site.grid is not None:
        grids.append(site.grid)
    wide = tuple(dict.fromkeys(g for g in grids if len(g.shape) > 1))
    assert isinstance(site.query_length, int) and isinstance(site.key_length, int)
    lengths = (site.query_length, site.key_length)
    return _made(structures(site.mask), site.mask.counts, lengths, (site.heads, site.kv_heads), wide)


@lru_cache(maxsize=16)
def _made(
    parts: tuple[MaskPart, ...], times: KeyCounts | None, lengths: tuple[int, int], heads: tuple[int, int],
    grids: tuple[TokenGrid, ...],
) -> Plan:  # fmt: skip
    return plan(_read(parts, times, *lengths).counts, heads[0], grids, heads[0] // heads[1])
