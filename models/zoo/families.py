"""Models of transformers, built from their configuration classes at a small size."""

from __future__ import annotations

from typing import Any

import torch

from attncompile.models.images import structured_images
from attncompile.models.recipe import Built
from attncompile.models.weights import seed_weights
from attncompile.models.zoo.entry import Entry

_VOCAB = 64
DECODER: dict[str, Any] = {
    "vocab_size": _VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


class _Named(torch.nn.Module):
    """``model`` with its tensors as positional arguments ``names``, giving the tensor ``output``."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], output: str, more: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._names, self._output, self._more = names, output, more

    def forward(self, *tensors: torch.Tensor) -> Any:
        result = self.model(**dict(zip(self._names, tensors, strict=True)), **self._more)
        return getattr(result, self._output)


def transformers_model(entry: Entry, defaults: dict[str, Any]) -> torch.nn.Module:
    import transformers

    options = entry.options
    kind, config_kind = getattr(transformers, options["model"]), getattr(transformers, options["config"])
    config = config_kind(**{**defaults, **options.get("settings", {})})
    config._attn_implementation = entry.attention
    # "eager" experts loop over the tokens that each got; "batched_mm" has a graph of fixed shape.
    more = {"experts_implementation": "batched_mm"} if options.get("experts") else {}
    model = kind._from_config(config, attn_implementation=entry.attention, **more)
    return seed_weights(model, 0)


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, _VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def text(entry: Entry) -> Built:
    """``input_ids`` int64 [batch, tokens], with ``attention_mask`` where ``mask`` is ``left`` or ``right``."""
    options, tokens, batch = entry.options, 24, 2
    model = transformers_model(entry, {} if options.get("bare") else DECODER)
    inputs = {"input_ids": ids(batch, tokens)}
    if options.get("mask"):
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        mask[-1, slice(0, 5) if options["mask"] == "left" else slice(tokens - 5, None)] = 0
        inputs["attention_mask"] = mask
    if options.get("decoder"):
        inputs["decoder_input_ids"] = ids(batch, 10)
    more = dict(options.get("call", {}))
    axes = {name: {0: "batch", 1: "target" if "decoder" in name else "sequence"} for name in inputs}
    wrapped = _Named(model, tuple(inputs), options.get("output", "last_hidden_state"), more)
    return Built(wrapped.eval(), inputs, ("output",), axes)


def image(entry: Entry) -> Built:
    """``pixel_values`` float32 [batch, 3, side, side]."""
    options = entry.options
    model = transformers_model(entry, {})
    pixels = torch.from_numpy(structured_images(options.get("batch", 2), 3, options.get("side", 32), 1))
    name = options.get("input", "pixel_values")
    wrapped = _Named(model, (name,), options.get("output", "last_hidden_state"), dict(options.get("call", {})))
    return Built(wrapped.eval(), {name: pixels}, ("output",), {name: {0: "batch"}})


def audio(entry: Entry) -> Built:
    """Whisper's encoder: ``input_features`` float32 [batch, bins, frames]; its decoder reads token ids beside it."""
    model = transformers_model(entry, {})
    features = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1))
    inputs = {"input_features": features, "decoder_input_ids": ids(2, 10)}
    wrapped = _Named(model, tuple(inputs), "last_hidden_state", {"use_cache": False})
    return Built(wrapped.eval(), inputs, ("output",), {name: {0: "batch"} for name in inputs})
