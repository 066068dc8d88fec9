"""What a mask provably is, and how that was shown.

Convention: query i sees key j iff ``-left <= j - i - offset <= right`` for a window, with -1 meaning unlimited and
``offset = key_length - query_length`` (windows are aligned at the sequence end).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from attncompile.core.pattern import Pattern

MaskKind = Literal[
    "none", "causal", "window", "neighborhood", "blocked", "block_sparse", "padding", "prefix", "dilated",
    "document", "global", "stripe", "radial", "bias", "opaque",
]  # fmt: skip
MaskedRows = Literal["zero", "uniform", "nan"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """How a mask fact was shown.

    ``method``: ``constant`` (every element of a stored mask compared), ``evaluated`` (a mask computed from shapes,
    run at every entry of ``lengths``), ``structure`` (follows from the graph's form, any shape), ``attribute`` (the
    operator says so). ``lengths`` holds (query_length, key_length) pairs. ``general`` says whether the fact holds
    for lengths other than those: a stored mask never generalises.
    """

    method: Literal["constant", "evaluated", "structure", "attribute"]
    detail: str
    lengths: tuple[tuple[int, int], ...] = ()
    general: bool = False


@dataclass(frozen=True, slots=True)
class MaskPart:
    """One factor of the mask; a key is visible where all factors allow it.

    ``left``/``right`` are set for ``window`` (and ``causal``: -1, 0). ``source`` names the graph value that holds
    a ``padding`` (bool, or additive float, broadcastable to [batch, heads, query, key] with query = 1), ``bias`` or
    ``opaque`` factor. ``additive`` says whether ``source`` is added to the scores (else it is a bool, True = visible).
    ``pattern`` is the exact structure of every other kind.
    """

    kind: MaskKind
    certificate: Certificate
    left: int = -1
    right: int = -1
    source: str | None = None
    additive: bool = False
    pattern: Pattern | None = None

    def parameters(self) -> dict[str, Any]:
        """The parameters that the CLI's JSON shows for this kind."""
        if self.kind == "window":
            return {"left": self.left, "right": self.right}
        if self.pattern is not None:
            return self.pattern.parameters()
        if self.source is not None:
            return {"source": self.source}
        return {}


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """All factors of a site's mask. No factor at all is an unmasked site.

    ``masked_rows`` is what the source gives for a query that sees no key: ``zero`` (a NaN guard, or an operator that
    says so), ``uniform`` (masked scores are finite, so softmax averages over all keys) or ``nan``. ``fills`` are the
    values that hidden scores get or have added, one for every place where the graph applies a mask; ``guarded`` says
    that a NaN guard follows the softmax.
    """

    parts: tuple[MaskPart, ...] = ()
    masked_rows: MaskedRows = "nan"
    fills: tuple[float, ...] = ()
    guarded: bool = False

    def part(self, *kinds: MaskKind) -> MaskPart | None:
        """The first factor of one of these kinds, or None."""
        return next((p for p in self.parts if p.kind in kinds), None)

    @property
    def kind(self) -> MaskKind:
        """The structural kind: the factor that says most about which keys are seen."""
        for kind in ("opaque", "window", "causal", "padding", "bias"):
            for p in self.parts:
                if p.kind == kind:
                    return p.kind
        return self.parts[0].kind if self.parts else "none"

    def to_json(self) -> dict[str, Any]:
        if not self.parts:
            return {"kind": "none"}
        main = self.part(self.kind)
        assert main is not None
        out: dict[str, Any] = {"kind": self.kind, **main.parameters(), "masked_rows": self.masked_rows}
        out["certificate"] = _certificate_json(main.certificate)
        if len(self.parts) > 1:
            out["parts"] = [
                {"kind": p.kind, **p.parameters(), "certificate": _certificate_json(p.certificate)} for p in self.parts
            ]
        return out


def _certificate_json(c: Certificate) -> dict[str, Any]:
    return {"method": c.method, "detail": c.detail, "lengths": [list(x) for x in c.lengths], "general": c.general}
