"""What is known of one compiled kernel: all that a launch needs, as plain values that a bundle's index holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from attncompile.core.kernel import Argument, Constant


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel for one architecture.

    ``name``: the entry function in its module. ``arguments`` in launch order; ``hidden`` null pointers follow them.
    ``warps`` as launched: a warp-specialised kernel has more than its program says. ``shared``: bytes of dynamic shared
    memory. ``registers`` a thread and bytes of ``spills`` (stores and loads) as ptxas reports them; ``serialized``: it
    said that asynchronous products are serialized, which costs much of their speed. ``specific``: the code runs on this
    very architecture only (sm_90a), else on later minors of the same major too.
    """

    op: str
    dtype: str
    head_dim: int
    value_dim: int
    architecture: int
    tactic: str
    abi: str
    language: str
    name: str
    arguments: tuple[Argument, ...]
    grid: tuple[str, str, str]
    constants: Mapping[str, Constant]
    warps: int
    shared: int
    registers: int
    spills: int
    serialized: bool
    hidden: int
    specific: bool
    ptx_version: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["arguments"] = [asdict(a) for a in self.arguments]
        return {**found, "constants": dict(self.constants), "grid": list(self.grid), "threads": self.threads}

    @staticmethod
    def of_json(value: Mapping[str, Any]) -> Entry:
        """The inverse of ``to_json``; further keys are left out."""
        known = {f.name: value[f.name] for f in fields(Entry)}
        known["arguments"] = tuple(Argument(**a) for a in value["arguments"])
        return Entry(**{**known, "grid": tuple(value["grid"])})


@dataclass(frozen=True, slots=True)
class Compiled:
    """An entry with its code. ``ptx`` has exactly the entry's arguments and hidden pointers as parameters."""

    entry: Entry
    ptx: str
    cubin: bytes

    @property
    def id(self) -> str:
        """Names the entry and its code."""
        what = {**self.entry.to_json(), "cubin": digest(self.cubin), "ptx": digest(self.ptx.encode())}
        return digest(canonical(what))[:16]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with one spelling for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
