"""Plugins registered with ``tensorrt.plugin``: functions are built from values, none is written by hand.

What TensorRT asks of them: annotated parameters without defaults, in its order and names; a result annotation; tactics
above 0; int32 arguments wrapped; expressions without a number on the left. ``docs/tensorrt.md`` lists it all.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from pathlib import Path
from types import GenericAlias
from typing import Any

from attncompile.core.errors import AttncompileError, KernelError
from attncompile.kernels import symbols as node_symbols
from attncompile.kernels.arguments import grid, int32
from attncompile.kernels.bundle import Bundle
from attncompile.kernels.entry import Compiled
from attncompile.kernels.expressions import Binary, Expression, Literal, Symbol, evaluate, parse, substitute
from attncompile.kernels.ptx import check_parameters
from attncompile.kernels.tensorrt.plugin import NAMESPACE, Plugin, read

TYPES = {
    "float16": ("FP16", "HALF"), "bfloat16": ("BF16", "BF16"), "float32": ("FP32", "FLOAT"), "bool": ("BOOL", "BOOL"),
    "uint8": ("UINT8", "UINT8"), "int8": ("INT8", "INT8"), "int32": ("INT32", "INT32"), "int64": ("INT64", "INT64"),
}  # fmt: skip
"""Element type: as ``AutoTuneCombination`` spells it, and as ``DataType`` does."""


@dataclass(slots=True)
class Registered:
    """What was registered in this process. ``problems`` are errors that TensorRT's callbacks swallowed, in words."""

    names: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)


def register_folder(folder: Path, multiprocessors: int, shared_limit: int | None = None) -> Registered:
    """Register the plugins of a bundle (``plugins.json``) for a GPU with so many multiprocessors.

    ``shared_limit``: leave out tactics that need more bytes of shared memory.
    """
    bundle = Bundle.open(folder)
    return register(read(folder), bundle.load, multiprocessors, shared_limit)


def register(
    plugins: Sequence[Plugin], load: Callable[[str], Compiled], multiprocessors: int, shared_limit: int | None = None
) -> Registered:
    """Register ``plugins``, whose kernels ``load`` gives by id. A name that is registered already is left alone: it
    says everything about its plugin but the number of multiprocessors, which a process does not change.
    """
    trt, trtp = importlib.import_module("tensorrt"), importlib.import_module("tensorrt.plugin")
    result = Registered()
    for plugin in plugins:
        made = [load(entry) for entry in plugin.entries]
        kernels = {t: k for t, k in enumerate(made, 1) if shared_limit is None or k.entry.shared <= shared_limit}
        if not kernels:
            raise KernelError(f"plugin {plugin.name} has no kernel with at most {shared_limit} bytes of shared memory")
        names = getattr(getattr(trtp.op, NAMESPACE, None), "__dict__", {})
        if plugin.name not in names:
            _Definition(trt, trtp, plugin, kernels, {"SMS": multiprocessors}, result).register()
        result.names += (plugin.name,)
    return result


