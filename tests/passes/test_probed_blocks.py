"""Several softmaxes over gathered blocks are one site: which keys each head sees, and how often each counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attncompile.core.errors import Unsupported
from attncompile.core.head_pattern import HeadMasks
from attncompile.core.site import AttentionSite
from attncompile.passes.detect.probed.counts import LARGEST, counted_keys
from attncompile.passes.detect.probed.reading import read
from attncompile.passes.detect.probed.visible import Sizes
from tests.passes.block_graphs import Blocks, graph
from tests.passes.rebuild import found_in, only_site, random_feeds, rebuilt, run_for
from tests.passes.test_probed_reasons import TOKENS, joined


def facts_of(site: AttentionSite, heads: int, tokens: int) -> np.ndarray:
    """How often each key counts by the site's facts, [heads, tokens, tokens]; 0 where it is hidden."""
    seen = np.ones((heads, tokens, tokens), int)
    distance = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    for part in site.mask.parts:
        if part.counts is not None:
            seen *= part.counts.times(tokens, tokens)
        elif part.pattern is not None:
            seen *= part.pattern.visible(tokens, tokens)
        else:
            seen *= ((part.left < 0) | (distance >= -part.left)) & ((part.right < 0) | (distance <= part.right))
    return seen


def reduced(counts: np.ndarray) -> np.ndarray:
    """Without the factor that all keys of a query share: it leaves a softmax as it is."""
    return np.asarray(counts // np.gcd.reduce(counts, axis=-1, keepdims=True))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_blocks_of_any_size(seed: int, per_head: bool, tmp_path: Path) -> None:
    given = Blocks.random(seed, per_head=per_head, width=1 + seed % 3)
    proto = graph(given)
    _, site = only_site(proto, tmp_path)
    assert (site.query_length, site.key_length, site.heads, site.head_dim, site.batch) == (
        given.tokens, given.tokens, given.heads, given.dim, given.batch)  # fmt: skip
    assert site.scale == pytest.approx(0.35, rel=1e-5)
    np.testing.assert_array_equal(facts_of(site, given.heads, given.tokens), reduced(given.counts()))
    same = bool(np.all(given.counts() == given.counts()[:1]))
    assert site.mask.by_head == any(isinstance(p.pattern, HeadMasks) for p in site.mask.parts)
    assert not (same and site.mask.by_head) and all(not p.certificate.general for p in site.mask.parts)
    assert len([n for n in proto.graph.node if n.op_type == "Softmax"]) == 3


FAULTS = ("index", "scale", "weights", "bias", "order", "seen outside")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("per_head", [False, True])
def test_one_thing_changed_is_refused(fault: str, per_head: bool, tmp_path: Path) -> None:
    """The middle is no attention alone, so that the whole is what is refused; parts that are attention stay sites."""
    given = Blocks.random(3, per_head=per_head)
    proto = graph(given, fault)
    _, found = found_in(proto, tmp_path)
    assert found.near_misses and all(s.query_length == given.block for s in found.sites)
    feeds = random_feeds(proto)
    for site in found.sites:
        rebuilt(proto, site, feeds).check()
    right = run_for(graph(given), feeds, ["y"])["y"]
    if fault != "seen outside":
        assert np.abs(run_for(proto, feeds, ["y"])["y"] - right).max() > 1e-6


def test_one_key_hidden_from_one_query_of_one_head(tmp_path: Path) -> None:
    given = Blocks.random(3, per_head=False)
    _, site = only_site(graph(given, "mask"), tmp_path)
    want = given.counts()
    key = int(given.drawn[-1, 0, 0]) * given.block
    want[-1, given.block + 1, key] -= 1
    np.testing.assert_array_equal(facts_of(site, given.heads, given.tokens), reduced(want))
    assert site.mask.counts is not None


@pytest.mark.parametrize("times", [2, 3, 5])
def test_a_block_that_is_drawn_often(times: int, tmp_path: Path) -> None:
    first = Blocks.random(5, per_head=False)
    drawn = np.zeros((first.heads, first.count - 2, times - 1), int)
    given = Blocks(first.batch, first.heads, first.dim, first.block, first.count, drawn, first.last)
    _, site = only_site(graph(given), tmp_path)
    assert site.mask.counts is not None and site.mask.counts.largest >= times
    np.testing.assert_array_equal(facts_of(site, given.heads, given.tokens), reduced(given.counts()))


def test_keys_that_count_twice_in_one_softmax(tmp_path: Path) -> None:
    _, site = only_site(joined(start=0), tmp_path)
    assert (site.key_length, site.mask.kind) == (TOKENS, "bias")
    assert site.mask.counts is not None
    want = np.broadcast_to(np.where(np.arange(TOKENS) < 3, 2, 1), (1, TOKENS, TOKENS))
    np.testing.assert_array_equal(site.mask.counts.times(TOKENS, TOKENS), want)


def _run(counts: np.ndarray, extra: float = 0.0):
    def run(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        scores = 0.5 * (q @ k.swapaxes(2, 3))
        weights = (counts + extra * (counts > 0)) * np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray((weights / weights.sum(axis=-1, keepdims=True)) @ v).astype(np.float32)

    return run


@pytest.mark.parametrize("keys, channels", [(41, 2), (97, 3), (300, 16), (1031, 8)])
def test_counts_are_read_whatever_the_number_of_keys(keys: int, channels: int) -> None:
    rng = np.random.default_rng(keys)
    counts = rng.integers(0, LARGEST + 1, (2, 2, 23, keys)) * (rng.random((2, 2, 23, 1)) < rng.random((2, 2, 23, keys)))
    counts[..., 3, :] *= 2 * (counts[..., 3, :] <= LARGEST // 2)
    counts[..., 0] += ~counts.any(axis=-1)
    found = counted_keys(_run(counts), Sizes(2, 2, 23, keys, 4, channels))
    np.testing.assert_array_equal(found, reduced(counts))


def test_a_pattern_of_its_own_in_each_head() -> None:
    counts = np.ones((2, 9, 11), int)
    counts[1, 4, 7] = 3
    reading = read(_run(counts), Sizes(1, 2, 9, 11, 4, 4))
    np.testing.assert_array_equal(reading.counts, counts)
    assert reading.scale == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("size", [0.02, 0.37])
def test_weights_that_are_no_multiples(size: float) -> None:
    counts = np.ones((2, 9, 11))
    counts[1, 4, 7] = 2 + size
    with pytest.raises(Unsupported):
        read(_run(counts), Sizes(1, 2, 9, 11, 4, 4))


def test_more_than_is_read() -> None:
    counts = np.ones((2, 9, 11), int)
    counts[1, 4, 7] = LARGEST + 1
    with pytest.raises(Unsupported, match="whole multiples"):
        read(_run(counts), Sizes(1, 2, 9, 11, 4, 4))
