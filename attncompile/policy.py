"""Reads policies and applies them: sites and mechanisms in, decisions with reasons out."""

from __future__ import annotations

import importlib.resources
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from attncompile.core.errors import BadArguments, Unsupported
from attncompile.core.mechanism import Candidate, Mechanism, exact_candidates
from attncompile.core.plan import Decision, Refusal
from attncompile.core.policy import DEFAULT_METRIC, METRICS, Policy, check_budget
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict

_KEYS: Mapping[str, Mapping[str, Any]] = {
    "": {"description": str},
    "exact": {"mechanisms": list, "min_gain": float},
    "approximate": {
        "mechanisms": list,
        "max_error": float,
        "metric": str,
        "keep_first": int,
        "keep_last": int,
        "keep_dense": str,
        "confidence": float,
    },
}


_TYPES = {str: "a text", list: "a list", float: "a number", int: "a whole number"}
_EXAMPLE = 'docs/sparse.md shows a policy file under "A policy\'s fields"'


def names() -> list[str]:
    """The policies that come with the package."""
    folder = importlib.resources.files("attncompile") / "policies"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def load_policy(name: str, mechanisms: Sequence[Mechanism]) -> Policy:
    """The policy called ``name``, or the one in the TOML file at that path.

    Raises:
        BadArguments: no such policy or file, bad TOML, an unknown key, type or mechanism.
    """
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise BadArguments(f"policy file {name} does not exist", f"built-in policies: {', '.join(names())}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BadArguments(f"policy {name} is not a text file", _EXAMPLE) from None
        title = path.stem
    else:
        if name not in names():
            raise BadArguments(f"unknown policy '{name}'", f"use one of {', '.join(names())}, or a .toml file")
        text = (importlib.resources.files("attncompile") / "policies" / f"{name}.toml").read_text(encoding="utf-8")
        title = name
    try:
        return _parse(title, tomllib.loads(text), {m.name for m in mechanisms})
    except tomllib.TOMLDecodeError as error:
        raise BadArguments(f"policy {name} is not TOML: {error}", _EXAMPLE) from None


def _parse(name: str, data: Mapping[str, Any], known: set[str]) -> Policy:
    values: dict[str, Any] = {}
    tables: dict[str, Mapping[str, Any]] = {"": data, **{k: v for k, v in data.items() if isinstance(v, dict)}}
    for table, keys in tables.items():
        if table not in _KEYS:
            raise BadArguments(f"policy {name} has an unknown table [{table}]", "tables are [exact] and [approximate]")
        for key, value in keys.items():
            if isinstance(value, dict):
                continue
            expected = _KEYS[table].get(key)
            if expected is None:
                where = f"in [{table}]" if table else "above the tables"
                raise BadArguments(
                    f"policy {name}: unknown key '{key}' {where}",
                    f"write a table [{key}]" if key in _KEYS else f"keys there: {', '.join(_KEYS[table])}",
                )
            allowed: Any = (int, float) if expected is float else expected
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise BadArguments(f"policy {name}: '{key}' must be {_TYPES[expected]}, not {value!r}", _EXAMPLE)
            if key == "mechanisms":
                unknown = [m for m in value if not isinstance(m, str) or m not in known]
                if unknown:
                    raise BadArguments(
                        f"policy {name}: no mechanism '{unknown[0]}'", f"there are {', '.join(sorted(known))}"
                    )
                values[table] = tuple(value)
            elif key in {f.name for f in fields(Policy)}:
                values[key] = value
    made = Policy(name=name, **values)
    _check(made, "max_error" in values)
    return made


def _check(policy: Policy, has_budget: bool) -> None:
    """Numbers that mean nothing would otherwise be found out after hours of search, or never."""
    said = f"policy {policy.name}:"
    if policy.metric not in METRICS:
        raise BadArguments(f"{said} no metric '{policy.metric}'", f"there are {', '.join(METRICS)}")
    if policy.metric != DEFAULT_METRIC and not has_budget:
        raise BadArguments(f"{said} metric {policy.metric} has no default budget", "write its max_error")
    check_budget(policy.max_error, policy.metric, f"{said} max_error")
    if not 0 < policy.confidence < 1:
        raise BadArguments(f"{said} confidence {policy.confidence} is none", "write a number between 0 and 1")
    if not 0 <= policy.min_gain < math.inf:
        raise BadArguments(f"{said} min_gain {policy.min_gain} is no gain", "write a number such as 1.15")
    for key, count in (("keep_first", policy.keep_first), ("keep_last", policy.keep_last)):
        if count < 0:
            raise BadArguments(f"{said} {key} {count} is negative", "write how many sites stay dense, 0 or more")


def candidates(
    policy: Policy, site: AttentionSite, mechanisms: Sequence[Mechanism], opset: int
) -> tuple[list[Candidate], list[Refusal]]:
    """Exact ways to replace ``site`` that can be lowered, in the policy's order; and why others do not apply."""
    found: list[Candidate] = []
    refused: list[Refusal] = []
    by_name = {m.name: m for m in mechanisms}
    for name in policy.exact:
        mechanism = by_name[name]
        for answer in exact_candidates(mechanism, site):
            if isinstance(answer, Verdict):
                refused.append(Refusal(name, answer.code, answer.reason))
                continue
            exact = mechanism.is_exact_for(site, answer.parameters)
            try:
                mechanism.lower(site, answer.parameters, opset)
            except Unsupported as error:
                exact = Verdict.of(error)
            if exact.ok:
                found.append(answer)
            else:
                refused.append(Refusal(name, exact.code, exact.reason))
    return found, refused


def decide(
    policy: Policy, site: AttentionSite, mechanisms: Sequence[Mechanism], opset: int,
    gain_of: Callable[[Candidate], float | Verdict], least_gain: float = 0.0,
) -> Decision:  # fmt: skip
    """The exact candidate with the largest predicted gain (the policy's order breaks ties) if it is worth it: at least
    the policy's ``min_gain``, and ``least_gain``. A candidate whose gain is a verdict is refused with it.
    """
    found, refusals = candidates(policy, site, mechanisms, opset)
    gains = [(gain_of(c), c) for c in found]
    refusals += [Refusal(c.mechanism, g.code, g.reason) for g, c in gains if isinstance(g, Verdict)]
    ranked = sorted(((g, c) for g, c in gains if not isinstance(g, Verdict)), key=lambda x: -x[0])
    wanted = max(policy.min_gain, least_gain)
    best = ranked[0] if ranked and ranked[0][0] >= wanted else None
    for gain, candidate in ranked:
        if best is None or candidate is not best[1]:
            bound = f"below {wanted:g}" if best is None else f"that of {best[1].mechanism} {best[0]:.2f}"
            refusals.append(Refusal(candidate.mechanism, "gain", f"predicted gain {gain:.2f}, {bound}"))
    if best is None:
        reason = _why_kept(refusals)
        return Decision(site.id, "keep", reason, refusals=tuple(refusals))
    gain, chosen = best
    return Decision(site.id, chosen.mechanism, chosen.reason, True, chosen.parameters, gain, tuple(refusals))


def _why_kept(refusals: Sequence[Refusal]) -> str:
    """The first refusal of a mechanism that could take such sites at all, else what none of them handles."""
    if not refusals:
        return "no mechanism of this policy applies"
    able = [r for r in refusals if r.code != "needs"]
    return able[0].reason if able else f"no mechanism of this policy can take it: {refusals[0].reason}"
