"""A rule that says for which calls of a model approximations are left out: ``time >= 0.7``.

What a step of a diffusion model may lose differs with the noise: the rule asks a scalar input of the call (a timestep,
a sigma). Of a batch of them one entry is enough, so that no entry gets less than was promised for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from attncompile.core.errors import BadArguments

OPERATORS: Mapping[str, str] = {"<": "Less", "<=": "LessOrEqual", ">": "Greater", ">=": "GreaterOrEqual"}
"""Relations and the ONNX operators that compute them."""

_COMPARE: Mapping[str, Any] = {
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal,
}  # fmt: skip

_FLOATS: Mapping[int, tuple[int, Any, Any]] = {
    TensorProto.FLOAT16: (TensorProto.FLOAT, np.float16, np.float32),
    TensorProto.FLOAT: (TensorProto.FLOAT, np.float32, np.float32),
    TensorProto.DOUBLE: (TensorProto.DOUBLE, np.float64, np.float64),
}
"""Types of inputs: the type that is compared, and NumPy's two."""

_INTEGERS = frozenset(
    (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.UINT16,
     TensorProto.UINT32)
)  # fmt: skip
_FORM = re.compile(r"\s*(?P<input>[^\s<>](?:[^<>]*[^\s<>])?)\s*(?P<relation><=|>=|<|>)\s*(?P<number>[^\s<>=]+)\s*")
_HINT = "write INPUT RELATION NUMBER with one of < <= > >=, such as 'time >= 0.7'"


def steps_of(proto: ModelProto, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """Float inputs that are one number for each call or batch entry, and another one from call to call in ``feeds``, as
    the steps of a diffusion sampler are. None where all inputs are such numbers.
    """
    stored = {t.name for t in proto.graph.initializer}
    inputs = [v for v in proto.graph.input if v.name not in stored]
    numbers = [
        v.name for v in inputs
        if v.type.tensor_type.elem_type in _FLOATS and v.type.tensor_type.HasField("shape")
        and len(v.type.tensor_type.shape.dim) < 2
    ]  # fmt: skip
    if len(numbers) == len(inputs):
        return []
    seen = {name: {float(x) for feed in feeds if name in feed for x in feed[name].flat[:1]} for name in numbers}
    return [name for name in numbers if len(seen[name]) > 1]


@dataclass(frozen=True, slots=True)
class KeepDense:
    """Calls whose ``input`` is in ``relation`` to ``number`` run no approximation."""

    input: str
    relation: str
    number: float

    @staticmethod
    def parse(text: str) -> KeepDense:
        """The rule in ``text``. Raises ``BadArguments`` where it is none."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise BadArguments(f"'{text}' is not a rule for calls that stay dense", _HINT)
        try:
            number = float(found["number"])
        except ValueError:
            number = float("nan")
        if not isfinite(number):
            raise BadArguments(f"'{text}': '{found['number']}' is not a finite number", _HINT)
        return KeepDense(found["input"], found["relation"], number)

    @property
    def text(self) -> str:
        """As ``parse`` reads it."""
        return f"{self.input} {self.relation} {self.number!r}"

    @property
    def operator(self) -> str:
        """The ONNX operator that compares."""
        return OPERATORS[self.relation]

    def check(self, proto: ModelProto) -> None:
        """Raises ``BadArguments`` unless the input is a number, or one number for each entry of the batch."""
        graph = proto.graph
        stored = {t.name for t in graph.initializer}
        inputs = {v.name: v.type.tensor_type for v in graph.input if v.name not in stored}
        if self.input not in inputs:
            raise BadArguments(f"the model has no input '{self.input}', which '{self.text}' asks for",
                               f"its inputs: {', '.join(inputs) or 'none'}")  # fmt: skip
        kind = inputs[self.input]
        if kind.elem_type not in (*_FLOATS, *_INTEGERS):
            name = TensorProto.DataType.Name(kind.elem_type).lower()
            raise BadArguments(f"'{self.text}': input '{self.input}' holds {name}, which is not compared with a number",
                               "name an input in float16, float32, float64 or whole numbers")  # fmt: skip
        if not kind.HasField("shape") or len(kind.shape.dim) > 1:
            dims = f"{len(kind.shape.dim)} axes" if kind.HasField("shape") else "no declared shape"
            raise BadArguments(f"'{self.text}': input '{self.input}' has {dims}, not one number for each call",
                               "name a scalar, or an input [batch], such as a timestep")  # fmt: skip
        if kind.elem_type in _INTEGERS and not (self.number.is_integer() and abs(self.number) < 2**62):
            raise BadArguments(f"'{self.text}': input '{self.input}' holds whole numbers", "compare it with one")
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        limits = np.iinfo(dtype) if kind.elem_type in _INTEGERS else np.finfo(dtype)
        lowest, highest = (self.holds({self.input: np.array(x, dtype)}) for x in (limits.min, limits.max))
        if lowest == highest:
            raise BadArguments(f"'{self.text}' holds of {'every' if lowest else 'no'} {dtype}, which '{self.input}' is",
                               "name a number between the input's values")  # fmt: skip

    def compared(self, elem_type: int) -> tuple[int, np.ndarray]:
        """The type that an input of ``elem_type`` is compared in, and the number in it: rounded to the input's own
        type first, so that a float32 0.7 is not below the 0.7 that was written.
        """
        if elem_type in _INTEGERS:
            return TensorProto.INT64, np.array(int(self.number), np.int64)
        wide, own, compared = _FLOATS[elem_type]
        with np.errstate(over="ignore"):
            return wide, np.array(own(self.number), compared)

    def holds(self, feed: Mapping[str, np.ndarray]) -> bool:
        """Whether the call with these inputs stays dense: one entry that satisfies is enough, NaN does not."""
        values = np.asarray(feed[self.input])
        return bool(np.any(_COMPARE[self.relation](values, self._in(values.dtype))))

    def feed(self, feed: Mapping[str, np.ndarray], keep: bool) -> dict[str, np.ndarray]:
        """``feed`` with the rule's input at its edge: satisfied in all entries, or in none."""
        values = np.asarray(feed[self.input])
        number = self._in(values.dtype)
        up = (self.relation in (">", ">=")) == keep
        inside = self.relation in ("<=", ">=") if keep else self.relation in ("<", ">")
        edge = number
        if not inside and values.dtype.kind == "f":
            edge = np.nextafter(number, values.dtype.type(np.inf if up else -np.inf))
        elif not inside:
            edge = number + (1 if up else -1)
        return {**feed, self.input: np.full_like(values, edge)}

    def _in(self, dtype: np.dtype[Any]) -> Any:
        with np.errstate(over="ignore"):
            return dtype.type(self.number) if dtype.kind == "f" else np.int64(self.number)
