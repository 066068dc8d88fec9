"""Sites without a model, and one-node models around what a mechanism lowers them to."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from attncompile.core.grid_pattern import Blocked
from attncompile.core.head_pattern import HeadMasks, KeyCounts
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Mechanism
from attncompile.core.pattern import BlockSparse, Pattern
from attncompile.core.site import AttentionSite, Operand

SHOWN = Certificate("structure", "given by the test", general=True)
ONCE = Certificate("constant", "given by the test")
TYPES = {
    "float32": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),  # ONNX Runtime's CPU provider cannot run it
}


def stored_mask(counts: np.ndarray) -> list[MaskPart]:
    """The factors of a mask [Nq, Nk] or [heads, Nq, Nk], bool or how often each key counts."""
    seen = counts > 0
    pattern: Pattern = BlockSparse.of(seen, 16) if seen.ndim == 2 else HeadMasks.of(seen, 16)
    made = [MaskPart("block_sparse", ONCE, pattern=pattern)]
    if counts.dtype != bool:
        times = KeyCounts.of(counts.reshape((-1, *counts.shape[-2:])))
        made.append(MaskPart("bias", ONCE, additive=True, counts=times))
    return made


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison. ``key_mask`` [.., Nk] bool, True = visible; ``visible`` [Nq, Nk] bool, a stored mask
    ([heads, Nq, Nk]: one for each head; whole numbers: how often each key counts);
    ``pattern`` a structure that the site's mask was found to have; ``bias`` broadcastable to [B, H, Nq, Nk];
    ``sinks`` H logits or one; ``windows`` a blocked pattern with ``window_bias`` [H or 1, W, W] by places in it and
    ``seam``, a finite number that is added where it wraps around.
    """

    batch: int = 1
    queries: int = 37
    keys: int | None = None
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 6
    layouts: tuple[str, str, str, str] = ("BHND", "BHND", "BHND", "BHND")
    dtype: str = "float32"
    softmax_dtype: str = "float32"
    scale: float = 0.3
    static: bool = False
    opset: int = 18
    key_mask: np.ndarray | None = None
    masked_rows: str = "zero"
    fills: tuple[float, ...] = ()
    causal: bool = False
    visible: np.ndarray | None = None
    pattern: Pattern | None = None
    bias: np.ndarray | None = None
    sinks: np.ndarray | None = None
    windows: Blocked | None = None
    window_bias: np.ndarray | None = None
    seam: float = 0.0
    seed: int = 0

    @property
    def key_length(self) -> int:
        return self.queries if self.keys is None else self.keys

    def site(self, **changes: Any) -> AttentionSite:
        parts = []
        if self.causal:
            parts.append(MaskPart("causal", SHOWN, -1, 0))
        if self.key_mask is not None:
            parts.append(MaskPart("padding", SHOWN, source="key_mask"))
        if self.visible is not None:
            parts += stored_mask(self.visible)
        if self.pattern is not None:
            parts.append(MaskPart("neighborhood", ONCE, pattern=self.pattern))
        if self.bias is not None:
            parts.append(MaskPart("bias", Certificate("evaluated", ""), source="bias", additive=True))
        if self.windows is not None:
            parts.append(MaskPart("blocked", ONCE, pattern=self.windows))
        if self.window_bias is not None:
            parts.append(MaskPart("bias", SHOWN, source="window_bias", additive=True, places=True))
        if self.seam and self.windows is not None:
            apart = replace(self.windows, cyclic=False)
            parts.append(MaskPart("bias", SHOWN, additive=True, pattern=apart, number=self.seam))
        same = self.queries == self.key_length
        made = AttentionSite(
            id="test", form="matmul", query=Operand("q", self.layouts[0]), key=Operand("k", self.layouts[1]),
            value=Operand("v", self.layouts[2]), output=Operand("o", self.layouts[3]),
            batch=self.batch if self.static else "B", heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, value_dim=self.value_dim, query_length=self.queries if self.static else "N",
            key_length=self.key_length if self.static else ("N" if same else "M"), scale=self.scale,
            mask=MaskFacts(tuple(parts), self.masked_rows, self.fills),
            dtype=self.dtype, softmax_dtype=self.softmax_dtype,
            nodes=(), interior=(), sinks="sinks" if self.sinks is not None else "",
        )  # fmt: skip
        return replace(made, **changes)

    def tensors(self) -> dict[str, np.ndarray]:
        """q, k, v as [B, N, H, D]."""
        rng = np.random.default_rng(self.seed)
        shapes = {
            "q": (self.batch, self.queries, self.heads, self.head_dim),
            "k": (self.batch, self.key_length, self.kv_heads, self.head_dim),
            "v": (self.batch, self.key_length, self.kv_heads, self.value_dim),
        }
        return {name: rng.standard_normal(shape).astype(TYPES[self.dtype][1]) for name, shape in shapes.items()}

    def model(self, mechanism: Mechanism, parameters: Mapping[str, Any]) -> onnx.ModelProto:
        site = self.site()
        lowering = mechanism.lower(site, parameters, self.opset)
        element = TYPES[self.dtype][0]
        length = {"q": site.query_length, "k": site.key_length, "v": site.key_length, "o": site.query_length}
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "o": self.heads}
        dim = {"q": self.head_dim, "k": self.head_dim, "v": self.value_dim, "o": self.value_dim}
        values = {}
        for name, layout in zip("qkvo", self.layouts, strict=True):
            dims = {"B": site.batch, "N": length[name], "H": heads[name], "D": dim[name]}
            values[name] = helper.make_tensor_value_info(name, element, [dims[axis] for axis in layout])
        inputs = [values[name] for name in "qkv"]
        if self.key_mask is not None:
            kind = TensorProto.BOOL
            inputs.append(helper.make_tensor_value_info("key_mask", kind, self.key_mask.shape))
        if self.sinks is not None:
            kind = helper.np_dtype_to_tensor_dtype(self.sinks.dtype)
            inputs.append(helper.make_tensor_value_info("sinks", kind, self.sinks.shape))
        if self.bias is not None:
            kind = helper.np_dtype_to_tensor_dtype(self.bias.dtype)
            inputs.append(helper.make_tensor_value_info("bias", kind, self.bias.shape))
        if self.window_bias is not None:
            kind = helper.np_dtype_to_tensor_dtype(self.window_bias.dtype)
            inputs.append(helper.make_tensor_value_info("window_bias", kind, self.window_bias.shape))
        graph = helper.make_graph(lowering.nodes, "test", inputs, [values["o"]], list(lowering.initializers))
        opsets = [helper.make_opsetid("", self.opset)]
        if lowering.functions:
            opsets.append(helper.make_opsetid("attncompile", 1))
        return helper.make_model(graph, functions=list(lowering.functions), opset_imports=opsets, ir_version=10)

    def feeds(self) -> dict[str, np.ndarray]:
        feeds = {
            name: x if layout == "BNHD" else np.ascontiguousarray(x.transpose(0, 2, 1, 3))
            for (name, x), layout in zip(self.tensors().items(), self.layouts, strict=False)
        }
        if self.key_mask is not None:
            feeds["key_mask"] = self.key_mask
        if self.bias is not None:
            feeds["bias"] = self.bias
        if self.sinks is not None:
            feeds["sinks"] = self.sinks
        if self.window_bias is not None:
            feeds["window_bias"] = self.window_bias
        return feeds

    def run(self, mechanism: Mechanism, parameters: Mapping[str, Any]) -> np.ndarray:
        """[B, Nq, H, Dv] out of ONNX Runtime's CPU provider."""
        model = self.model(mechanism, parameters)
        onnx.checker.check_model(model, full_check=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        out = session.run(None, self.feeds())[0]
        return out if self.layouts[3] == "BNHD" else out.transpose(0, 2, 1, 3)

    def expected(self, mechanism: Mechanism, parameters: Mapping[str, Any]) -> np.ndarray:
        sinks = None if self.sinks is None else np.broadcast_to(self.sinks.reshape(-1), (self.heads,))
        stored = {"visible": self.visible, "bias": self.bias, "sinks": sinks, "window_bias": self.window_bias}
        extra = {name: value for name, value in stored.items() if value is not None}
        given = {**self.tensors(), **extra, "scale": self.scale, "key_mask": self.key_mask}
        # The definition knows nothing of how a body is cut: many tests ask for the same again.
        said = {name: value for name, value in parameters.items() if name not in OF_BODIES}
        words = pickle.dumps((mechanism.name, sorted(said.items()), sorted(given.items())))
        key = (mechanism.reference.__func__, hashlib.sha256(words).digest())  # type: ignore[attr-defined]
        if key not in _KNOWN:
            if len(_KNOWN) >= 300:
                del _KNOWN[next(iter(_KNOWN))]
            _KNOWN[key] = mechanism.reference(**given, parameters=said)
            _KNOWN[key].setflags(write=False)
        return _KNOWN[key]


OF_BODIES = ("block", "dense_below", "chunks")
_KNOWN: dict[tuple[Any, bytes], np.ndarray] = {}


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 over finite results; infinite when shapes or NaN positions differ or nothing is compared."""
    if got.shape != want.shape or got.size == 0 or not np.array_equal(np.isnan(got), np.isnan(want)):
        return float("inf")
    finite = ~np.isnan(want)
    norm = float(np.linalg.norm(want[finite]))
    return float(np.linalg.norm(got[finite].astype(np.float64) - want[finite])) / norm if norm else float("inf")


TOLERANCE = {"float32": 1e-6, "float16": 2e-3}


@pytest.fixture
def case() -> type[Case]:
    return Case


@pytest.fixture
def error() -> Callable[[Case, Mechanism, Mapping[str, Any]], float]:
    """Relative L2 of a mechanism's lowering against its reference."""
    return lambda case, mechanism, parameters: relative_error(
        case.run(mechanism, parameters), case.expected(mechanism, parameters)
    )


@pytest.fixture
def tolerance() -> Mapping[str, float]:
    return TOLERANCE
