"""The entries of the zoo, as one explicit tuple."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attncompile.models.zoo.entry import Entry

_RECIPE = "attncompile.models.zoo.recipes:recipe"
_TEXT = "attncompile.models.zoo.families:text"
_IMAGE = "attncompile.models.zoo.families:image"
_AUDIO = "attncompile.models.zoo.families:audio"
_PLAIN = "attncompile.models.zoo.plain:"
_DIFFUSION = "attncompile.models.zoo.diffusion:model"


def _twice(entry: Entry) -> tuple[Entry, Entry]:
    """Through both exporters; TorchScript at opset 17."""
    return entry, replace(entry, exporter="torchscript", opset=17)


def _text(name: str, family: str, model: str, config: str, **more: Any) -> Entry:
    keys = {"exporter", "opset", "attention", "dtype", "dynamic", "modules", "refused"}
    known = {k: more.pop(k) for k in list(more) if k in keys}
    return Entry(name, _TEXT, family, options={"model": model, "config": config, **more}, **known)


def _image(name: str, model: str, config: str, settings: dict[str, Any], **more: Any) -> Entry:
    keys = {"exporter", "opset", "attention", "dtype", "dynamic", "modules", "refused"}
    known = {k: more.pop(k) for k in list(more) if k in keys}
    options = {"model": model, "config": config, "settings": settings, **more}
    return Entry(name, _IMAGE, "vision", options=options, **known)


_NO_CACHE = {"use_cache": False}
_SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_PATCHES = {**_SMALL, "image_size": 32, "patch_size": 8}
_GROUPED = {"num_key_value_heads": 2, "pad_token_id": 0}

_RECIPES: tuple[Entry, ...] = (
    Entry("vit", _RECIPE, "vision"),
    Entry("vit", _RECIPE, "vision", opset=23),
    Entry("vit", _RECIPE, "vision", exporter="torchscript", opset=17, dynamic=("batch",)),
    Entry("vit", _RECIPE, "vision", dtype="fp16"),
    Entry("vit", _RECIPE, "vision", exporter="torchscript", opset=14, attention="eager", dtype="fp16"),
    Entry("dinov2", _RECIPE, "vision", exporter="torchscript", opset=17),
    *_twice(Entry("swin", _RECIPE, "vision")),
    Entry("swin", _RECIPE, "vision", exporter="torchscript", opset=12, attention="eager"),
    *_twice(Entry("dit", _RECIPE, "diffusion")),
    Entry("dit", _RECIPE, "diffusion", attention="eager"),
    *_twice(Entry("pixart", _RECIPE, "diffusion")),
    Entry("flux", _RECIPE, "diffusion"),
    Entry("mistral", _RECIPE, "decoder", dynamic=("sequence",)),
    Entry("mistral", _RECIPE, "decoder", opset=23),
    Entry("mistral", _RECIPE, "decoder", exporter="torchscript", opset=17, dynamic=("sequence",)),
    Entry("mistral", _RECIPE, "decoder", dtype="fp16", attention="eager"),
    *_twice(Entry("llama", _RECIPE, "decoder")),
    Entry("llama", _RECIPE, "decoder", exporter="torchscript", opset=17, attention="eager", dtype="fp16"),
    *_twice(Entry("gpt2", _RECIPE, "decoder", dynamic=("sequence",))),
    *_twice(Entry("bert", _RECIPE, "encoder")),
    Entry("bert", _RECIPE, "encoder", opset=23),
    Entry("bert", _RECIPE, "encoder", exporter="torchscript", opset=17, dynamic=("batch", "sequence")),
)

_TEXTS: tuple[Entry, ...] = (
    *_twice(_text("qwen3", "decoder", "Qwen3Model", "Qwen3Config", settings={**_GROUPED, "head_dim": 16}, mask="right",
                  call=_NO_CACHE)),
    *_twice(_text("qwen2", "decoder", "Qwen2Model", "Qwen2Config", settings=_GROUPED, mask="left", call=_NO_CACHE)),
    *_twice(_text("phi3", "decoder", "Phi3Model", "Phi3Config", settings=_GROUPED, mask="right", call=_NO_CACHE)),
    *_twice(_text("gemma2", "decoder", "Gemma2Model", "Gemma2Config", mask="right", call=_NO_CACHE, attention="eager",
                  settings={**_GROUPED, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16})),
    _text("gemma3", "decoder", "Gemma3TextModel", "Gemma3TextConfig", mask="right", call=_NO_CACHE,
          settings={**_GROUPED, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16,
                    "layer_types": ["sliding_attention", "full_attention"]}),
    *_twice(_text("gpt-neox", "decoder", "GPTNeoXModel", "GPTNeoXConfig", mask="right", call=_NO_CACHE)),
    _text("opt", "decoder", "OPTModel", "OPTConfig", mask="right", call=_NO_CACHE,
          settings={"ffn_dim": 64, "word_embed_proj_dim": 48}),
    *_twice(_text("bloom", "decoder", "BloomModel", "BloomConfig", mask="right", call=_NO_CACHE, attention="eager",
                  modules=("BloomAttention",), settings={"n_layer": 2, "n_head": 4})),
    *_twice(_text("t5", "encoder-decoder", "T5Model", "T5Config", bare=True, decoder=True, mask="right", call=_NO_CACHE,
                  settings={"vocab_size": 64, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4},
                  attention="eager")),
    *_twice(_text("bart", "encoder-decoder", "BartModel", "BartConfig", bare=True, decoder=True, call=_NO_CACHE,
                  settings={"vocab_size": 64, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
                            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                            "decoder_ffn_dim": 64, "max_position_embeddings": 64})),
    *_twice(_text("distilbert", "encoder", "DistilBertModel", "DistilBertConfig", bare=True, mask="right",
                  settings={"vocab_size": 64, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64})),
    _text("roberta", "encoder", "RobertaModel", "RobertaConfig", mask="left", exporter="torchscript", opset=17,
          attention="eager"),
    _text("electra", "encoder", "ElectraModel", "ElectraConfig", mask="right", dtype="fp16"),
    _text("deberta-v2", "encoder", "DebertaV2Model", "DebertaV2Config", mask="right", exporter="torchscript", opset=17,
          attention="eager", modules=("DisentangledSelfAttention",)),
    *_twice(_text("falcon", "decoder", "FalconModel", "FalconConfig", mask="right", call=_NO_CACHE, attention="eager",
                  modules=("FalconAttention",), settings={"multi_query": True, "alibi": False})),
    *_twice(_text("granite", "decoder", "GraniteModel", "GraniteConfig", mask="right", call=_NO_CACHE,
                  settings={**_GROUPED, "attention_multiplier": 0.125})),
    *_twice(_text("olmo2", "decoder", "Olmo2Model", "Olmo2Config", mask="right", call=_NO_CACHE, settings=_GROUPED)),
    _text("cohere", "decoder", "CohereModel", "CohereConfig", mask="left", call=_NO_CACHE, settings=_GROUPED),
    *_twice(_text("deepseek-v3", "decoder", "DeepseekV3Model", "DeepseekV3Config", mask="right", call=_NO_CACHE,
                  settings={"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                            "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2,
                            "pad_token_id": 0})),
    _text("qwen3", "decoder", "Qwen3Model", "Qwen3Config", settings={**_GROUPED, "head_dim": 16}, mask="right",
          call=_NO_CACHE, opset=24),
    _text("qwen3", "decoder", "Qwen3Model", "Qwen3Config", settings={**_GROUPED, "head_dim": 16}, mask="right",
          call=_NO_CACHE, dtype="fp16", attention="eager"),
    _text("gpt-j", "decoder", "GPTJModel", "GPTJConfig", mask="right", call=_NO_CACHE, attention="eager",
          modules=("GPTJAttention",), bare=True, exporter="torchscript", opset=17,
          settings={"vocab_size": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}),
    *_twice(_text("albert", "encoder", "AlbertModel", "AlbertConfig", mask="right",
                  settings={"embedding_size": 16})),
    *_twice(_text("mpnet", "encoder", "MPNetModel", "MPNetConfig", mask="right", attention="eager",
                  modules=("MPNetSelfAttention",))),
    *_twice(_text("modernbert", "encoder", "ModernBertModel", "ModernBertConfig", mask="right",
                  settings={"local_attention": 8, "pad_token_id": 0})),
    _text("mamba", "negative", "MambaModel", "MambaConfig", call=_NO_CACHE, attention="eager", exporter="torchscript",
          opset=17, settings={"state_size": 4}),
    _text("clip-text", "encoder", "CLIPTextModel", "CLIPTextConfig", mask="right"),
)  # fmt: skip

_IMAGES: tuple[Entry, ...] = (
    *_twice(_image("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", _PATCHES)),
    *_twice(_image("siglip", "SiglipVisionModel", "SiglipVisionConfig", _PATCHES, output="pooler_output")),
    _image("beit", "BeitModel", "BeitConfig", {**_PATCHES, "use_relative_position_bias": True}, exporter="torchscript",
           opset=17),
    _image("deit", "DeiTModel", "DeiTConfig", _PATCHES, attention="eager"),
    *_twice(_image("swinv2", "Swinv2Model", "Swinv2Config",
                   {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2], "num_heads": [2],
                    "window_size": 4}, attention="eager", modules=("Swinv2SelfAttention",),
                   refused={"tensor-scale": 2})),
    *_twice(_image("sam", "SamVisionModel", "SamVisionConfig",
                   {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
                    "patch_size": 8, "mlp_dim": 64, "window_size": 4, "global_attn_indexes": [1],
                    "output_channels": 16}, side=64, attention="eager", modules=("SamVisionAttention",))),
    _image("segformer", "SegformerModel", "SegformerConfig",
           {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
    _image("convnext", "ConvNextModel", "ConvNextConfig",
           {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, attention="eager"),
)  # fmt: skip

_OTHERS: tuple[Entry, ...] = (
    Entry("whisper", _AUDIO, "encoder-decoder", options={
        "model": "WhisperModel", "config": "WhisperConfig",
        "settings": {"vocab_size": 64, "num_mel_bins": 16, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
                     "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                     "decoder_ffn_dim": 64, "max_source_positions": 24, "max_target_positions": 32,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}}),
    *_twice(Entry("sd3", _DIFFUSION, "diffusion", options={
        "kind": "SD3Transformer2DModel",
        "settings": {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
                     "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32,
                     "pooled_projection_dim": 16, "out_channels": 4, "qk_norm": "rms_norm"},
        "inputs": {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 7, 32),
                   "pooled_projections": (1, 16), "timestep": (1,)}})),
    *_twice(Entry("unet", _DIFFUSION, "diffusion", options={
        "kind": "UNet2DConditionModel",
        "settings": {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
                     "block_out_channels": (16, 32), "norm_num_groups": 4, "cross_attention_dim": 24,
                     "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                     "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2},
        "inputs": {"sample": (1, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 7, 24)}})),
    Entry("wan", _DIFFUSION, "diffusion", options={
        "kind": "WanTransformer3DModel",
        "settings": {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
                     "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1,
                     "rope_max_seq_len": 32},
        "inputs": {"hidden_states": (1, 4, 2, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 7, 16)}}),
)  # fmt: skip

_WRITTEN: tuple[Entry, ...] = tuple(
    entry
    for how in ("einsum", "flat", "exp", "softcap", "float", "fill", "plain", "sinks")
    for entry in _twice(
        Entry(
            f"plain-{how}",
            _PLAIN + "attention",
            "plain",
            options={"how": how},
            modules=("PlainAttention",),
            refused={"sinks": 1} if how == "sinks" else {},
        )
    )
)
_LAYERS: tuple[Entry, ...] = tuple(
    entry
    for kind in ("encoder", "decoder", "weights", "no-weights")
    for entry in _twice(Entry(
        f"torch-{kind}", _PLAIN + "torch_layer", "plain", options={"kind": kind},
        refused={"weights-used": 1} if kind == "weights" else {},
    ))
)  # fmt: skip
_MORE: tuple[Entry, ...] = (
    *(
        entry
        for how in ("expand", "repeat_interleave")
        for entry in _twice(Entry(f"grouped-{how}", _PLAIN + "grouped", "plain", options={"how": how}))
    ),
    Entry("grouped-enable_gqa", _PLAIN + "grouped", "plain", options={"how": "enable_gqa"}),
    Entry("grouped-enable_gqa", _PLAIN + "grouped", "plain", opset=23, options={"how": "enable_gqa"}),
    *_twice(Entry("decode", _PLAIN + "decode", "plain")),
    Entry(
        "plain-float",
        _PLAIN + "attention",
        "plain",
        dtype="fp16",
        options={"how": "float"},
        modules=("PlainAttention",),
    ),
    Entry("plain-exp", _PLAIN + "attention", "plain", opset=25, options={"how": "exp"}, modules=("PlainAttention",)),
    Entry(
        "plain-plain",
        _PLAIN + "attention",
        "plain",
        dynamic=("batch", "sequence"),
        options={"how": "plain"},
        modules=("PlainAttention",),
    ),
    Entry("decode", _PLAIN + "decode", "plain", opset=23),
    *(
        entry
        for kind in ("router", "codebook", "pointer", "pooling", "columns", "transposed-product")
        for entry in _twice(Entry(f"no-{kind}", _PLAIN + "negative", "negative", options={"kind": kind}))
    ),
)

ENTRIES: tuple[Entry, ...] = (*_RECIPES, *_TEXTS, *_IMAGES, *_OTHERS, *_WRITTEN, *_LAYERS, *_MORE)
