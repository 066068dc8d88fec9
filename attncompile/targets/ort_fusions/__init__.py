"""Fusions for ONNX Runtime's GPU provider, which runs what an export writes out op by op: one kernel for each.

Each turns a pattern into an op of ONNX Runtime's own that computes the same function; patterns are shown by constants,
types and sizes in the graph, never by names.

ONNX Runtime 1.32's transformers optimizer and onnxscript 0.7's fusions were tried on torch's exports in fp16: the one
finds tanh GELU and no RMS norm of Mistral's, the other the reverse; neither the modulated norms and gates of a DiT,
rotary codes written by ScatterND, or a GELU's bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from attncompile.targets.ort_fusions import bias, gelu, norm, rotary, skip
from attncompile.targets.ort_fusions.operands import operands, outputs
from attncompile.targets.ort_fusions.view import CONTRIB, View

__all__ = ["AROUND_OURS", "BIASES", "CONTRIB", "FUSIONS", "ROUNDING", "Fused", "fuse"]

FUSIONS: tuple[tuple[str, Callable[[View], int]], ...] = (
    ("copies", rotary.identities),
    ("sizes", rotary.sizes),
    ("interleaved pairs", rotary.interleaved),
    ("transposes", rotary.transposes),
    ("rotary pairs", rotary.rotary_pairs),
    ("rotary halves", rotary.rotary_halves),
    ("operands", operands),
    ("outputs", outputs),
    ("biases of keys", bias.key_biases),
    ("biases of values", bias.value_biases),
    ("GELU", gelu.gelu),
    ("RMS norm", norm.rms_norm),
    ("modulated norm", norm.modulated),
    ("norm in fp16", norm.narrow_norm),
    ("gated residual in fp16", norm.gated_residual),
    ("residual and norm", skip.skip_norm),
)
"""Name and function, in the order in which they run: each takes a view, changes it and says how often."""

AROUND_OURS = ("copies", "sizes", "operands", "outputs", "transposes", "biases of keys", "biases of values")
"""Fusions that ops of ours take part in: where those are written out, they are not found."""

BIASES = ("biases of keys", "biases of values")
"""Fusions that leave constants out: nothing but a comparison of what is deployed sees a wrong one."""

ROUNDING = ("biases of values",)
"""Fusions that round constants anew: where outputs are too far off with them, they are worth a try without."""


@dataclass(frozen=True, slots=True)
class Fused:
    """``counts``: fusion -> how often, those that were not found left out."""

    proto: ModelProto
    counts: Mapping[str, int]


def fuse(
    proto: ModelProto, folder: Path, only: tuple[str, ...] = (), half_norms: bool = True, without: tuple[str, ...] = ()
) -> Fused:
    """A copy of ``proto`` with these fusions, or all but those ``without``. External data in ``folder`` is read only
    where it is small, or where biases move through a product. ``half_norms``: see ``skip.skip_norm``.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    view = View(copy, folder, half_norms)
    view.sweep()
    counts = {}
    for name, run in FUSIONS:
        if name in (only or [n for n, _ in FUSIONS]) and name not in without:
            counts[name] = run(view)
            view.sweep()
    view.finish()
    return Fused(copy, {name: count for name, count in counts.items() if count})
