"""Decoders: Mistral with an active sliding window, Llama, GPT-2.

Mistral takes ``inputs_embeds`` [batch, sequence, hidden] and gives ``last_hidden_state``: no vocabulary, so that what
is measured is attention and FFN. Llama and GPT-2 take ``input_ids`` int64 [batch, sequence] and give ``logits``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attncompile.core.errors import BadArguments
from attncompile.models.recipe import Built, Options, Recipe
from attncompile.models.weights import seed_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Size:
    """A decoder's shape; ``window`` matters to Mistral only (number of keys a query sees, itself included)."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    layers: int
    tokens: int
    vocab: int = 256
    window: int = 0


_MISTRAL = {
    "tiny": _Size(hidden=128, heads=4, kv_heads=2, ffn=256, layers=2, tokens=64, window=16),
    "small": _Size(hidden=512, heads=8, kv_heads=2, ffn=1792, layers=4, tokens=1024, window=256),
    "bench": _Size(hidden=768, heads=12, kv_heads=12, ffn=2688, layers=2, tokens=4096, window=512),
    "base": _Size(hidden=4096, heads=32, kv_heads=8, ffn=14336, layers=1, tokens=8192, window=4096),
}
_LLAMA = {
    "tiny": _Size(hidden=64, heads=4, kv_heads=2, ffn=128, layers=2, tokens=48),
    "small": _Size(hidden=768, heads=12, kv_heads=4, ffn=2048, layers=4, tokens=512, vocab=4096),
    "base": _Size(hidden=2048, heads=32, kv_heads=8, ffn=8192, layers=2, tokens=1024, vocab=4096),
}
_GPT2 = {
    "tiny": _Size(hidden=64, heads=4, kv_heads=4, ffn=256, layers=2, tokens=48),
    "small": _Size(hidden=768, heads=12, kv_heads=12, ffn=3072, layers=12, tokens=512, vocab=4096),
}


def _wants_mask(options: Options) -> bool:
    # Without a mask input transformers asks the position ids whether sequences are packed; the TorchScript exporter
    # has no aten::diff for that question.
    if options.padding_mask is False and options.exporter == "torchscript":
        raise BadArguments(
            "the TorchScript exporter cannot export this decoder without attention_mask (aten::diff)",
            "leave out --no-padding-mask, or use --exporter dynamo",
        )
    return options.exporter == "torchscript" if options.padding_mask is None else options.padding_mask


def _wrap(model: torch.nn.Module, first: str, output: str, masked: bool) -> torch.nn.Module:
    """``model`` with positional tensor arguments and one tensor result, and without a key-value cache."""
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> Any:
            return getattr(self.model(**{first: x}, use_cache=False), output)

    class MaskedDecoder(Decoder):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> Any:  # type: ignore[override]
            return getattr(self.model(**{first: x}, attention_mask=attention_mask, use_cache=False), output)

    return MaskedDecoder() if masked else Decoder()


def _built(model: torch.nn.Module, example: torch.Tensor, name: str, output: str, options: Options) -> Built:
    import torch

    masked = _wants_mask(options)
    inputs = {name: example}
    if masked:
        inputs["attention_mask"] = torch.ones(example.shape[:2], dtype=torch.int64)
    axes = {key: {0: "batch", 1: "sequence"} for key in inputs}
    return Built(_wrap(model, name, output, masked), inputs, (output,), axes)


def _ids(size: _Size, options: Options, tokens: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(options.seed + 1)
    return torch.randint(0, size.vocab, (options.batch, tokens), generator=generator)


def _check_rope(options: Options) -> None:
    # onnxscript 0.7 fuses RotaryEmbedding at opset 23 only, and leaves the caches at the batch of the position ids, 1.
    batched = options.batch > 1 or "batch" in options.dynamic
    if options.exporter == "dynamo" and options.opset == 23 and batched:
        raise BadArguments(
            "at opset 23 the dynamo exporter writes RotaryEmbedding with caches of batch 1, which only batch 1 can run",
            "use --opset 18, 24 or higher, or keep the batch at 1 (--dynamic sequence)",
        )


def _kv_heads(size: _Size, options: Options) -> int:
    kv_heads = options.kv_heads or size.kv_heads
    if size.heads % kv_heads:
        raise BadArguments(f"--kv-heads {kv_heads} does not divide {size.heads} heads", "choose a divisor")
    return kv_heads


def _mistral(options: Options) -> Built:
    import torch
    from transformers import MistralConfig, MistralModel

    _check_rope(options)
    size = _MISTRAL[options.size]
    tokens = options.tokens or size.tokens
    config = MistralConfig(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_key_value_heads=_kv_heads(size, options),
        head_dim=size.hidden // size.heads,
        intermediate_size=size.ffn,
        num_hidden_layers=options.layers or size.layers,
        sliding_window=options.window or size.window,
        max_position_embeddings=max(tokens, 131072),
        vocab_size=8,
        attn_implementation=options.attention,
    )
    model = seed_weights(MistralModel(config), options.seed)
    generator = torch.Generator().manual_seed(options.seed + 1)
    example = torch.randn(options.batch, tokens, size.hidden, generator=generator)
    return _built(model, example, "inputs_embeds", "last_hidden_state", options)


def _llama(options: Options) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    _check_rope(options)
    size = _LLAMA[options.size]
    tokens = options.tokens or size.tokens
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_key_value_heads=_kv_heads(size, options),
        head_dim=size.hidden // size.heads,
        intermediate_size=size.ffn,
        num_hidden_layers=options.layers or size.layers,
        max_position_embeddings=max(tokens, 2048),
        vocab_size=size.vocab,
        attn_implementation=options.attention,
    )
    model = seed_weights(LlamaForCausalLM(config), options.seed)
    return _built(model, _ids(size, options, tokens), "input_ids", "logits", options)


def _gpt2(options: Options) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = _GPT2[options.size]
    tokens = options.tokens or size.tokens
    config = GPT2Config(
        n_embd=size.hidden,
        n_head=size.heads,
        n_inner=size.ffn,
        n_layer=options.layers or size.layers,
        n_positions=max(tokens, 1024),
        vocab_size=size.vocab,
        attn_implementation=options.attention,
    )
    model = seed_weights(GPT2LMHeadModel(config), options.seed)
    return _built(model, _ids(size, options, tokens), "input_ids", "logits", options)


_USES = frozenset({"tokens", "layers", "padding_mask", "eager"})
_AXES = ("batch", "sequence")

MISTRAL = Recipe(
    name="mistral",
    description="Mistral decoder with an active sliding window, RoPE and GQA (transformers); embeddings in",
    sizes=tuple(_MISTRAL),
    build=_mistral,
    kind="tokens",
    dynamic_axes=_AXES,
    uses=_USES | {"window", "kv_heads"},
)
LLAMA = Recipe(
    name="llama",
    description="Llama decoder with RoPE, GQA and a language-model head (transformers)",
    sizes=tuple(_LLAMA),
    build=_llama,
    kind="tokens",
    dynamic_axes=_AXES,
    uses=_USES | {"kv_heads"},
)
GPT2 = Recipe(
    name="gpt2",
    description="GPT-2 decoder with fused QKV and a language-model head (transformers)",
    sizes=tuple(_GPT2),
    build=_gpt2,
    kind="tokens",
    dynamic_axes=_AXES,
    uses=_USES,
)
