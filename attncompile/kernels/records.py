"""What a bundle's index is made of: nodes, calls and which kernels they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attncompile.core.kernel import OpCall
from attncompile.core.verdict import Verdict
from attncompile.kernels.entry import Compiled, canonical, digest
from attncompile.kernels.node_tensors import NodeTensors


@dataclass(frozen=True, slots=True)
class NodeCall:
    """One node. ``scope`` names the nodes and branches whose body it is in, from the outside, or the function.

    ``call``, ``symbols`` (as expressions over the sizes of the node's inputs) and ``tensors`` are there where
    ``verdict`` is ok.
    """

    name: str
    scope: str
    op: str
    verdict: Verdict
    call: OpCall | None = None
    symbols: Mapping[str, str] | None = None
    tensors: NodeTensors | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call has no kernel on an architecture, or lacks one of its tactics (``tactic``)."""

    architecture: int
    tactic: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class CallKernels:
    """A general call and its kernels: ids by architecture, best first."""

    call: OpCall
    kernels: Mapping[int, tuple[str, ...]]
    refused: tuple[Refusal, ...] = ()

    @property
    def key(self) -> str:
        return key_of(self.call)


@dataclass(frozen=True, slots=True)
class Built:
    """All that a bundle holds. ``nodes`` are those of the model, with and without kernels."""

    compiled: Mapping[str, Compiled]
    calls: tuple[CallKernels, ...]
    nodes: tuple[tuple[NodeCall, str], ...] = ()
    """Each with the key of its call, or an empty one."""


def signature(call: OpCall) -> dict[str, Any]:
    """A general call as JSON values."""
    return {
        "op": call.op, "dtype": call.dtype, "head_dim": call.head_dim, "value_dim": call.value_dim,
        "attributes": {k: list(v) if isinstance(v, tuple) else v for k, v in call.attributes.items()},
        "inputs": dict(call.inputs), "outputs": list(call.outputs), **({"packed": True} if call.packed else {}),
    }  # fmt: skip


def key_of(call: OpCall) -> str:
    """Names a general call."""
    return digest(canonical(signature(call)))[:16]
