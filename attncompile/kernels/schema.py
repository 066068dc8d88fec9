"""Checks JSON values against ``bundle.schema.json``: the part of JSON Schema that this file uses, so that reading a
bundle needs no further package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
_KEYWORDS = {
    "$schema", "$defs", "$ref", "title", "type", "enum", "pattern", "minimum", "items", "minItems", "maxItems",
    "required", "properties", "additionalProperties",
}  # fmt: skip


@cache
def schema() -> Mapping[str, Any]:
    """The schema of ``bundle.json``."""
    text = (files("attncompile.kernels") / "bundle.schema.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found


def problem(value: Any, rule: Mapping[str, Any] | None = None, where: str = "") -> str:
    """What is wrong with ``value``, beginning with where, or an empty text."""
    rule = schema() if rule is None else rule
    if "$ref" in rule:
        return problem(value, schema()["$defs"][rule["$ref"].rpartition("/")[2]], where)
    unknown = set(rule) - _KEYWORDS
    if unknown:
        raise ValueError(f"the schema uses {', '.join(sorted(unknown))}, which is not understood here")
    return _of_its_own(value, rule, where or "bundle") or _inside(value, rule, where)


def _of_its_own(value: Any, rule: Mapping[str, Any], where: str) -> str:
    kinds = rule.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_is(value, kind) for kind in kinds):
        return f"{where} is no {' or '.join(kinds)}"
    if "enum" in rule and value not in rule["enum"]:
        return f"{where} is {value!r}, not {' or '.join(map(repr, rule['enum']))}"
    if "pattern" in rule and not re.search(rule["pattern"], value):
        return f"{where} is {value!r}, which does not match {rule['pattern']}"
    if "minimum" in rule and value < rule["minimum"]:
        return f"{where} is {value}, below {rule['minimum']}"
    if isinstance(value, list) and not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)):
        return f"{where} has {len(value)} items"
    missing = [name for name in rule.get("required", ()) if name not in value]
    return f"{where} has no {missing[0]}" if missing else ""


def _is(value: Any, kind: str) -> bool:
    # True is an int in Python, and no number in JSON.
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _inside(value: Any, rule: Mapping[str, Any], where: str) -> str:
    if isinstance(value, list) and "items" in rule:
        parts = ((f"{where}[{i}]", item, rule["items"]) for i, item in enumerate(value))
    elif isinstance(value, dict):
        known, others = rule.get("properties", {}), rule.get("additionalProperties", True)
        extra = [name for name in value if name not in known]
        if extra and others is False:
            return f"{where or 'bundle'} has an unknown {extra[0]!r}"
        others = {} if isinstance(others, bool) else others
        dot = f"{where}." if where else ""
        parts = ((f"{dot}{name}", item, known.get(name, others)) for name, item in value.items())
    else:
        return ""
    return next((found for name, item, its in parts if (found := problem(item, its, name))), "")
