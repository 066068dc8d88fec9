"""No wrong facts: mutants of the forms with sinks, scales of heads, log-sum-exps, guards, caches and other products.

Every mutant is refused, or what the facts say of it gives its own outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import numpy as np
import onnx
import pytest

from attncompile.core.errors import Unsupported
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.normalise import normalise
from attncompile.passes.replace import apply
from attncompile.passes.separate import HELPED, separate
from attncompile.passes.symbols import profile_for
from tests.passes import mutations
from tests.passes.attention_graphs import save
from tests.passes.mutations import Graph, softmaxes
from tests.passes.mutations_of_nodes import CHANGES
from tests.passes.rebuild import rebuilt
from tests.passes.test_lifter_invariance import BASES
from tests.passes.test_mutants import expressible, feeds, gentle, runs, worst

EACH = 12
COUNTS: Counter[str] = Counter()


def mutants(base: onnx.ModelProto, count: int, seed: int) -> Iterator[tuple[str, onnx.ModelProto]]:
    """``count`` mutants, one change in most, two in some; a third by changes that look for a softmax."""
    rng = np.random.default_rng(seed)
    made = tried = 0
    while made < count and tried < 8 * count:
        tried += 1
        graph = Graph(base)
        names = []
        for _ in range(1 + int(rng.random() < 0.25)):
            around = softmaxes(graph)
            if around and rng.random() < 0.3:
                mutation = mutations.MUTATIONS[int(rng.integers(len(mutations.MUTATIONS)))]
                if mutation(graph, around[0], rng):
                    names.append(mutation.__name__)
            else:
                change = CHANGES[int(rng.integers(len(CHANGES)))]
                if change(graph, rng):
                    names.append(change.__name__)
        if names:
            made += 1
            yield " + ".join(names), graph.model()


def judge(proto: onnx.ModelProto, folder: Path) -> str:
    """``invalid``, ``refused``, ``opaque`` or ``right``; fails where the facts are wrong."""
    if not runs(proto):
        return "invalid"
    model = normalise(load(save(proto, folder)))
    profile = profile_for(model, {})
    found = detect(model, profile)
    if any(m.code in HELPED for m in found.near_misses):
        model = separate(model, profile)
        found = detect(model, profile)
    edits = expressible(found.sites)
    if edits:
        error = worst(proto, apply(model, edits), gentle(found.sites))
        assert error <= 2e-4, f"the facts are wrong: relative L2 {error:.3g}; {found.sites}"
    for site in found.sites:
        if site.log_sum_exp:
            for feed in feeds(proto, True):
                rebuilt(model.proto, site, feed).check(2e-3)
    return "right" if edits else "opaque" if found.sites else "refused"


@pytest.mark.parametrize("name", BASES)
def test_mutants(name: str, tmp_path: Path) -> None:
    for number, (change, proto) in enumerate(mutants(BASES[name](), EACH, crc32(name.encode()))):
        try:
            COUNTS[judge(proto, tmp_path)] += 1
        except (AssertionError, Unsupported) as error:
            pytest.fail(f"mutant {number} of {name}: {change}: {error}")


def test_enough_of_each() -> None:
    """Runs last in this file: at least 300 mutants that run, neither all refused nor all taken."""
    if sum(COUNTS.values()) < EACH * len(BASES) // 2:
        pytest.skip("only part of this file ran")
    assert COUNTS["right"] + COUNTS["refused"] + COUNTS["opaque"] >= 300
    assert COUNTS["right"] >= 100 and COUNTS["refused"] >= 60
