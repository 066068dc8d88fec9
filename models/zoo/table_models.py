"""Entries of transformers and diffusers with experts, sinks, sparse attention, caches and joint attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attncompile.models.zoo.builders import GROUPED, NO_CACHE, PATCHES, PLAIN, cache, diffusion, image, text, twice
from attncompile.models.zoo.entry import Entry

_LEFT: dict[str, Any] = {"mask": "left", "call": NO_CACHE}
_EXPERTS = {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
_DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 7,
    "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
                        "depths": [1, 1, 1, 1], "out_features": ["stage4"]},
}  # fmt: skip
_MASK2FORMER = {
    "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "encoder_layers": 1,
    "decoder_layers": 3, "num_attention_heads": 4, "dim_feedforward": 32, "num_queries": 7,
    "backbone_config": {"model_type": "swin", "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1],
                        "num_heads": [1, 1, 2, 2], "window_size": 4,
                        "out_features": ["stage1", "stage2", "stage3", "stage4"]},
}  # fmt: skip
_MOBILEVIT = {
    "image_size": 64, "hidden_sizes": [24, 32, 48], "neck_hidden_sizes": [8, 16, 24, 24, 24, 24, 32],
    "num_attention_heads": 2,
}  # fmt: skip
_BIGBIRD = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 64}

_HUNYUAN = diffusion(
    "hunyuan-video", "HunyuanVideoTransformer3DModel",
    {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
     "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 2, "patch_size_t": 1,
     "guidance_embeds": False, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4)},
    {"hidden_states": (2, 4, 2, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 7, 16),
     "encoder_attention_mask": (2, 7), "pooled_projections": (2, 8)},
)  # fmt: skip
_SANA = diffusion(
    "sana", "SanaTransformer2DModel",
    {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
     "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12,
     "sample_size": 8, "patch_size": 1},
    {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 7, 12), "timestep": (2,)},
    linear=("SanaLinearAttnProcessor2_0",),
)  # fmt: skip
UNET = diffusion(
    "unet", "UNet2DConditionModel",
    {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
     "norm_num_groups": 4, "cross_attention_dim": 24, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
     "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2},
    {"sample": (1, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 7, 24)},
)  # fmt: skip

MODELS: tuple[Entry, ...] = (
    *twice(text("gpt-oss", "decoder", "GptOssModel", "GptOssConfig", attention="eager", experts=True,
                settings={**_EXPERTS, "head_dim": 16, "sliding_window": 7}, **_LEFT)),
    text("mixtral", "decoder", "MixtralModel", "MixtralConfig", experts=True,
         settings={**_EXPERTS, "sliding_window": None}, **_LEFT),
    text("longformer", "sparse", "LongformerModel", "LongformerConfig", exporter="torchscript", opset=17,
         settings={"attention_window": 8, "max_position_embeddings": 66}, attention="eager",
         sparse=("LongformerSelfAttention",), refused={"unknown-op": 2}),
    text("longformer-chunks", "sparse", "LongformerModel", "LongformerConfig", exporter="torchscript", opset=17,
         settings={"attention_window": 8, "max_position_embeddings": 66, "onnx_export": True}, attention="eager",
         sparse=("LongformerSelfAttention",)),
    *(text(f"longformer-{side}", "sparse", "LongformerModel", "LongformerConfig", exporter="torchscript", opset=17,
           settings={"attention_window": 8, "max_position_embeddings": 66, "onnx_export": True}, attention="eager",
           mask=side, sparse=("LongformerSelfAttention",)) for side in ("left", "right")),
    *twice(text("bigbird", "sparse", "BigBirdModel", "BigBirdConfig", settings=_BIGBIRD, attention="eager",
                sparse=("BigBirdBlockSparseAttention",))),
    *twice(Entry("plain-neighborhood", PLAIN + "neighbourhood", "sparse", sparse=("_Neighbourhood",))),
    text("mamba2", "negative", "Mamba2Model", "Mamba2Config", call=NO_CACHE, attention="eager",
         settings={"state_size": 4, "num_heads": 12, "head_dim": 8, "expand": 2, "chunk_size": 8, "n_groups": 1}),
    text("fnet", "negative", "FNetModel", "FNetConfig", attention="eager"),
    text("xlnet", "decoder", "XLNetModel", "XLNetConfig", bare=True, attention="eager",
         settings={"vocab_size": 64, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 64},
         modules=("XLNetRelativeAttention",)),
    text("xglm", "decoder", "XGLMModel", "XGLMConfig", bare=True, attention="eager", modules=("XGLMAttention",),
         settings={"vocab_size": 64, "d_model": 48, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64,
                   "max_position_embeddings": 64}, **_LEFT),
    text("deberta", "encoder", "DebertaModel", "DebertaConfig", mask="right", attention="eager",
         modules=("DisentangledSelfAttention",)),
    *twice(image("vit-mae", "ViTMAEModel", "ViTMAEConfig", {**PATCHES, "mask_ratio": 0.5})),
    *twice(image("mobilevit", "MobileViTModel", "MobileViTConfig", _MOBILEVIT, side=64, attention="eager",
                 modules=("MobileViTSelfAttention",))),
    image("dpt", "DPTModel", "DPTConfig", PATCHES),
    image("yolos", "YolosModel", "YolosConfig", {**PATCHES, "image_size": [32, 32], "num_detection_tokens": 3}),
    image("detr", "DetrModel", "DetrConfig", _DETR, side=64, attention="eager", varied=("pixel_values",)),
    image("mask2former", "Mask2FormerModel", "Mask2FormerConfig", _MASK2FORMER, side=64, attention="eager",
          output="transformer_decoder_last_hidden_state", modules=("Mask2FormerAttention",), varied=("pixel_values",)),
    *twice(Entry("plain-masked-cross", PLAIN + "masked_cross", "plain", varied=("x0", "x1"))),
    *twice(Entry("plain-perceiver", PLAIN + "latents", "plain")),
    *twice(_SANA), replace(_SANA, dtype="fp16"), _HUNYUAN,
    diffusion("cogvideox", "CogVideoXTransformer3DModel",
              {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
               "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 1, "sample_width": 8, "sample_height": 8,
               "sample_frames": 5, "patch_size": 2, "max_text_seq_length": 7},
              {"hidden_states": (1, 2, 4, 8, 8), "encoder_hidden_states": (1, 7, 16), "timestep": (1,)}),
    diffusion("aura-flow", "AuraFlowTransformer2DModel",
              {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
               "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 16,
               "caption_projection_dim": 32, "out_channels": 4, "pos_embed_max_size": 64},
              {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 7, 16), "timestep": (1,)}),
    diffusion("ltx", "LTXVideoTransformer3DModel",
              {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
               "cross_attention_dim": 24, "num_layers": 1, "caption_channels": 16},
              {"hidden_states": (2, 32, 4), "encoder_hidden_states": (2, 7, 16), "timestep": (2,),
               "encoder_attention_mask": (2, 7)}, call={"num_frames": 2, "height": 4, "width": 4}),
)  # fmt: skip

_LLAMA = {"model": "LlamaModel", "config": "LlamaConfig", "settings": GROUPED}
_MISTRAL = {"model": "MistralModel", "config": "MistralConfig", "settings": {**GROUPED, "sliding_window": 7}}
_GPT2 = {"model": "GPT2Model", "config": "GPT2Config"}
_SHORT: dict[str, Any] = {"past": 5, "padded": 3, "mask": True}
_STATIC: dict[str, Any] = {"static": True, "varied": ("position", "input_ids")}

CACHES: tuple[Entry, ...] = (
    *twice(cache("llama-decode", _LLAMA, mask=True)),
    *twice(cache("llama-prefill", _LLAMA, new=6, mask=True)),
    cache("llama-decode", _LLAMA, opset=23),
    cache("llama-decode", _LLAMA, exporter="torchscript", opset=17, dynamic=("batch", "past")),
    cache("llama-decode", _LLAMA, mask=True, exporter="torchscript", opset=17, dtype="fp16"),
    *twice(cache("mistral-decode", _MISTRAL, **_SHORT)),
    *twice(cache("mistral-prefill", _MISTRAL, new=6, **_SHORT)),
    *twice(cache("gpt2-decode", _GPT2, mask=True)),
    *twice(cache("gpt2-prefill", _GPT2, new=6, mask=True)),
    *twice(cache("llama-static-decode", _LLAMA, **_STATIC)),
    *twice(cache("llama-static-prefill", _LLAMA, new=6, **_STATIC)),
    cache("llama-merged", _LLAMA, mask=True, new=3, other={"new": 6, "past": 0}, exporter="torchscript", opset=17,
          dynamic=("batch", "sequence", "past", "total"), after=("merged",)),
    cache("gpt2-merged", _GPT2, other={"new": 6, "past": 0}, exporter="torchscript", opset=17,
          dynamic=("batch", "sequence", "past"), after=("merged",)),
)  # fmt: skip
