"""Fusions for ONNX Runtime's GPU provider, which runs what an export writes out op by op: one kernel for each.

Each turns a pattern into an op of ONNX Runtime's own that computes the same function; patterns are shown by constants,
types and sizes in the graph, never by names. ONNX Runtime's transformers optimizer and onnxscript's fusions match few of
the patterns that torch's exporter writes in fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from attncompile.targets.ort_fusions import gelu, norm, rotary, skip
from attncompile.targets.ort_fusions.view import View

FUSIONS: tuple[tuple[str, Callable[[View], int]], ...] = (
    ("interleaved pairs", rotary.interleaved),
    ("transposes", rotary.transposes),
    ("rotary pairs", rotary.rotary_pairs),
    ("rotary halves", rotary.rotary_halves),
    ("operands", rotary.operands),
    ("GELU", gelu.gelu),
    ("RMS norm", norm.rms_norm),
    ("modulated norm", norm.modulated),
    ("norm in fp16", norm.narrow_norm),
    ("gated residual in fp16", norm.gated_residual),
    ("residual and norm", skip.skip_norm),
)
"""Name and function, in the order in which they run: each takes a view, changes it and says how often."""


@dataclass(frozen=True, slots=True)
class Fused:
    """``counts``: fusion -> how often, those that were not found left out."""

    proto: ModelProto
    counts: Mapping[str, int]


def fuse(proto: ModelProto, folder: Path, only: tuple[str, ...] = ()) -> Fused:
    """A copy of ``proto`` with these fusions, or all. External data in ``folder`` is read only where it is small."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    view = View(copy, folder)
    counts = {name: run(view) for name, run in FUSIONS if not only or name in only}
    view.finish()
    return Fused(copy, {name: count for name, count in counts.items() if count})
