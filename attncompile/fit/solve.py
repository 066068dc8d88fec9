"""The fitting of one key head's maps: by torch where weights are learned, in closed form for ``mala``.

Learned maps begin where their scores are near q k scale, then follow two losses, half of the steps each: the
cross-entropy of the maps (Hedgehog's), and the squared distance of the outputs behind the projection, which is what the
model feels. What is nearest in the second among the start and both ends is taken. Seeded, on one thread: the same
inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from attncompile.core.errors import MissingDependency
from attncompile.core.feature_map import EPSILON
from attncompile.fit.capture import Entry, Place, entries

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS = 64
"""Queries of a step."""

RATES = (1e-2, 5e-3)
"""Adam's first rates for the two losses; both fall to 0 along a cosine."""

LOOKED = 256
"""Queries of an entry, at most, by which ends are compared."""


@dataclass(frozen=True, slots=True, eq=False)
class Solve:
    """One key head. ``projection`` [heads, Dv, Dv] as in ``search.maps.Operands``, or None. Gives the arrays of
    ``FeatureMaps`` without the axis of key heads.
    """

    place: Place
    head: int
    numbers: tuple[int, ...]
    kind: str
    scale: float
    causal: bool
    width: int
    steps: int
    seed: int
    projection: np.ndarray | None = None

    def __call__(self, threads: int) -> dict[str, np.ndarray]:
        found = entries(self.place, self.head, self.numbers)
        if self.kind == "mala":
            return {"magnitude": magnitudes(found, self.scale, self.projection)}
        return learned(found, self.kind, self.scale, self.causal, self.width, self.steps, self.seed, self.projection)


def require_torch() -> None:
    """Raises ``MissingDependency``."""
    if find_spec("torch") is None:
        raise MissingDependency(
            "fitting feature maps needs the package torch, which is not installed",
            "pip install torch; or fit elsewhere and give the file with --fitted; --map mala needs none",
        )


