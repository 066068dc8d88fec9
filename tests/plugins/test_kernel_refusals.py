"""What kernels do not do is refused with a reason; what they do is taken on every architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import ARCHITECTURES, Kernel, OpCall
from attncompile.plugins.attention.kernel import AttentionKernel
from attncompile.plugins.block_sparse.kernel import BlockSparseKernel
from attncompile.plugins.neighborhood.kernel import NARROW, NeighborhoodKernel

DENSE = OpCall("Attention", "float16", 4, 2, 64, 64)
HOOD = OpCall("NeighborhoodAttention", "float16", 4, 2, 64, 64, attributes={"kernel_size": [3, 5], "grid": [9, 11]})
LISTS = dict.fromkeys(("rows", "columns", "kinds", "masks"), "int32")
SPARSE = OpCall("BlockSparseAttention", "float16", 4, 2, 64, 64, attributes={"block": 64}, inputs=LISTS)
RING = {"kernel_size": [4, 4], "stride": [4, 4], "grid": [8, 12], "border": "circular"}
LARGE_BALL = {"kernel_size": [63, 63, 63], "grid": [64, 64, 64], "shape": "ball"}
SEQUENCE = {"kernel_size": [5], "grid": [37]}


def having(call: OpCall, **changed: Any) -> OpCall:
    return replace(call, attributes={**call.attributes, **changed})


REFUSED: dict[str, tuple[Kernel, OpCall, str, str]] = {
    "ring": (NeighborhoodKernel(), having(HOOD, **RING), "ring", "rings"),
    "ring, moved": (NeighborhoodKernel(), having(HOOD, **RING, shift=[2, 2], seam=-100.0), "ring", "seam"),
    "window bias": (NeighborhoodKernel(), replace(HOOD, inputs={"window_bias": "float16"}), "inputs", "window_bias"),
    "sinks": (NeighborhoodKernel(), replace(HOOD, inputs={"sinks": "float16"}), "inputs", "sinks"),
    "log-sum-exp": (NeighborhoodKernel(), replace(HOOD, outputs=("output", "log_sum_exp")), "outputs", "log_sum_exp"),
    "dynamic": (NeighborhoodKernel(), having(HOOD, kernel_size=[5], grid=[-1]), "grid", "dynamic"),
    "causal with a prefix": (NeighborhoodKernel(), having(HOOD, **SEQUENCE, causal=[1], prefix=2), "prefix", ""),
    "cache": (NeighborhoodKernel(), replace(HOOD, query_length=5, key_length=99), "lengths", "5 tokens"),
    "negative scale": (NeighborhoodKernel(), having(HOOD, scale=-0.125), "scale", "positive"),
    "double bias": (NeighborhoodKernel(), replace(HOOD, inputs={"bias": "float64"}), "dtype", "float64"),
    "additive key mask": (NeighborhoodKernel(), replace(HOOD, inputs={"key_mask": "float16"}), "dtype", "key_mask"),
    "float32": (NeighborhoodKernel(), replace(HOOD, dtype="float32"), "dtype", "float32"),
    "head dim": (NeighborhoodKernel(), replace(HOOD, head_dim=36), "head-dim", "36"),
    "long windows": (NeighborhoodKernel(), having(HOOD, kernel_size=[40000], grid=[50000]), "size", "tokens"),
    "large ball": (NeighborhoodKernel(), having(HOOD, **LARGE_BALL), "size", "31x31x31"),
    "dense, zero scale": (AttentionKernel(), having(DENSE, scale=0.0), "scale", "positive"),
    "dense, softcap": (AttentionKernel(), having(DENSE, softcap=-1.0), "softcap", "positive"),
    "dense, lengths": (AttentionKernel(), replace(DENSE, inputs={"key_lengths": "uint8"}), "dtype", "key_lengths"),
    "dense, unknown": (AttentionKernel(), replace(DENSE, inputs={"past_key": "float16"}), "inputs", "past_key"),
    "lists, block": (BlockSparseKernel(), having(SPARSE, block=32), "block", "kernels take 64 and 128"),
    "lists, none": (BlockSparseKernel(), replace(SPARSE, inputs={"rows": "int32"}), "inputs", "columns, kinds, masks"),
    "lists, int64": (BlockSparseKernel(), replace(SPARSE, inputs={**LISTS, "order": "int64"}), "dtype", "order is"),
    "lists, unknown": (BlockSparseKernel(), replace(SPARSE, inputs={**LISTS, "mask": "bool"}), "inputs", "mask"),
    "lists, float32": (BlockSparseKernel(), replace(SPARSE, dtype="float32"), "dtype", "float32"),
    "lists, head dim": (BlockSparseKernel(), replace(SPARSE, head_dim=264), "head-dim", "264"),
    "lists, scale": (BlockSparseKernel(), having(SPARSE, scale=-1.0), "scale", "positive"),
    "dense, heads": (AttentionKernel(), replace(DENSE, heads=5), "heads", "5 query heads"),
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "call", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(kernel: Kernel, call: OpCall, code: str, words: str) -> None:
    for architecture in ARCHITECTURES:
        verdict = kernel.supports(call, architecture)
        assert not verdict.ok and verdict.code == code and words in verdict.reason, verdict
        with pytest.raises(Unsupported):
            kernel.programs(call, architecture)


TAKEN: dict[str, tuple[Kernel, OpCall]] = {
    "bias and key mask": (NeighborhoodKernel(), replace(HOOD, inputs={"bias": "float32", "key_mask": "bool"})),
    "bias beside a prefix": (NeighborhoodKernel(), having(replace(HOOD, inputs={"bias": "float16"}), prefix=1)),
    "Swin's windows, truncated": (NeighborhoodKernel(), having(HOOD, **{**RING, "border": "truncate"})),
    "stride and dilation": (NeighborhoodKernel(), having(HOOD, stride=[2, 1], dilation=[1, 2], border="clamp")),
    "all of BlockSparseAttention": (
        BlockSparseKernel(),
        replace(
            having(SPARSE, block=128, masked_rows="uniform"), outputs=("output", "log_sum_exp"),
            inputs={
                **LISTS, "key_mask": "bool", "bias": "float32", "sinks": "float16", "order": "int32", "counts": "int32"
            },
        ),
    ),
    "all of Attention": (
        AttentionKernel(),
        replace(
            having(DENSE, left=5, right=0, softcap=30.0, masked_rows="uniform"), outputs=("output", "log_sum_exp"),
            inputs={"key_mask": "bool", "bias": "float32", "sinks": "float16", "mask": "bool", "key_lengths": "int64"},
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "call"), TAKEN.values(), ids=TAKEN)
def test_taken(kernel: Kernel, call: OpCall) -> None:
    for architecture in ARCHITECTURES:
        assert kernel.supports(call, architecture).ok
        names = [[a.name for a in p.arguments] for p in kernel.programs(call, architecture)]
        assert all(name in given for given in names for name in call.inputs)


def test_windows_without_a_key_are_compared_in_wide_fields() -> None:
    """A group of 200 queries whose causal window holds 3 keys: bounds lie 200 places from the tile's keys."""
    call = having(HOOD, kernel_size=[3], stride=[200], causal=[1], grid=[400])
    (program, *_) = NeighborhoodKernel().programs(call, 80)
    assert int(str(program.constants["E2"])) < NARROW and not program.constants["NARROW"]
