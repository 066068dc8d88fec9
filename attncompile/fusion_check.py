"""Whether fusions leave a model's outputs what they were: both forms in ONNX Runtime on the CPU, bodies in the place of
kernels, in float32 where the weights are not too large for that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto, TensorProto, external_data_helper

from attncompile import verify
from attncompile.core.errors import AttncompileError
from attncompile.core.model import Model
from attncompile.core.verdict import Verdict
from attncompile.runtime import layout
from attncompile.targets import graph as g
from attncompile.targets import onnx as onnx_target
from attncompile.targets.engine import save
from attncompile.targets.ort_fusions import AROUND_OURS, fuse

if TYPE_CHECKING:
    from attncompile.targets.base import Precision

WIDENED = 1 << 28
"""Elements of all weights up to which both forms are compared in float32."""
BUDGETS = {TensorProto.FLOAT: 1e-5, TensorProto.FLOAT16: 1e-4, TensorProto.BFLOAT16: 8e-3}
"""Relative L2 at the outputs in float32, by the type whose rounding a model's constants have."""
PLAIN_BUDGET = 1e-2
"""The same where both run in fp16."""
_TO_FLOAT: Mapping[int, int] = {TensorProto.FLOAT16: TensorProto.FLOAT, TensorProto.BFLOAT16: TensorProto.FLOAT}


def check(
    proto: ModelProto, model: Model, precision: Precision | None, feeds: Sequence[Mapping[str, np.ndarray]],
    counts: Mapping[str, int], lowered: ModelProto,
) -> Verdict:  # fmt: skip
    """``proto``, made from ``model``, with fusions against itself without. ``counts``: how often each was found in what
    is deployed, ``lowered``; here they must be found as often, else this would prove nothing of it.
    """
    folder = model.path.resolve().parent
    plain = onnx_target.TARGET.lower(proto, model, precision) if precision else g.inlined(proto)
    launched = {o for n in lowered.graph.node if n.domain == layout.DOMAIN for o in n.output}
    known = {v.name for v in (*plain.graph.value_info, *plain.graph.output)}
    # A body does not say its sizes as the op does.
    plain.graph.value_info.extend(v for v in lowered.graph.value_info if v.name in launched - known)
    fused = fuse(plain, folder)
    for name, count in counts.items():
        if name not in AROUND_OURS and fused.counts.get(name, 0) < count:
            return Verdict.no(
                "unlike", f"'{name}' was not found again in the model with bodies, so it was not compared"
            )
    try:
        with tempfile.TemporaryDirectory(prefix="attncompile-fusions-") as scratch:
            return _compare(plain, fused.proto, model, feeds, Path(scratch))
    except AttncompileError as error:
        return Verdict.no("not_compared", error.message, error.hint)


def _compare(
    plain: ModelProto, fused: ModelProto, model: Model, feeds: Sequence[Mapping[str, np.ndarray]], scratch: Path
) -> Verdict:  # fmt: skip
    kind = next((t for t in (TensorProto.BFLOAT16, TensorProto.FLOAT16) if _uses(plain, t)), TensorProto.FLOAT)
    widened = kind != TensorProto.FLOAT and sum(prod(t.dims) for t in plain.graph.initializer) <= WIDENED
    budget = BUDGETS[kind] if widened or kind == TensorProto.FLOAT else PLAIN_BUDGET
    paths = []
    converted = list(feeds)
    for name, form in (("plain", plain), ("fused", fused)):
        place = scratch / name
        place.mkdir()
        if widened:
            whole = ModelProto()
            whole.CopyFrom(form)
            external_data_helper.load_external_data_for_model(whole, str(model.path.resolve().parent))
            wide = verify.retype(whole, _TO_FLOAT)
            converted = [verify.convert_feed(feed, wide) for feed in feeds]
            paths.append(save(wide, place / "model.onnx")[0])
        else:
            paths.append(onnx_target.write(form, model, place))
    compared = verify.compare_models(paths[0], paths[1], converted, budget=budget)
    if not compared.passed:
        return Verdict.no("parity", compared.verdict.reason)
    said = "in float32" if widened or kind == TensorProto.FLOAT else "in fp16"
    return Verdict.yes(f"with fusions against without, on the CPU {said}: relative L2 {compared.error:.1e}")


def _uses(proto: ModelProto, kind: int) -> bool:
    values = (*proto.graph.initializer, *proto.graph.input)
    return any((v.data_type if isinstance(v, TensorProto) else v.type.tensor_type.elem_type) == kind for v in values)
