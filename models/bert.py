"""BERT encoder: ``input_ids`` and ``attention_mask`` int64 [batch, sequence] in, ``last_hidden_state`` out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attncompile.models.recipe import Built, Options, Recipe
from attncompile.models.weights import seed_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Size:
    hidden: int
    heads: int
    layers: int
    tokens: int
    vocab: int


_BERT = {
    "tiny": _Size(hidden=64, heads=4, layers=2, tokens=48, vocab=256),
    "small": _Size(hidden=256, heads=4, layers=4, tokens=128, vocab=4096),
    "base": _Size(hidden=768, heads=12, layers=12, tokens=384, vocab=4096),
}


def _bert(options: Options) -> Built:
    import torch
    from transformers import BertConfig, BertModel

    size = _BERT[options.size]
    tokens = options.tokens or size.tokens
    config = BertConfig(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_hidden_layers=options.layers or size.layers,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=max(tokens, 512),
        vocab_size=size.vocab,
        attn_implementation=options.attention,
    )
    model = seed_weights(BertModel(config, add_pooling_layer=False), options.seed)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    generator = torch.Generator().manual_seed(options.seed + 1)
    ids = torch.randint(0, size.vocab, (options.batch, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": padded_mask(options.batch, tokens)}
    return Built(Encoder(), inputs, ("last_hidden_state",), {name: {0: "batch", 1: "sequence"} for name in inputs})


def padded_mask(batch: int, tokens: int) -> torch.Tensor:
    """Int64 [batch, tokens]: 1 for tokens, 0 for padding on the right, an eighth of the last sequence."""
    import torch

    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[-1, tokens - tokens // 8 :] = 0
    return mask


BERT = Recipe(
    name="bert",
    description="BERT encoder with a padding mask (transformers)",
    sizes=tuple(_BERT),
    build=_bert,
    kind="tokens",
    dynamic_axes=("batch", "sequence"),
    uses=frozenset({"tokens", "layers", "eager"}),
)
