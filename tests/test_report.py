"""report.json fits its published schema, and the tables say what happened."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.pattern import GridWindow
from attncompile.core.plan import Decision
from attncompile.core.verdict import Verdict
from attncompile.report import Bisection, Parity, Report, dumps, mask_text, schema
from attncompile.report_explain import Explanation
from attncompile.report_text import closing_line, print_plan, print_sites, print_table, size_text

_spec = importlib.util.spec_from_file_location("report_samples", Path(__file__).with_name("report_samples.py"))
assert _spec is not None and _spec.loader is not None
samples: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(samples)

REPORTS = {
    "replaced": samples.report(),
    "nothing found": samples.report(sites=(), near_misses=(), outcome="unchanged", parity=None, timings=()),
    "kept": samples.report(sites=(samples.kept(),), outcome="unchanged", parity=None, timings=()),
    "rolled back": samples.report(
        sites=(samples.site_report(rolled_back="relative L2 0.2, budget 1e-05"),),
        outcome="rolled_back",
        failures=("--strict: layers.0 was rolled back",),
        exit_code=1,
    ),
    "approximate": samples.report(
        sites=(samples.approximate(),), parity=Parity(True, "relative_l2", 0.01, 0.004, "inputs")
    ),
    "bisected": samples.report(bisection=Bisection((("layers.2",), ("layers.3", "layers.5")), 12, 14)),
    "not finite": samples.report(parity=Parity(False, "relative_l2", 0.01, math.nan, "inputs", (), "NaN in logits")),
}


def test_schema_is_valid_and_named() -> None:
    value = schema()
    jsonschema.Draft202012Validator.check_schema(value)
    assert value["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("name", REPORTS)
def test_report_fits_its_schema(name: str) -> None:
    value = json.loads(dumps(REPORTS[name].to_json()))
    jsonschema.Draft202012Validator(schema()).validate(value)


@pytest.mark.parametrize("name", REPORTS)
def test_schema_knows_every_key(name: str) -> None:
    assert _unknown(REPORTS[name].to_json(), schema(), schema()["$defs"], "report") == []


def _unknown(value: Any, rule: dict[str, Any], definitions: dict[str, Any], path: str) -> list[str]:
    """Paths of keys that the schema does not list: added in the code and forgotten in the schema."""
    if "$ref" in rule:
        rule = definitions[rule["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in rule:
        rule = rule["anyOf"][0]
        return [] if value is None else _unknown(value, rule, definitions, path)
    out: list[str] = []
    if isinstance(value, dict) and "properties" in rule:
        for key, item in value.items():
            if key not in rule["properties"]:
                out.append(f"{path}.{key}")
            else:
                out += _unknown(item, rule["properties"][key], definitions, f"{path}.{key}")
    elif isinstance(value, dict) and isinstance(rule.get("additionalProperties"), dict):
        for key, item in value.items():
            out += _unknown(item, rule["additionalProperties"], definitions, f"{path}.{key}")
    elif isinstance(value, list) and "items" in rule:
        for item in value:
            out += _unknown(item, rule["items"], definitions, f"{path}[]")
    return out


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("outcome",), "won"),
        (("exit_code",), 3),
        (("model", "hash"), "md5:1"),
        (("sites", 0, "decision", "predicted_gain"), 0),
        (("sites", 0, "site", "mask", "kind"), "strange"),
        (("timings", 0, "interval"), [1]),
        (("parity", "evidence"), "noise"),
        (("targets", 0, "files", 0, "size_bytes"), "12 MB"),
    ],
)
def test_schema_refuses(path: tuple[str | int, ...], value: Any) -> None:
    whole = json.loads(dumps(samples.report().to_json()))
    place = whole
    for key in path[:-1]:
        place = place[key]
    assert path[-1] in place or isinstance(path[-1], int)
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(whole)


def test_schema_refuses_a_missing_key() -> None:
    whole = json.loads(dumps(samples.report().to_json()))
    del whole["sites"][0]["decision"]["reason"]
    with pytest.raises(jsonschema.ValidationError, match="'reason' is a required property"):
        jsonschema.Draft202012Validator(schema()).validate(whole)


def test_json_is_strict() -> None:
    assert json.loads(dumps(REPORTS["not finite"].to_json()))["parity"]["value"] is None
    with pytest.raises(ValueError):
        dumps({"x": math.nan})


def test_derived_facts() -> None:
    assert len(REPORTS["replaced"].replaced) == 2
    assert not REPORTS["replaced"].approximate
    assert REPORTS["approximate"].approximate
    rolled = samples.approximate().__class__(**{**_fields(samples.approximate()), "rolled_back": "too far"})
    assert not samples.report(sites=(rolled,)).approximate, "an undone approximation is not in the model"
    assert samples.site_report().measured_gain == pytest.approx(2.5)
    assert samples.kept().measured_gain is None


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _text(report: Report) -> str:
    out = io.StringIO()
    print_table(report, Console(file=out, width=170))
    return out.getvalue()


def test_table_has_a_row_for_equal_neighbours() -> None:
    text = _text(REPORTS["replaced"])
    assert "layers.0 .. layers.1 (2)" in text
    row = next(line for line in text.splitlines() if "layers.0" in line)
    for cell in (
        "seq",
        "12/4",
        "window -255..0 + padding",
        "NeighborhoodAttention",
        "3.50x",
        "2.50x",
        "2.0e-07",
    ):
        assert cell in row
    assert "512" in text and "2.33..2.63" in text, "the gain's interval is the inverse of the ratio's"
    assert "?..3.57" in text, "an unbounded interval is not printed as a number"
    assert "2 of 2" in text and "6.0 MB" in text


def test_kind_is_a_column_where_it_says_something() -> None:
    linear = dataclasses.replace(samples.kept("b"), site=dataclasses.replace(samples.site("b"), kind="linear"))
    for sites, shown in (((samples.kept("a"),), False), ((samples.kept("a"), linear), True)):
        header, *rows = _text(samples.report(sites=sites)).partition("\n\n")[0].splitlines()
        assert ("kind" in header.split()) is shown
        assert [("softmax" in row, "linear" in row) for row in rows[1:]] == [(shown, False), (False, True)][
            : len(sites)
        ]


def test_near_misses_are_counted_where_nothing_was_found() -> None:
    text = _text(samples.report(sites=(), outcome="unchanged", near_misses=(samples.NEAR_MISS,)))
    assert "no attention found, 1 near miss (see `attncompile inspect`)" in text


def test_different_sites_have_their_own_rows() -> None:
    text = _text(samples.report(sites=(samples.site_report("a"), samples.kept("b"), samples.site_report("c"))))
    table = text.partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith(("a ", "b ", "c "))]
    assert [row.split()[0] for row in rows] == ["a", "b", "c"]
    assert "keep" in rows[1]
    assert "\nb: no gain predicted\n" in text, "the reason has a line of its own"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("replaced", ("replaced 2 of 2 attention sites (exact)", "relative_l2 3e-07, within 1e-05", "2.50 times")),
        ("nothing found", ("unchanged: no attention found", "model.onnx is the input file")),
        ("kept", ("unchanged: nothing to win at 1 attention site",)),
        ("rolled back", ("rolled back", "is the input file")),
        ("approximate", ("(approximate)", "0.004, within 0.01 on your inputs")),
        ("not finite", ("OUTSIDE 0.01",)),
    ],
)
def test_closing_line(name: str, words: tuple[str, ...]) -> None:
    line = closing_line(REPORTS[name])
    for word in words:
        assert word in line
    assert _text(REPORTS[name]).rstrip().endswith(line), "the closing line comes last, on one line"


def test_markup_in_names_is_printed_as_it_is() -> None:
    text = _text(samples.report(sites=(samples.site_report("[red]x[/red]"),)))
    assert "[red]x[/red]" in text


def test_inspect_and_plan_tables() -> None:
    out = io.StringIO()
    console = Console(file=out, width=160)
    sites = (samples.site("a"), samples.site("b", MaskFacts(), 8, 8))
    print_sites(sites, (samples.NEAR_MISS,), console)
    print_plan(sites, (samples.site_report("a").decision, Decision("b", "keep", "dense")), console)
    text = out.getvalue()
    assert "2 attention sites, 1 near miss" in text
    assert "the product with V is missing" in text
    assert "1 of 2 attention sites would be replaced" in text


def test_explanations() -> None:
    site = samples.site("layers.0")
    found = Explanation(
        "layers.0/Softmax", site, None,
        (("NeighborhoodAttention", Verdict.yes("a window")), ("Attention", Verdict.no("x", "no mask", "drop it"))),
        Decision("layers.0", "NeighborhoodAttention", "3.5 times"),
    )  # fmt: skip
    text = "\n".join(found.lines)
    for words in (
        "site layers.0",
        "evaluating the graph",
        "NeighborhoodAttention: can: a window",
        "cannot: no mask",
        "hint: drop it",
    ):
        assert words in text
    assert json.loads(dumps(found.to_json()))["verdicts"][1]["hint"] == "drop it"
    assert "the product with V is missing" in "\n".join(Explanation("n", near_miss=samples.NEAR_MISS).lines)
    assert "nothing in it looks like attention" in Explanation("n").lines[0]


def test_mask_of_an_explanation() -> None:
    """Sizes an axis read 3x5, flags stand by their name or not at all, what is opaque is not said to be shown."""
    pattern = GridWindow(TokenGrid((6, 7)), (3, 5), (1, 2), (1, 1), (False, False))
    some = Certificate("evaluated", "every element compared", ((42, 42),), False)
    mask = MaskFacts(
        (MaskPart("neighborhood", some, pattern=pattern),
         MaskPart("neighborhood", some, pattern=dataclasses.replace(pattern, causal=(True, True))),
         MaskPart("opaque", Certificate("evaluated", "no pattern fits", ((3, 3), (5, 5)), False), source="m"))
    )  # fmt: skip
    lines = Explanation("s", dataclasses.replace(samples.site("s"), mask=mask)).lines
    assert [line for line in lines if line.startswith("  mask: ")] == [
        "  mask: neighborhood (kernel size 3x5, dilation 1x2, stride 1x1, border clamp, shape box), shown by "
        "evaluating the graph: every element compared (42; for these alone)",
        "  mask: neighborhood (kernel size 3x5, dilation 1x2, stride 1x1, causal, border clamp, shape box), shown by "
        "evaluating the graph: every element compared (42; for these alone)",
        "  mask: opaque (from 'm', a bool), no structure was shown: no pattern fits (looked at 3, 5)",
    ]


def test_mask_and_size_words() -> None:
    assert mask_text(samples.site()) == "window -255..0 + padding"
    assert mask_text(samples.site(mask=MaskFacts())) == "none"
    assert [size_text(n) for n in (0, 999, 1000, 86_700_000, 5 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "86.7 MB", "5.0 TB",
    ]  # fmt: skip