def magnitudes(found: Sequence[Entry], scale: float, projection: np.ndarray | None) -> np.ndarray:
    """float32 [heads]: c in out = A + c B, the least squares solution, where A is linear attention with the map elu + 1
    and B = phi(q) S - s mean(v): with c phi(q) in the place of phi(q) that is MALA's output.
    """
    heads = found[0].query.shape[0]
    above, below = np.zeros(heads), np.zeros(heads)
    for entry in found:
        key, value = _elu(entry.key.astype(np.float64)), entry.value.astype(np.float64)
        for h in range(heads):
            scores = scale * entry.query[h].astype(np.float64) @ entry.key.astype(np.float64).T
            exact = np.exp(scores - scores.max(axis=1, keepdims=True))
            want = (exact / exact.sum(axis=1, keepdims=True)) @ value
            query = _elu(entry.query[h].astype(np.float64))
            state, total = query @ (key.T @ value), (query @ key.sum(axis=0))[:, None]
            plain, off = state / total, state - total * value.mean(axis=0)
            left = want - plain
            if projection is not None:
                left, off = left @ projection[h], off @ projection[h]
            above[h] += (left * off).sum()
            below[h] += (off * off).sum()
    solved = np.divide(above, below, out=np.zeros(heads), where=below > 0)
    least = 1e-9  # s is divided by: values that are all alike leave c open
    return np.where(np.abs(solved) < least, least, solved).astype(np.float32)


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def learned(
    found: Sequence[Entry], kind: str, scale: float, causal: bool, width: int, steps: int, seed: int,
    projection: np.ndarray | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The arrays of ``hedgehog`` or ``relu``, float32."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _Learner(torch, found, kind, scale, causal, projection, seed).fit(width, steps)
    finally:
        torch.set_num_threads(threads)


class _Learner:
    """Entries as tensors, and the losses."""

    def __init__(
        self, torch: Any, found: Sequence[Entry], kind: str, scale: float, causal: bool,
        projection: np.ndarray | None, seed: int,
    ) -> None:  # fmt: skip
        self.torch, self.kind, self.scale, self.causal = torch, kind, scale, causal
        self.random = torch.Generator().manual_seed(seed)
        matrix = None if projection is None else torch.from_numpy(np.ascontiguousarray(projection))
        self.entries = []
        for e in found:
            query, rows, key, value = (torch.from_numpy(a) for a in (e.query, e.rows, e.key, e.value))
            value = value.expand(len(query), *value.shape)
            self.entries.append((query, rows, key, value if matrix is None else value @ matrix))
        self.size = float(np.mean([float(v.var(dim=1).mean()) for *_, v in self.entries])) or 1.0

    def fit(self, width: int, steps: int) -> dict[str, np.ndarray]:
        ends = [self.start(width)]
        for loss, rate in zip((self.cross_entropy, self.output), RATES, strict=True):
            ends.append(self.descend(ends[-1], loss, rate, steps // 2))
        best = min(ends, key=self.distance)
        return {n: p.numpy().copy() for n, p in best.items()}

    def start(self, width: int) -> dict[str, Tensor]:
        """[exp(x), exp(-x)] with x the roots of the scale times q and k, on random directions beyond the head dim."""
        torch = self.torch
        heads, dim = self.entries[0][0].shape[0], self.entries[0][0].shape[2]
        turned = torch.randn(dim, max(width - dim, 0), generator=self.random) / dim**0.5
        base = torch.cat([torch.eye(dim), turned], dim=1)[:, :width] * abs(self.scale) ** 0.5
        made = {"query_weight": base.expand(heads, dim, width).clone(), "key_weight": base.clone()}
        if self.kind == "relu":
            made |= {"query_bias": torch.full((heads, width), 0.5), "key_bias": torch.full((width,), 0.5)}
        return made

    def descend(
        self, start: Mapping[str, Tensor], loss: Callable[[Tensor, Tensor, Tensor], Tensor], rate: float, steps: int
    ) -> dict[str, Tensor]:
        torch = self.torch
        made = {n: p.clone().requires_grad_() for n, p in start.items()}
        optimiser = torch.optim.Adam(made.values(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
        for step in range(steps):
            query, rows, key, value = self.entries[step % len(self.entries)]
            chosen = torch.randint(len(rows), (ROWS,), generator=self.random)
            want, ours = self.both(query[:, chosen], rows[chosen], key, made)
            optimiser.zero_grad()
            loss(want, ours, value).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(made.values(), 1.0)
            optimiser.step()
            schedule.step()
        return {n: p.detach() for n, p in made.items()}

    def both(
        self, query: Tensor, rows: Tensor, key: Tensor, maps: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The softmax and our weights, [heads, R, N]."""
        torch = self.torch
        hidden = torch.arange(len(key))[None, :] > rows[:, None] if self.causal else None
        scores = query @ key.T * self.scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        q, k = query @ maps["query_weight"], key @ maps["key_weight"]
        if self.kind == "relu":
            q, k = torch.relu(q + maps["query_bias"][:, None]), torch.relu(k + maps["key_bias"])
        else:
            # A factor of a query, or of all keys, leaves the quotient as it is.
            q, k = torch.cat([q, -q], dim=-1), torch.cat([k, -k], dim=-1)
            q, k = torch.exp(q - q.amax(dim=-1, keepdim=True).detach()), torch.exp(k - k.max().detach())
        ours = q @ k.T
        if hidden is not None:
            ours = ours.masked_fill(hidden, 0.0)
        return torch.softmax(scores, dim=-1), ours / (ours.sum(dim=-1, keepdim=True) + EPSILON * (self.kind == "relu"))

    def cross_entropy(self, want: Tensor, ours: Tensor, value: Tensor) -> Tensor:
        loss: torch.Tensor = -(want * ours.clamp_min(1e-12).log()).sum(dim=-1).mean()
        return loss

    def output(self, want: Tensor, ours: Tensor, value: Tensor) -> Tensor:
        return ((ours - want) @ value).square().mean() / self.size

    def distance(self, maps: Mapping[str, Tensor]) -> float:
        """Mean squared distance of the outputs; infinite where there is a NaN."""
        total = 0.0
        with self.torch.no_grad():
            for query, rows, key, value in self.entries:
                want, ours = self.both(query[:, :LOOKED], rows[:LOOKED], key, maps)
                total += float(self.output(want, ours, value))
        return total / len(self.entries) if np.isfinite(total) else float("inf")
