"""Dimensions whose names are sums of others, as exporters write them: ``past + sequence``, ``2*n + 1``."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PART = r"(?:(?:\d+\s*\*\s*)?[A-Za-z_]\w*|\d+)"
_SUM = re.compile(rf"\s*{_PART}(?:\s*[+-]\s*{_PART})*\s*")
_TERM = re.compile(r"([+-]?)\s*(?:(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)|(\d+))")


def terms_of(symbol: str) -> tuple[dict[str, int], int] | None:
    """How often each name is in the sum ``symbol``, and the number beside; None for a name, or anything else."""
    if not _SUM.fullmatch(symbol):
        return None
    names: dict[str, int] = {}
    rest = 0
    for sign, times, name, number in _TERM.findall(symbol):
        one = -1 if sign == "-" else 1
        if name:
            names[name] = names.get(name, 0) + one * int(times or 1)
        else:
            rest += one * int(number)
    return (names, rest) if names and symbol.strip() not in names else None


def size_of(symbol: str, binding: Mapping[str, int]) -> int | None:
    """The size of a dynamic dimension: its own, or the sum that its name is; None where it is not bound."""
    if symbol in binding:
        return binding[symbol]
    terms = terms_of(symbol)
    if terms is None or not terms[0].keys() <= binding.keys():
        return None
    return terms[1] + sum(times * binding[name] for name, times in terms[0].items())
