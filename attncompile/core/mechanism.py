"""What a mechanism (a folder in ``plugins/``) offers to the rest. Free of hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto

from attncompile.core.block_pattern import BlockGeometry, BlockPattern
from attncompile.core.block_selection import Family
from attncompile.core.site import NEED_WORDS, AttentionSite, Need
from attncompile.core.verdict import Verdict

Parameters = Mapping[str, Any]
"""A mechanism's parameters: TOML-representable values only (int, float, bool, str, lists of them)."""

FLOPS_PER_GUARD = 260.0
"""What a NaN guard (IsNaN, Where) costs a score element, in flops of a product; ONNX Runtime's CPU kernels of both are
slow. Set by hand from profiles of a few sites on 2 CPU cores."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to replace one site. ``parameters`` round-trip through plan.toml. ``inside``: of an approximation the
    parameters of another that sees the same keys and more; where that takes no longer this one is not tried.
    """

    mechanism: str
    parameters: Parameters
    exact: bool
    reason: str
    inside: Parameters | None = None


@dataclass(frozen=True, slots=True)
class Lowering:
    """What replaces a site's nodes: ``nodes`` in topological order, the last of which produces the site's output
    value under its original name, with the initializers and model-local functions that they need.
    """

    nodes: tuple[NodeProto, ...]
    functions: tuple[FunctionProto, ...] = ()
    initializers: tuple[TensorProto, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one call: multiply-adds are counted as 2 ``flops``; ``keys`` is the number of keys that a query
    meets on average, masked ones in touched blocks included; ``elements`` the score elements written.
    """

    flops: float
    keys: float
    elements: float


@dataclass(frozen=True, slots=True)
class Shape:
    """Concrete sizes of one call of a site."""

    batch: int
    query_length: int
    key_length: int
    bindings: Mapping[str, int] = field(default_factory=dict)


class Mechanism(Protocol):
    """Mathematics and parameters of one kind of attention."""

    name: str
    skips_keys: bool
    """Whether a query meets fewer keys. A target that fuses dense attention takes only such replacements."""
    understands: frozenset[Need]
    """Which of a site's ``needs`` the mechanism's other methods look at; it is never offered a site with others."""

    def exact_candidates(self, site: AttentionSite) -> Sequence[Candidate | Verdict]:
        """Ways to replace ``site`` that change nothing but rounding, and why others do not apply."""
        ...

    def approximate_candidates(self, site: AttentionSite) -> Sequence[Candidate]:
        """Ways to approximate ``site``, cheapest first."""
        ...

    def supports(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        """Whether ``lower`` can express this site with these parameters."""
        ...

    def is_exact_for(self, site: AttentionSite, parameters: Parameters) -> Verdict:
        """Whether the replacement is provably the same function as the site."""
        ...

    def cost(self, site: AttentionSite, parameters: Parameters, shape: Shape) -> Cost:
        """Work of the function body at ``shape``."""
        ...

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, parameters: Parameters, **extra: Any
    ) -> np.ndarray:
        """Naive definition in float64. q [B, Nq, H, D], k [B, Nk, Hkv, D], v [B, Nk, Hkv, Dv] -> [B, Nq, H, Dv]."""
        ...

    def without_branches(self, parameters: Parameters) -> Parameters:
        """The same replacement for a target that compiles the graph as a whole, where run-time branches cost copies
        between host and device.
        """
        ...

    def lower(self, site: AttentionSite, parameters: Parameters, opset: int) -> Lowering:
        """The op with its function body, for a model that imports ``opset`` of the standard domain."""
        ...


@runtime_checkable
class HeadMechanism(Mechanism, Protocol):
    """A mechanism that can give every head of a site a pattern of its own, as an approximation."""

    def head_geometry(self, site: AttentionSite) -> BlockGeometry | Verdict:
        """The blocks that patterns of this site's heads are made of, or why they cannot have any."""
        ...

    def head_parameters(self, geometry: BlockGeometry, patterns: Sequence[BlockPattern]) -> Parameters:
        """Parameters that give each head its pattern."""
        ...


@runtime_checkable
class ChoosingMechanism(HeadMechanism, Protocol):
    """A mechanism whose heads may choose their blocks when the model runs, by ``core/block_selection.py``."""

    def choice_geometry(self, site: AttentionSite, tokens: int) -> BlockGeometry | Verdict:
        """The blocks that heads of this site choose among at one length, or why they cannot."""
        ...

    def choice_parameters(self, geometry: BlockGeometry, texts: Sequence[str]) -> Parameters:
        """Parameters with one text a head, all of one family or ``dense``."""
        ...

    def choice_cost(
        self, site: AttentionSite, edge: int, family: Family, blocks: float, shape: Shape, rest: int = 0
    ) -> Cost:
        """Of the function bodies, scores and selection included, where ``blocks`` are computed by all heads and batch
        entries together; with means of ``rest`` keys in place of others, which are among them.
        """
        ...


@runtime_checkable
class KernelMechanism(Mechanism, Protocol):
    """A mechanism whose kernels like other parameters than its bodies do."""

    def for_kernels(self, site: AttentionSite, parameters: Parameters) -> Parameters:
        """The same replacement, which is proved anew, for a target that runs the kernels of its ops."""
        ...


def kernel_parameters(mechanism: Mechanism, site: AttentionSite, parameters: Parameters) -> Parameters:
    """What a target that runs kernels is given; a plan names ``parameters`` all the same."""
    return mechanism.for_kernels(site, parameters) if isinstance(mechanism, KernelMechanism) else parameters


def understood(mechanism: Mechanism, site: AttentionSite) -> Verdict:
    """Whether ``mechanism`` looks at everything that ``site`` has."""
    missing = sorted(site.needs - mechanism.understands)
    if missing:
        return Verdict.no("needs", f"does not handle {', '.join(NEED_WORDS[need] for need in missing)}")
    return Verdict.yes("nothing beyond what it does")


def exact_candidates(mechanism: Mechanism, site: AttentionSite) -> Sequence[Candidate | Verdict]:
    """``mechanism.exact_candidates``, asked only where everything that ``site`` has is understood."""
    known = understood(mechanism, site)
    return mechanism.exact_candidates(site) if known.ok else (known,)
