"""FLUX (diffusers): joint attention over text and image tokens with QK RMSNorm and rotary positions of 3 axes.

``image`` [batch, N, 16], ``text`` [batch, T, channels], ``pooled`` [batch, channels], ``timestep`` [batch],
``image_ids`` [N, 3] and ``text_ids`` [T, 3] in, ``sample`` [batch, N, 16] out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attncompile.core.errors import BadArguments
from attncompile.models.images import side_of, structured_images
from attncompile.models.recipe import Built, Options, Recipe
from attncompile.models.weights import seed_weights

if TYPE_CHECKING:
    import torch

_CHANNELS = 16


@dataclass(frozen=True, slots=True)
class _Size:
    """``rope`` splits the head dim over (text, row, column); ``joint`` and ``single`` count the blocks of each kind."""

    heads: int
    rope: tuple[int, int, int]
    joint: int
    single: int
    side: int
    text: int
    text_channels: int


_FLUX = {
    "tiny": _Size(heads=2, rope=(4, 6, 6), joint=1, single=1, side=6, text=10, text_channels=32),
    "small": _Size(heads=6, rope=(16, 24, 24), joint=2, single=2, side=16, text=64, text_channels=256),
    "base": _Size(heads=24, rope=(16, 56, 56), joint=1, single=1, side=32, text=512, text_channels=4096),
}


def _write_out_norms(module: torch.nn.Module) -> None:
    """Replaces torch's RMSNorm by its formula: the TorchScript exporter has no aten::rms_norm."""
    import torch

    class WrittenOut(torch.nn.Module):
        def __init__(self, norm: torch.nn.RMSNorm) -> None:
            super().__init__()
            self.weight = norm.weight
            self.eps = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.RMSNorm):
                setattr(parent, name, WrittenOut(child))


def _flux(options: Options) -> Built:
    import torch
    from diffusers import FluxTransformer2DModel

    if options.exporter == "torchscript" and options.dynamic:
        raise BadArguments(
            "flux: the TorchScript exporter writes rotary positions that fail at any other batch size",
            "leave out --dynamic, or use --exporter dynamo",
        )
    size = _FLUX[options.size]
    side = side_of(options.tokens, size.side)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=_CHANNELS,
        num_layers=options.layers or size.joint,
        num_single_layers=options.layers or size.single,
        attention_head_dim=sum(size.rope),
        num_attention_heads=size.heads,
        joint_attention_dim=size.text_channels,
        pooled_projection_dim=size.text_channels,
        guidance_embeds=False,
        axes_dims_rope=size.rope,
    )
    seed_weights(model, options.seed)
    if options.exporter == "torchscript":
        _write_out_norms(model)

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            image: torch.Tensor,
            text: torch.Tensor,
            pooled: torch.Tensor,
            timestep: torch.Tensor,
            image_ids: torch.Tensor,
            text_ids: torch.Tensor,
        ) -> Any:
            return self.model(
                hidden_states=image,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=timestep,
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]

    generator = torch.Generator().manual_seed(options.seed + 1)
    pixels = torch.from_numpy(structured_images(options.batch, _CHANNELS, side, options.seed + 1))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros(side * side), rows.flatten().float(), columns.flatten().float()], dim=1)
    inputs = {
        "image": pixels.flatten(2).transpose(1, 2).contiguous(),
        "text": torch.randn(options.batch, size.text, size.text_channels, generator=generator),
        "pooled": torch.randn(options.batch, size.text_channels, generator=generator),
        "timestep": torch.full((options.batch,), 0.5),
        "image_ids": ids,
        "text_ids": torch.zeros(size.text, 3),
    }
    batched = {name: {0: "batch"} for name in ("image", "text", "pooled", "timestep")}
    return Built(Denoiser(), inputs, ("sample",), batched)


FLUX = Recipe(
    name="flux",
    description="FLUX denoiser blocks: joint text and image attention, QK norm, 3-axis RoPE (diffusers)",
    sizes=tuple(_FLUX),
    build=_flux,
    kind="latent",
    uses=frozenset({"tokens", "layers"}),
)
