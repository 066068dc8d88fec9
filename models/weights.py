"""Seeded weights with structure: what libraries initialise to 0 or 1 hides errors (a lost bias changes nothing)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_weights(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fills every parameter from one generator, in the order of ``named_parameters``, and sets eval mode.

    Matrices get N(0, 1 / fan_in), so that attention logits have a deviation near 1 and the softmax is not uniform;
    vectors get their library value (1 for norms, 0 for biases) plus N(0, 0.05^2).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                fan_in = parameter.numel() // parameter.shape[0]
                parameter.normal_(0.0, 1.0 / math.sqrt(max(fan_in, 1)), generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()