@dataclass(frozen=True, slots=True)
class _Definition:
    """One plugin on its way into ``tensorrt.plugin``. ``kernels`` by tactic."""

    trt: Any
    trtp: Any
    plugin: Plugin
    kernels: Mapping[int, Compiled]
    device: Mapping[str, int]
    result: Registered

    def register(self) -> None:
        trtp, name = self.trtp, f"{NAMESPACE}::{self.plugin.name}"
        desc = trtp.TensorDesc
        inputs = [Parameter(t.name, Parameter.POSITIONAL_OR_KEYWORD, annotation=desc) for t in self.plugin.inputs]
        results = GenericAlias(tuple, (desc,) * len(self.plugin.outputs))
        outputs = Parameter("outputs", Parameter.POSITIONAL_OR_KEYWORD, annotation=results)
        tactic = Parameter("tactic", Parameter.POSITIONAL_OR_KEYWORD, annotation=int)
        code = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymExprs))
        combinations = GenericAlias(list, (trtp.AutoTuneCombination,))
        trtp.register(name)(_signed(self._noted(self.describe), inputs, results))
        trtp.autotune(name)(_signed(self._noted(self.tune), [*inputs, outputs], combinations))
        trtp.aot_impl(name)(_signed(self._noted(self.launch), [*inputs, outputs, tactic], code))

    def _noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose errors are kept: what TensorRT makes of them does not say which plugin it was."""

        def call(*given: Any, **named: Any) -> Any:
            try:
                return function(*given, **named)
            except Exception as error:
                said = error.message if isinstance(error, AttncompileError) else f"{type(error).__name__}: {error}"
                self.result.problems.append(f"plugin {self.plugin.name}: {said}")
                raise

        return call

    def describe(self, *inputs: Any) -> tuple[Any, ...]:
        """Types and symbolic shapes of the outputs."""
        given = self._sizes(inputs)
        # When only types are asked for all sizes are fakes. Numbers then have no builder to be made with, or in 10.9
        # that of another plugin.
        fake = any(size.is_fake for size in given.values())
        return tuple(
            self.trtp.from_shape_expr(
                tuple(self.trtp.ShapeExpr() if fake else self._shape(parse(axis), given) for axis in t.axes),
                self._type(t.type),
            )
            for t in self.plugin.outputs
        )

    def tune(self, *given: Any) -> list[Any]:
        """One combination: the types that the kernels are compiled for, linear, with every tactic."""
        types = ", ".join(TYPES[t.type][0] for t in (*self.plugin.inputs, *self.plugin.outputs))
        return [self.trtp.AutoTuneCombination(types, "LINEAR", sorted(self.kernels))]

    def launch(self, *given: Any) -> tuple[str, str, Any, Any]:
        """Entry, PTX, launch parameters and int32 arguments of one tactic."""
        inputs, (_, tactic) = given[: len(self.plugin.inputs)], given[len(self.plugin.inputs) :]
        made = self.kernels[tactic]
        entry = made.entry
        self._check_types(given)
        check_parameters(made.ptx, entry.arguments)
        self._check_profile(made, inputs)
        sizes = self._sizes(inputs)
        table = {name: parse(text) for name, text in self.plugin.symbols.items()}
        table |= {name: Literal(value) for name, value in self.device.items()}

        def number(text: str) -> Any:
            return self._symbolic(substitute(parse(text), table), sizes)

        parameters = self.trtp.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y, parameters.grid_z = (number(text) for text in entry.grid)
        parameters.block_x = entry.threads
        parameters.shared_mem = entry.shared
        extras = [self.trtp.SymInt32(number(a.expression)) for a in entry.arguments if a.kind == "int32"]
        name = f"{entry.name}_{made.id}"
        return name, renamed(made.ptx, entry.name, name), parameters, self.trtp.SymIntExprs.from_tuple(tuple(extras))

    def _check_types(self, given: Sequence[Any]) -> None:
        tensors = (*self.plugin.inputs, *self.plugin.outputs)
        for wanted, found in zip(tensors, (*given[:-2], *given[-2]), strict=True):
            if found.dtype != self._type(wanted.type) or found.format != self.trt.TensorFormat.LINEAR:
                raise KernelError(f"{wanted.name} is {found.dtype} {found.format}, not linear {wanted.type}")

    def _check_profile(self, made: Compiled, inputs: Sequence[Any]) -> None:
        """TensorRT would wrap a number that is no int32: refuse it while the engine is built."""
        for bound in ("min", "opt", "max"):
            shapes = {
                t.name: [int(n) for n in (getattr(d.shape, bound) if d.shape.is_dynamic else d.shape)]
                for t, d in zip(self.plugin.inputs, inputs, strict=True)
            }
            values = {**self.device, **node_symbols.values(self.plugin.symbols, shapes)}
            where = f"{bound} shapes of the profile"
            if 0 in grid(made.entry, values, where):
                raise KernelError(f"nothing to launch at the {where}: an axis of the grid is empty")
            for argument in made.entry.arguments:
                if argument.kind == "int32":
                    int32(argument, values, where)

    def _sizes(self, inputs: Sequence[Any]) -> dict[str, Any]:
        return {
            f"{t.name}[{i}]": d.shape_expr[i]
            for t, d in zip(self.plugin.inputs, inputs, strict=True)
            for i in range(len(t.axes))
        }

    def _type(self, name: str) -> Any:
        return getattr(self.trt.DataType, TYPES[name][1])

    def _shape(self, expression: Expression, sizes: Mapping[str, Any]) -> Any:
        found = self._symbolic(expression, sizes)
        return self.trtp.ShapeExpr(found) if isinstance(found, int) else found

    def _symbolic(self, expression: Expression, sizes: Mapping[str, Any]) -> Any:
        """``expression`` as TensorRT's, or a plain number. A number on the left is wrapped: there is no int - size."""
        match expression:
            case Literal(value):
                return value
            case Symbol(name):
                return sizes[name]
            case Binary(operator, left, right):
                a, b = self._symbolic(left, sizes), self._symbolic(right, sizes)
                if isinstance(a, int) and isinstance(b, int):
                    return evaluate(Binary(operator, left, right), {})
                a = self.trtp.ShapeExpr(a) if isinstance(a, int) else a
                return _OPERATORS[operator](self.trtp, a, b)
        raise AssertionError(expression)


_OPERATORS: Mapping[str, Callable[[Any, Any, Any], Any]] = {
    "+": lambda _, a, b: a + b, "-": lambda _, a, b: a - b, "*": lambda _, a, b: a * b, "//": lambda _, a, b: a // b,
    "cdiv": lambda p, a, b: p.cdiv(a, b), "min": lambda p, a, b: p.min(a, b), "max": lambda p, a, b: p.max(a, b),
}  # fmt: skip


def _signed(function: Callable[..., Any], parameters: Sequence[Parameter], result: Any) -> Callable[..., Any]:
    """``function`` with the signature that TensorRT reads."""
    function.__signature__ = Signature(list(parameters), return_annotation=result)  # type: ignore[attr-defined]
    return function


def renamed(ptx: str, old: str, new: str) -> str:
    """``ptx`` with another name of its entry: whether TensorRT tells apart equal names in one engine is not known.

    Raises:
        KernelError: the code names its entry elsewhere.
    """
    word = re.compile(rf"(?<![\w$]){re.escape(old)}(?![\w$])")
    code = [line.partition("//")[0] for line in ptx.splitlines()]
    if sum(len(word.findall(line)) for line in code) != 1:
        raise KernelError(f"the code of {old} names its entry in other places too")
    return re.sub(rf"(\.entry\s+){re.escape(old)}(?![\w$])", lambda m: m[1] + new, ptx)
