"""The fitting of one key head: planted maps are found, others are not claimed to be; the judge is right by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attncompile.core.feature_map import EPSILON
from attncompile.fit import solve
from attncompile.fit.capture import Entry
from attncompile.fit.judge import distances, fitted_weights, weights
from tests.fit.constructed import WORDS

pytest.importorskip("torch")
SCALE = 0.5


def entry(seed: int, tokens: int = 70, dim: int = WORDS, heads: int = 2, planted: bool = True) -> Entry:
    """Planted: queries and keys are words, as in ``constructed``."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    rows = np.sort(rng.permutation(tokens)[: tokens - 11])
    key, value = rng.standard_normal((2, tokens, dim)) * 2
    query = rng.standard_normal((heads, tokens, dim)) * 2
    if planted:
        said = rng.integers(0, WORDS, tokens)
        key, query = fixed.standard_normal((WORDS, dim))[said], fixed.standard_normal((heads, WORDS, dim))[:, said]
    return Entry(np.ascontiguousarray(query[:, rows], np.float32), rows,
                 key.astype(np.float32), value.astype(np.float32))  # fmt: skip


def fit(kind: str, found: list[Entry], steps: int = 600, causal: bool = False, seed: int = 3) -> dict[str, np.ndarray]:
    return solve.learned(found, kind, SCALE, causal, 2 * WORDS, steps, seed, None)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kind", "most"), [("hedgehog", 0.03), ("relu", 0.03)])
def test_a_planted_map_is_found_and_holds_for_others(kind: str, most: float, causal: bool) -> None:
    found, others = [entry(i) for i in range(4)], [entry(i) for i in range(10, 14)]
    made = fit(kind, found, causal=causal)
    plain = fit(kind, found, steps=0, causal=causal)
    for part in (found, others):
        for near, far in zip(*(distances(part, kind, m, SCALE, causal) for m in (made, plain)), strict=True):
            assert near.output < most < far.output / 3
            assert near.l1 < 0.06
            assert near.kl < 0.01


@pytest.mark.parametrize("kind", ["hedgehog", "relu"])
def test_what_is_not_linear_is_not_claimed_to_be(kind: str) -> None:
    found, others = ([entry(i, planted=False) for i in range(s, s + 3)] for s in (0, 10))
    made = fit(kind, found, steps=100)
    start = fit(kind, found, steps=0)
    for near, far in zip(*(distances(others, kind, m, SCALE, False) for m in (made, start)), strict=True):
        assert 0.2 < near.output < far.output
        assert near.l1 > 0.2


def test_the_magnitude_is_the_best_there_is() -> None:
    found = [entry(i, planted=False) for i in range(3)]
    made = solve.magnitudes(found, SCALE, None)
    at = [d.output for d in distances(found, "mala", {"magnitude": made}, SCALE, False)]
    for factor in (0.9, 1.1):
        changed = (made * factor).astype(np.float32)
        worse = [d.output for d in distances(found, "mala", {"magnitude": changed}, SCALE, False)]
        assert all(w > a for w, a in zip(worse, at, strict=True))
    assert all(0.2 < a < 1.0 for a in at)


def test_a_projection_decides_what_counts() -> None:
    """A channel that the model does not read is free to be wrong: the magnitude follows the other alone."""
    found = [entry(i, planted=False) for i in range(3)]
    only = np.zeros((2, WORDS, WORDS), np.float32)
    only[:, 0, 0] = 1.0
    seen = [Entry(e.query, e.rows, e.key, np.ascontiguousarray(e.value[:, :1])) for e in found]
    want = solve.magnitudes(seen, SCALE, None)
    np.testing.assert_allclose(solve.magnitudes(found, SCALE, only), want, rtol=1e-5)


