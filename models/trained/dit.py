"""A diffusion transformer (DiT, arXiv 2212.09748) in pixel space, trained as a rectified flow (arXiv 2209.03003).

One matrix makes the modulation of all layers, to which each adds a table of its own (PixArt-alpha, arXiv 2310.00426).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncompile.models.trained.blocks import Attention, Mlp, first_weights, patches_of, with_positions
from attncompile.models.trained.recipe import DitRecipe


class Layer(nn.Module):
    """Attention and feed-forward net; ``modulation`` [batch, 6, hidden] shifts, scales and gates them."""

    def __init__(self, recipe: DitRecipe) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(recipe.hidden, elementwise_affine=False)
        self.attention = Attention(recipe.hidden, recipe.heads)
        self.mlp_norm = nn.LayerNorm(recipe.hidden, elementwise_affine=False)
        self.mlp = Mlp(recipe.hidden, recipe.ffn)
        self.table_zero = nn.Parameter(torch.zeros(6, recipe.hidden))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (modulation + self.table_zero.to(x.dtype)).split(1, dim=1)
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.mlp_norm(x) * (1 + scale2) + shift2)


class Dit(nn.Module):
    """``sample`` [batch, 3, side, side], ``time`` [batch] from 0 (image) to 1 (noise), ``label`` int64 [batch] to the
    velocity [batch, 3, side, side] from image to noise.
    """

    def __init__(self, recipe: DitRecipe) -> None:
        super().__init__()
        self.patch, self.hidden = recipe.patch, recipe.hidden
        self.embed = nn.Linear(3 * recipe.patch**2, recipe.hidden)
        self.label = nn.Embedding(recipe.classes, recipe.hidden)
        self.time_in = nn.Linear(recipe.hidden, recipe.hidden)
        self.time_out = nn.Linear(recipe.hidden, recipe.hidden)
        self.modulate_zero = nn.Linear(recipe.hidden, 6 * recipe.hidden)
        self.layers = nn.ModuleList(Layer(recipe) for _ in range(recipe.layers))
        self.norm = nn.LayerNorm(recipe.hidden)
        self.head_zero = nn.Linear(recipe.hidden, 3 * recipe.patch**2)
        first_weights(self, recipe.seed, recipe.layers)

    def forward(self, sample: Tensor, time: Tensor, label: Tensor) -> Tensor:
        batch, _, height, width = sample.shape
        rows, columns = height // self.patch, width // self.patch
        x = self.embed(patches_of(sample, self.patch))
        x = with_positions(x, rows, columns)
        half = self.hidden // 2
        rates = torch.exp(-math.log(1e4) * torch.arange(half, device=x.device).float() / half)
        angles = 1000.0 * time.float()[:, None] * rates[None, :]
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(x.dtype)
        condition = self.time_out(functional.silu(self.time_in(waves))) + self.label(label).to(x.dtype)
        modulation = self.modulate_zero(functional.silu(condition)).view(batch, 6, self.hidden)
        for layer in self.layers:
            x = layer(x, modulation)
        out = self.head_zero(self.norm(x)).view(batch, rows, columns, 3, self.patch, self.patch)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, height, width)
