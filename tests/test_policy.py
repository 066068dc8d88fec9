"""Policies as files, and the choice between candidates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attncompile.core.errors import BadArguments, Unsupported
from attncompile.core.mask import MaskFacts
from attncompile.core.mechanism import Candidate, Lowering
from attncompile.core.policy import Policy
from attncompile.core.site import AttentionSite, Operand
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanisms
from attncompile.policy import decide, load_policy, names
from attncompile.search import open_sites

SITE = AttentionSite(
    id="s", form="test", query=Operand("q", "BHND"), key=Operand("k", "BHND"), value=Operand("v", "BHND"),
    output=Operand("o", "BHND"), batch=1, heads=2, kv_heads=2, head_dim=8, value_dim=8, query_length=64, key_length=64,
    scale=1.0, mask=MaskFacts(), dtype="float32", softmax_dtype="float32", nodes=(), interior=(),
)  # fmt: skip


class Fake:
    """A mechanism that offers one exact candidate, which may not lower."""

    skips_keys = True
    understands = frozenset()

    def __init__(self, name: str, lowers: bool = True, exact: bool = True) -> None:
        self.name, self._lowers, self._exact = name, lowers, exact

    def exact_candidates(self, site: AttentionSite) -> tuple[Candidate, ...]:
        return (Candidate(self.name, {}, True, f"{self.name} does it"),)

    def is_exact_for(self, site: AttentionSite, parameters: object) -> Verdict:
        return Verdict.yes() if self._exact else Verdict.no("inexact", "not the same")

    def lower(self, site: AttentionSite, parameters: object, opset: int) -> Lowering:
        if not self._lowers:
            raise Unsupported("opset", f"not at {opset}")
        return Lowering(())


def decision(fakes: list[Fake], gains: dict[str, float], least: float = 1.15):  # type: ignore[no-untyped-def]
    policy = Policy("p", exact=tuple(f.name for f in fakes), min_gain=least)
    return decide(policy, SITE, fakes, 18, lambda c: gains[c.mechanism])  # type: ignore[arg-type]


def test_the_largest_gain_wins_and_the_others_say_why_not() -> None:
    made = decision([Fake("A"), Fake("B"), Fake("C", lowers=False), Fake("D", exact=False)], {"A": 1.5, "B": 3.0})
    assert made.mechanism == "B" and made.predicted_gain == 3.0
    assert {r.mechanism: r.code for r in made.refusals} == {"A": "gain", "C": "opset", "D": "inexact"}


def test_a_site_that_no_mechanism_handles_says_so() -> None:
    """What is asked of all is the reason, not what the first of them happens to lack; an able one's refusal is."""
    linear = replace(SITE, kind="linear")
    policy = Policy("p", exact=("A", "B"), min_gain=1.15)
    made = decide(policy, linear, [Fake("A"), Fake("B")], 18, lambda c: 9.0)  # type: ignore[arg-type]
    assert made.kept and [r.code for r in made.refusals] == ["needs", "needs"]
    assert made.reason == "no mechanism of this policy can take it: does not handle linear attention"
    able = Fake("B", exact=False)
    able.understands = frozenset({"linear"})  # type: ignore[assignment]
    made = decide(policy, linear, [Fake("A"), able], 18, lambda c: 9.0)  # type: ignore[arg-type]
    assert made.kept and made.reason == "not the same"


def test_too_small_a_gain_keeps_the_site() -> None:
    made = decision([Fake("A")], {"A": 1.1})
    assert made.kept and "1.10" in made.reason and "1.15" in made.reason


def test_built_in_policies_load() -> None:
    assert names() == ["auto", "exact", "linear", "neighborhood", "sparse"]
    exact, sparse = (load_policy(n, mechanisms()) for n in ("exact", "sparse"))
    assert exact.exact and not exact.approximate
    assert sparse.exact == exact.exact and sparse.approximate and sparse.max_error == 0.01
    assert sparse.confidence == 0.99
    for name in names():
        assert load_policy(name, mechanisms()).name == name


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("nonsense", "TOML"),
        ("[exact]\nmechanisms = ['Magic']", "Magic"),
        ("[exact]\nspeed = 3", "speed"),
        ("[exact]\nmin_gain = 'much'", "min_gain"),
        ("[exact]\nmin_gain = true", "min_gain"),
        ("[other]\nx = 1", "other"),
        ("exact = 3", "'exact' above the tables"),
        ("[exact]\nmechanisms = [['a']]", "no mechanism"),
        ("[exact]\nmin_gain = nan", "min_gain nan"),
        ("[approximate]\nmetric = 'foo'\nmax_error = 1", "no metric 'foo'"),
        ("[approximate]\nmetric = 'psnr'", "psnr has no default budget"),
        ("[approximate]\nmax_error = -1", "max_error -1"),
        ("[approximate]\nmax_error = nan", "max_error nan"),
        ("[approximate]\nmax_error = inf", "max_error inf"),
        ("[approximate]\nmetric = 'cosine'\nmax_error = 2", "cosine above 1"),
        ("[approximate]\nconfidence = 1.0", "confidence 1.0"),
        ("[approximate]\nconfidence = 0", "confidence 0"),
        ("[approximate]\nkeep_first = -1", "keep_first -1"),
        ("[approximate]\nkeep_last = 'two'", "'keep_last' must be a whole number"),
        ("\udcff", "not a text file"),
    ],
)
def test_bad_policy_files(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(BadArguments, match=word) as error:
        load_policy(str(path), mechanisms())
    assert error.value.hint


def test_unknown_policies() -> None:
    with pytest.raises(BadArguments, match="unknown policy 'fast'") as error:
        load_policy("fast", mechanisms())
    assert "auto, exact, linear, neighborhood, sparse" in error.value.hint
    with pytest.raises(BadArguments, match="does not exist"):
        load_policy("./none.toml", mechanisms())


@pytest.mark.parametrize(("first", "last", "left"), [(0, 0, 3), (1, 1, 1), (2, 5, 0), (5, 0, 0), (0, 4, 0), (0, 3, 0)])
def test_sites_at_the_ends_stay_dense_however_many_are_asked_for(first: int, last: int, left: int) -> None:
    sites = [replace(SITE, id=f"site{i}") for i in range(3)]
    assert len(open_sites(sites, Policy("p", keep_first=first, keep_last=last), (), ())) == left
