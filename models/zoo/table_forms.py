"""Forms of other entries: later opsets, half precision, and files that other tools made of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attncompile.models.zoo.entry import Entry

_EAGER: dict[str, Any] = {"exporter": "torchscript", "opset": 18, "attention": "eager"}

_FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((title, {"opset": 23}) for title in (
        "llama/dynamo/18/sdpa", "gpt2/dynamo/18/sdpa/dynamic-sequence", "dit/dynamo/18/sdpa", "swin/dynamo/18/sdpa",
        "sd3/dynamo/18/sdpa", "whisper/dynamo/18/sdpa", "gemma3/dynamo/18/sdpa", "t5/dynamo/18/eager",
    )),
    *((title, {"opset": 24}) for title in ("vit/dynamo/18/sdpa", "bert/dynamo/18/sdpa", "flux/dynamo/18/sdpa")),
    *((title, {"opset": 25}) for title in ("llama/dynamo/18/sdpa", "bert/dynamo/18/sdpa", "pixart/dynamo/18/sdpa")),
    *((title, {"dtype": "fp16"}) for title in (
        # TorchScript's BERT and GPT-2 in half precision mix types in LayerNormalization: no runtime loads those files.
        "bert/dynamo/18/sdpa", "gpt2/dynamo/18/sdpa/dynamic-sequence", "dit/dynamo/18/sdpa", "flux/dynamo/18/sdpa",
        "swin/torchscript/17/sdpa", "t5/torchscript/17/eager",
        "whisper/dynamo/18/sdpa", "sd3/torchscript/17/sdpa", "qwen2/dynamo/18/sdpa", "gemma2/dynamo/18/eager",
        "llama/dynamo/18/sdpa", "clip-vision/torchscript/17/sdpa", "grouped-repeat_interleave/dynamo/18/sdpa",
    )),
    *((title, {"after": ("function",)}) for title in (
        "vit/dynamo/18/sdpa", "bert/torchscript/17/sdpa", "mistral/dynamo/18/sdpa/dynamic-sequence",
    )),
    *((title, {"after": ("qdq",)}) for title in (
        "vit/dynamo/18/sdpa", "dinov2/torchscript/17/sdpa", "bert/dynamo/18/sdpa", "llama/torchscript/17/sdpa",
    )),
)  # fmt: skip
_OPTIMISED: tuple[tuple[str, str, int, int], ...] = (
    ("bert/dynamo/18/sdpa", "bert", 4, 64),
    ("roberta/torchscript/17/eager", "bert", 4, 48),
    ("electra/dynamo/18/sdpa/fp16", "bert", 4, 48),
    ("clip-vision/dynamo/18/sdpa", "clip", 4, 48),
    ("unet/dynamo/18/sdpa", "unet", 0, 0),
)
"""Title, and what ONNX Runtime's optimizer is told: the type of the model, heads, hidden size."""


def forms(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The forms of some of ``entries``."""
    by_title = {e.title: e for e in entries}
    made = [replace(by_title[title], **changes) for title, changes in _FORMS]
    for title, kind, heads, width in _OPTIMISED:
        entry = by_title[title]
        how = {"model_type": kind, "num_heads": heads, "hidden_size": width}
        # One at an opset that has to be converted: the optimizer's files do not import its own domain.
        changes = {**_EAGER, "opset": entry.opset if entry.exporter == "torchscript" else _EAGER["opset"]}
        made.append(replace(entry, **changes, dtype="fp32", after=("ort-optimizer",),
                            options={**entry.options, "optimizer": how}))  # fmt: skip
    return tuple(made)
