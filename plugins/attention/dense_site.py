"""A site in the terms of the op ``Attention``: its attributes and optional inputs, or why it cannot be said so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isinf

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskFacts, MaskPart, in_windows, seam
from attncompile.core.site import AttentionSite
from attncompile.plugins.attention.dense import never_past
from attncompile.plugins.attention.op import OPTIONAL
from attncompile.plugins.body import float_type
from attncompile.plugins.neighborhood.facts import check_masked_rows

ALIKE = "zero"
"""``masked_rows`` of sites in which every query sees a key: it says nothing there."""


@dataclass(frozen=True, slots=True)
class Reading:
    """``values``: the graph value of each optional input that the op gets, in the op's order; ``plus``: what is added
    to the value of ``key_lengths``. ``bounds``: the factors of the mask that ``left`` and ``right`` say.
    """

    left: int
    right: int
    masked_rows: str
    values: Mapping[str, str]
    plus: int
    bounds: tuple[MaskPart, ...]


def read(site: AttentionSite) -> Reading:
    """What the op has to say for ``site``.

    Raises:
        Unsupported: the op cannot express the site.
    """
    _check(site)
    mask = site.mask
    if in_windows(mask) is not None or seam(mask) is not None:
        raise Unsupported("bias", "the bias goes by places in windows, not by queries and keys")
    bounds = tuple(p for p in mask.parts if p.kind in ("causal", "window"))
    left = min((p.left for p in bounds if p.left >= 0), default=-1)
    right = min(
        (0 if p.kind == "causal" else p.right for p in bounds if p.kind == "causal" or p.right >= 0), default=-1
    )
    added: list[MaskPart] = []
    padding: list[MaskPart] = []
    masks: list[MaskPart] = []
    for part in mask.parts:
        if part in bounds:
            continue
        _check_part(part)
        (added if part.additive else padding if part.kind == "padding" else masks).append(part)
    for name, found in (("bias", added), ("mask", padding), ("mask", masks)):
        if len(found) > 1:
            words = {"bias": "values are added to the scores", "mask": "masks come from different values"}[name]
            raise Unsupported(name, f"{len(found)} {words}", "join them into one in the model")
    if mask.ends is not None and mask.ends.offset != "sequence" and bounds:
        raise Unsupported(
            "key-ends", "its windows are aligned at each batch entry's last key, the op's at the last of all"
        )
    sources = {
        "key_mask": padding[0].source if padding else "", "bias": added[0].source if added else "",
        "sinks": site.sinks, "mask": masks[0].source if masks else "",
        "key_lengths": mask.ends.source if mask.ends is not None else "",
    }  # fmt: skip
    values = {name: sources[name] or "" for name in OPTIONAL if sources[name]}
    plus = mask.ends.plus if mask.ends is not None else 0
    return Reading(left, right, _masked_rows(site, values, added, bool(bounds)), values, plus, bounds)


def _check(site: AttentionSite) -> None:
    if site.kind != "softmax":
        raise Unsupported("kind", f"a {site.kind} attention site")
    if site.heads % site.kv_heads:
        raise Unsupported("heads", f"{site.heads} query heads over {site.kv_heads} key heads")
    if site.softcap < 0:
        raise Unsupported("softcap", f"softcap {site.softcap}: the op has positive ones")
    float_type(site.dtype)


def _check_part(part: MaskPart) -> None:
    """Raise ``Unsupported`` for a factor whose value is not known to be what an input of the op is."""
    if part.kind == "bias":
        if part.source is None or not part.additive or part.certificate.method == "structure":
            raise Unsupported("bias", "the bias is not one that is added to scores of [batch, heads, query, key]")
    elif part.kind == "padding":
        if part.source is None or part.tokens or (part.additive and not part.as_input):
            raise Unsupported("mask", "padding that is not one bool or number for each key")
    elif part.source is None or not part.as_input:
        raise Unsupported("mask", f"a mask of kind {part.kind} has no value that could go into the op")


def _masked_rows(site: AttentionSite, values: Mapping[str, str], added: list[MaskPart], bounded: bool) -> str:
    """What a query without a key gives in the source. Raises ``Unsupported`` where that is not known."""
    nq, nk = (x if isinstance(x, int) else None for x in (site.query_length, site.key_length))
    hides = {"key_mask", "mask", "key_lengths"} & set(values)
    past = bounded and not never_past(nq, nk, site.query_length == site.key_length)
    free = [p for p in added if p.kind != "bias"]
    if not hides and not past and not free:
        return ALIKE
    if site.sinks:
        if site.mask.masked_rows != "zero" and (hides or free):
            raise Unsupported("sinks", "a query that sees no key has all its weight on the sink, which gives zero")
        return ALIKE
    if free:
        return _of_added(site, site.mask)
    check_masked_rows(site.mask)
    return site.mask.masked_rows


def _of_added(site: AttentionSite, mask: MaskFacts) -> str:
    """A mask that is added may hold any number. The op adds it as well: only rows of -inf alone are to be told, and
    rows that other masks fill with a finite number cannot be.
    """
    if not all(isinf(fill) for fill in mask.fills):
        raise Unsupported("masked-rows", "what fully masked rows give in the source depends on several masks",
                          "export with one mask")  # fmt: skip
    if mask.guarded or site.form == "attention-op":
        return "zero"
    if site.form.startswith(FUSED):
        raise Unsupported("masked-rows", f"what rows of -inf give in {site.form} is not known", "export without it")
    return "nan"


FUSED = "attention-op "
"""Beginning of the forms of operators whose softmax is not written out."""
