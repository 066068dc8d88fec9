"""Lists of blocks from a seed, and what they say as one matrix. Shares no code with the op's own lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Drawn:
    """How lists are drawn. ``sets``: batch entries and heads that have their own. A block is listed with probability
    ``density``, as a partial one with probability ``partial``, beside those that reach beyond the last key.
    ``empty``: every other row of blocks has none. ``causal``: blocks above the diagonal are not listed, and those on it
    show what is not later. ``kinds``: different masks; ``times``: how often keys count at most. ``order``: random,
    longest (first), or none. ``spread``: rows lie anywhere in the lists, with entries between them that no row has.
    """

    sets: tuple[int, int] = (1, 1)
    density: float = 0.5
    partial: float = 0.4
    empty: bool = False
    causal: bool = False
    kinds: int = 3
    times: int = 1
    order: str = "random"
    spread: bool = True

    def arrays(self, queries: int, keys: int, block: int, seed: int) -> dict[str, np.ndarray]:
        """The op's inputs by their formal names."""
        rng = np.random.default_rng([seed, queries, keys, block])
        high, wide = -(-queries // block), -(-keys // block)
        masks = rng.random((self.kinds, block, block)) < 0.5
        masks[0] = np.tril(np.ones((block, block), bool))
        if self.kinds > 1:
            masks[1] = True
        batch, heads = self.sets
        rows = np.zeros((batch * heads * high, 3), np.int32)
        entries: list[tuple[int, int]] = []
        for n in rng.permutation(len(rows)) if self.spread else range(len(rows)):
            if self.spread:
                entries += [(int(rng.integers(wide)), int(rng.integers(self.kinds))) for _ in range(rng.integers(3))]
            r = int(n) % high
            partial, full = [], []
            for c in range(wide):
                if self.causal and c == r:
                    partial.append((c, 0))
                elif rng.random() < self.density and not (self.causal and c > r):
                    hidden = (c + 1) * block > keys or rng.random() < self.partial
                    (partial if hidden else full).append((c, int(rng.integers(self.kinds))))
            if self.empty and r % 2:
                partial, full = [], []
            rng.shuffle(full)
            rng.shuffle(partial)
            start = len(entries)
            entries += [(int(c), int(k)) for c, k in [*partial, *full]]
            rows[n] = start, start + len(partial), len(entries)
        entries = entries or [(0, 0)]
        found = {
            "rows": rows.reshape(batch, heads, high, 3), "columns": np.array([c for c, _ in entries], np.int32),
            "kinds": np.array([k for _, k in entries], np.int32), "masks": words(masks),
        }  # fmt: skip
        if self.order == "random":
            found["order"] = rng.permutation(len(rows)).astype(np.int32)
        elif self.order == "longest":
            found["order"] = np.argsort(rows[:, 0] - rows[:, 2], kind="stable").astype(np.int32)
        if self.times > 1:
            found["counts"] = rng.integers(1, self.times + 1, len(entries)).astype(np.int32)
        return found


def words(masks: np.ndarray) -> np.ndarray:
    """Bool [U, block, block] as the op stores it, int32 [U, block, block / 32]."""
    bits = masks.reshape(*masks.shape[:2], -1, 32).astype(np.int64) << np.arange(32)
    return bits.sum(-1).astype(np.uint32).view(np.int32)


def matrix(arrays: dict[str, np.ndarray], queries: int, keys: int, block: int) -> np.ndarray:
    """Int64 [b, h, Nq, Nk]: how often each query counts each key."""
    rows, masks = arrays["rows"], arrays["masks"]
    b, h, high, _ = rows.shape
    wide = -(-keys // block)
    shown = (masks.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32) & 1).reshape(len(masks), block, block)
    blocks = np.zeros((b * h * high, wide, block, block), np.int64)
    for n, (first, full, end) in enumerate(rows.reshape(-1, 3)):
        part = slice(first, end)
        bits = np.ones((end - first, block, block), np.int64)
        bits[: full - first] = shown[arrays["kinds"][first:full]]
        if "counts" in arrays:
            bits *= arrays["counts"][part, None, None]
        np.add.at(blocks[n], arrays["columns"][part], bits)
    whole = blocks.reshape(b, h, high, wide, block, block).transpose(0, 1, 2, 4, 3, 5)
    return whole.reshape(b, h, high * block, wide * block)[:, :, :queries, :keys]
