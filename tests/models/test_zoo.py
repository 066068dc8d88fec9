"""The zoo: a twentieth of its entries exported again, another one every day, and the comparing that it rests on."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import ModelProto

from attncompile.core.grid import TokenGrid
from attncompile.core.grid_pattern import Blocked
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.site import AttentionSite, Detection
from attncompile.models.zoo import graphs
from attncompile.models.zoo.__main__ import main
from attncompile.models.zoo.check import Outcome, Skipped, attempt, compare, exported, found_in
from attncompile.models.zoo.entry import Call, Entry
from attncompile.models.zoo.table import ENTRIES
from attncompile.models.zoo.table_open import OPEN
from attncompile.passes.load import load

TODAY = [
    i for i in range(len(ENTRIES)) if i % 20 == datetime.datetime.now(datetime.UTC).timetuple().tm_yday % 20
]  # fmt: skip


@pytest.mark.parametrize("position", TODAY, ids=[ENTRIES[i].title for i in TODAY])
def test_todays_share(position: int) -> None:
    """Exported with weights and counted again: the truth is the committed one, and detection finds it."""
    outcome = attempt(position)
    if isinstance(outcome, Skipped):
        pytest.skip(outcome.reason)
    assert not isinstance(outcome, str), outcome
    assert "the committed truth is another one" not in outcome.wrong
    if outcome.entry.title in OPEN:
        assert not outcome.passed
        return
    assert (outcome.missed, outcome.false, outcome.wrong) == ((), (), ()), outcome.near_misses
    assert outcome.found + outcome.refused == len(outcome.true)


def test_the_table() -> None:
    titles = [e.title for e in ENTRIES]
    assert len(set(titles)) == len({e.slug for e in ENTRIES}) == len(titles) >= 60
    assert {e.exporter for e in ENTRIES} == {"dynamo", "torchscript"}
    assert {e.dtype for e in ENTRIES} == {"fp32", "fp16"}
    assert {e.attention for e in ENTRIES} == {"sdpa", "eager"}
    assert {bool(e.dynamic) for e in ENTRIES} == {True, False}
    assert {e.opset for e in ENTRIES} >= {12, 14, 17, 18, 23, 24, 25}
    assert {s for e in ENTRIES for s in e.after} == {"function", "merged", "ort-optimizer", "qdq"}
    assert set(OPEN) <= set(titles)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Entry, list[Call], Detection]:
    entry = next(e for e in ENTRIES if e.title == "grouped-repeat_interleave/torchscript/17/sdpa")
    path: Path = tmp_path_factory.mktemp("zoo") / "model.onnx"
    calls = exported(entry, path)
    return entry, calls, found_in(load(path))


def test_comparing_fails_on_every_difference(compared: tuple[Entry, list[Call], Detection]) -> None:
    """A comparison that cannot fail proves nothing."""
    entry, calls, found = compared

    def outcome(calls: list[Call], found: Detection, entry: Entry = entry) -> object:
        return compare(entry, calls, found, ModelProto(), 0.0)

    assert outcome(calls, found).passed
    (call,), (site,) = calls, found.sites
    assert outcome([call, call], found).missed
    assert outcome([], found).false
    assert outcome(calls, replace(found, sites=(site, site))).false
    assert outcome(calls, replace(found, sites=())).missed
    for change in (
        {"heads": 2}, {"kv_heads": 1}, {"head_dim": 16}, {"value_dim": 16}, {"query_length": 3}, {"key_length": 3},
        {"kind": "linear"},
    ):  # fmt: skip
        result = outcome(calls, replace(found, sites=(replace(site, **change),)))
        assert result.missed and result.false
    for mask in ("none", "window 3 0", "none+data", "causal+padding", "causal+bias", "causal+heads"):
        assert bool(outcome([replace(call, mask=mask)], found).wrong) == (mask != "causal+heads")
    assert outcome([replace(call, sinks=True)], found).wrong
    assert outcome(calls, replace(found, sites=(replace(site, sinks="s"),))).wrong
    for kind in ("padding", "bias", "opaque"):
        part = MaskPart(kind, Certificate("structure", ""), source="m")
        masked = replace(site, mask=MaskFacts((*site.mask.parts, part)))
        assert outcome(calls, replace(found, sites=(masked,))).wrong
    assert outcome(calls, found, replace(entry, refused={"sinks": 1})).missed


def test_one_query_in_groups_may_be_said_either_way(compared: tuple[Entry, list[Call], Detection]) -> None:
    """Two key heads that two query heads each meet with one query are two heads with two queries; never with more."""
    entry, (call,), found = compared
    (site,) = found.sites
    one = replace(call, query_length=1, mask="none")
    bare = replace(site, mask=MaskFacts(), query_length=1)
    folded = replace(bare, heads=call.kv_heads, query_length=call.heads // call.kv_heads)
    for said, passes in ((bare, True), (folded, True), (replace(folded, query_length=3), False)):
        assert compare(entry, [one], Detection((said,)), ModelProto(), 0.0).passed == passes
    assert compare(entry, [replace(one, query_length=2)], Detection((folded,)), ModelProto(), 0.0).missed


def test_windows_over_a_grid_are_compared_by_their_first_window() -> None:
    """Swin: torch attends to windows one by one, the site is one over the grid: its facts have to say a window."""
    entry = next(e for e in ENTRIES if e.title == "swin/dynamo/18/sdpa")
    calls, found = graphs.read_truth(entry)["calls"], found_in(graphs.read_graph(entry))
    assert [s.query_length for s in found.sites] == [256, 256, 64, 64]
    assert [c.query_length for c in calls] == [16] * 4
    assert compare(entry, calls, found, ModelProto(), 0.0).passed

    def outcome(change: Callable[[AttentionSite], AttentionSite]) -> Outcome:
        sites = (change(found.sites[0]), *found.sites[1:])
        return compare(entry, calls, replace(found, sites=sites), ModelProto(), 0.0)

    def with_pattern(site: AttentionSite, **other: object) -> AttentionSite:
        parts = tuple(
            replace(p, pattern=replace(p.pattern, **other)) if isinstance(p.pattern, Blocked) else p
            for p in site.mask.parts
        )
        return replace(site, mask=replace(site.mask, parts=parts))

    assert outcome(lambda s: s).passed
    assert outcome(lambda s: with_pattern(s, window=(4, 8))).missed  # another number of tokens a window
    assert outcome(lambda s: with_pattern(s, grid=TokenGrid((16, 8)))).missed  # not the site's tokens
    assert outcome(lambda s: with_pattern(s, shift=(2, 0))).wrong  # windows at the ends are cut in two
    assert outcome(lambda s: replace(s, form="matmul-softmax-matmul")).missed
    without = [p for p in found.sites[0].mask.parts if p.kind != "bias"]
    assert outcome(lambda s: replace(s, mask=MaskFacts(tuple(without)))).wrong


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--match", "no-codebook/torchscript"]) == 0
    assert "1 entries, 0 true sites, 0 found" in capsys.readouterr().out
    assert main(["--check-graphs", "--match", "no-codebook/torchscript"]) == 0
    assert "1 entries, 0 true sites, 0 found" in capsys.readouterr().out
    assert main(["--list", "--only", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ENTRIES[3::10]) and all(line.split()[0].endswith("3") for line in lines)
