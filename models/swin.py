"""Swin image classifier (transformers): shifted windows, a position bias. ``pixel_values`` in, ``logits`` out."""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.models.recipe import Built, Options, Recipe
from attncompile.models.vit import classifier
from attncompile.models.weights import seed_weights


@dataclass(frozen=True, slots=True)
class _Size:
    image: int
    patch: int
    window: int
    embed: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    labels: int = 1000


_SWIN = {
    "tiny": _Size(image=32, patch=2, window=4, embed=32, depths=(2, 2), heads=(2, 4), labels=10),
    "small": _Size(image=224, patch=4, window=7, embed=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),  # Swin-T
}


def _swin(options: Options) -> Built:
    from transformers import SwinConfig, SwinForImageClassification

    size = _SWIN[options.size]
    config = SwinConfig(
        image_size=size.image,
        patch_size=size.patch,
        window_size=size.window,
        embed_dim=size.embed,
        depths=list(size.depths),
        num_heads=list(size.heads),
        num_labels=size.labels,
        attn_implementation=options.attention,
    )
    return classifier(seed_weights(SwinForImageClassification(config), options.seed), size.image, options)


SWIN = Recipe(
    name="swin",
    description="Swin image classifier with shifted windows and relative position bias; small = Swin-T (transformers)",
    sizes=tuple(_SWIN),
    build=_swin,
    kind="image",
    uses=frozenset({"eager"}),
)
