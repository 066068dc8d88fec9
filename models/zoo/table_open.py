"""Entries of which detection does not say the whole truth yet, and what it says instead."""

from __future__ import annotations

from collections.abc import Mapping

_EXPANDED = "the standard Attention operator's keys were repeated by Expand before it: as many key heads as query heads"
_GATHERED = "one site of one query for each token and head, with the keys of its window, in place of one neighborhood"

OPEN: Mapping[str, str] = {
    "mistral/dynamo/23/sdpa": _EXPANDED,
    "qwen3/dynamo/24/sdpa": _EXPANDED,
    "llama/dynamo/23/sdpa": _EXPANDED,
    "gemma3/dynamo/23/sdpa": _EXPANDED,
    "llama/dynamo/25/sdpa": _EXPANDED,
    "llama-decode/dynamo/23/sdpa": _EXPANDED,
    "plain-neighborhood/dynamo/18/sdpa": _GATHERED,
    "plain-neighborhood/torchscript/17/sdpa": _GATHERED,
    "pixart/torchscript/17/sdpa": "the caption's padding mask, repeated for every head, is opaque",
    "llama-decode/torchscript/17/sdpa/fp16": "near miss 'layout': no rank-4 value holds the query",
    "llama-merged/torchscript/17/sdpa/dynamic-batch-sequence-past-total/merged": (
        "near miss 'shape-unknown': the mask's length is a symbol that is bound without the other two"
    ),
    "gpt2-merged/torchscript/17/sdpa/dynamic-batch-sequence-past/merged": (
        "the prefill's causal mask is opaque: at a past that is not empty, with which it is never run, it is not causal"
    ),
}
"""Title -> what is said. An entry that is right has to be taken out: tests fail otherwise."""
