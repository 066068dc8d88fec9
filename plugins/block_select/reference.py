"""Selection by its definition: one tile, one block, one row at a time, in float64. Slow and plain on purpose."""

from __future__ import annotations

import math

import numpy as np


def scores(
    query: np.ndarray, key: np.ndarray, stride: int, block: int, causal: bool = False, scale: float | None = None,
    reduce: str = "sum", span: int = 1,
) -> np.ndarray:  # fmt: skip
    """query [B, Nq, H, D], key [B, Nk, G, D] -> float64 [B, H, ceil(Nq / stride), ceil(Nk / block)].

    XAttention (arXiv:2503.16428): antidiagonals of stride x stride squares, scaled by 1 / stride. AnchorAttention
    (arXiv:2505.23520): ``reduce`` max, of mean queries that stand for ``span`` = ``block`` keys each.
    """
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    batch, queries, heads, dim = query.shape
    keys, groups = key.shape[1], key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    rows, columns = math.ceil(queries / stride), math.ceil(keys / block)
    out = np.full((batch, heads, rows, columns), -np.inf)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for a in range(rows):
                of_block: dict[int, list[float]] = {}
                for c in range(math.ceil(keys / stride)):
                    if causal and c * stride >= (a + 1) * stride * span:
                        continue  # the tile begins after the last key that the queries of ``a`` stand for
                    total = 0.0
                    for i in range(stride):
                        at, place = a * stride + stride - 1 - i, c * stride + i
                        if at < queries and place < keys:
                            total += float(query[b, at, h] @ key[b, place, g])
                    of_block.setdefault(c * stride // block, []).append(scale / stride * total)
                for c, found in of_block.items():
                    top = max(found)
                    out[b, h, a, c] = top if reduce == "max" else top + math.log(sum(math.exp(x - top) for x in found))
    return out


def pooled(x: np.ndarray, block: int) -> np.ndarray:
    """[B, N, H, D] -> float64 [B, ceil(N / block), H, D]: the mean of each block's tokens, as many as there are."""
    x = np.asarray(x, np.float64)
    return np.stack([x[:, at : at + block].mean(axis=1) for at in range(0, x.shape[1], block)], axis=1)


def mass(given: np.ndarray, tiles: int) -> np.ndarray:
    """Scores [B, H, T, C] -> [B, H, ceil(T / tiles), C]: what each block of keys weighs in a row of blocks."""
    given = np.asarray(given, np.float64)
    batch, heads, rows, columns = given.shape
    out = np.zeros((batch, heads, math.ceil(rows / tiles), columns))
    for b, h, r in np.ndindex(*out.shape[:3]):
        members = range(r * tiles, min((r + 1) * tiles, rows))
        for a in members:
            weights = np.exp(given[b, h, a] - given[b, h, a].max())
            out[b, h, r] += weights / weights.sum() / len(members)
    return out


def order(weights: np.ndarray, row: int, causal: bool, sinks: int, window: int) -> tuple[list[int], int]:
    """The blocks that a row may see, ranked, and how many of them are always kept. ``weights`` [C]."""
    seen = [c for c in range(len(weights)) if not causal or c <= row]
    always = [c for c in seen if c < sinks or abs(c - row) <= window]
    rest = sorted((c for c in seen if c not in always), key=lambda c: (-weights[c], c))
    return [*always, *rest], len(always)


def kept(
    weights: np.ndarray, amount: np.ndarray, rule: str, causal: bool = False, sinks: int = 1, window: int = 0
) -> np.ndarray:
    """weights [B, H, R, C], amount [H] or [1] -> bool [B, H, R, C]. Of rule anchor ``weights`` are scores."""
    out = np.zeros(weights.shape, bool)
    for b, h, r in np.ndindex(*weights.shape[:3]):
        asked = float(amount[h if len(amount) > 1 else 0])
        ranked, always = order(weights[b, h, r], r, causal, sinks, window)
        if rule == "anchor":
            anchor = max((float(weights[b, h, r, c]) for c in ranked[:always]), default=-math.inf)
            least = float(np.float32(anchor - asked))
            for place, c in enumerate(ranked):
                out[b, h, r, c] = place < always or weights[b, h, r, c] >= least
            continue
        count = math.ceil(asked * len(ranked) - 2**-10)
        if rule == "mass":
            count = len(ranked)
            for n in range(len(ranked)):
                if weights[b, h, r, ranked[:n]].sum() >= asked:
                    count = n
                    break
        out[b, h, r, ranked[: max(count, always)]] = True
    return out


def listed(rows: np.ndarray, columns: np.ndarray, count: int, causal: bool) -> np.ndarray:
    """Bool [B, H, R, count]: the blocks that lists name. Raises ``AssertionError`` for lists that break the rules."""
    out = np.zeros((*rows.shape[:3], count), bool)
    taken: set[int] = set()
    for b, h, r in np.ndindex(*rows.shape[:3]):
        first, full, end = (int(x) for x in rows[b, h, r])
        assert first <= full <= end and not taken & set(range(first, end)), "entries of two rows overlap"
        taken |= set(range(first, end))
        found = [int(c) for c in columns[first:end]]
        partial = r if causal else count - 1
        assert all(c == partial for c in found[: full - first]) and full - first <= 1
        assert partial not in found[full - first :], "a block that is not whole stands among whole ones"
        assert found[full - first :] == sorted(set(found[full - first :]))
        out[b, h, r, found] = True
    return out
