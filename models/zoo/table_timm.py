"""Entries made of models of timm."""

from __future__ import annotations

from attncompile.models.zoo.builders import timm, twice
from attncompile.models.zoo.entry import Entry

_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 4}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2,), "num_heads": (2,)}

_ONCE: tuple[Entry, ...] = (
    timm("vit_tiny_patch16_224", 32, _VIT),
    timm("deit3_small_patch16_224", 32, _VIT),
    timm("vit_base_patch14_reg4_dinov2", 32, _VIT),
    timm("vit_base_patch16_siglip_224", 32, {**_VIT, "depth": 1}),
    timm("beitv2_base_patch16_224", 32, _VIT),
    timm("vit_relpos_small_patch16_224", 32, _VIT),
    timm("cait_xxs24_224", 32, _VIT),
    timm("xcit_nano_12_p16_224", 32, _VIT),
    timm("convit_tiny", 32, {**_VIT, "local_up_to_layer": 1}, modules=("MHSA",)),
    timm("swin_tiny_patch4_window7_224", 32, _SWIN, modules=("WindowAttention",)),
    timm("swinv2_tiny_window8_256", 32, _SWIN, modules=("WindowAttention",)),
    timm("pvt_v2_b0", 64, {}),
    timm("efficientvit_b0", 64, {}, linear=("LiteMLA",)),
)  # fmt: skip
_TORCHSCRIPT: tuple[Entry, ...] = (
    timm("samvit_base_patch16_224", 32, {**_VIT, "window_size": 2, "global_attn_indexes": (1,)},
         modules=("Attention",)),
    timm("twins_svt_small", 64, {"img_size": 64, "embed_dims": (16, 32), "num_heads": (2, 4), "depths": (2, 2),
                                 "wss": (4, 4), "mlp_ratios": (2, 2), "sr_ratios": (4, 2)}),
    timm("efficientvit_m0", 64, {}, modules=("CascadedGroupAttention",)),
    timm("crossvit_9_240", 240, {}, modules=("CrossAttention",)),
    timm("mobilevitv2_050", 64, {}, family="negative"),
    timm("levit_128s", 96, {"img_size": 96}, modules=("Attention", "AttentionDownsample")),
    timm("davit_tiny", 64, {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 4)}),
    timm("tnt_s_patch16_224", 32, {"img_size": 32, "depth": 1}, modules=("Attention",)),
    timm("edgenext_xx_small", 64, {}, family="negative"),
)  # fmt: skip
_DYNAMO: tuple[Entry, ...] = (timm("eva02_tiny_patch14_224", 32, _VIT),)

TIMM: tuple[Entry, ...] = (
    *(form for entry in _ONCE for form in twice(entry)),
    *(twice(entry)[1] for entry in _TORCHSCRIPT),
    *_DYNAMO,
)
