"""Decoders with a key-value cache: past keys and values are inputs, the grown or written cache is an output."""

from __future__ import annotations

from typing import Any

import torch

from attncompile.models.recipe import Built
from attncompile.models.zoo.entry import Entry
from attncompile.models.zoo.families import DECODER, ids, transformers_model

_BATCH, _PAST, _SLOTS = 2, 13, 24


class _Cached(torch.nn.Module):
    """``forward(input_ids, attention_mask?, position?, key_0, value_0, ..)``: hidden states, then presents."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], static: bool) -> None:
        super().__init__()
        self.model, self._names, self._static = model, names, static

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = dict(zip(self._names, tensors, strict=True))
        pairs = [(given[f"past_key_{i}"], given[f"past_value_{i}"]) for i in range(self._layers())]
        cache = self._filled(pairs, given["position"]) if self._static else self._grown(pairs or None)
        more = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
        out = self.model(input_ids=given["input_ids"], past_key_values=cache, use_cache=True, **more)
        return (out.last_hidden_state, *(t for layer in cache.layers for t in (layer.keys, layer.values)))

    def _layers(self) -> int:
        return sum(name.startswith("past_key") for name in self._names)

    def _grown(self, pairs: list[tuple[torch.Tensor, torch.Tensor]] | None) -> Any:
        from transformers import DynamicCache

        return DynamicCache(ddp_cache_data=pairs)

    def _filled(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], position: torch.Tensor) -> Any:
        from transformers import StaticCache

        config: Any = self.model.config
        cache = StaticCache(config=config, max_cache_len=_SLOTS)
        for layer, (key, value) in zip(cache.layers, pairs, strict=True):
            layer.keys, layer.values = key.clone(), value.clone()
            layer.dtype, layer.device = key.dtype, key.device
            layer.batch_size, layer.num_heads = key.shape[:2]
            layer.cumulative_length = position.clone()
            layer.is_initialized = True
        return cache


def cached(entry: Entry) -> Built:
    """``options``: those of ``families.text``, ``new`` (tokens of this call), ``past`` (0: a prefill that takes no
    past, as a merged decoder's first branch), ``static`` (a cache of fixed size that is written at ``position``).
    """
    options = entry.options
    model = transformers_model(entry, DECODER)
    config: Any = model.config
    new, static = int(options.get("new", 1)), bool(options.get("static"))
    past = _SLOTS if static else int(options.get("past", _PAST))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inputs: dict[str, torch.Tensor] = {"input_ids": ids(_BATCH, new)}
    if options.get("mask"):
        mask = torch.ones(_BATCH, past + new, dtype=torch.int64)
        mask[-1, : int(options.get("padded", 5))] = 0
        inputs["attention_mask"] = mask
    if static:
        inputs["position"] = torch.tensor(int(options.get("position", _PAST)))
    generator = torch.Generator().manual_seed(2)
    for i in range(config.num_hidden_layers):
        for kind in ("key", "value") if past else ():
            inputs[f"past_{kind}_{i}"] = torch.randn(_BATCH, heads, past, dim, generator=generator)
    axes: dict[str, dict[int, str]] = {"input_ids": {0: "batch", 1: "sequence"}}
    for name in inputs:
        if name.startswith("past"):
            axes[name] = {0: "batch", 2: "past"}
    if "attention_mask" in inputs:
        axes["attention_mask"] = {0: "batch", 1: "total"}
    outputs = ["last_hidden_state"]
    for i in range(config.num_hidden_layers):
        outputs += [f"present_key_{i}", f"present_value_{i}"]
    return Built(_Cached(model, tuple(inputs), static).eval(), inputs, tuple(outputs), axes)
