"""Windows side by side on rings (Swin): the body against the definition, and sites that have such a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from attncompile.core.errors import Unsupported
from attncompile.core.grid import TokenGrid
from attncompile.core.grid_pattern import Blocked
from attncompile.core.mechanism import Candidate
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanism, mechanisms
from attncompile.plugins.neighborhood.op import Neighborhood
from attncompile.plugins.neighborhood.reference import reference, sees
from attncompile.plugins.neighborhood.rings import rings

SUBJECT = mechanism("NeighborhoodAttention")
HIDDEN = float("-inf")
LAYOUTS = [("BNHD",) * 4, ("BHND",) * 4, ("BNHD", "BHND", "BNHD", "BHND"), ("BHND", "BNHD", "BHND", "BNHD")]


def windows(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], hidden: bool) -> Blocked:
    return Blocked(window, shift, TokenGrid(grid), cyclic=any(shift) and not hidden)


def swin(
    case: Any, grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], seam: float, **other: Any
) -> Any:
    """A case with a bias by places; ``seam`` -inf hides."""
    tokens, places = int(np.prod(grid)), int(np.prod(window))
    heads = other.pop("heads", 3)
    bias = np.random.default_rng(5).standard_normal((heads, places, places)).astype(np.float32)
    made = case(
        queries=tokens,
        static=True,
        heads=heads,
        kv_heads=other.pop("kv_heads", heads),
        windows=windows(grid, window, shift, seam == HIDDEN),
        window_bias=bias,
        seam=0.0 if seam == HIDDEN else seam,
    )
    return replace(made, **other)


def only(found: Any) -> Candidate | Verdict:
    assert len(found) == 1, found
    return found[0]


SIZES = {
    "one axis": ((15,), (5,), (2,)),
    "Swin, not shifted": ((6, 9), (3, 3), (0, 0)),
    "Swin, shifted": ((6, 9), (3, 3), (1, 1)),
    "one axis shifted": ((6, 10), (3, 5), (0, 2)),
    "one window on an axis": ((4, 12), (4, 4), (0, 1)),
    "video": ((4, 6, 6), (2, 3, 3), (1, 1, 2)),
}


@pytest.mark.parametrize("seam", [0.0, -100.0, -1.5, HIDDEN])
@pytest.mark.parametrize("size", SIZES)
def test_a_site_is_taken_and_right(size, seam, case, error, tolerance) -> None:
    grid, window, shift = SIZES[size]
    layouts = LAYOUTS[(list(SIZES).index(size) + int(seam == HIDDEN)) % len(LAYOUTS)]
    at = swin(case, grid, window, shift, seam, layouts=layouts, batch=2)
    found = SUBJECT._exact_parameters(at.site())[0]  # the gain of so few tokens is below what a candidate needs
    assert SUBJECT.is_exact_for(at.site(), found).ok
    assert (found["border"], found["shift"], found["grid"]) == ("circular", list(shift), list(grid))
    assert error(at, SUBJECT, found) < tolerance["float32"]


def test_random_sizes(case, error, tolerance) -> None:
    rng = np.random.default_rng(0)
    for seed in range(25):
        rank = int(rng.integers(1, 4))
        window = tuple(int(x) for x in rng.integers(1, 5, rank))
        grid = tuple(w * int(rng.integers(1, 4)) for w in window)
        shift = tuple(int(rng.integers(0, w)) for w in window)
        kv_heads = int(rng.integers(1, 3))
        seam = float(rng.choice([0.0, -100.0, 2.0, HIDDEN]))
        parameters = {"kernel_size": list(window), "stride": list(window), "grid": list(grid), "border": "circular",
                      "shift": list(shift), "seam": seam}  # fmt: skip
        at = swin(
            case, grid, window, shift, seam, heads=kv_heads * int(rng.integers(1, 3)), kv_heads=kv_heads, seed=seed
        )
        if any(s and g == w for s, g, w in zip(shift, grid, window, strict=True)) and seam == HIDDEN:
            continue  # the pattern says it in another way: two cells
        assert SUBJECT.is_exact_for(at.site(), parameters).ok, parameters
        assert error(at, SUBJECT, parameters) < tolerance["float32"], parameters


def test_the_definition_is_the_patterns(case) -> None:
    """Two definitions that share no code: what a token sees in a ring with hidden seams is Swin's mask."""
    for grid, window, shift in SIZES.values():
        parameters = {"kernel_size": window, "stride": window, "grid": grid, "border": "circular", "shift": shift}
        tokens = int(np.prod(grid))
        seen = np.array([[sees(i, j, tokens, parameters) for j in range(tokens)] for i in range(tokens)])
        np.testing.assert_array_equal(seen, windows(grid, window, shift, hidden=False).visible(tokens, tokens))
        hood = Neighborhood.of({**parameters, "seam": HIDDEN})
        np.testing.assert_array_equal(
            rings(hood).visible(hood), windows(grid, window, shift, hidden=True).visible(tokens, tokens)
        )


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
def test_layouts_and_head_groups(heads, kv_heads, layouts, case, error, tolerance) -> None:
    at = swin(case, (4, 6), (2, 3), (1, 1), -100.0, heads=heads, kv_heads=kv_heads, layouts=layouts, batch=2)
    assert error(at, SUBJECT, SUBJECT._exact_parameters(at.site())[0]) < tolerance["float32"]


