"""Plans as TOML: written for a person to edit, read back with errors that name the line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from math import isfinite
from typing import Any

import tomli_w

from attncompile.core.assumption import KINDS, Assumption
from attncompile.core.errors import BadArguments
from attncompile.core.plan import PLAN_SCHEMA_VERSION, Decision, Dense, Plan, Refusal

_HEADER = """\
# What attncompile will do to each attention site of one model.
#
# Edit it, then apply it:   attncompile MODEL --plan THIS_FILE
#
#   mechanism   "keep" leaves the site as it is; another mechanism's name replaces it.
#   parameters  the mechanism's settings. Delete a line to get its default.
#   exact       whether the replacement changes nothing but rounding; checked again when the plan is applied.
#   assumptions what the replacement relies on and how it was shown. For your information; made again when applied.
#   dense       the exact replacement of an approximated site in calls that options.keep_dense holds of.
#   considered  what else was looked at for the site, and why it was not taken. For your information only.
#
# A site that is not listed here is kept. `attncompile explain MODEL NODE` tells more about one site.
"""

_PLAN_KEYS: dict[str, tuple[type, ...]] = {
    "schema_version": (int,), "model_hash": (str,), "policy": (str,), "notes": (list,), "options": (dict,),
    "site": (list,),
}  # fmt: skip
_SITE_KEYS: dict[str, tuple[type, ...]] = {
    "id": (str,), "mechanism": (str,), "reason": (str,), "exact": (bool,), "predicted_gain": (int, float),
    "parameters": (dict,), "considered": (list,), "assumptions": (list,), "dense": (dict,),
}  # fmt: skip
_ASSUMPTION_KEYS: dict[str, tuple[type, ...]] = {
    "kind": (str,), "statement": (str,), "shown_by": (str,), "inputs": (list,), "checked": (bool,),
}  # fmt: skip
_DENSE_KEYS: dict[str, tuple[type, ...]] = {"mechanism": (str,), "parameters": (dict,)}
_REFUSAL_KEYS: dict[str, tuple[type, ...]] = {"mechanism": (str,), "code": (str,), "reason": (str,)}

_NUMBERS = re.compile(r"= \[\n((?: +[-+.\w]+,\n)+) *\]")
"""An array of numbers or booleans that tomli_w spread over lines, one element each."""

_TYPE_NAMES: dict[type, str] = {
    int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "an array", dict: "a table",
}  # fmt: skip


def dumps(plan: Plan) -> str:
    """``plan`` as TOML text. Options and parameters whose value is None mean "default" and are not written.

    Raises:
        TypeError: a value that TOML cannot hold.
    """
    head: dict[str, Any] = {
        "schema_version": plan.schema_version, "model_hash": plan.model_hash, "policy": plan.policy,
    }  # fmt: skip
    if plan.notes:
        head["notes"] = list(plan.notes)
    if plan.options:
        head["options"] = _without_none(plan.options)
    head["site"] = [_site(d) for d in plan.decisions]
    # Strings hold no raw line breaks in tomli_w's output, so this joins nothing but arrays of numbers.
    body = _NUMBERS.sub(lambda m: "= [" + ", ".join(m[1].replace(",", "").split()) + "]", tomli_w.dumps(head))
    return _HEADER + "\n" + body


def loads(text: str, source: str = "plan.toml") -> Plan:
    """The plan in ``text``; errors name the file ``source``. The model's hash is for the caller to check.

    Raises:
        BadArguments: not TOML, another schema version, an unknown, missing or repeated key, or a value of a wrong type.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadArguments(
            f"{source} is not valid TOML: {error}", "correct that line, or write the plan again with `attncompile plan`"
        ) from None
    reader = _Reader(text, source)
    version = data.get("schema_version")
    if version != PLAN_SCHEMA_VERSION:
        found = "has no schema_version" if version is None else f"has schema_version {version!r}"
        raise BadArguments(
            f"{reader.where('schema_version')} {found}; this attncompile reads version {PLAN_SCHEMA_VERSION}",
            "write the plan again with `attncompile plan`",
        )
    reader.check(data, _PLAN_KEYS, required=("model_hash", "policy"))
    if not all(isinstance(note, str) for note in data.get("notes", [])):
        raise BadArguments(
            f"{reader.where('notes')} 'notes' must be an array of strings", "put quotes around each note"
        )
    decisions: list[Decision] = []
    for index, table in enumerate(data.get("site", [])):
        decision = _decision(table, reader.at_site(index))
        if any(d.site == decision.site for d in decisions):
            raise BadArguments(
                f"{reader.at_site(index).where('id')} site '{decision.site}' is listed twice", "keep one of the two"
            )
        decisions.append(decision)
    return Plan(
        model_hash=data["model_hash"],
        policy=data["policy"],
        decisions=tuple(decisions),
        options=data.get("options", {}),
        notes=tuple(data.get("notes", [])),
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON object with the keys of the TOML file, every key written."""
    return {
        "schema_version": plan.schema_version, "model_hash": plan.model_hash, "policy": plan.policy,
        "notes": list(plan.notes), "options": plan.options, "sites": [decision_json(d) for d in plan.decisions],
    }  # fmt: skip


def decision_json(decision: Decision) -> dict[str, Any]:
    """One decision as a JSON object."""
    return {
        "id": decision.site, "mechanism": decision.mechanism, "reason": decision.reason, "exact": decision.exact,
        "predicted_gain": decision.predicted_gain, "parameters": dict(decision.parameters),
        "considered": [{"mechanism": r.mechanism, "code": r.code, "reason": r.reason} for r in decision.refusals],
        "assumptions": [a.to_json() for a in decision.assumptions], "dense": _dense_json(decision.dense),
    }  # fmt: skip


def _dense_json(dense: Dense | None) -> dict[str, Any] | None:
    return {"mechanism": dense.mechanism, "parameters": dict(dense.parameters)} if dense is not None else None


def _site(decision: Decision) -> dict[str, Any]:
    table = decision_json(decision)
    table["parameters"] = _without_none(decision.parameters)
    if decision.dense is not None:
        table["dense"] = _without_none(table["dense"])
    return {key: value for key, value in table.items() if value not in ({}, [], None)}


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _decision(table: Any, reader: _Reader) -> Decision:
    if not isinstance(table, dict):
        raise BadArguments(f"{reader.where('site')} 'site' must be a list of tables", "begin each site with [[site]]")
    reader.check(table, _SITE_KEYS, required=("id", "mechanism"))
    gain = float(table.get("predicted_gain", 1.0))
    if not isfinite(gain) or gain <= 0:
        raise BadArguments(
            f"{reader.where('predicted_gain')} 'predicted_gain' must be a positive number, not {gain}",
            "delete the line: the gain is predicted anew",
        )
    refusals = []
    for entry in table.get("considered", []):
        if not isinstance(entry, dict):
            raise BadArguments(f"{reader.where('considered')} 'considered' must be a list of tables", "delete it")
        reader.check(entry, _REFUSAL_KEYS, required=tuple(_REFUSAL_KEYS))
        refusals.append(Refusal(entry["mechanism"], entry["code"], entry["reason"]))
    return Decision(
        site=table["id"],
        mechanism=table["mechanism"],
        reason=table.get("reason", "set in the plan file"),
        exact=table.get("exact", True),
        parameters=table.get("parameters", {}),
        predicted_gain=gain,
        refusals=tuple(refusals),
        assumptions=tuple(_assumption(entry, reader) for entry in table.get("assumptions", [])),
        dense=_dense(table["dense"], reader) if "dense" in table else None,
    )


def _dense(table: Mapping[str, Any], reader: _Reader) -> Dense:
    reader.check(table, _DENSE_KEYS, required=("mechanism",))
    return Dense(table["mechanism"], table.get("parameters", {}))


def _assumption(entry: Any, reader: _Reader) -> Assumption:
    if not isinstance(entry, dict):
        raise BadArguments(f"{reader.where('assumptions')} 'assumptions' must be a list of tables", "delete it")
    reader.check(entry, _ASSUMPTION_KEYS, required=("kind", "statement", "shown_by"))
    inputs = entry.get("inputs", [])
    if entry["kind"] not in KINDS or not all(isinstance(name, str) for name in inputs):
        raise BadArguments(
            f"{reader.where('assumptions')} an assumption has an unknown kind, or inputs that are no names", "delete it"
        )
    return Assumption(entry["kind"], entry["statement"], entry["shown_by"], tuple(inputs), entry.get("checked", False))


class _Reader:
    """Checks tables and finds the line of a key, which ``tomllib`` does not tell. ``site`` is an index or None."""

    def __init__(self, text: str, source: str, site: int | None = None) -> None:
        self._lines = text.splitlines()
        self._text = text
        self._source = source
        self._site = site

    def at_site(self, index: int) -> _Reader:
        """The reader for the ``index``-th [[site]] table."""
        return _Reader(self._text, self._source, index)

    def where(self, key: str) -> str:
        """``plan.toml line 12:``, without the number where the line cannot be told."""
        line = self._line(key)
        return f"{self._source} line {line}:" if line else f"{self._source}:"

    def check(self, table: Mapping[str, Any], keys: Mapping[str, tuple[type, ...]], required: tuple[str, ...]) -> None:
        """Raise BadArguments for an unknown key, a missing required one, or a value of another type."""
        for key, value in table.items():
            if key not in keys:
                close = difflib.get_close_matches(key, keys, 1)
                hint = f"did you mean '{close[0]}'?" if close else f"keys here: {', '.join(keys)}"
                raise BadArguments(f"{self.where(key)} unknown key '{key}'", hint)
            # bool is an int to Python, not to TOML.
            if not isinstance(value, keys[key]) or (isinstance(value, bool) and bool not in keys[key]):
                want = " or ".join(_TYPE_NAMES[t] for t in keys[key])
                raise BadArguments(f"{self.where(key)} '{key}' must be {want}, not {value!r}", "correct that line")
        for key in required:
            if key not in table:
                raise BadArguments(
                    f"{self.where('')} '{key}' is missing", "write the plan again with `attncompile plan`"
                )

    def _line(self, key: str) -> int | None:
        first, last = self._section()
        name = re.escape(key)
        # The key at the start of its line or in a table's header; else inside an inline table.
        for start in (r"\s*(?:\[+\s*)?(?:site\.)?", r".*[{,]\s*"):
            pattern = re.compile(rf"{start}[\"']?{name}[\"']?\s*[=.\]]")
            for number in range(first, last) if key else ():
                if pattern.match(self._lines[number]):
                    return number + 1
        return first + 1 if self._site is not None and first < last else None

    def _section(self) -> tuple[int, int]:
        starts = [i for i, line in enumerate(self._lines) if re.match(r"\s*\[\[\s*site\s*\]\]", line)]
        if self._site is None:
            return 0, len(self._lines)
        if self._site >= len(starts):  # the sites are written as an inline array
            return 0, 0
        ends = [*starts[1:], len(self._lines)]
        return starts[self._site], ends[self._site]
