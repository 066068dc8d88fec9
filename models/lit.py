"""LiT: DiT (diffusers) with linear attention, after arXiv:2501.12976: relu features of few heads, and a depthwise
convolution of the values beside. Inputs and outputs are those of ``dit``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attncompile.models.dit import denoiser
from attncompile.models.images import side_of
from attncompile.models.recipe import Built, Options, Recipe
from attncompile.models.weights import seed_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Size:
    """``heads`` of the linear attention; ``side`` counts patches along one side of the latent."""

    width: int
    heads: int
    layers: int
    side: int
    labels: int = 1000


_LIT = {
    "tiny": _Size(width=64, heads=2, layers=2, side=8, labels=10),
    "small": _Size(width=384, heads=2, layers=12, side=16),  # LiT-S/2 at 256 px
    "xl-512": _Size(width=1152, heads=2, layers=2, side=32),  # LiT-XL/2's shape at 512 px, 2 of 28 layers
}
KERNEL = 5
"""Side of the convolution."""


def attention(width: int, heads: int, side: int) -> torch.nn.Module:
    """[batch, side * side, width] -> the same."""
    from torch import nn

    class ReluLinearAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.near = nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2, groups=width)

        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            b, n, c = hidden_states.shape
            q, k, v = self.qkv(hidden_states).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
            q, k = q.relu(), k.relu()
            below = q @ k.sum(dim=2).unsqueeze(-1) + 1e-6
            y = (q @ (k.transpose(-1, -2) @ v) / below).transpose(1, 2).reshape(b, n, c)
            values = v.transpose(-1, -2).reshape(b, c, side, side)
            found: torch.Tensor = self.out(y + self.near(values).flatten(2).transpose(1, 2))
            return found

    return ReluLinearAttention()


def _lit(options: Options) -> Built:
    size = _LIT[options.size]
    side = side_of(options.tokens, size.side)
    model, built = denoiser(
        options, size.heads, size.width // size.heads, options.layers or size.layers, side, size.labels
    )
    for block in model.get_submodule("transformer_blocks").children():
        block.attn1 = attention(size.width, size.heads, side)
    seed_weights(model, options.seed)
    return built


LIT = Recipe(
    name="lit",
    description="LiT: DiT with relu linear attention of few heads and a depthwise convolution (diffusers)",
    sizes=tuple(_LIT),
    build=_lit,
    kind="latent",
    uses=frozenset({"tokens", "layers"}),
)
