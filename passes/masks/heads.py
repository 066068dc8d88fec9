"""Masks that differ between heads, and keys that count more than once, as factors of a mask at fixed lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attncompile.core.head_pattern import HeadMasks, KeyCounts
from attncompile.core.mask import Certificate, MaskPart
from attncompile.passes.masks.fit import edge_of


def by_head(visible: np.ndarray, how: Certificate) -> MaskPart:
    """The mask of each head itself: bool [heads, query, key]."""
    pattern = HeadMasks.of(visible, edge_of((visible.shape[1], visible.shape[2])))
    detail = f"{len(pattern.patterns)} masks for {pattern.heads} heads, {visible.mean():.1%} of the keys are seen"
    return MaskPart("block_sparse", replace(how, detail=f"{detail}: {how.detail}"), pattern=pattern)


def repeated_keys(counts: np.ndarray, how: Certificate) -> MaskPart | None:
    """The bias that says how often keys count, uint8 [heads, query, key]; None where all that are seen count once."""
    largest = int(counts.max())
    if largest <= 1:
        return None
    share = np.count_nonzero(counts > 1) / np.count_nonzero(counts)
    detail = f"{share:.1%} of the keys that are seen count more than once in a softmax, at most {largest} times"
    return MaskPart("bias", replace(how, detail=f"{detail}: {how.detail}"), additive=True, counts=KeyCounts.of(counts))