def test_half_precision(case, error, tolerance) -> None:
    at = swin(case, (6, 9), (3, 3), (1, 2), -100.0, dtype="float16", batch=2)
    assert error(at, SUBJECT, SUBJECT._exact_parameters(at.site())[0]) < tolerance["float16"]


def test_bias_for_all_heads(case, error, tolerance) -> None:
    for heads, kv_heads in ((3, 3), (4, 2)):
        at = swin(case, (6, 9), (3, 3), (1, 2), -100.0, heads=heads, kv_heads=kv_heads)
        at = replace(at, window_bias=at.window_bias[:1])
        assert error(at, SUBJECT, SUBJECT._exact_parameters(at.site())[0]) < tolerance["float32"]


def test_the_reference_counts_places_from_the_shift() -> None:
    """By hand: two windows of two tokens on a ring of four, moved by one: {1, 2} and {3, 0}."""
    one = np.zeros((1, 4, 1, 1))
    value = np.arange(4.0).reshape(1, 4, 1, 1)
    parameters = {"kernel_size": [2], "stride": [2], "grid": [4], "border": "circular", "shift": [1], "seam": -1.0}
    bias = np.log(np.array([[[1.0, 2.0], [3.0, 4.0]]]))
    out = reference(one, one, value, parameters, scale=1.0, window_bias=bias)[0, :, 0, 0]
    across = np.exp(-1.0)
    want = [(4 * 0 + 3 * across * 3) / (4 + 3 * across), (1 * 1 + 2 * 2) / 3, (3 * 1 + 4 * 2) / 7,
            (1 * 3 + 2 * across * 0) / (1 + 2 * across)]  # fmt: skip
    np.testing.assert_allclose(out, want, rtol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shift": [1, 2]}, {"shift": [0, 0]}, {"kernel_size": [2, 3], "stride": [2, 3]}, {"seam": -99.0},
        {"seam": "-inf"}, {"seam": 0.0}, {"grid": [9, 6]},
    ],
    ids=str,
)  # fmt: skip
def test_other_windows_are_not_exact(wrong, case) -> None:
    site = swin(case, (6, 9), (3, 3), (1, 1), -100.0).site()
    found = SUBJECT._exact_parameters(site)[0]
    assert not SUBJECT.is_exact_for(site, {**found, **wrong}).ok


def test_a_seam_where_the_site_has_none_is_not_exact(case) -> None:
    """One window a ring: the same keys are seen wherever it begins, but not with the same scores."""
    whole = Blocked((4,), (0,), TokenGrid((4,)))
    site = case(queries=4, static=True, windows=whole).site()
    same = {"kernel_size": [4], "stride": [4], "grid": [4], "border": "circular", "shift": [1]}
    assert SUBJECT.is_exact_for(site, same).ok
    assert not SUBJECT.is_exact_for(site, {**same, "seam": -5.0}).ok


@pytest.mark.parametrize(
    "wrong",
    [
        {"shift": [3, 0]}, {"shift": [-1, 0]}, {"stride": [1, 1]}, {"grid": [6, 8]}, {"prefix": 1},
        {"dilation": [2, 1]},
        {"causal": [1, 0]}, {"seam": float("nan")}, {"border": "truncate"}, {"shape": "ball"}, {"grid": [-1, -1]},
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_meaning_is_refused(wrong) -> None:
    good = {
        "kernel_size": [3, 3],
        "stride": [3, 3],
        "grid": [6, 9],
        "border": "circular",
        "shift": [1, 1],
        "seam": -9.0,
    }
    Neighborhood.of(good)
    with pytest.raises(Unsupported):
        Neighborhood.of({**good, **wrong})


def test_no_other_mechanism_takes_a_bias_by_places(case) -> None:
    site = swin(case, (6, 9), (3, 3), (1, 1), -100.0).site()
    for other in mechanisms():
        if other.name != SUBJECT.name:
            assert all(isinstance(c, Verdict) and not c.ok for c in other.exact_candidates(site)), other.name


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_a_scale_for_each_head(layout, case) -> None:
    """SwinV2's: the query is multiplied by it before the op, so that the reference sees such a query."""
    at = swin(case, (6, 9), (3, 3), (1, 2), -100.0, layouts=(layout,) * 4, batch=2)
    scale = np.array([0.5, 2.0, 7.0], np.float32)
    site = at.site(head_scale="head_scale")
    lowering = SUBJECT.lower(site, SUBJECT._exact_parameters(site)[0], 18)
    model = at.model(SUBJECT, SUBJECT._exact_parameters(at.site())[0])
    del model.graph.node[:]
    model.graph.node.extend(lowering.nodes)
    model.graph.initializer.extend(
        [*lowering.initializers, numpy_helper.from_array(scale[:, None, None], "head_scale")]
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, at.feeds())[0]
    q, k, v = (at.tensors()[x] for x in "qkv")
    want = reference(
        q * scale[:, None], k, v, SUBJECT._exact_parameters(at.site())[0], scale=at.scale, window_bias=at.window_bias
    )
    np.testing.assert_allclose(got if layout == "BNHD" else got.transpose(0, 2, 1, 3), want, rtol=1e-4, atol=1e-5)


def test_a_candidate_for_swin_t(case) -> None:
    found = only(SUBJECT.exact_candidates(swin(case, (28, 28), (7, 7), (3, 3), -100.0).site()))
    assert isinstance(found, Candidate)
    assert found.reason.startswith("windows of 7x7, moved by 3x3 on the grid of 28x28 tokens")
