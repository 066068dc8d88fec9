"""Padding that runs through the pieces of an attention: what each hidden token does, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.probed.mask_paths import origins
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.load import load
from tests.passes.attention_graphs import save
from tests.passes.padded_graphs import Padded, graph
from tests.passes.rebuild import found_in, only_site, random_feeds, rebuilt, run_for
from tests.passes.test_probed_blocks import facts_of


def sized(seed: int) -> Padded:
    rng = np.random.default_rng(seed)
    kind = (TensorProto.INT64, TensorProto.BOOL, TensorProto.INT32)[seed % 3]
    return Padded(int(rng.integers(1, 4)), int(rng.integers(2, 5)), int(rng.integers(3, 7)), int(rng.integers(2, 5)),
                  int(rng.integers(2, 6)), int(rng.integers(2, 5)), kind=kind)  # fmt: skip


def without_first(given: Padded) -> np.ndarray:
    """Whether each query sees itself: the first tokens do, as all see them."""
    return given.visible()[np.arange(given.tokens), np.arange(given.tokens)]


@pytest.mark.parametrize("fill", [-np.inf, -1e4, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("seed", range(6))
def test_padding_of_any_size(seed: int, fill: float, tmp_path: Path) -> None:
    given = replace(sized(seed), fill=fill)
    proto = graph(given)
    _, site = only_site(proto, tmp_path)
    assert without_first(given).all()
    assert site.mask.zeroed and site.mask.masked_rows == "zero" and "token-padding" in site.needs
    (padding,) = [p for p in site.mask.parts if p.kind == "padding"]
    assert padding.source == "mask" and padding.tokens and not padding.additive
    structure = replace(site, mask=replace(site.mask, parts=tuple(p for p in site.mask.parts if p is not padding)))
    seen = facts_of(structure, given.heads, given.tokens)
    np.testing.assert_array_equal(seen, np.broadcast_to(given.visible(), seen.shape))
    feeds = random_feeds(proto)
    place, shape = np.arange(given.tokens), (given.batch, given.tokens)
    for mask in (place >= 3, place < given.tokens - 2, (place < 2) | (place > 4), place < 0, place == 1, place >= 0):
        feeds["mask"] = np.broadcast_to(mask, shape).astype(feeds["mask"].dtype).copy()
        feeds["mask"][0, 0] = 1  # entries differ
        rebuilt(proto, site, feeds).check()


def test_rows_that_see_nothing_are_not_a_number(tmp_path: Path) -> None:
    _, site = only_site(graph(Padded(gate=False)), tmp_path)
    assert (site.mask.zeroed, site.mask.masked_rows) == (False, "nan")


@pytest.mark.parametrize("fill", [-1e4, -1e9])
def test_rows_that_average_hidden_keys_are_refused(fill: float, tmp_path: Path) -> None:
    _, found = found_in(graph(Padded(gate=False, fill=fill)), tmp_path)
    assert found.sites == ()
    assert any("average some of the keys that are hidden" in m.reason for m in found.near_misses)


FAULTS = (
    "next token", "two tokens", "unlike the first", "other entry", "soft", "sign", "queries", "one head",
    "part of the keys", "times", "gate of the next", "gate of keys", "gate of a quarter", "by data",
)  # fmt: skip


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_thing_changed_is_refused(fault: str, gate: bool, tmp_path: Path) -> None:
    given = Padded(fault=fault, gate=gate, fill=-1e4 if fault in ("one head", "part of the keys") else -np.inf)
    proto = graph(given)
    _, found = found_in(proto, tmp_path)
    assert found.sites == () and found.near_misses
    right = graph(replace(given, fault="", fill=given.fill))
    feeds = random_feeds(right, 3)
    out = run_for(proto, feeds, ["y"])["y"]
    if fault == "times":  # what is hidden weighs nothing: the same function, in a form that is not followed
        return
    assert not np.allclose(out, run_for(right, feeds, ["y"])["y"], atol=1e-4, equal_nan=True)


def test_a_mask_of_floats_is_refused(tmp_path: Path) -> None:
    _, found = found_in(graph(Padded(kind=TensorProto.FLOAT)), tmp_path)
    assert found.sites == ()
    assert any(m.code == "padding-enters" and "floats" in m.reason for m in found.near_misses)


def test_origins_are_followed_element_by_element(tmp_path: Path) -> None:
    given = Padded(fault="next token")
    index = GraphIndex(load(save(graph(given), tmp_path)))
    world = World(index, {})
    (moved,) = {n.output[0] for n in index.nodes if n.op_type == "Gather"}
    want = np.roll(np.arange(given.batch * given.tokens).reshape(given.batch, -1), 1, axis=1)
    np.testing.assert_array_equal(origins(index, world, moved, "mask"), want)
    index = GraphIndex(load(save(graph(Padded(fault="two tokens")), tmp_path)))
    (joined,) = {n.output[0] for n in index.nodes if n.op_type == "Or"}
    with pytest.raises(Unsupported, match="joins the padding of several tokens"):
        origins(index, World(index, {}), joined, "mask")
