"""Lists of blocks for cases: causal, a share of the blocks below the diagonal drawn from a seed, each head its own."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from attncompile.plugins.block_sparse.op import longest_first


@lru_cache(maxsize=4)
def kept(heads: int, tokens: int, block: int, density: float, seed: int = 0) -> np.ndarray:
    """Bool [heads, R, R]: which blocks are listed. Those on the diagonal always are."""
    count = tokens // block
    drawn = np.random.default_rng([seed, heads, tokens, block]).random((heads, count, count)) < density
    return np.tril(drawn, -1) | np.eye(count, dtype=bool)


def arrays(blocks: np.ndarray, block: int) -> dict[str, np.ndarray]:
    """The op's inputs: blocks on the diagonal are partial, the others full."""
    heads, count, _ = blocks.shape
    met = blocks.sum(axis=2).reshape(-1)
    end = np.cumsum(met)
    rows = np.stack([end - met, end - met + 1, end], axis=1).astype(np.int32).reshape(1, heads, count, 3)
    head, row, column = np.nonzero(blocks)
    # The one on the diagonal is the last of its row, and has to be the first.
    order = np.lexsort((column, column != row, row, head))
    bits = np.tril(np.ones((block, block), np.uint64)).reshape(block, -1, 32) << np.arange(32, dtype=np.uint64)
    words = bits.sum(-1).astype(np.uint32)
    return {
        "rows": rows, "columns": column[order].astype(np.int32), "kinds": np.zeros(len(column), np.int32),
        "masks": np.ascontiguousarray(words.view(np.int32)[None]), "order": longest_first(rows),
    }  # fmt: skip
