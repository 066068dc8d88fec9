"""Plugins as a user writes them: of one input, with at most one attribute. Their annotations are objects, not texts."""

from collections.abc import Callable
from typing import Any

from onnx import NodeProto, helper

from tests.kernels.conftest import PTX
from tests.kernels.tensorrt import native
from tests.kernels.tensorrt.walk import Launch, created, launches

SHAPE = {"N": (1, 100, 300)}
X = [(native.DataType.HALF, ["N", 64])]


def node(name: str, domain: str = "toys", inputs: tuple[str, ...] = ("x",), **attributes: Any) -> NodeProto:
    return helper.make_node(name, list(inputs), ["y"], name, domain=domain, aot=1, **attributes)


def made(both: Any, name: str = "kernel", ptx: str = PTX, extras: tuple[Any, ...] | None = None) -> Any:
    """What ``aot_impl`` returns; by default right for ``PTX``."""
    trtp = both[1]
    extras = (trtp.SymInt32(3),) if extras is None else extras
    parameters = trtp.KernelLaunchParams()
    parameters.block_x = 32
    return name, ptx, parameters, trtp.SymIntExprs.from_tuple(extras)


def toy(both: Any, name: str, launch: Callable[..., Any] | None = None, attribute: Any = None) -> None:
    """Registers it. ``launch`` gets the input's description, and the attribute, of type ``attribute``."""
    trtp = both[1]
    result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]
    outputs_type = tuple[trtp.TensorDesc]
    chosen = launch or (lambda *_: made(both))
    if attribute is None:

        def register(x: trtp.TensorDesc) -> trtp.TensorDesc:
            return x.like()

        def aot(x: trtp.TensorDesc, outputs: outputs_type, tactic: int) -> result:
            return chosen(x)
    else:

        def register(x: trtp.TensorDesc, a: attribute) -> trtp.TensorDesc:
            return x.like()

        def aot(x: trtp.TensorDesc, a: attribute, outputs: outputs_type, tactic: int) -> result:
            return chosen(x, a)

    trtp.register(f"toys::{name}")(register)
    trtp.aot_impl(f"toys::{name}")(aot)


def run(both: Any, name: str, **attributes: Any) -> list[Launch]:
    """Through the parser and the builder."""
    written = node(name, plugin_namespace="toys", **attributes)
    return launches(created(both[0], written), written, X, SHAPE)
