"""Why something is, or is not, an attention site that is replaced: as values, as JSON, and as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from attncompile.core.mask import MaskFacts, MaskPart
from attncompile.core.site import NEED_WORDS, Dim
from attncompile.report import mask_text, tokens_text

if TYPE_CHECKING:
    from attncompile.core.plan import Decision
    from attncompile.core.site import AttentionSite, NearMiss
    from attncompile.core.verdict import Verdict

_LENGTHS = 8
"""Lengths of a certificate that are written out for people; the JSON has all."""
_METHODS = {
    "constant": "the stored mask", "evaluated": "evaluating the graph", "structure": "the graph's structure",
    "attribute": "the operator's attributes",
}  # fmt: skip
"""How a certificate was made, in words."""
_SIZES = frozenset(("kernel_size", "dilation", "stride", "window", "windows", "shift"))
"""Lists with one size an axis."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one node is, or is not, a site that is replaced. ``verdicts`` are (mechanism, verdict) in registry order."""

    node: str
    site: AttentionSite | None = None
    near_miss: NearMiss | None = None
    verdicts: tuple[tuple[str, Verdict], ...] = ()
    decision: Decision | None = None

    def to_json(self) -> dict[str, Any]:
        from attncompile.core.plan_toml import decision_json

        return {
            "node": self.node, "site": self.site.to_json() if self.site else None,
            "near_miss": self.near_miss.to_json() if self.near_miss else None,
            "verdicts": [
                {"mechanism": name, "ok": v.ok, "code": v.code, "reason": v.reason, "hint": v.hint}
                for name, v in self.verdicts
            ],
            "decision": decision_json(self.decision) if self.decision else None,
        }  # fmt: skip

    @property
    def lines(self) -> tuple[str, ...]:
        """The explanation for people."""
        if self.near_miss is not None:
            return tuple(_of_near_miss(self.node, self.near_miss))
        if self.site is None:
            return (f"{self.node} is in no attention site and no near miss: nothing in it looks like attention",)
        named = self.site.id if self.node == self.site.id else f"{self.node} belongs to site {self.site.id}"
        return tuple(_of_site(named, self.site, self.verdicts, self.decision))


@dataclass(frozen=True, slots=True)
class Explanations:
    """All candidates of a model: every site, then every near miss."""

    model: str
    candidates: tuple[Explanation, ...]

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "candidates": [c.to_json() for c in self.candidates]}

    @property
    def lines(self) -> tuple[str, ...]:
        """The explanations for people, a blank line after each, and a closing line."""
        sites = sum(c.site is not None for c in self.candidates)
        misses = len(self.candidates) - sites
        out = [line for c in self.candidates for line in (*c.lines, "")]
        sites_text = f"{sites} attention site{'s' * (sites != 1)}"
        return (*out, f"{sites_text}, {misses} near miss{'es' * (misses != 1)}")


def _of_near_miss(node: str, miss: NearMiss) -> Iterator[str]:
    yield f"{node} is not taken as attention"
    yield f"  first check that failed: {f'{miss.code}: ' if miss.code else ''}{miss.reason}"
    yield f"  nearest form: {miss.nearest_form}"


def _of_site(
    named: str, site: AttentionSite, verdicts: tuple[tuple[str, Verdict], ...], decision: Decision | None
) -> Iterator[str]:
    yield (
        f"{named}: {site.kind} attention, {tokens_text(site)} tokens, {site.heads} heads of {site.head_dim}, "
        f"mask {mask_text(site)}"
    )
    yield f"  form: {site.form}"
    operands = (("query", site.query), ("key", site.key), ("value", site.value), ("output", site.output))
    yield "  " + ", ".join(f"{name} '{o.value}' {o.layout}" for name, o in operands)
    values = f", values of {site.value_dim}" if site.value_dim != site.head_dim else ""
    softmax = "" if site.softmax_dtype == site.dtype or site.kind == "linear" else f", softmax in {site.softmax_dtype}"
    yield (
        f"  batch {_dim(site.batch)}, {_dim(site.query_length)} queries, {_dim(site.key_length)} keys, {site.heads} "
        f"heads on {site.kv_heads} key heads{values}; {site.dtype}{softmax}; scale {site.scale:.6g}"
    )
    for name, text in _beyond(site):
        yield f"  {name}: {text}"
    yield from _of_mask(site.mask)
    for name, verdict in verdicts:
        yield f"  {name}: {'can' if verdict.ok else 'cannot'}{_tail(verdict.reason)}"
        if verdict.hint:
            yield f"    hint: {verdict.hint}"
    if decision is not None:
        yield f"  decision: {decision.mechanism}{_tail(decision.reason)}"
        for assumption in decision.assumptions:
            yield f"    assumes: {assumption.text}"


