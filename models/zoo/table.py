"""The entries of the zoo, as one explicit tuple."""

from __future__ import annotations

from attncompile.models.zoo.builders import GROUPED, NO_CACHE, PATCHES, PLAIN, RECIPE, diffusion, image, text, twice
from attncompile.models.zoo.entry import Entry
from attncompile.models.zoo.table_forms import forms
from attncompile.models.zoo.table_linear import LINEAR
from attncompile.models.zoo.table_models import CACHES, MODELS, UNET
from attncompile.models.zoo.table_timm import TIMM

_RECIPES: tuple[Entry, ...] = (
    Entry("vit", RECIPE, "vision"),
    Entry("vit", RECIPE, "vision", opset=23),
    Entry("vit", RECIPE, "vision", exporter="torchscript", opset=17, dynamic=("batch",)),
    Entry("vit", RECIPE, "vision", dtype="fp16"),
    Entry("vit", RECIPE, "vision", exporter="torchscript", opset=14, attention="eager", dtype="fp16"),
    Entry("dinov2", RECIPE, "vision", exporter="torchscript", opset=17),
    *twice(Entry("swin", RECIPE, "vision")),
    Entry("swin", RECIPE, "vision", exporter="torchscript", opset=12, attention="eager"),
    *twice(Entry("dit", RECIPE, "diffusion")),
    Entry("dit", RECIPE, "diffusion", attention="eager"),
    *twice(Entry("pixart", RECIPE, "diffusion")),
    Entry("flux", RECIPE, "diffusion"),
    Entry("mistral", RECIPE, "decoder", dynamic=("sequence",)),
    Entry("mistral", RECIPE, "decoder", opset=23),
    Entry("mistral", RECIPE, "decoder", exporter="torchscript", opset=17, dynamic=("sequence",)),
    Entry("mistral", RECIPE, "decoder", dtype="fp16", attention="eager"),
    *twice(Entry("llama", RECIPE, "decoder")),
    Entry("llama", RECIPE, "decoder", exporter="torchscript", opset=17, attention="eager", dtype="fp16"),
    *twice(Entry("gpt2", RECIPE, "decoder", dynamic=("sequence",))),
    *twice(Entry("bert", RECIPE, "encoder")),
    Entry("bert", RECIPE, "encoder", opset=23),
    Entry("bert", RECIPE, "encoder", exporter="torchscript", opset=17, dynamic=("batch", "sequence")),
)

