"""Many images for ``vit``, four an input: ``attncompile vit.onnx --inputs attncompile/models/trained/many_images.py``,
of a file that was exported with ``--dtype fp32 --dynamic batch``.

Whether a classifier's answers stay has to be asked of hundreds: of 672 images one may change, of 2,016 ten, and it is
still shown with 99% confidence that at most 1% of all do. There are as many to choose on as are held out, in turn;
``evaluate`` scores others. ``VIT_INPUTS`` in the environment is how many inputs each part has, 168 without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from attncompile.models.inputs import Sample
from attncompile.models.trained import draw
from attncompile.models.trained.inputs import SEEDS
from attncompile.models.trained.recipe import load

BATCH = 4
COUNT = int(os.environ.get("VIT_INPUTS", "168"))
"""Inputs of each part."""
_DRAWN = 32
"""Images that are painted at once: on a GPU where there is one, else by all threads."""


def load_data(count: int = COUNT) -> Iterator[Sample]:
    """``count`` inputs of each part in turn: images float32 [4, 3, side, side]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = [torch.Generator().manual_seed(seed) for seed in SEEDS.values()]
    for start in range(0, count * BATCH, _DRAWN):
        drawn = [draw.scene(_DRAWN, load().vit.side, part, device, full=True)[0].cpu().numpy() for part in parts]
        for at in range(0, min(_DRAWN, count * BATCH - start), BATCH):
            yield from ({"images": images[at : at + BATCH]} for images in drawn)
