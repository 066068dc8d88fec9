"""Names, node order, Identity and Cast nodes say nothing for sinks, scales of heads, caches and the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from attncompile.core.site import AttentionSite
from tests.passes import test_lifter_cache as cache
from tests.passes import test_lifter_products as products
from tests.passes import test_lifter_scales as scales
from tests.passes import test_lifter_sinks as sinks
from tests.passes.rebuild import found_in, random_feeds, rebuilt
from tests.passes.test_lifter_forms import Graph, model_of
from tests.passes.test_names_mean_nothing import CHANGES

Make = Callable[[], onnx.ModelProto]


def plain(form: Callable[[Graph], str]) -> Make:
    def make() -> onnx.ModelProto:
        b = Graph()
        return products.model(b, form(b))

    return make


def beside(form: Callable[[Graph], tuple[str, str]]) -> Make:
    def make() -> onnx.ModelProto:
        b = Graph()
        out, other = form(b)
        return model_of(b, out, 18, TensorProto.FLOAT, (other,))

    return make


def guarded(guard: Callable[[Graph, str], str]) -> Make:
    def make() -> onnx.ModelProto:
        b = Graph()
        p = guard(b, scales.masked_weights(b))
        return model_of(b, b.merge(b.op("MatMul", p, b.heads())), 18, TensorProto.FLOAT)

    return make


BASES: dict[str, Make] = {
    **{f"sinks: {name}": plain(form) for name, form in sinks.LIFTED.items()},
    **{f"scales: {name}": plain(form) for name, form in scales.SCALED.items()},
    **{f"products: {name}": plain(form) for name, (form, _) in products.LIFTED.items()},
    **{f"beside: {name}": beside(form) for name, form in scales.BESIDE.items()},
    "masked sinks": plain(lambda b: sinks.masked(b, -1e4)),
    "nan_to_num": guarded(scales.nan_to_num),
    "not-nan": guarded(scales.not_nan),
    "channels": plain(lambda b: scales.channels(b, False)),
    "absorbed": plain(products.latent_absorbed),
    "cache": lambda: cache.joined(cache.Step(1)),
    "transposed cache": lambda: cache.joined(cache.Step(transposed=True)),
    "scattered": lambda: cache.scattered("elements"),
    "scattered nd": lambda: cache.scattered("nd"),
}


def facts(site: AttentionSite) -> tuple[object, ...]:
    """Everything but names."""
    held = site.cache
    return (
        site.heads, site.kv_heads, site.head_dim, site.value_dim, site.batch, site.query_length, site.key_length,
        round(site.scale, 6), site.softcap, site.mask.kind, site.mask.masked_rows, site.mask.guarded, site.dtype,
        bool(site.sinks), bool(site.head_scale), bool(site.log_sum_exp), site.needs,
        held and (held.form, bool(held.past_key), bool(held.present_key)),
    )  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_same_facts(name: str, tmp_path: Path) -> None:
    _, before = found_in(BASES[name](), tmp_path)
    assert before.sites or before.near_misses
    for seed, change in enumerate(CHANGES):
        proto = change(BASES[name](), np.random.default_rng(seed))
        model, after = found_in(proto, tmp_path)
        assert [facts(s) for s in after.sites] == [facts(s) for s in before.sites], change.__name__
        assert [m.code for m in after.near_misses] == [m.code for m in before.near_misses], change.__name__
        feeds = random_feeds(model.proto)
        if "at" in feeds:
            feeds["at"] = np.array([4, 5])
        for site in after.sites:
            rebuilt(model.proto, site, feeds).check(5e-5)
