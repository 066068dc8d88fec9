"""Whether a model classifies: one answer for each entry of its batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def answers(feeds: Sequence[Mapping[str, np.ndarray]], outputs: Iterable[Sequence[int] | None]) -> int:
    """How many things each of ``feeds`` asks to classify: the batch that all inputs have, if all ``outputs`` (shapes,
    None where one is not known) are [batch, classes]. Else 0: tokens of a text, say, are not independent.
    """
    batches = {value.shape[:1] for feed in feeds for value in feed.values()}
    if len(batches) != 1 or () in batches:
        return 0
    (batch,) = batches
    shapes = [None if shape is None else tuple(shape) for shape in outputs]
    return int(batch[0]) if shapes and all(s is not None and len(s) == 2 and s[:1] == batch for s in shapes) else 0