_TEXTS: tuple[Entry, ...] = (
    *twice(text("qwen3", "decoder", "Qwen3Model", "Qwen3Config", settings={**GROUPED, "head_dim": 16}, mask="right",
                  call=NO_CACHE)),
    *twice(text("qwen2", "decoder", "Qwen2Model", "Qwen2Config", settings=GROUPED, mask="left", call=NO_CACHE)),
    *twice(text("phi3", "decoder", "Phi3Model", "Phi3Config", settings=GROUPED, mask="right", call=NO_CACHE)),
    *twice(text("gemma2", "decoder", "Gemma2Model", "Gemma2Config", mask="right", call=NO_CACHE, attention="eager",
                  settings={**GROUPED, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16})),
    text("gemma3", "decoder", "Gemma3TextModel", "Gemma3TextConfig", mask="right", call=NO_CACHE,
          settings={**GROUPED, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16,
                    "layer_types": ["sliding_attention", "full_attention"]}),
    *twice(text("gpt-neox", "decoder", "GPTNeoXModel", "GPTNeoXConfig", mask="right", call=NO_CACHE)),
    text("opt", "decoder", "OPTModel", "OPTConfig", mask="right", call=NO_CACHE,
          settings={"ffn_dim": 64, "word_embed_proj_dim": 48}),
    *twice(text("bloom", "decoder", "BloomModel", "BloomConfig", mask="right", call=NO_CACHE, attention="eager",
                  modules=("BloomAttention",), settings={"n_layer": 2, "n_head": 4})),
    *twice(text("t5", "encoder-decoder", "T5Model", "T5Config", bare=True, decoder=True, mask="right", call=NO_CACHE,
                  settings={"vocab_size": 64, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4},
                  attention="eager")),
    *twice(text("bart", "encoder-decoder", "BartModel", "BartConfig", bare=True, decoder=True, call=NO_CACHE,
                  settings={"vocab_size": 64, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
                            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                            "decoder_ffn_dim": 64, "max_position_embeddings": 64})),
    *twice(text("distilbert", "encoder", "DistilBertModel", "DistilBertConfig", bare=True, mask="right",
                  settings={"vocab_size": 64, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64})),
    text("roberta", "encoder", "RobertaModel", "RobertaConfig", mask="left", exporter="torchscript", opset=17,
          attention="eager"),
    text("electra", "encoder", "ElectraModel", "ElectraConfig", mask="right", dtype="fp16"),
    text("deberta-v2", "encoder", "DebertaV2Model", "DebertaV2Config", mask="right", exporter="torchscript", opset=17,
          attention="eager", modules=("DisentangledSelfAttention",)),
    *twice(text("falcon", "decoder", "FalconModel", "FalconConfig", mask="right", call=NO_CACHE, attention="eager",
                  modules=("FalconAttention",), settings={"multi_query": True, "alibi": False})),
    *twice(text("granite", "decoder", "GraniteModel", "GraniteConfig", mask="right", call=NO_CACHE,
                  settings={**GROUPED, "attention_multiplier": 0.125})),
    *twice(text("olmo2", "decoder", "Olmo2Model", "Olmo2Config", mask="right", call=NO_CACHE, settings=GROUPED)),
    text("cohere", "decoder", "CohereModel", "CohereConfig", mask="left", call=NO_CACHE, settings=GROUPED),
    *twice(text("deepseek-v3", "decoder", "DeepseekV3Model", "DeepseekV3Config", mask="right", call=NO_CACHE,
                  settings={"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                            "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2,
                            "pad_token_id": 0})),
    text("qwen3", "decoder", "Qwen3Model", "Qwen3Config", settings={**GROUPED, "head_dim": 16}, mask="right",
          call=NO_CACHE, opset=24),
    text("qwen3", "decoder", "Qwen3Model", "Qwen3Config", settings={**GROUPED, "head_dim": 16}, mask="right",
          call=NO_CACHE, dtype="fp16", attention="eager"),
    text("gpt-j", "decoder", "GPTJModel", "GPTJConfig", mask="right", call=NO_CACHE, attention="eager",
          modules=("GPTJAttention",), bare=True, exporter="torchscript", opset=17,
          settings={"vocab_size": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}),
    *twice(text("albert", "encoder", "AlbertModel", "AlbertConfig", mask="right",
                  settings={"embedding_size": 16})),
    *twice(text("mpnet", "encoder", "MPNetModel", "MPNetConfig", mask="right", attention="eager",
                  modules=("MPNetSelfAttention",))),
    *twice(text("modernbert", "encoder", "ModernBertModel", "ModernBertConfig", mask="right",
                  settings={"local_attention": 8, "pad_token_id": 0})),
    text("mamba", "negative", "MambaModel", "MambaConfig", call=NO_CACHE, attention="eager", exporter="torchscript",
          opset=17, settings={"state_size": 4}),
    text("clip-text", "encoder", "CLIPTextModel", "CLIPTextConfig", mask="right"),
)  # fmt: skip

