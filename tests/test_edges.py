"""The sizes beside the profile's own at which sites are checked."""

from __future__ import annotations

import dataclasses

from attncompile.core.profile import Range, ShapeProfile
from attncompile.core.site import AttentionSite
from attncompile.edges import PRIMES, edges
from tests.report_samples import site


def found(ranges: dict[str, Range], sites: tuple[AttentionSite, ...]) -> dict[str, list[dict[str, int]]]:
    return {e.label: [dict(b) for b in e.bindings] for e in edges(ShapeProfile(ranges), sites)}


def test_a_model_without_dynamic_dimensions_has_none() -> None:
    assert edges(ShapeProfile({}), (site(),)) == ()


def test_an_odd_batch_and_a_prime() -> None:
    got = found({"batch": Range(1, 2, 4), "seq": Range(1, 512, 4096)}, (site(),))
    assert got == {"prime lengths": [{"batch": 3, "seq": 127}]}
    smallest = dict(ShapeProfile({"seq": Range(1, 512, 4096)}).bindings())["min"]
    assert smallest == {"seq": 1}  # one token is the profile's own


def test_query_and_key_lengths_differ_but_may_have_to_agree() -> None:
    cross = dataclasses.replace(site(), query_length="image", key_length="text")
    ranges = {"batch": Range(1, 1, 1), "image": Range(64, 256, 1024), "text": Range(64, 256, 1024)}
    (edge,) = edges(ShapeProfile(ranges), (cross,))
    assert [dict(b) for b in edge.bindings] == [
        {"batch": 1, "image": 127, "text": 113}, {"batch": 1, "image": 127, "text": 127},
    ]  # fmt: skip


def test_everything_stays_inside_the_profile() -> None:
    for low, high in ((1, 1), (2, 2), (4, 4), (8, 10), (24, 28), (200, 300), (5000, 6000), (7, 4096)):
        for edge in edges(ShapeProfile({"batch": Range(1, 1, 1), "seq": Range(low, high, high)}), (site(),)):
            for binding in edge.bindings:
                assert low <= binding["seq"] <= high and binding["batch"] == 1
    got = found({"seq": Range(200, 300, 300), "batch": Range(1, 1, 1)}, (site(),))
    assert got["prime lengths"][0]["seq"] == 211
    got = found({"seq": Range(24, 28, 28), "batch": Range(1, 1, 1)}, (site(),))
    assert got == {}  # no prime there, and the smallest size is checked anyway


def test_symbols_of_expressions_count_as_lengths() -> None:
    cached = dataclasses.replace(site(), key_length="past + seq")
    got = found({"batch": Range(1, 1, 4), "seq": Range(2, 8, 8), "past": Range(1, 64, 128)}, (cached,))
    assert got["prime lengths"][0] == {"batch": 3, "seq": 7, "past": 127}


def test_primes_are_primes() -> None:
    assert all(p > 1 and all(p % d for d in range(2, p)) for p in PRIMES)
