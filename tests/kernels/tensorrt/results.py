"""What a sample's node is given at some sizes, and what it must give: by the references of ``tests/conformance``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from attncompile.core.kernel import OpCall
from attncompile.core.layout import part, unpacked
from attncompile.plugins.linear_attention.op import DELTA
from tests.conformance import linear_ops, vectorised
from tests.conformance.block_lists import words
from tests.conformance.budget import wrong, wrong_sums
from tests.conformance.case import Case, laid
from tests.kernels.tensorrt import choosing
from tests.kernels.tensorrt.samples import DENSE, HOOD, SAMPLES, Sample, linear

TORCH = {1: "float32", 10: "float16", 16: "bfloat16", 9: "bool", 6: "int32", 7: "int64"}
OUTPUTS = {0: "float32", 1: "float16", 7: "bfloat16", 3: "int32"}
"""TensorRT's numbers of element types."""

POINTS = (
    {"B": 2, "N": 100, "M": 130, "C": 5, "E": 23},
    {"B": 1, "N": 331, "M": 397, "C": 1, "E": 40},
    {"B": 3, "N": 17, "M": 401, "C": 9, "E": 9},
)
SMALL = ({"B": 2, "N": 45, "M": 70, "C": 3, "E": 7},)
"""For an interpreter."""
OPERANDS = ("query", "key", "value", "output")


def widened(sample: Sample, **attributes: Any) -> Sample:
    """``sample`` with head dims of 128, whose best tactics need more than 48 KB of shared memory."""
    dims = {32: 128, 48: 128}
    inputs = {
        n: (kind, tuple(dims.get(d, d) if n not in DENSE[3:] else d for d in shape))  # type: ignore[call-overload]
        for n, (kind, shape) in sample.inputs.items()
    }
    return replace(sample, name=f"{sample.name}, 128", inputs=inputs, attributes={**sample.attributes, **attributes})


def _named(name: str) -> Sample:
    return next(s for s in SAMPLES if s.name == name)


LARGE = (
    widened(_named("dense")), widened(_named("neighborhood")), widened(_named("lists of a file")),
    widened(_named("states of chunks")), widened(_named("whole state applied")),
    widened(_named("states before chunks"), chunk=128), widened(_named("output of chunks"), chunk=128),
    linear("what the delta rule writes, 128", DELTA, {
        "key": (10, ("B", "N", 2, 128)), "value": (10, ("B", "N", 2, 128)), "solved": (1, ("B", 2, "C", 64, 64)),
        "log_decay": (1, ("B", "N", 2)),
    }, ("written", "state", "final_state"), {"B": (1, 2, 3), "N": (1, 100, 333), "C": (1, 2, 6)}, tile=64, chunk=64),
)  # fmt: skip
"""Of each op that multiplies large tiles: sums of chunks, single steps and single tiles need little shared memory."""


def poisoned(kind: int, shape: Sequence[int], device: str = "cpu") -> torch.Tensor:
    """An output of TensorRT's type ``kind`` before a launch."""
    dtype = getattr(torch, OUTPUTS[kind])
    return torch.full(tuple(shape), torch.nan if dtype.is_floating_point else -(1 << 30), dtype=dtype, device=device)


