"""DiT (diffusers): ``latent`` [batch, 4, s, s], ``timestep`` and ``class_labels`` int64 [batch] in, ``sample`` out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attncompile.models.images import side_of, structured_images
from attncompile.models.recipe import Built, Options, Recipe
from attncompile.models.weights import seed_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Size:
    """``side`` counts patches along one side of the latent; a patch is 2 x 2."""

    heads: int
    head_dim: int
    layers: int
    side: int
    labels: int = 1000


_DIT = {
    "tiny": _Size(heads=4, head_dim=16, layers=2, side=8, labels=10),
    "small": _Size(heads=6, head_dim=64, layers=12, side=16),  # DiT-S/2 at 256 px
    "xl": _Size(heads=16, head_dim=72, layers=2, side=16),  # DiT-XL/2's shape at 256 px, 2 of 28 layers
    "xl-512": _Size(heads=16, head_dim=72, layers=2, side=32),  # the same at 512 px: 1,024 tokens
}


def set_attention(model: torch.nn.Module, options: Options) -> None:
    """Chooses between diffusers' two attention processors: fused by torch, or written out as batched products."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor() if options.attention == "eager" else AttnProcessor2_0())


def denoiser(
    options: Options, heads: int, head_dim: int, layers: int, side: int, labels: int
) -> tuple[torch.nn.Module, Built]:  # fmt: skip
    """The transformer, and a module around it that takes its inputs by position, with examples of them."""
    import torch
    from diffusers import DiTTransformer2DModel

    latent_side = 2 * side
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=latent_side,
        patch_size=2,
        num_embeds_ada_norm=labels,
    )

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, latent: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> Any:
            return self.model(latent, timestep=timestep, class_labels=class_labels, return_dict=False)[0]

    inputs = {
        "latent": torch.from_numpy(structured_images(options.batch, 4, latent_side, options.seed + 1)),
        "timestep": torch.full((options.batch,), 500, dtype=torch.int64),
        "class_labels": torch.arange(options.batch, dtype=torch.int64) % labels,
    }
    return model, Built(Denoiser(), inputs, ("sample",), {name: {0: "batch"} for name in inputs})


def _dit(options: Options) -> Built:
    size = _DIT[options.size]
    side = side_of(options.tokens, size.side)
    model, built = denoiser(options, size.heads, size.head_dim, options.layers or size.layers, side, size.labels)
    set_attention(model, options)
    seed_weights(model, options.seed)
    return built


DIT = Recipe(
    name="dit",
    description="DiT class-conditional denoiser; xl and xl-512 have DiT-XL/2's shape with few layers (diffusers)",
    sizes=tuple(_DIT),
    build=_dit,
    kind="latent",
    uses=frozenset({"tokens", "layers", "eager"}),
)
