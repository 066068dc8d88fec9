"""Masks over past and new keys: general only where both lengths were varied on their own, and both agree."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from attncompile.core.mask import MaskPart
from attncompile.core.profile import Range
from attncompile.core.site import AttentionSite
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.masks.pairs import REQUIRED, seen_enough
from attncompile.passes.symbols import profile_for, symbols
from tests.passes.attention_graphs import save
from tests.passes.cache_graphs import Graph, Masks, model_of, positions, whole, window
from tests.passes.rebuild import random_feeds, rebuilt

WIDTH = 9
RANGES = {"n": Range(1, 12, 40), "p": Range(1, 30, 61)}


def site_of(proto: onnx.ModelProto, folder: Path, **ranges: Range) -> AttentionSite:
    model = load(save(proto, folder))
    given = {name: r for name, r in {**RANGES, **ranges}.items() if name in symbols(model)}
    (site,) = detect(model, profile_for(model, given)).sites
    assert (site.query_length, site.key_length) == ("n", "n + p")
    return site


def structure(site: AttentionSite) -> MaskPart:
    (part,) = [p for p in site.mask.parts if p.kind != "padding"]
    return part


@pytest.mark.parametrize("width", [1, 2, WIDTH, 23, 64])
def test_a_window_is_general_in_both_lengths(width: int, tmp_path: Path) -> None:
    proto = model_of(window(width))
    site = site_of(proto, tmp_path)
    part = structure(site)
    assert part.kind == "window" and (part.left, part.right) == (width - 1, 0) and part.certificate.general
    seen = set(part.certificate.lengths)
    wanted = {width - 1, width, width + 1, 2 * width + 1}
    assert {(1, n + 1) for n in wanted} | {(n, n) for n in wanted if n} <= seen  # steps, and prefills without a past
    assert {(s, p + s) for p, s in REQUIRED} <= seen and (40, 101) in seen and (1, 1) in seen
    for sizes in ({"n": 1, "p": 1}, {"n": 1, "p": 61}, {"n": 13, "p": 8}, {"n": 30, "p": 3}):
        rebuilt(proto, site, random_feeds(proto, 0, {"batch": 2, **sizes})).check()


def test_padding_stands_beside_it(tmp_path: Path) -> None:
    site = site_of(model_of(window(WIDTH), padded=True), tmp_path, **{"p + n": Range(2, 42, 101)})
    assert sorted(p.kind for p in site.mask.parts) == ["padding", "window"]
    assert structure(site).certificate.general and structure(site).left == WIDTH - 1
    assert site.mask.masked_rows == "uniform" and len(site.mask.fills) == 1


def test_a_causal_mask_is_general_too(tmp_path: Path) -> None:
    def causal(b: Graph, new: str, past: str, total: str) -> str:
        i, j = positions(b, new, past, total)
        return b.op("LessOrEqual", j, i)

    part = structure(site_of(model_of(causal), tmp_path))
    assert part.kind == "causal" and part.certificate.general


def aligned_at_start(b: Graph, new: str, past: str, total: str) -> str:
    """Forgets the past: right where there is none."""
    i, j = positions(b, new, whole(b, 0), new)
    _, j = positions(b, new, past, total)
    return b.op("And", b.op("LessOrEqual", j, i), b.op("Greater", j, b.op("Sub", i, whole(b, WIDTH))))


def wider_after_a_past(b: Graph, new: str, past: str, total: str) -> str:
    """One key more as soon as there is a past."""
    i, j = positions(b, new, past, total)
    width = b.op("Add", b.op("Min", past, whole(b, 1)), whole(b, WIDTH))
    return b.op("And", b.op("LessOrEqual", j, i), b.op("Greater", j, b.op("Sub", i, width)))


def no_mask_for_one_query(b: Graph, new: str, past: str, total: str) -> str:
    """A single step sees all keys."""
    alone = b.op("Equal", new, whole(b, 1))
    return b.op("Or", window(WIDTH)(b, new, past, total), alone)


def another_where_both_are_equal(b: Graph, new: str, past: str, total: str) -> str:
    """One key fewer where the past is as long as the new tokens: on the line where both are equal it is a window."""
    i, j = positions(b, new, past, total)
    same = b.op("Cast", b.op("Equal", past, new), to=7)
    width = b.op("Sub", whole(b, WIDTH), same)
    return b.op("And", b.op("LessOrEqual", j, i), b.op("Greater", j, b.op("Sub", i, width)))


def ahead_after_a_long_past(b: Graph, new: str, past: str, total: str) -> str:
    """Sees one key ahead once the past is longer than 20."""
    i, j = positions(b, new, past, total)
    ahead = b.op("Cast", b.op("Greater", past, whole(b, 20)), to=7)
    near = b.op("LessOrEqual", b.op("Sub", j, ahead), i)
    return b.op("And", near, b.op("Greater", j, b.op("Sub", i, whole(b, WIDTH))))


WRONG = [
    aligned_at_start,
    wider_after_a_past,
    no_mask_for_one_query,
    another_where_both_are_equal,
    ahead_after_a_long_past,
]


@pytest.mark.parametrize("mask", WRONG, ids=lambda m: m.__name__)
def test_a_mask_that_is_a_window_at_some_lengths_only_is_none(mask: Masks, tmp_path: Path) -> None:
    part = structure(site_of(model_of(mask), tmp_path))
    assert part.kind == "opaque", part


def test_what_the_line_of_equal_lengths_shows_is_not_enough() -> None:
    line = [(n, 2 * n) for n in range(1, 300)]
    assert not seen_enough(line, {WIDTH})
    whole = [(s, p + s) for p in range(130) for s in range(1, 130)]
    assert seen_enough(whole, {WIDTH})
    for missing in ((1, 1), (1, WIDTH + 1), (WIDTH, WIDTH), (127, 254), (127, WIDTH + 1 + 127)):
        assert not seen_enough(set(whole) - {missing}, {WIDTH})


def test_two_lengths_that_are_no_past(tmp_path: Path) -> None:
    """The key length alone moves with both symbols: not the lengths of a cache, so nothing is believed."""
    proto = model_of(window(WIDTH))
    for info in proto.graph.input:
        if info.name == "k0":
            info.type.tensor_type.shape.dim[2].dim_param = "q"
    model = load(save(proto, tmp_path))
    (site,) = detect(model, profile_for(model, {"n": Range(1, 12, 40), "q": Range(1, 30, 61)})).sites
    assert structure(site).kind in ("window", "opaque")
