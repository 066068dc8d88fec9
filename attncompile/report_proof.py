"""How replacements were proved and what they assume, for tables and as lines; equal neighbours are told once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
from typing import TYPE_CHECKING, TypeVar

from attncompile.report import not_judged

if TYPE_CHECKING:
    from attncompile.report import SiteCase, SiteReport

T = TypeVar("T")

CASE_COLUMNS = ("site", "case", "at", "error", "the original's", "verdict")
ASSUMPTION_COLUMNS = ("site", "about", "assumed", "shown by", "inputs compared")


def case_rows(sites: Iterable[SiteReport]) -> Iterator[tuple[str, ...]]:
    """Cells under ``CASE_COLUMNS``: one row a case, with the shapes it was run at and the worst errors there."""
    for ids, checks in _together(sites, lambda s: s.exactness.checks if s.exactness else ()):
        for name in dict.fromkeys(c.case for c in checks):
            of_case = [c for c in checks if c.case == name]
            shapes = ", ".join(dict.fromkeys(c.shapes for c in of_case))
            yield ids, name, shapes, _worst(of_case, "error"), _worst(of_case, "original_error"), _verdict(of_case)


def assumption_rows(sites: Iterable[SiteReport]) -> Iterator[tuple[str, ...]]:
    """Cells under ``ASSUMPTION_COLUMNS``, of the sites that are replaced."""
    for ids, assumed in _together(sites, lambda s: s.decision.assumptions if s.replaced else ()):
        for a in assumed:
            yield ids, a.kind, a.statement, a.shown_by, ", ".join(a.inputs) if a.checked else ""


def proof_lines(sites: Iterable[SiteReport]) -> Iterator[str]:
    """For every group of equal sites one line that names the cases, and an empty one after the last."""
    found = False
    for ids, checks in _together(sites, lambda s: s.exactness.checks if s.exactness else ()):
        names = list(dict.fromkeys(c.case for c in checks))
        shapes = list(dict.fromkeys(c.shapes for c in checks))
        left = "".join(f"; not judged: {n} of {len(checks)} ({why})" for why, n in not_judged(checks).items())
        yield f"{ids} was checked at {', '.join(shapes)} on: {', '.join(names)}{left}"
        found = True
    if found:
        yield ""


def assumption_lines(sites: Iterable[SiteReport]) -> Iterator[str]:
    """The ledger of every group of equal sites that are replaced, and an empty line after the last."""
    found = False
    for ids, assumed in _together(sites, lambda s: s.decision.assumptions if s.replaced else ()):
        yield f"{ids} assumes:"
        yield from (f"  {a.text}" for a in assumed)
        found = True
    if found:
        yield ""


def _together(
    sites: Iterable[SiteReport], of: Callable[[SiteReport], Sequence[T]]
) -> Iterator[tuple[str, Sequence[T]]]:  # fmt: skip
    """What neighbouring sites have in common, with their ids; sites without anything are left out."""
    groups: list[tuple[list[str], Sequence[T]]] = []
    for s in sites:
        value = of(s)
        if groups and value and groups[-1][1] == value:
            groups[-1][0].append(s.site.id)
        elif value:
            groups.append(([s.site.id], value))
    for ids, value in groups:
        yield ids[0] if len(ids) == 1 else f"{ids[0]} .. {ids[-1]} ({len(ids)})", value


def _worst(checks: Sequence[SiteCase], name: str) -> str:
    numbers = [x for c in checks if (x := getattr(c, name)) is not None and isfinite(x)]
    return f"{max(numbers):.1e}" if numbers else ""


def _verdict(checks: Sequence[SiteCase]) -> str:
    failed = [c for c in checks if c.judged and not c.passed]
    if failed:
        return f"failed at {failed[0].shapes}: {failed[0].reason}"
    judged = [c for c in checks if c.judged]
    notes = list(dict.fromkeys(c.reason for c in judged if c.reason))
    words = ["equal" + (f": {'; '.join(notes)}" if notes else "")] if judged else []
    if judged and len(judged) < len(checks):
        words[0] = words[0].replace("equal", f"equal at {len(judged)} of {len(checks)} shapes", 1)
    several = len(checks) > 1
    for why, n in not_judged(checks).items():
        words.append("not judged" + (f" at {n} of {len(checks)} shapes" if several else "") + f": {why}")
    return "; ".join(words)
