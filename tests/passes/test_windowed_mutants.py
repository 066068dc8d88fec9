"""No wrong facts of windows: every mutant is refused, or what its facts say is what ONNX Runtime computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import crc32

import numpy as np
import onnx
import pytest

from tests.passes.mutations import Graph
from tests.passes.rebuild import Unaligned, found_in, random_feeds, rebuilt, run_for
from tests.passes.test_probed import pieces
from tests.passes.test_windowed import FORMS
from tests.passes.windowed_mutations import CHANGES

EACH = 40
BASES: dict[str, Callable[[], onnx.ModelProto]] = {
    **{name: lambda form=form: form().proto for name, form in FORMS.items() if name != "unfold-dynamic-batch"},
    "pieces": pieces,
}


def mutants(base: onnx.ModelProto, seed: int, each: int = EACH) -> Iterator[tuple[str, onnx.ModelProto]]:
    """``each`` mutants that ONNX Runtime runs and that a softmax is left in, one change in most, two in some."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < each:
        graph, names = Graph(base), []
        for _ in range(1 + int(rng.random() < 0.2)):
            change = CHANGES[int(rng.integers(len(CHANGES)))]
            try:
                if change(graph, rng):
                    names.append(change.__name__)
            except ValueError:  # an axis or an equation that is none
                continue
        proto = graph.model()
        if names and runs(proto):
            made += 1
            yield " + ".join(names), proto


def runs(proto: onnx.ModelProto) -> bool:
    try:
        onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        return bool(run_for(proto, random_feeds(proto), [o.name for o in proto.graph.output]))
    except Exception:  # both raise their own untyped errors
        return False


@pytest.mark.parametrize("name", BASES)
def test_no_wrong_facts(name: str, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for i, (changes, proto) in enumerate(mutants(BASES[name](), crc32(name.encode()))):
        model, found = found_in(proto, tmp_path)
        assert found.sites or found.near_misses, f"{name} {i}, {changes}: neither a site nor a reason"
        verdict = "refused"
        for site in found.sites:
            for seed in range(2):
                try:
                    rebuilt(model.proto, site, random_feeds(model.proto, seed)).check(2e-4)
                    verdict = "right"
                except Unaligned:  # the facts say that they do not know: added to scores of other axes
                    verdict = "unplaced"
                except AssertionError as error:
                    raise AssertionError(f"{name} {i}, {changes}: the facts are wrong: {site}: {error}") from None
        counts[verdict] += 1
    assert min(counts["right"], counts["refused"]) > 0, counts
