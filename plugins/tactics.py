"""Tactics: from tables that were measured (``tactics.toml`` in a mechanism's folder), else by rule.

A row of a table holds for ``architectures``, head dims ``head_dim`` (first, last) and, where named, kinds of mask. The
first row that fits is the best tactic; a tactic within ``SMALL_SHARED`` bytes always follows.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from attncompile.core.kernel import OpCall, Tactic
from attncompile.plugins.kernel_arguments import padded

HOPPER = "hopper"
"""Prefix of the names of tactics whose kernel is the Gluon one."""

HOPPER_ROWS = 64
"""Queries of one of its consumers."""

HOPPER_SHARED = 227 * 1024
"""Bytes of shared memory that a block may have on sm_90."""


@cache
def table(package: str) -> Sequence[Mapping[str, Any]]:
    """The rows of ``tactics.toml`` of a mechanism's package."""
    text = (files(package) / "tactics.toml").read_text(encoding="utf-8")
    rows: list[Mapping[str, Any]] = tomllib.loads(text)["tactic"]
    return rows


def measured(package: str, call: OpCall, architecture: int, kind: str) -> list[Tactic]:
    """The tactics of the first row that fits; () where none was measured."""
    dim = max(call.head_dim, call.value_dim)
    for row in table(package):
        first, last = row["head_dim"]
        if architecture in row["architectures"] and first <= dim <= last and kind in row.get("kinds", (kind,)):
            return [_tactic(t) for t in row["use"]]
    return []


def _tactic(t: Mapping[str, Any]) -> Tactic:
    hopper = bool(t.get("hopper"))
    constants = {k: v for k, v in t.items() if k.isupper()}
    if hopper:
        # Two consumers; registers a thread of theirs and of the producer's; whether consumers take turns.
        constants = {"TAKE": 232, "GIVE": 40, "TURNS": True, "CONSUMERS": 2, **constants}
    name = "-".join([HOPPER if hopper else "triton", *(f"{k.lower()}{v}" for k, v in constants.items())])
    name += f"-w{t.get('warps', 4)}-s{t['stages']}"
    return Tactic(name, constants, t.get("warps", 4), t["stages"], t.get("registers"), t.get("ptxas", 12))


def by_rule(call: OpCall, architecture: int) -> Tactic:
    """Where nothing was measured: large tiles of queries, keys as shared memory allows, no register spills."""
    dim = max(call.head_dim, call.value_dim)
    if dim <= 64:
        return _tactic({"BM": 128, "BN": 64, "warps": 8, "stages": 3})
    if dim <= 128:
        return _tactic({"BM": 128, "BN": 32, "warps": 8, "stages": 2})
    return _tactic({"BM": 128 if architecture in (90, 100) else 64, "BN": 32, "warps": 8, "stages": 2})


def small(call: OpCall) -> Tactic:
    """At most ``SMALL_SHARED`` bytes on every architecture."""
    dim = max(call.head_dim, call.value_dim)
    if dim <= 64:
        return _tactic({"BM": 64, "BN": 32, "warps": 4, "stages": 2})
    if dim <= 128:
        return _tactic({"BM": 64, "BN": 32, "warps": 4, "stages": 1})
    return _tactic({"BM": 32, "BN": 16, "warps": 4, "stages": 1})


def hopper_shared(call: OpCall, tactic: Tactic) -> int:
    """Bytes of shared memory that queries (of two items), keys, values and barriers of a Gluon kernel take."""
    keys, values = 2 * padded(call.head_dim), 2 * padded(call.value_dim)
    of_queries = 2 * HOPPER_ROWS * int(tactic.constants["CONSUMERS"] or 0) * keys
    return of_queries + tactic.stages * int(tactic.constants["BN"] or 0) * (keys + values) + 1024


def tactics(package: str, call: OpCall, architecture: int, kind: str, hopper: Callable[[Tactic], bool]) -> list[Tactic]:
    """Best first; ``hopper`` says whether the Gluon kernel takes the call with a tactic."""
    found = [t for t in measured(package, call, architecture, kind) if not t.name.startswith(HOPPER) or hopper(t)]
    if not any(not t.name.startswith(HOPPER) for t in found):
        found.append(by_rule(call, architecture))
    return [*found, *([] if small(call) in found else [small(call)])]
