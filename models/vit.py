"""ViT and DINOv2 image classifiers (transformers): ``pixel_values`` [batch, 3, side, side] in, ``logits`` out."""

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
    """``side`` counts patches along one side of the image."""

    hidden: int
    heads: int
    layers: int
    patch: int
    side: int
    labels: int = 1000


_VIT = {
    "tiny": _Size(hidden=64, heads=4, layers=2, patch=8, side=6, labels=10),
    "small": _Size(hidden=384, heads=6, layers=12, patch=16, side=14),  # ViT-S/16 at 224 px
    "base": _Size(hidden=768, heads=12, layers=12, patch=16, side=14),  # ViT-B/16 at 224 px
}
_DINOV2 = {
    "tiny": _Size(hidden=64, heads=4, layers=2, patch=7, side=6, labels=10),
    "small": _Size(hidden=384, heads=6, layers=12, patch=14, side=16),  # DINOv2 ViT-S/14 at 224 px
    "large-image": _Size(hidden=384, heads=6, layers=12, patch=14, side=37),  # 518 px: 1,369 patches
}


def classifier(model: torch.nn.Module, image: int, options: Options) -> Built:
    """A transformers image classifier with one tensor in and one out; ``image`` is its side in pixels."""
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return self.model(pixel_values=pixel_values).logits

    pixels = torch.from_numpy(structured_images(options.batch, 3, image, options.seed + 1))
    return Built(Classifier(), {"pixel_values": pixels}, ("logits",), {"pixel_values": {0: "batch"}})


def _vit(options: Options) -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    size = _VIT[options.size]
    image = size.patch * side_of(options.tokens, size.side)
    config = ViTConfig(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_hidden_layers=options.layers or size.layers,
        intermediate_size=4 * size.hidden,
        image_size=image,
        patch_size=size.patch,
        num_labels=size.labels,
        attn_implementation=options.attention,
    )
    return classifier(seed_weights(ViTForImageClassification(config), options.seed), image, options)


def _dinov2(options: Options) -> Built:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    size = _DINOV2[options.size]
    image = size.patch * side_of(options.tokens, size.side)
    config = Dinov2Config(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_hidden_layers=options.layers or size.layers,
        image_size=image,
        patch_size=size.patch,
        num_labels=size.labels,
        attn_implementation=options.attention,
    )
    return classifier(seed_weights(Dinov2ForImageClassification(config), options.seed), image, options)


_USES = frozenset({"tokens", "layers", "eager"})

VIT = Recipe(
    name="vit",
    description="ViT image classifier; small = ViT-S/16, base = ViT-B/16, both at 224 px (transformers)",
    sizes=tuple(_VIT),
    build=_vit,
    kind="image",
    uses=_USES,
)
DINOV2 = Recipe(
    name="dinov2",
    description="DINOv2 image classifier with layer scale; large-image has 1,369 patches (transformers)",
    sizes=tuple(_DINOV2),
    build=_dinov2,
    kind="image",
    uses=_USES,
)
