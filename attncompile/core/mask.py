"""What a mask provably is, and how that was shown.

Convention: query i sees key j iff ``-left <= j - i - offset <= right`` for a window, with -1 meaning unlimited and
``offset = key_length - query_length`` (windows are aligned at the sequence end).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from attncompile.core.head_pattern import HeadMasks, KeyCounts
from attncompile.core.pattern import Pattern

MaskKind = Literal[
    "none", "causal", "window", "neighborhood", "blocked", "block_sparse", "padding", "prefix", "dilated",
    "document", "global", "stripe", "radial", "bias", "opaque",
]  # fmt: skip
MaskedRows = Literal["zero", "uniform", "nan"]

_ORDER: tuple[MaskKind, ...] = (
    "opaque", "block_sparse", "neighborhood", "radial", "stripe", "global", "document", "blocked", "dilated", "prefix",
    "window", "causal", "padding", "bias",
)  # fmt: skip
"""Of several factors the first of these names the mask."""


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
    ``opaque`` factor; of other kinds it is set where one value holds that factor alone. ``additive`` says whether
    ``source`` is added to the scores (else it is a bool, True = visible, or False where the graph negates it).
    ``pattern`` is the exact structure of every other kind.

    A bias that came merged with a mask in one tensor keeps that tensor as its source: at keys that the mask hides it
    holds a number that hides them once more, at the others the bias. A bias whose certificate's method is ``structure``
    is not added to scores of [batch, heads, query, key]; with a ``pattern`` it is one finite number outside of it,
    which is ``number`` where that is not 0. ``places``: the last two axes of ``source``, [.., heads, W, W], are not
    queries and keys but their places in a window of W tokens of the ``blocked`` part (row-major over the window's axes,
    place 0 where the pattern's windows begin).
    A bias with ``counts`` is no value of the graph: some keys count several times in one softmax, which is the
    logarithm of their number added to a key that counts once. A ``HeadMasks`` pattern differs between heads. Padding
    with ``tokens`` has an input of bools or whole numbers (1 = visible, 0 = hidden) of [batch, keys] as its source.

    ``as_input``: ``source`` says this factor alone and can go into an op as it is: it broadcasts to [batch, heads,
    query, key], and is added to the scores, or a bool that is True where a key is seen.
    """

    kind: MaskKind
    certificate: Certificate
    left: int = -1
    right: int = -1
    source: str | None = None
    additive: bool = False
    pattern: Pattern | None = None
    places: bool = False
    number: float = 0.0
    counts: KeyCounts | None = None
    tokens: bool = False
    as_input: bool = False

    def parameters(self) -> dict[str, Any]:
        """The parameters that the CLI's JSON shows for this kind."""
        if self.kind == "window":
            return {"left": self.left, "right": self.right}
        if self.pattern is not None:
            return {**self.pattern.parameters(), **({"number": self.number} if self.number else {})}
        if self.counts is not None:
            return self.counts.parameters()
        if self.source is not None:
            return {"source": self.source, **({"places": True} if self.places else {})}
        return {}


@dataclass(frozen=True, slots=True)
class KeyEnds:
    """Every batch entry has its own number of keys: ``source`` (int [batch]) plus ``plus``; later keys are hidden.

    ``offset`` is where query 0 stands among the keys, for causal and window parts: ``sequence``: where it stands
    without ends; ``ends``: at ends - query_length (below 0, its first queries see nothing); ``ends-or-start``: there,
    but never below 0 (an entry with fewer keys than queries has its padded queries last, and what they give is not
    said).
    """

    source: str
    plus: int
    offset: Literal["sequence", "ends", "ends-or-start"]


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """All factors of a site's mask. No factor at all is an unmasked site.

    ``masked_rows`` is what the source gives for a query that sees no key: ``zero`` (a NaN guard, or an operator that
    says so), ``uniform`` (masked scores are finite, so softmax averages over all keys) or ``nan``. ``fills`` are the
    values that hidden scores get or have added, one for every place where the graph applies a mask; ``guarded`` says
    that a NaN guard follows the softmax. ``ends``: each batch entry's own number of keys, where an operator takes it.
    ``zeroed``: queries whose own token the padding (one of ``tokens``) hides give zero, whatever they see.
    """

    parts: tuple[MaskPart, ...] = ()
    masked_rows: MaskedRows = "nan"
    fills: tuple[float, ...] = ()
    guarded: bool = False
    ends: KeyEnds | None = None
    zeroed: bool = False

    def part(self, *kinds: MaskKind) -> MaskPart | None:
        """The first factor of one of these kinds, or None."""
        return next((p for p in self.parts if p.kind in kinds), None)

    @property
    def by_head(self) -> bool:
        """Whether heads see different keys."""
        return any(isinstance(p.pattern, HeadMasks) for p in self.parts)

    @property
    def counts(self) -> KeyCounts | None:
        """How often keys count, where some count more than once."""
        return next((p.counts for p in self.parts if p.counts is not None), None)

    @property
    def kind(self) -> MaskKind:
        """The structural kind: the factor that says most about which keys are seen."""
        for kind in _ORDER:
            for p in self.parts:
                if p.kind == kind:
                    return p.kind
        if not self.parts:
            return "padding" if self.ends else "none"
        return self.parts[0].kind

    def to_json(self) -> dict[str, Any]:
        ends = {"ends": asdict(self.ends)} if self.ends else {}
        if not self.parts:
            return {"kind": self.kind, **ends}
        main = self.part(self.kind)
        assert main is not None
        out: dict[str, Any] = {"kind": self.kind, **main.parameters(), "masked_rows": self.masked_rows, **ends}
        if self.zeroed:
            out["zeroed"] = True
        out["certificate"] = _certificate_json(main.certificate)
        if len(self.parts) > 1:
            out["parts"] = [
                {"kind": p.kind, **p.parameters(), "certificate": _certificate_json(p.certificate)} for p in self.parts
            ]
        return out


def in_windows(mask: MaskFacts) -> MaskPart | None:
    """The bias by places in windows, or None without one."""
    return next((p for p in mask.parts if p.kind == "bias" and p.places), None)


def seam(mask: MaskFacts) -> MaskPart | None:
    """The one finite number that is added where windows wrap around the end of a grid, or None without one."""
    return next((p for p in mask.parts if p.kind == "bias" and p.number), None)


def plain_biases(mask: MaskFacts) -> tuple[MaskPart, ...]:
    """The biases that are values of the graph, by queries and keys."""
    return tuple(p for p in mask.parts if p.kind == "bias" and not (p.places or p.number or p.counts))


def _certificate_json(c: Certificate) -> dict[str, Any]:
    return {"method": c.method, "detail": c.detail, "lengths": [list(x) for x in c.lengths], "general": c.general}
