"""Mechanisms: one folder each. The registry is an explicit tuple of lazy names; other packages add theirs by the
entry-point group ``attncompile.extensions``: an entry is an object whose attribute ``mechanisms`` holds instances, and
whose attribute ``kernels`` those of GPU kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from attncompile.core.errors import AttncompileError
from attncompile.core.kernel import Kernel
from attncompile.core.mechanism import Mechanism

MECHANISMS = (
    "attncompile.plugins.neighborhood.mechanism:NeighborhoodAttention",
    "attncompile.plugins.block_sparse.mechanism:BlockSparseAttention",
    "attncompile.plugins.linear_attention.mechanism:LinearAttention",
    "attncompile.plugins.linear_attention.fitted:FittedLinearAttention",
    "attncompile.plugins.attention.dense_mechanism:DenseAttention",
    "attncompile.plugins.attention.standard_mechanism:Attention",
)

KERNELS = (
    "attncompile.plugins.attention.kernel:AttentionKernel",
    "attncompile.plugins.neighborhood.kernel:NeighborhoodKernel",
    "attncompile.plugins.block_sparse.kernel:BlockSparseKernel",
    "attncompile.plugins.block_select.kernel:ScoresKernel",
    "attncompile.plugins.block_select.kernel:SelectKernel",
    "attncompile.plugins.linear_attention.kernel:StateKernel",
    "attncompile.plugins.linear_attention.kernel:CombineKernel",
    "attncompile.plugins.linear_attention.kernel:ApplyKernel",
    "attncompile.plugins.linear_attention.kernel:StatesKernel",
    "attncompile.plugins.linear_attention.kernel:OutputKernel",
    "attncompile.plugins.linear_attention.kernel:SolveKernel",
    "attncompile.plugins.linear_attention.kernel:DeltaKernel",
    "attncompile.plugins.linear_attention.kernel:StepKernel",
)

ENTRY_POINT_GROUP = "attncompile.extensions"


class BadExtension(AttncompileError):
    """An installed extension cannot be used."""


@cache
def mechanisms() -> tuple[Mechanism, ...]:
    """All mechanisms, ours first. Raises ``BadExtension`` for one that fails to load or takes a name in use."""
    found: list[Mechanism] = list(_ours(MECHANISMS))
    for extension, made in _offered("mechanisms"):
        if any(made.name == m.name for m in found):
            raise BadExtension(f"extension {extension}: the mechanism name {made.name} is taken", "rename it")
        found.append(made)
    return tuple(found)


@cache
def kernels() -> Mapping[str, Kernel]:
    """All GPU kernels by their op, ours first. Imports no compiler. Raises ``BadExtension`` as ``mechanisms``."""
    found: dict[str, Kernel] = {k.op: k for k in _ours(KERNELS)}
    for extension, made in _offered("kernels"):
        if made.op in found:
            raise BadExtension(f"extension {extension}: there is a kernel of {made.op} already", "rename the op")
        found[made.op] = made
    return found


def _ours(targets: Iterable[str]) -> Iterator[Any]:
    for target in targets:
        module, _, attribute = target.partition(":")
        yield getattr(import_module(module), attribute)()


def _offered(what: str) -> Iterator[tuple[str, Any]]:
    """Of every extension: its name and each thing in its attribute ``what``; an extension need not have it."""
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value)):
        try:
            offered = tuple(getattr(entry.load(), what, ()))
        except Exception as error:  # whatever a foreign package raises: name the package, do not die nameless
            raise BadExtension(
                f"extension {entry.name} ({entry.value}) failed: {error}", "uninstall or fix it"
            ) from error
        for made in offered:
            yield entry.name, made


def mechanism(name: str) -> Mechanism:
    """The mechanism with this name. Raises ``AttncompileError`` naming those that exist."""
    for m in mechanisms():
        if m.name == name:
            return m
    raise AttncompileError(f"no mechanism {name!r}", f"there are: {', '.join(m.name for m in mechanisms())}")
