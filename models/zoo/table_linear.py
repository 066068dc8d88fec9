"""Entries of linear attention in plain torch."""

from __future__ import annotations

from dataclasses import replace

from attncompile.models.zoo.builders import twice
from attncompile.models.zoo.entry import Entry

_STATES = ("elu", "relu", "ones", "joined", "channels", "efficient", "random", "flat", "float", "dot")
_CAUSAL = ("cumulative", "outer", "retention", "triangle", "filled", "chunked", "unrolled", "summed")


def _linear(how: str) -> Entry:
    return Entry(f"linear-{how}", "attncompile.models.zoo.linear:attention", "linear", options={"how": how},
                 linear=("LinearCore",))  # fmt: skip


LINEAR: tuple[Entry, ...] = (
    *(form for how in (*_STATES, *_CAUSAL) for form in twice(_linear(how))),
    *twice(Entry("linear-multi-scale", "attncompile.models.zoo.linear:multi_scale", "linear", linear=("LinearCore",))),
    replace(_linear("ones"), dtype="fp16"),
    replace(_linear("ones"), dynamic=("batch", "sequence")),
    replace(_linear("retention"), exporter="torchscript", opset=17, dynamic=("batch", "sequence")),
)