def points(sample: Sample, among: Sequence[Mapping[str, int]] = POINTS) -> list[dict[str, int]]:
    """Sizes of the sample's dynamic axes, which agree with each other; one of none where all are static."""
    found: list[dict[str, int]] = []
    for point in among:
        full = dict(point)
        full["R"] = -(-full["N"] // 64)
        full["R4"] = full["B"] * 4 * full["R"]
        full["T"] = 4 * full["C"] - 1
        if "chunk" in sample.attributes:
            full["C"] = -(-full["N"] // sample.attributes.get("tile", sample.attributes["chunk"]))
        sizes = {n: full[n] for n in sample.sizes}
        if sizes not in found:
            found.append(sizes)
    return found


def shapes(sample: Sample, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Of the inputs, as the network has them."""
    return {n: tuple(sizes.get(d, d) for d in dims) for n, (_, dims) in sample.inputs.items()}  # type: ignore[misc, call-overload]


def layout(sample: Sample, operand: str) -> str:
    return str(sample.attributes.get(f"{operand[0]}_layout", "BNHD"))


def inputs(sample: Sample, call: OpCall, sizes: Mapping[str, int], device: str = "cpu") -> dict[str, torch.Tensor]:
    """As the network has them: contiguous, in the node's layouts and types."""
    if sample.op in choosing.CHOOSING:
        given = choosing.inputs(call, _in_order(sample, sizes))
    else:
        given = _linear(sample, sizes) if sample.op.startswith("Linear") else _softmax(sample, call, sizes)
    found = {}
    for name, array in given.items():
        x = torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, TORCH[sample.inputs[name][0]]))
        found[name] = (_laid(x, layout(sample, name)) if name in OPERANDS else x).contiguous().to(device)
    return found


def problems(
    sample: Sample, call: OpCall, sizes: Mapping[str, int], given: Mapping[str, torch.Tensor],
    got: Mapping[str, torch.Tensor],
) -> Iterator[str]:  # fmt: skip
    """What is wrong with each output, as the network has it, of a launch on ``given``."""
    logical = {n: _logical(x, layout(sample, n)) if n in OPERANDS else x for n, x in (given | got).items()}
    if sample.op in choosing.CHOOSING:
        arrays = {n: x.float().cpu().numpy() if x.is_floating_point() else x.cpu().numpy() for n, x in logical.items()}
        yield from choosing.problems(call, _in_order(sample, sizes), arrays, {n: arrays[n] for n in got})
        return
    results = {n: logical[n].detach().double().cpu().numpy() for n in got}
    if not sample.op.startswith("Linear"):
        arrays = {n: logical[n].cpu() for n in given}
        held = {n: (x.float() if x.is_floating_point() else x).numpy() for n, x in arrays.items()}
        case = case_of(sample, call, sizes)
        device = str(next(iter(given.values())).device)
        want, sums = vectorised.expected(case.call, held, device)
        low, low_sums = vectorised.expected(case.call, held, device, half=call.dtype)
        if said := wrong(results["output"], want, low, call.dtype):
            yield f"output: {said}"
        if "log_sum_exp" in got:
            softcap = call.attributes.get("softcap", 0.0)
            if said := wrong_sums(results["log_sum_exp"], sums, low_sums, softcap):
                yield f"log_sum_exp: {said}"
        return
    half = call.dtype if call.dtype != "float32" else "float16"
    asked = {"epsilon": 0.0, "floor": -np.inf, "scale": 1.0, "chunk": 0, **call.attributes}
    whole = linear_ops.expected(sample.op, asked, {n: logical[n] for n in given})
    best = linear_ops.expected(sample.op, asked, {n: logical[n] for n in given}, half)
    for name, x in results.items():
        kind = call.dtype if name in ("output", "written") else "sums"
        if said := wrong(x, whole[name].cpu().numpy(), best[name].cpu().numpy(), kind):
            yield f"{name}: {said}"


def case_of(sample: Sample, call: OpCall, sizes: Mapping[str, int]) -> Case:
    """The call of an op with a softmax, with all its sizes."""
    at = shapes(sample, sizes)
    layouts = tuple(layout(sample, n) for n in OPERANDS)
    q, k = (dict(zip(layout(sample, n), at[n], strict=True)) for n in ("query", "key"))
    optional = {n: s for n, s in at.items() if n not in OPERANDS}
    full = replace(call, batch=q["B"], query_length=q["N"], key_length=k["N"], shapes=optional)
    return Case(sample.name, full, layouts)  # type: ignore[arg-type]


def _softmax(sample: Sample, call: OpCall, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    case = case_of(sample, call, sizes)
    given = {n: x for n, x in case.inputs().items() if n in (*DENSE, *HOOD)}
    if "rows" in sample.inputs:
        given |= lists(shapes(sample, sizes), call.attributes["block"], case.sizes[2], sample.inputs)
    return given


def lists(
    at: Mapping[str, tuple[int, ...]], block: int, keys: int, there: Mapping[str, Any], seed: int = 0
) -> dict[str, np.ndarray]:
    """Lists of exactly the sizes ``at``: rows share their entries, and no row names a block twice."""
    rng = np.random.default_rng([seed, keys])
    entries, wide = at["columns"][0], -(-keys // block)
    # Any ``wide`` entries in a row are of different columns.
    columns = rng.permutation(wide)[np.arange(entries) % wide].astype(np.int32)
    rows = np.zeros((int(np.prod(at["rows"][:-1])), 3), np.int32)
    ragged = columns == wide - 1 if keys % block else np.zeros(entries, bool)
    for row in rows:
        start = int(rng.integers(entries))
        end = start + int(rng.integers(0, min(wide, entries - start) + 1))
        least = max([i + 1 for i in range(start, end) if ragged[i]], default=start)
        row[:] = start, int(rng.integers(least, end + 1)), end
    masks = rng.random((at["masks"][0], block, block)) < 0.5
    found = {
        "rows": rows.reshape(at["rows"]), "columns": columns, "masks": words(masks),
        "kinds": rng.integers(0, len(masks), entries).astype(np.int32),
    }  # fmt: skip
    if "order" in there:
        found["order"] = rng.permutation(len(rows)).astype(np.int32)
    if "counts" in there:
        found["counts"] = rng.integers(1, 5, entries).astype(np.int32)
    return found


def _in_order(sample: Sample, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Of the inputs, operands in BNHD."""
    at = shapes(sample, sizes)
    named = {n: dict(zip(layout(sample, n), x, strict=True)) for n, x in at.items() if n in OPERANDS}
    return at | {n: tuple(x[a] for a in "BNHD") for n, x in named.items()}


POSITIVE = ("total", "initial_total", "key_weight")


def _linear(sample: Sample, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Of the kinds that ops before this one give: sums are positive, logarithms of decays are not."""
    rng, found = np.random.default_rng(1), {}
    for name, shape in _in_order(sample, sizes).items():
        x = rng.standard_normal(shape).astype(np.float32)
        if name in POSITIVE:
            x = np.abs(x) + np.float32(0.5)
        if name == "key" and {"beta", "solved"} & set(sample.inputs):  # the delta rule is made for keys of length one
            x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        if name == "feature_weight":
            x = x / np.float32(shape[1] ** 0.5)
        if name == "beta":
            x = 1 / (1 + np.exp(-x))
        found[name] = -np.abs(x) / 4 if name == "log_decay" else x
    return found


def _laid(x: torch.Tensor, order: str) -> torch.Tensor:
    """From the axes BNHD to those of a layout; other parts are NaN."""
    return torch.from_numpy(laid(x.float().numpy(), order)).to(x.dtype)


def _logical(x: torch.Tensor, order: str) -> torch.Tensor:
    chosen = part(order)
    one = x if chosen is None else x.select(*chosen)
    return one.permute([unpacked(order).index(a) for a in "BNHD"])