def test_weights_by_hand() -> None:
    e = entry(0, tokens=13, planted=False)
    rng = np.random.default_rng(5)
    arrays = {
        "query_weight": rng.standard_normal((2, WORDS, 3)), "key_weight": rng.standard_normal((WORDS, 3)),
        "query_bias": rng.standard_normal((2, 3)), "key_bias": rng.standard_normal(3), "magnitude": np.array([0.3, 2]),
    }  # fmt: skip
    arrays = {n: a.astype(np.float32) for n, a in arrays.items()}
    for causal in (False, True):
        for kind in ("hedgehog", "relu", *(["mala"] if not causal else [])):
            ours, exact = fitted_weights(e, 1, kind, arrays, causal), weights(e, 1, SCALE, causal)
            for i, row in enumerate(e.rows):
                seen = [j for j in range(13) if not causal or j <= row]

                def features(x: np.ndarray, side: str, of: str = kind) -> list[float]:
                    if of == "mala":
                        factor = 2.0 if side == "query" else 1.0
                        return [factor * (1 + z if z > 0 else np.exp(z)) for z in x]
                    weight = arrays["query_weight"][1] if side == "query" else arrays["key_weight"]
                    bias = arrays["query_bias"][1] if side == "query" else arrays["key_bias"]
                    inner = [sum(x[d] * weight[d, w] for d in range(WORDS)) for w in range(3)]
                    if of == "relu":
                        return [max(z + b, 0.0) for z, b in zip(inner, bias, strict=True)]
                    return [np.exp(z) for z in inner] + [np.exp(-z) for z in inner]

                q = features(e.query[1, i], "query")
                scores = {j: sum(a * b for a, b in zip(q, features(e.key[j], "key"), strict=True)) for j in seen}
                total = sum(scores.values())
                true = {j: np.exp(SCALE * float(e.query[1, i] @ e.key[j])) for j in seen}
                for j in range(13):
                    if kind == "mala":
                        want = (1 + 1 / total) * scores[j] - total / 13
                    else:
                        want = scores.get(j, 0.0) / (total + (EPSILON if kind == "relu" else 0.0))
                    assert ours[i, j] == pytest.approx(want, rel=1e-4, abs=1e-5)
                    assert exact[i, j] == pytest.approx(true.get(j, 0.0) / sum(true.values()), rel=1e-4, abs=1e-9)


def test_what_overflows_is_infinitely_far() -> None:
    e = entry(0, planted=False)
    large = {"query_weight": np.full((2, WORDS, 3), 99, np.float32), "key_weight": np.full((WORDS, 3), 99, np.float32)}
    assert all(d.output == np.inf for d in distances([e], "hedgehog", large, SCALE, False))


def test_a_seed_decides_all(tmp_path: Path) -> None:
    """In this process, in another one, with other threads: the same bits; with another seed others."""
    found = [entry(i, planted=False) for i in range(2)]
    made = fit("hedgehog", found, steps=20)
    again, other = fit("hedgehog", found, steps=20), fit("hedgehog", found, steps=20, seed=4)
    assert all(np.array_equal(made[n], again[n]) for n in made)
    assert not np.array_equal(made["key_weight"], other["key_weight"])
    path = tmp_path / "there.npz"
    code = (
        "import sys, numpy as np, torch; torch.set_num_threads(3)\n"
        "from tests.fit.test_solve import entry, fit\n"
        "np.savez(sys.argv[1], **fit('hedgehog', [entry(i, planted=False) for i in range(2)], steps=20))\n"
        "assert torch.get_num_threads() == 3"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=root,
                   env={**os.environ, "PYTHONPATH": str(root)})  # fmt: skip
    with np.load(path) as there:
        assert all(np.array_equal(made[n], there[n]) for n in made)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["hedgehog", "relu"])
def test_what_is_learned_from_is_what_is_judged(kind: str, causal: bool) -> None:
    """The softmax and the weights in the losses, against the judge's, which shares no code with them."""
    import torch

    e = entry(0, planted=False)
    learner = solve._Learner(torch, [e], kind, SCALE, causal, None, 0)
    maps = learner.start(9)
    query, rows, key, _ = learner.entries[0]
    arrays = {n: p.numpy() for n, p in maps.items()}
    for h in range(2):
        want, ours = (x[h].numpy() for x in learner.both(query, rows, key, maps))
        np.testing.assert_allclose(want, weights(e, h, SCALE, causal), atol=2e-6)
        np.testing.assert_allclose(ours, fitted_weights(e, h, kind, arrays, causal), atol=2e-6)
