"""What the image recipes share: example pixels with structure, and the meaning of ``--tokens`` for a square image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from attncompile.core.errors import BadArguments

if TYPE_CHECKING:
    from numpy.typing import NDArray


def side_of(tokens: int | None, default: int) -> int:
    """Patches along one side of a square image that has ``tokens`` patches; ``default`` where tokens is None."""
    if tokens is None:
        return default
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise BadArguments(
            f"--tokens {tokens} is not a square number of patches", f"use {side * side} or {(side + 1) ** 2}"
        )
    return side


def structured_images(count: int, channels: int, side: int, seed: int) -> NDArray[np.float32]:
    """Float32 [count, channels, side, side] with mean 0 and deviation 1: gradients, discs, stripes and a little noise.

    White noise has no neighbours that resemble one another, so it says nothing about a neighborhood's error.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side].astype(np.float64) / side
    images = np.zeros((count, channels, side, side))
    for image in images:
        colour = rng.normal(size=(4, channels, 1, 1))
        angle, frequency, phase = rng.uniform(0, np.pi), rng.uniform(2, 12), rng.uniform(0, 2 * np.pi)
        along = np.cos(angle) * x + np.sin(angle) * y
        image += colour[0] * along + colour[1] * 0.5 * np.sin(2 * np.pi * frequency * along + phase)
        for _ in range(3):
            cx, cy, radius = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.05, 0.3)
            disc = ((x - cx) ** 2 + (y - cy) ** 2 < radius**2).astype(np.float64)
            image += rng.normal(size=(channels, 1, 1)) * disc
        image += 0.05 * rng.normal(size=image.shape)
        image -= image.mean()
        image /= image.std()
    return images.astype(np.float32)
