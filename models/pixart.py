"""PixArt (diffusers): self-attention over the latent and cross-attention to a caption with a padding mask.

``latent`` [batch, 4, s, s], ``caption`` [batch, text, channels], ``caption_mask`` int64 [batch, text] and ``timestep``
int64 [batch] in, ``sample`` [batch, 8, s, s] out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attncompile.core.errors import BadArguments
from attncompile.models.bert import padded_mask
from attncompile.models.dit import set_attention
from attncompile.models.images import side_of, structured_images
from attncompile.models.recipe import Built, Options, Recipe
from attncompile.models.weights import seed_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Size:
    heads: int
    head_dim: int
    layers: int
    side: int
    text: int
    caption: int


_PIXART = {
    "tiny": _Size(heads=4, head_dim=16, layers=2, side=8, text=12, caption=32),
    "small": _Size(heads=6, head_dim=64, layers=4, side=16, text=120, caption=512),
    "xl": _Size(heads=16, head_dim=72, layers=2, side=32, text=120, caption=4096),  # PixArt-alpha XL at 512 px
}


def _pixart(options: Options) -> Built:
    import torch
    from diffusers import PixArtTransformer2DModel

    if options.exporter == "dynamo" and options.dynamic:
        raise BadArguments(
            "pixart: torch.export cannot keep the batch dynamic (it reshapes the timestep by the latent's batch)",
            "leave out --dynamic, or use --exporter torchscript",
        )
    size = _PIXART[options.size]
    latent_side = 2 * side_of(options.tokens, size.side)
    model = PixArtTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        cross_attention_dim=size.heads * size.head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=options.layers or size.layers,
        sample_size=latent_side,
        patch_size=2,
        caption_channels=size.caption,
        use_additional_conditions=False,
    )
    set_attention(model, options)
    seed_weights(model, options.seed)

    class Extended(torch.nn.Module):
        """``linear`` with an extent of 1 for diffusers to squeeze: it squeezes axis 1 of [batch, N, channels], which
        does nothing in torch, and both exporters write a Squeeze there that no runtime loads.
        """

        def __init__(self, linear: torch.nn.Module) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> Any:
            return self.linear(x).unsqueeze(1)

    model.proj_out = Extended(model.proj_out)

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, latent: torch.Tensor, caption: torch.Tensor, caption_mask: torch.Tensor, timestep: torch.Tensor
        ) -> Any:
            return self.model(
                latent,
                encoder_hidden_states=caption,
                encoder_attention_mask=caption_mask,
                timestep=timestep,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]

    generator = torch.Generator().manual_seed(options.seed + 1)
    inputs = {
        "latent": torch.from_numpy(structured_images(options.batch, 4, latent_side, options.seed + 1)),
        "caption": torch.randn(options.batch, size.text, size.caption, generator=generator),
        "caption_mask": padded_mask(options.batch, size.text),
        "timestep": torch.full((options.batch,), 500, dtype=torch.int64),
    }
    return Built(Denoiser(), inputs, ("sample",), {name: {0: "batch"} for name in inputs})


PIXART = Recipe(
    name="pixart",
    description="PixArt denoiser: self-attention, and cross-attention to a padded caption (diffusers)",
    sizes=tuple(_PIXART),
    build=_pixart,
    kind="latent",
    uses=frozenset({"tokens", "layers", "eager"}),
)