_IMAGES: tuple[Entry, ...] = (
    *twice(image("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", PATCHES)),
    *twice(image("siglip", "SiglipVisionModel", "SiglipVisionConfig", PATCHES, output="pooler_output")),
    image("beit", "BeitModel", "BeitConfig", {**PATCHES, "use_relative_position_bias": True}, exporter="torchscript",
           opset=17),
    image("deit", "DeiTModel", "DeiTConfig", PATCHES, attention="eager"),
    *twice(image("swinv2", "Swinv2Model", "Swinv2Config",
                   {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2], "num_heads": [2],
                    "window_size": 4}, attention="eager", modules=("Swinv2SelfAttention",))),
    *twice(image("sam", "SamVisionModel", "SamVisionConfig",
                   {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
                    "patch_size": 8, "mlp_dim": 64, "window_size": 4, "global_attn_indexes": [1],
                    "output_channels": 16}, side=64, attention="eager", modules=("SamVisionAttention",))),
    image("segformer", "SegformerModel", "SegformerConfig",
           {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
    image("convnext", "ConvNextModel", "ConvNextConfig",
           {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, attention="eager"),
)  # fmt: skip

_OTHERS: tuple[Entry, ...] = (
    Entry("whisper", "attncompile.models.zoo.families:audio", "encoder-decoder", options={
        "model": "WhisperModel", "config": "WhisperConfig",
        "settings": {"vocab_size": 64, "num_mel_bins": 16, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
                     "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                     "decoder_ffn_dim": 64, "max_source_positions": 24, "max_target_positions": 32,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}}),
    *twice(diffusion("sd3", "SD3Transformer2DModel", {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32,
        "pooled_projection_dim": 16, "out_channels": 4, "qk_norm": "rms_norm"},
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 7, 32), "pooled_projections": (1, 16),
         "timestep": (1,)})),
    *twice(UNET),
    diffusion("wan", "WanTransformer3DModel", {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32},
        {"hidden_states": (1, 4, 2, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 7, 16)}),
)  # fmt: skip

_WRITTEN: tuple[Entry, ...] = tuple(
    entry
    for how in ("einsum", "flat", "exp", "softcap", "float", "fill", "plain", "sinks")
    for entry in twice(
        Entry(
            f"plain-{how}",
            PLAIN + "attention",
            "plain",
            options={"how": how},
            modules=("PlainAttention",),
        )
    )
)
_LAYERS: tuple[Entry, ...] = tuple(
    entry
    for kind in ("encoder", "decoder", "weights", "no-weights")
    for entry in twice(Entry(
        f"torch-{kind}", PLAIN + "torch_layer", "plain", options={"kind": kind},
        refused={"weights-used": 1} if kind == "weights" else {},
    ))
)  # fmt: skip
_MORE: tuple[Entry, ...] = (
    *(
        entry
        for how in ("expand", "repeat_interleave")
        for entry in twice(Entry(f"grouped-{how}", PLAIN + "grouped", "plain", options={"how": how}))
    ),
    Entry("grouped-enable_gqa", PLAIN + "grouped", "plain", options={"how": "enable_gqa"}),
    Entry("grouped-enable_gqa", PLAIN + "grouped", "plain", opset=23, options={"how": "enable_gqa"}),
    *twice(Entry("decode", PLAIN + "decode", "plain")),
    Entry(
        "plain-float",
        PLAIN + "attention",
        "plain",
        dtype="fp16",
        options={"how": "float"},
        modules=("PlainAttention",),
    ),
    Entry("plain-exp", PLAIN + "attention", "plain", opset=25, options={"how": "exp"}, modules=("PlainAttention",)),
    Entry(
        "plain-plain",
        PLAIN + "attention",
        "plain",
        dynamic=("batch", "sequence"),
        options={"how": "plain"},
        modules=("PlainAttention",),
    ),
    Entry("decode", PLAIN + "decode", "plain", opset=23),
    *(
        entry
        for kind in ("router", "codebook", "pointer", "pooling", "columns", "transposed-product")
        for entry in twice(Entry(f"no-{kind}", PLAIN + "negative", "negative", options={"kind": kind}))
    ),
)

_OWN = (*_RECIPES, *_TEXTS, *_IMAGES, *_OTHERS, *_WRITTEN, *_LAYERS, *_MORE, *MODELS, *CACHES, *TIMM)

ENTRIES: tuple[Entry, ...] = (*_OWN, *forms(_OWN), *LINEAR)
