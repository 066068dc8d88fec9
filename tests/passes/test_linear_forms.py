"""Every spelling of linear attention that detection takes, rebuilt from its facts and compared with the graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attncompile.core.linear import LinearFacts
from attncompile.core.site import AttentionSite
from tests.passes.linear_graphs import Spec, build, detected, error_of, feed_of


def found(spec: Spec, folder: Path) -> AttentionSite:
    model, detection = detected(build(spec), folder)
    assert detection.near_misses == ()
    (site,) = detection.sites
    assert site.kind == "linear"
    assert site.linear is not None
    assert site.needs >= {"linear"}
    lengths = (spec.length, spec.keys or spec.length)
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (
        spec.heads, spec.kv_heads, spec.dim, spec.value_dim
    )  # fmt: skip
    assert (site.batch, site.query_length, site.key_length) == (spec.batch, *lengths)
    assert error_of(model, site, feed_of(model)) < 3e-6
    return site


def facts(site: AttentionSite) -> LinearFacts:
    assert site.linear is not None
    return site.linear


@pytest.mark.parametrize("order", ["kv", "einsum", "vk"])
@pytest.mark.parametrize("normaliser", ["none", "pad", "split"])
def test_orders_of_the_state_product(order: str, normaliser: str, tmp_path: Path) -> None:
    site = found(Spec(order=order, normaliser=normaliser, epsilon=1e-3 if normaliser != "none" else 0.0), tmp_path)
    said = facts(site)
    assert (said.form, said.causal, said.decay) == ("state", False, "none")
    assert said.normaliser == ("none" if normaliser == "none" else "sum")
    assert said.epsilon == pytest.approx(0.0 if normaliser == "none" else 1e-3)
    assert (said.query_map, said.key_map) == ("relu", "relu")


@pytest.mark.parametrize("normaliser", ["concat", "gather", "sum", "ones", "mul", "reciprocal", "einsum"])
@pytest.mark.parametrize("epsilon, floor", [(0.0, 0.0), (1e-2, 0.0), (0.0, 2.0), (0.25, 1.5)])
def test_normalisers(normaliser: str, epsilon: float, floor: float, tmp_path: Path) -> None:
    said = facts(found(Spec(normaliser=normaliser, epsilon=epsilon, floor=floor), tmp_path))
    assert said.normaliser == "sum"
    assert said.epsilon == pytest.approx(epsilon)
    assert said.floor == (pytest.approx(floor) if floor else None)


@pytest.mark.parametrize("normaliser", ["mul", "einsum"])
def test_normalisers_on_tokens_before_heads(normaliser: str, tmp_path: Path) -> None:
    said = facts(found(Spec(order="einsum", normaliser=normaliser, epsilon=1e-2), tmp_path))
    assert (said.normaliser, said.epsilon) == ("sum", pytest.approx(1e-2))


@pytest.mark.parametrize("where", ["query", "key", "value", "state", "after"])
@pytest.mark.parametrize("normaliser", ["none", "pad", "sum"])
def test_scales_reach_the_facts(where: str, normaliser: str, tmp_path: Path) -> None:
    """A number that multiplies numerator and sum alike changes only what is added to the sum."""
    spec = Spec(scale=0.37, scale_at=where, normaliser=normaliser, epsilon=0.5 if normaliser != "none" else 0.0)
    site = found(spec, tmp_path)
    said = facts(site)
    if where == "after":  # after the quotient: outside of the site
        assert (site.scale, said.epsilon) == (1.0, pytest.approx(spec.epsilon))
    elif normaliser == "none" or where == "value" or (where == "state" and normaliser == "sum"):
        assert (site.scale, said.epsilon) == (pytest.approx(0.37), pytest.approx(spec.epsilon))
    else:
        assert (site.scale, said.epsilon) == (pytest.approx(1.0), pytest.approx(0.5 / 0.37))


@pytest.mark.parametrize(
    "kind, named",
    [("relu", "relu"), ("relu max", "relu"), ("relu clip", "relu"), ("elu+1", "elu+1"), ("elu+1 where", "elu+1"),
     ("elu+1 parts", "elu+1"), ("exp", "exp"), ("softmax", "softmax"), ("identity", "identity")],
)  # fmt: skip
def test_feature_maps(kind: str, named: str, tmp_path: Path) -> None:
    said = facts(found(Spec(query_map=kind, key_map=kind, normaliser="none"), tmp_path))
    assert (said.query_map, said.key_map) == (named, named)


@pytest.mark.parametrize("kind", ["relu+eps", "relu6", "elu alpha", "elu+2"])
def test_maps_that_only_look_like_one_are_left_before_the_operands(kind: str, tmp_path: Path) -> None:
    said = facts(found(Spec(query_map=kind, key_map="relu", normaliser="sum", epsilon=1e-3), tmp_path))
    assert (said.query_map, said.key_map) == ("identity", "relu")


def test_different_maps_and_lengths_and_shared_heads(tmp_path: Path) -> None:
    spec = Spec(heads=6, kv_heads=2, length=13, keys=9, query_map="elu+1", key_map="exp", normaliser="sum",
                epsilon=1e-4)  # fmt: skip
    said = facts(found(spec, tmp_path))
    assert (said.query_map, said.key_map) == ("elu+1", "exp")


def test_one_head_and_one_batch_entry(tmp_path: Path) -> None:
    found(Spec(batch=1, heads=1, kv_heads=1, normaliser="pad", epsilon=1e-3), tmp_path)
    found(Spec(batch=1, heads=2, kv_heads=2, order="vk"), tmp_path)


def test_random_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    for seed in range(12):
        heads = int(rng.integers(1, 5))
        spec = Spec(
            batch=int(rng.integers(1, 4)), heads=heads, kv_heads=heads, length=int(rng.integers(2, 19)),
            keys=int(rng.integers(2, 23)), dim=int(rng.integers(2, 9)), value_dim=int(rng.integers(2, 9)),
            order=str(rng.choice(["kv", "vk"])), normaliser=str(rng.choice(["none", "pad", "split"])), epsilon=1e-2,
            query_map=str(rng.choice(["relu", "elu+1", "exp"])), key_map="elu+1", seed=seed,
        )  # fmt: skip
        spec = replace(spec, epsilon=0.0) if spec.normaliser == "none" else spec
        found(spec, tmp_path)


def test_padding_multiplied_into_the_keys_is_part_of_their_features(tmp_path: Path) -> None:
    """The operand is the masked features, which both the state and the sum read."""
    proto = build(
        Spec(order="einsum", normaliser="mul", epsilon=1e-3), key_features=lambda b, x: b.op("Mul", x, "pad")
    )  # fmt: skip
    model, detection = detected(proto, tmp_path)
    (site,) = detection.sites
    said = facts(site)
    assert (said.query_map, said.key_map, said.normaliser) == ("relu", "identity", "sum")
    assert error_of(model, site, feed_of(model)) < 3e-6
