"""PTX text: the parameters of its entry, and what ptxas says about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from attncompile.core.errors import KernelError
from attncompile.core.kernel import Argument

_ENTRY = re.compile(r"\.entry\s+(?P<name>[A-Za-z_$][\w$]*)\s*\((?P<parameters>[^)]*)\)")
_TYPES = {"int32": ("u32", "s32", "b32"), "pointer": ("u64", "b64")}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an entry: its declaration, PTX type (``u32``) and name."""

    text: str
    type: str
    name: str


def entry_name(ptx: str) -> str:
    return _entry(ptx)["name"]


def parameters(ptx: str) -> list[Parameter]:
    """Of the only entry in ``ptx``, in order."""
    found = []
    for part in (p.strip() for p in _entry(ptx)["parameters"].split(",")):
        if part:
            words = part.split()
            found.append(Parameter(part, words[1].removeprefix("."), words[-1]))
    return found


def _entry(ptx: str) -> re.Match[str]:
    found = list(_ENTRY.finditer(ptx))
    if len(found) != 1:
        raise KernelError(f"the PTX has {len(found)} entries, not one", "this is a bug: report it with the kernel")
    return found[0]


def without_hidden(ptx: str, arguments: int) -> str:
    """``ptx`` without the parameters after the first ``arguments``, which its code must not read."""
    entry, given = _entry(ptx), parameters(ptx)
    body = ptx[entry.end() :]
    for extra in given[arguments:]:
        if re.search(rf"\b{re.escape(extra.name)}\b", body):
            raise KernelError(f"the kernel reads its hidden parameter {extra.name}", "it needs scratch memory")
    kept = ",\n\t".join(p.text for p in given[:arguments])
    start, end = entry.span("parameters")
    return f"{ptx[:start]}\n\t{kept}\n{ptx[end:]}"


def check_parameters(ptx: str, arguments: Sequence[Argument], hidden: int = 0) -> None:
    """Raise ``KernelError`` unless the entry's parameters are ``arguments`` in order, then ``hidden`` pointers."""
    given = parameters(ptx)
    kinds = ["int32" if a.kind == "int32" else "pointer" for a in arguments] + ["pointer"] * hidden
    names = [a.name for a in arguments] + ["(hidden)"] * hidden
    if len(given) != len(kinds):
        raise KernelError(f"the entry has {len(given)} parameters for {len(kinds)} arguments", "this is a bug")
    for parameter, kind, name in zip(given, kinds, names, strict=True):
        if parameter.type not in _TYPES[kind]:
            raise KernelError(f"parameter {parameter.name} is {parameter.type}; argument {name} is an {kind}")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel, as ``ptxas -v`` reports them."""

    registers: int
    spills: int
    serialized: bool


def resources(log: str) -> Resources:
    """Read the report that ptxas gives of a module with one entry."""
    registers = re.findall(r"Used (\d+) registers", log)
    if len(registers) != 1:
        raise KernelError(f"ptxas reported {len(registers)} kernels, not one: {' '.join(log.split())[:200]}")
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    serialized = re.search(r"wgmma[^\n]*serialized|\(C751\d\)", log) is not None
    return Resources(int(registers[0]), spills, serialized)
