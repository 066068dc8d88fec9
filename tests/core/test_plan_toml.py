"""Plans round-trip through TOML, and whatever is wrong with an edited one is said with its line."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncompile.core.assumption import KINDS, Assumption
from attncompile.core.errors import BadArguments
from attncompile.core.plan import Decision, Dense, Plan, Refusal
from attncompile.core.plan_toml import dumps, loads, to_json

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_scalars = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans(), _texts)
_values = st.recursive(_scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
_parameters = st.dictionaries(_names, _values, max_size=4)
_refusals = st.builds(Refusal, _texts, _texts, _texts)
_assumptions = st.builds(
    Assumption, st.sampled_from(KINDS), _texts, _texts, st.lists(_names, max_size=2).map(tuple), st.booleans()
)
_decisions = st.builds(
    Decision,
    site=_names,
    mechanism=_names,
    reason=_texts,
    exact=st.booleans(),
    parameters=_parameters,
    predicted_gain=st.floats(1e-3, 1e3),
    refusals=st.lists(_refusals, max_size=2).map(tuple),
    assumptions=st.lists(_assumptions, max_size=3).map(tuple),
    dense=st.none() | st.builds(Dense, mechanism=_names, parameters=_parameters),
)
_plans = st.builds(
    Plan,
    model_hash=_texts,
    policy=_texts,
    decisions=st.lists(_decisions, max_size=4, unique_by=lambda d: d.site).map(tuple),
    options=st.dictionaries(_names, st.one_of(_values, _parameters), max_size=3),
    notes=st.lists(_texts, max_size=2).map(tuple),
)


@given(_plans)
@settings(max_examples=300, deadline=None)
def test_round_trip(plan: Plan) -> None:
    assert loads(dumps(plan)) == plan


PLAN = Plan(
    "sha256:ab",
    "sparse",
    (
        Decision(
            "s0",
            "NeighborhoodAttention",
            "window of 256 in 4096",
            parameters={"kernel_size": [256], "causal": [1], "grid": [-1], "border": "truncate", "scale": 0.125},
            predicted_gain=2.5,
            refusals=(Refusal("Attention", "slower", "a dense kernel reads all keys"),),
        ),
        Decision("s1", "keep", "dense"),
    ),
    {"max_error": 0.01, "target": None},
    ("two sites",),
)


def test_text_is_for_people() -> None:
    text = dumps(PLAN)
    assert text.startswith("# What attncompile will do")
    assert "kernel_size = [256]\n" in text, "short arrays of numbers stay on one line"
    assert "target" not in tomllib.loads(text)["options"], "None means default and is not written"


def test_arrays_of_strings_are_left_alone() -> None:
    # A string may look like an array of numbers; joining lines must not touch it.
    plan = Plan("h", "p", (Decision("s", "m", "= [\n    1,\n    2,\n]", parameters={"x": ["1,", "2,\n3"]}),))
    assert loads(dumps(plan)) == plan


@pytest.mark.parametrize(
    "table",
    ['assumptions = ["all is well"]', 'assumptions = [{kind = "mask", statement = "causal"}]',
     'assumptions = [{kind = "hope", statement = "s", shown_by = "h"}]',
     'assumptions = [{kind = "mask", statement = "s", shown_by = "h", inputs = [1]}]'],
)  # fmt: skip
def test_wrong_assumptions_name_their_line(table: str) -> None:
    head = 'schema_version = 1\nmodel_hash = "h"\npolicy = "exact"\n[[site]]\nid = "s0"\nmechanism = "keep"\n'
    with pytest.raises(BadArguments, match="line"):
        loads(head + table + "\n", "plan.toml")


def test_minimal_site_gets_defaults() -> None:
    text = 'schema_version = 1\nmodel_hash = "h"\npolicy = "exact"\n[[site]]\nid = "s0"\nmechanism = "keep"\n'
    assert loads(text).decisions == (Decision("s0", "keep", "set in the plan file"),)


def test_no_sites_at_all() -> None:
    assert loads(dumps(Plan("h", "exact", ()))) == Plan("h", "exact", ())


def test_a_value_that_toml_cannot_hold_is_a_bug() -> None:
    with pytest.raises(TypeError):
        dumps(Plan("h", "p", (Decision("s", "m", "r", parameters={"x": object()}),)))


def test_json_has_every_key() -> None:
    value = to_json(PLAN)
    assert value["sites"][1] == {
        "id": "s1", "mechanism": "keep", "reason": "dense", "exact": True, "predicted_gain": 1.0, "parameters": {},
        "considered": [], "assumptions": [], "dense": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("table", "said"),
    [("{}", "'mechanism' is missing"), ('{mechanism = "A", x = 1}', "unknown key 'x'"),
     ("3", "'dense' must be a table"), ('{mechanism = "A", parameters = 3}', "'parameters' must be a table")],
)  # fmt: skip
def test_a_dense_side_that_is_none(table: str, said: str) -> None:
    text = 'schema_version = 1\nmodel_hash = "h"\npolicy = "exact"\n[[site]]\nid = "s0"\nmechanism = "B"\ndense = '
    with pytest.raises(BadArguments, match=said):
        loads(text + table)


def _line_of(text: str, needle: str) -> int:
    return max(i for i, line in enumerate(text.splitlines(), 1) if needle in line)


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ('mechanism = "keep"', 'mecanism = "keep"', "unknown key 'mecanism'", "did you mean 'mechanism'"),
        ('mechanism = "keep"', "mechanism = 3", "'mechanism' must be a string, not 3", ""),
        ("predicted_gain = 1.0", "predicted_gain = true", "'predicted_gain' must be", ""),
        ("predicted_gain = 1.0", "predicted_gain = -1", "must be a positive number", ""),
        ("predicted_gain = 1.0", "predicted_gain = nan", "must be a positive number", ""),
        ('id = "s1"', 'id = "s0"', "site 's0' is listed twice", "keep one"),
        ('code = "slower"', 'cod = "slower"', "unknown key 'cod'", "did you mean 'code'"),
        ("schema_version = 1", "schema_version = 2", "schema_version 2; this attncompile reads version 1", "plan"),
        ('policy = "sparse"', "policy = []", "'policy' must be a string, not []", ""),
        ('policy = "sparse"', 'polcy = "sparse"', "unknown key 'polcy'", "did you mean 'policy'"),
        ('    "two sites",', "    2,", "'notes' must be an array of strings", "quotes"),
    ],
)
def test_errors_name_the_line(old: str, new: str, message: str, hint: str) -> None:
    good = dumps(PLAN)
    assert good.count(old) == 1
    text = good.replace(old, new)
    with pytest.raises(BadArguments) as caught:
        loads(text, "my.toml")
    assert message in caught.value.message
    assert hint in caught.value.hint
    line = _line_of(text, "notes" if "two sites" in old else new)
    assert caught.value.message.startswith(f"my.toml line {line}:")


@pytest.mark.parametrize("missing", ["model_hash", "policy"])
def test_missing_head_key(missing: str) -> None:
    text = "\n".join(line for line in dumps(PLAN).splitlines() if not line.startswith(missing))
    with pytest.raises(BadArguments, match=f"'{missing}' is missing"):
        loads(text)


def test_missing_site_key_names_the_site() -> None:
    text = dumps(PLAN).replace('mechanism = "keep"\n', "")
    with pytest.raises(BadArguments, match=rf"line {_line_of(text, 's1') - 1}: 'mechanism' is missing"):
        loads(text)


@pytest.mark.parametrize("text", ["", "x = [", "schema_version = '1'\n", "\x00", "[[site]]\nid = 'a'\n"])
def test_rubbish_is_a_bad_argument(text: str) -> None:
    with pytest.raises(BadArguments) as caught:
        loads(text)
    assert caught.value.hint


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_text_is_a_crash(text: str) -> None:
    with pytest.raises(BadArguments):
        loads(text)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_deleted_or_doubled_line_is_a_crash(data: st.DataObject) -> None:
    lines = dumps(PLAN).splitlines()
    index = data.draw(st.integers(0, len(lines) - 1))
    edited = (
        lines[:index] + lines[index + 1 :] if data.draw(st.booleans()) else [*lines[:index], *lines[index:][:1] * 2]
    )
    try:
        loads("\n".join(edited))
    except BadArguments as error:
        assert error.hint


@pytest.mark.parametrize("site", ["site = 3", "site = [1]", "site = [[]]"])
def test_site_that_is_no_table(site: str) -> None:
    with pytest.raises(BadArguments):
        loads(f'schema_version = 1\nmodel_hash = "h"\npolicy = "p"\n{site}\n')
