"""A vision transformer without a class token: the mean over patches is classified."""

from __future__ import annotations

from torch import Tensor, nn

from attncompile.models.trained.blocks import Attention, Mlp, first_weights, patches_of, with_positions
from attncompile.models.trained.recipe import VitRecipe


class Layer(nn.Module):
    """Attention and feed-forward net, each after a norm and beside a residual."""

    def __init__(self, recipe: VitRecipe) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(recipe.hidden)
        self.attention = Attention(recipe.hidden, recipe.heads)
        self.mlp_norm = nn.LayerNorm(recipe.hidden)
        self.mlp = Mlp(recipe.hidden, recipe.ffn)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Vit(nn.Module):
    """``images`` [batch, 3, side, side] to ``logits`` [batch, classes]; the side may be any multiple of the patch."""

    def __init__(self, recipe: VitRecipe) -> None:
        super().__init__()
        self.patch, self.hidden = recipe.patch, recipe.hidden
        self.embed = nn.Linear(3 * recipe.patch**2, recipe.hidden)
        self.layers = nn.ModuleList(Layer(recipe) for _ in range(recipe.layers))
        self.norm = nn.LayerNorm(recipe.hidden)
        self.head = nn.Linear(recipe.hidden, recipe.classes)
        first_weights(self, recipe.seed, recipe.layers)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(patches_of(images, self.patch))
        rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
        x = with_positions(x, rows, columns)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=1))
