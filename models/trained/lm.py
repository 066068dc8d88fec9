"""A decoder as Llama's: RMS norm, rotary positions, SwiGLU, the embedding matrix also as the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncompile.models.trained.blocks import Attention, GatedMlp, RmsNorm, first_weights
from attncompile.models.trained.recipe import LmRecipe


class Layer(nn.Module):
    """Attention and feed-forward net, each after a norm and beside a residual."""

    def __init__(self, recipe: LmRecipe) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(recipe.hidden)
        self.attention = Attention(recipe.hidden, recipe.heads)
        self.mlp_norm = RmsNorm(recipe.hidden)
        self.mlp = GatedMlp(recipe.hidden, recipe.ffn)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), (cos, sin))
        return x + self.mlp(self.mlp_norm(x))


class Lm(nn.Module):
    """``input_ids`` int64 [batch, tokens] to ``logits`` [batch, tokens, vocab]."""

    def __init__(self, recipe: LmRecipe) -> None:
        super().__init__()
        self.embedding = nn.Embedding(recipe.vocab, recipe.hidden)
        self.layers = nn.ModuleList(Layer(recipe) for _ in range(recipe.layers))
        self.norm = RmsNorm(recipe.hidden)
        self.theta, self.head_dim = recipe.rope_theta, recipe.hidden // recipe.heads
        first_weights(self, recipe.seed, recipe.layers)

    def features(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[batch, tokens, hidden], before the head; activations and rotation tables in ``dtype``."""
        x = self.embedding(input_ids).to(dtype)
        rates = self.theta ** (-torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim)
        positions = torch.arange(input_ids.shape[1], device=x.device).float()
        angles = positions[:, None] * rates[None, :]
        angles = torch.cat((angles, angles), dim=-1)[None, None]  # [1, 1, tokens, head dim]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.features(input_ids, self.embedding.weight.dtype)
        return functional.linear(x, self.embedding.weight)


def token_losses(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, float32 [batch, tokens]; 0 where the target is -100."""
    logits = functional.linear(features, head.to(features.dtype)).float()
    flat = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    return flat.view_as(targets)
