"""How often the budget is exceeded: one small model, its inputs divided a hundred times into those that choose and
those that are held out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.search import choose, maps
from attncompile.search.candidates import candidates
from attncompile.search.choose import Choice, Limits, SiteSpace, Unit, damage_of, tune
from tests.search import constructed

TOKENS, HEADS, DIM, INPUTS, BUDGET = 330, 4, 16, 16, 0.05
CONTENT, SPREAD = 0.9, 0.05
"""How much of a score comes from contents, beside positions: so much that no head has a clean pattern; and how much
inputs differ in size."""

GEOMETRY = BlockGeometry(TOKENS, 32, False)


class Model:
    """y = x + attention(x) W, whose inputs are of different sizes, so that what a pattern costs differs between
    them.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        width = HEADS * DIM
        sizes = np.exp(SPREAD * rng.standard_normal(INPUTS))
        self.x = [f["x"][0] * s for f, s in zip(constructed.feeds(INPUTS, TOKENS), sizes, strict=True)]
        made = [rng.standard_normal((width, width)) * s / np.sqrt(width) for s in (CONTENT, CONTENT, 1.0, 1.0)]
        at = [constructed.positions(kind, TOKENS, DIM, 200) for kind in constructed.HEADS]
        self.out = made[3].reshape(HEADS, DIM, width)
        self.operands: list[maps.Operands] = []
        self.masses: dict[tuple[int, int], np.ndarray] = {}
        self.scored: dict[tuple[int, int], dict[str, float]] = {}
        self.sizes: dict[tuple[int, int], float] = {}
        self.outputs: dict[tuple[int, int, str], np.ndarray] = {}
        for x in self.x:
            query, key, value = (np.stack(np.split(x @ w, HEADS, axis=1)) for w in made[:3])
            query, key = query + np.stack([a for a, _ in at]), key + np.stack([b for _, b in at])
            self.operands.append(maps.Operands(*(a.astype(np.float32) for a in (query, key, value)), DIM**-0.5))

    def mass(self, i: int, head: int) -> np.ndarray:
        if (i, head) not in self.masses:
            self.masses[i, head] = maps.masses(self.operands[i], GEOMETRY, head)
        return self.masses[i, head]

    def scores(self, i: int, head: int, texts: Sequence[str]) -> np.ndarray:
        """Squared changes of one head's output; what was scored before is known."""
        known = self.scored.setdefault((i, head), {})
        missing = [t for t in texts if t not in known]
        if missing:
            choices = np.stack([BlockPattern(t).blocks(GEOMETRY) for t in missing])
            averaged = [k for k, text in enumerate(missing) if text == "mean"]
            found = maps.score(self.operands[i], GEOMETRY, head, choices, range(GEOMETRY.count), averaged)
            known.update(zip(missing, found.error, strict=True))
            self.sizes[i, head] = found.size
        return np.array([known[t] for t in texts])

    def head(self, i: int, head: int, text: str) -> np.ndarray:
        """What a head adds to the output, in float64."""
        if (i, head, text) not in self.outputs:
            self.outputs[i, head, text] = self._head(i, head, text).astype(np.float32)
        return self.outputs[i, head, text]

    def _head(self, i: int, head: int, text: str) -> np.ndarray:
        o = self.operands[i]
        if text == "mean":
            out = np.broadcast_to(o.value[head].mean(axis=0), o.value[head].shape)
            return np.asarray(out, np.float64) @ self.out[head]
        token = np.arange(TOKENS) // GEOMETRY.edge
        seen = BlockPattern(text).blocks(GEOMETRY)[token[:, None], token[None, :]]
        scores = np.where(seen, o.query[head].astype(np.float64) @ o.key[head].T * o.scale, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True) @ o.value[head] @ self.out[head]

    def error(self, i: int, texts: tuple[str, ...]) -> float:
        dense = self.x[i] + sum(self.head(i, h, "dense") for h in range(HEADS))
        ours = self.x[i] + sum(self.head(i, h, t) for h, t in enumerate(texts))
        return float(np.linalg.norm(ours - dense) / np.linalg.norm(dense))


def searched(model: Model, known: np.ndarray, future: int) -> tuple[tuple[str, ...], float] | None:
    """Patterns of all heads, chosen as ``run.Search`` does on these inputs, and their relative time."""
    offered = [
        candidates(np.mean([model.mass(i, h) for i in known], axis=0), GEOMETRY, True) for h in range(HEADS)
    ]  # fmt: skip
    changes = [{i: model.scores(i, h, [p.text for p in o]) for i in known} for h, o in enumerate(offered)]
    sizes = {i: sum(model.sizes[i, h] for h in range(HEADS)) for i in known}
    units = []
    for patterns, change in zip(offered, changes, strict=True):
        damage = np.mean([change[i] / sizes[i] for i in known], axis=0)
        time = [float(p.blocks(GEOMETRY).sum()) for p in patterns]
        units.append(Unit(tuple(p.text for p in patterns), np.array(time), damage))
    base = float(HEADS * GEOMETRY.all.sum())
    space = SiteSpace("site", base, 0.0, tuple(units), 1.0, 1.15)

    def texts(choice: Choice) -> tuple[str, ...]:
        return tuple(u.labels[k] for u, k in zip(units, choice["site"], strict=True))

    probe = tuple(int(np.argmin(np.abs(np.log(np.maximum(u.damage, 1e-12) / 0.005)))) for u in units)
    errors = [model.error(i, texts({"site": probe})) for i in known[:2]]
    weight = float(np.mean(np.square(errors))) / damage_of([space], {"site": probe})
    space = SiteSpace("site", base, 0.0, tuple(units), weight, 1.15)
    best, _ = tune([space], Limits(BUDGET, future, 0.99), lambda c: [model.error(i, texts(c)) for i in known])
    return (texts(best.choice), best.time) if best is not None else None


def resplit(model: Model, times: int) -> tuple[int, list[float], list[float]]:
    """How often the worst held-out input exceeds the budget; times of the choices and their worst held-out errors."""
    rng = np.random.default_rng(0)
    exceeded, took, errors = 0, [], []
    for _ in range(times):
        order = rng.permutation(INPUTS)
        known, held = order[: INPUTS // 2], order[INPUTS // 2 :]
        found = searched(model, known, len(held))
        if found is not None:
            errors.append(max(model.error(i, found[0]) for i in held))
            exceeded += errors[-1] > BUDGET
            took.append(found[1])
    return exceeded, took, errors


@pytest.mark.slow
def test_the_budget_holds_on_inputs_that_chose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 2 of 100, before held-out inputs have a say; and what is chosen uses the budget."""
    model = Model()
    exceeded, took, errors = resplit(model, 100)
    assert exceeded <= 2
    assert len(took) == 100 and np.mean(took) < 0.35 and np.mean(errors) > 0.4 * BUDGET
    # A bound that is a third too low does not keep it: this test can fail.
    monkeypatch.setattr(choose, "upper_bound", lambda known, future, confidence: 0.67 * float(np.mean(known)))
    exceeded, _, _ = resplit(model, 12)
    assert exceeded > 4