def _beyond(site: AttentionSite) -> Iterator[tuple[str, str]]:
    """What the site has beyond softmax(scale * Q K^T + mask) V in the main graph."""
    if site.softcap:
        yield "softcap", f"{site.softcap:g}"
    if site.grid is not None:
        around = f", {site.grid.prefix} tokens before and {site.grid.suffix} after it"
        yield "grid", "x".join(map(str, site.grid.shape)) + around + _tail(site.grid.evidence)
    for name, value in (("sinks", site.sinks), ("head scale", site.head_scale), ("log-sum-exp", site.log_sum_exp)):
        if value:
            yield name, f"'{value}'"
    if site.cache is not None:
        yield "cache", _pairs(asdict(site.cache))
    if site.linear is not None:
        yield "linear", _pairs(site.linear.to_json())
    if site.quantised:
        yield "quantised", site.quantised
    if site.scope:
        yield "inside", site.scope
    if site.needs:
        yield "needs", f"a mechanism that handles {', '.join(NEED_WORDS[need] for need in sorted(site.needs))}"


def _of_mask(mask: MaskFacts) -> Iterator[str]:
    for part in mask.parts:
        certificate = part.certificate
        how = "no structure was shown" if part.kind == "opaque" else f"shown by {_METHODS[certificate.method]}"
        yield f"  mask: {_part(part)}, {how}: {certificate.detail}{_lengths(part)}"
    if mask.ends is not None:
        yield f"  mask: each batch entry's own number of keys: {_pairs(asdict(mask.ends))}"
    if mask.parts:
        yield f"  rows without a visible key: {mask.masked_rows}" + (", by a NaN guard" if mask.guarded else "")


def _part(part: MaskPart) -> str:
    how = {True: "added", False: "a bool"}[part.additive] if part.source else ""
    values = {k: v for k, v in part.parameters().items() if k != "grid"}
    words = [_pairs(values), how] if part.source is None or part.pattern else [f"from '{part.source}'", how]
    told = ", ".join(w for w in words if w)
    return part.kind + (f" ({told})" if told else "")


def _lengths(part: MaskPart) -> str:
    known = part.certificate.lengths
    if not known:
        return ""
    shown = ", ".join(str(q) if q == k else f"{q}x{k}" for q, k in known[:_LENGTHS])
    more = f" and {len(known) - _LENGTHS} more" if len(known) > _LENGTHS else ""
    if part.kind == "opaque":
        return f" (looked at {shown}{more})"
    return f" ({shown}{more}; {'holds for others' if part.certificate.general else 'for these alone'})"


def _pairs(values: Mapping[str, Any]) -> str:
    """``name value`` of everything that says something: flags that are set by their name alone, sizes as ``3x3``."""
    words = []
    for key, value in values.items():
        name = key.replace("_", " ")
        if value is True or (isinstance(value, (list, tuple)) and value and all(v is True for v in value)):
            words.append(name)
        elif key in _SIZES and isinstance(value, (list, tuple)):
            words.append(f"{name} {'x'.join(map(_short, value))}")
        elif not _says_nothing(value):
            words.append(f"{name} {_short(value)}")
    return ", ".join(words)


def _says_nothing(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(v is False for v in value)
    return value is False or value in ("", None, {})


def _dim(dim: Dim) -> str:
    return f"'{dim}'" if isinstance(dim, str) else str(dim)


def _short(value: Any) -> str:
    if isinstance(value, float) and isfinite(value):
        return f"{value:g}"
    if isinstance(value, (list, tuple)) and len(value) > _LENGTHS:
        return f"[{', '.join(map(_short, value[:_LENGTHS]))}, ...] ({len(value)})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_short, value))}]"
    return "no end" if value is None else str(value)


def _tail(text: str) -> str:
    return f": {text}" if text else ""
