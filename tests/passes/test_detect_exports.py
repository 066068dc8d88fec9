"""Every recipe, through both exporters: the sites, their facts, and the site read in NumPy equal to the run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from attncompile.core.profile import Range
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from tests.exports import exported
from tests.passes.test_lifter_properties import run_site


@dataclass(frozen=True)
class Truth:
    """What the recipe's torch model does: sites of the tiny size, head counts and the kinds of mask factors."""

    sites: int
    heads: int  # of the first site; Swin's later stages have more
    kv_heads: int
    kinds: frozenset[str]


NONE: frozenset[str] = frozenset()
TRUTH = {
    "vit": Truth(2, 4, 4, NONE),
    "dinov2": Truth(2, 4, 4, NONE),
    "swin": Truth(4, 2, 2, frozenset({"bias"})),
    "dit": Truth(2, 4, 4, NONE),
    "pixart": Truth(4, 4, 4, NONE),
    "flux": Truth(2, 2, 2, NONE),
    "mistral": Truth(2, 4, 2, frozenset({"window"})),
    "llama": Truth(2, 4, 2, frozenset({"causal"})),
    "gpt2": Truth(2, 4, 4, frozenset({"causal"})),
    "bert": Truth(2, 4, 4, frozenset({"padding"})),
}
CASES = [
    *((name, "dynamo", 18, {}) for name in TRUTH),
    *((name, "torchscript", 17, {}) for name in TRUTH),
    *((name, "dynamo", 23, {}) for name in ("vit", "mistral", "bert", "dit")),
    ("mistral", "dynamo", 18, {"dynamic": ("sequence",)}),
    ("gpt2", "dynamo", 18, {"dynamic": ("batch", "sequence")}),
    ("vit", "dynamo", 18, {"dynamic": ("batch",)}),
    *((name, "torchscript", 17, {"dynamic": ("sequence",)}) for name in ("mistral", "llama")),
    *((name, "dynamo", 18, {"attention": "eager"}) for name in ("mistral", "bert", "vit")),
    *((name, "torchscript", 17, {"attention": "eager"}) for name in ("gpt2",)),
]


@pytest.mark.parametrize(
    "name, exporter, opset, options",
    CASES,
    ids=[f"{c[0]}-{c[1]}-{c[2]}{'-'.join(['', *map(str, c[3])])}" for c in CASES],
)
def test_sites_facts_and_meaning(name: str, exporter: str, opset: int, options: dict[str, object]) -> None:
    truth = TRUTH[name]
    model = load(exported(name, exporter, opset, **options))
    index = GraphIndex(model)
    profile = profile_for(model, {})
    found = detect(model, profile, index=index)
    assert [m.reason for m in found.near_misses] == []
    assert len(found.sites) == truth.sites
    assert found.sites[0].heads == truth.heads
    for site in found.sites:
        assert site.heads == truth.heads or name == "swin"
        if site.form != "attention-op":  # there the exporter has expanded the keys before the operator
            assert site.kv_heads * truth.heads == truth.kv_heads * site.heads
        cross = name == "pixart" and site.query_length != site.key_length
        kinds = {p.kind for p in site.mask.parts}
        if not cross:  # PixArt's text mask is an additive bias whose head axis TorchScript hides
            assert kinds - {"padding"} == truth.kinds - {"padding"}
        window = site.mask.part("window")
        if window is not None:
            assert (window.left, window.right) == (15, 0)
            assert window.certificate.general == ("dynamic" in options)
        for label, binding in profile.bindings():
            if label != "usual" or not profile.ranges:
                binding = {k: min(v, 70) for k, v in binding.items()}
            actual, read = run_site(site, World(index, binding), 0, pad=True)
            np.testing.assert_allclose(actual, read, rtol=3e-4, atol=3e-5, err_msg=f"{site.id} at {label}")


def test_grids() -> None:
    """ViT has a class token before its grid, DiT none."""
    for name, prefix in (("vit", 1), ("dit", 0)):
        model = load(exported(name))
        for site in detect(model, profile_for(model, {})).sites:
            assert site.grid is not None and site.grid.prefix == prefix and site.grid.tokens == site.query_length


def test_window_certificate_names_the_lengths_around_the_window() -> None:
    model = load(exported("mistral", dynamic=("sequence",)))
    (name,) = profile_for(model, {}).ranges
    site = detect(model, profile_for(model, {name: Range(1, 40, 90)})).sites[0]
    part = site.mask.part("window")
    assert part is not None and part.certificate.method == "evaluated"
    lengths = {q for q, _ in part.certificate.lengths}
    assert {15, 16, 17, 33, 127, 1, 40, 90} <= lengths


def test_trained_weights() -> None:
    """MiniLM: six sites with padding taken from the attention mask."""
    model = load(exported("minilm"))
    found = detect(model, profile_for(model, {}))
    assert len(found.sites) == 6 and not found.near_misses
    assert {(s.heads, s.head_dim, s.mask.kind) for s in found.sites} == {(12, 32, "padding")}
