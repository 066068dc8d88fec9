"""A bundle: a folder with ``bundle.json``, the index, and ``kernels/``, whose files are named by their SHA-256.

The same kernels give the same bytes. ``docs/kernels.md`` describes the index, ``bundle.schema.json`` its form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attncompile import __version__
from attncompile.core.errors import KernelError
from attncompile.core.folder import atomic_folder, write_file
from attncompile.kernels.entry import Compiled, Entry, digest
from attncompile.kernels.launcher import best_for
from attncompile.kernels.records import Built, CallKernels, NodeCall, Refusal, signature
from attncompile.kernels.schema import problem

INDEX = "bundle.json"
FOLDER = "kernels"
FORMAT = 1


class BadBundle(KernelError):
    """A folder is no bundle, or one that was damaged or written by another version."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """An index whose files were all found whole. ``entries`` by id; ``index`` is the JSON object."""

    folder: Path
    index: Mapping[str, Any]
    entries: Mapping[str, Entry]
    files: Mapping[str, Mapping[str, str]]
    """By entry id: the hashes of its ``cubin`` and ``ptx``."""

    @staticmethod
    def open(path: Path) -> Bundle:
        """Read and check a bundle: its form, and the hash of each file. Raises ``BadBundle`` naming the file."""
        index = _index(path)
        entries = {e["id"]: Entry.of_json(e) for e in index["entries"]}
        files = {e["id"]: e["files"] for e in index["entries"]}
        for call in index["calls"]:
            for kernel in call["kernels"]:
                if kernel["entry"] not in entries:
                    raise _bad(path / INDEX, f"call {call['key']} names an entry {kernel['entry']} that is not there")
        keys = {call["key"] for call in index["calls"]} | {""}
        for node in index["nodes"]:
            if node["call"] not in keys:
                raise _bad(path / INDEX, f"node '{node['name']}' names a call {node['call']} that is not there")
        found = Bundle(path, index, entries, files)
        for entry_id in entries:
            made = found.load(entry_id)
            if made.id != entry_id:
                raise _bad(path / INDEX, f"entry {entry_id} was changed")
        return found

    def load(self, entry_id: str) -> Compiled:
        """An entry with its code, whose hashes are checked. Raises ``BadBundle``."""
        if entry_id not in self.entries:
            raise BadBundle(f"{self.folder / INDEX} has no entry {entry_id}", "list them: attncompile kernels list")
        code = {kind: _read(_path(self.folder, sha, kind), sha) for kind, sha in self.files[entry_id].items()}
        return Compiled(self.entries[entry_id], code["ptx"].decode(), code["cubin"])

    def sizes(self) -> dict[str, int]:
        """Bytes of the cubin of each entry."""
        return {i: _path(self.folder, f["cubin"], "cubin").stat().st_size for i, f in self.files.items()}

    def call_of(self, node: str, scope: str = "") -> str:
        """The key of the call of the node with this name. Raises ``BadBundle`` where it has none."""
        return str(self._node(node, scope)["call"])

    def symbols_of(self, node: str, scope: str = "") -> Mapping[str, str]:
        """The node's symbols, as expressions over the sizes of its inputs. Raises ``BadBundle`` as ``call_of``."""
        found: Mapping[str, str] = self._node(node, scope)["symbols"]
        return found

    def _node(self, name: str, scope: str) -> Mapping[str, Any]:
        for known in self.index["nodes"]:
            if (known["name"], known["scope"]) == (name, scope):
                if known["call"]:
                    found: Mapping[str, Any] = known
                    return found
                raise BadBundle(f"node '{name}' has no kernel: {known['reason']}", known["hint"])
        raise BadBundle(f"{self.folder / INDEX} knows no node '{name}'", "build the bundle from this model")

    def kernels(self, key: str, capability: int) -> list[Compiled]:
        """The kernels of a call that suit a device of this compute capability (90) best, best first; [] for none."""
        for call in self.index["calls"]:
            if call["key"] == key:
                ids = [k["entry"] for k in sorted(call["kernels"], key=lambda k: (k["architecture"], k["rank"]))]
                chosen = best_for([self.entries[i] for i in ids], capability)
                return [self.load(i) for i in ids if any(self.entries[i] is c for c in chosen)]
        raise BadBundle(f"{self.folder / INDEX} has no call {key}", "build the bundle from this model")


def write(out: Path, built: Built, triton: str, strict_norms: bool = False) -> None:
    """Write ``built`` as a bundle to ``out``, whole or not at all. ``strict_norms``: its model has norms of sums in
    fp16.

    Raises:
        BadArguments: ``out`` is there and is none of ours, or cannot be written.
    """
    with atomic_folder(out) as folder:
        (folder / FOLDER).mkdir()
        for made in built.compiled.values():
            for kind, data in _code(made).items():
                path = _path(folder, digest(data), kind)
                if not path.exists():
                    write_file(path, data)
        text = json.dumps(index_of(built, triton, strict_norms), indent=1, sort_keys=True, ensure_ascii=False)
        write_file(folder / INDEX, text.encode() + b"\n")


def index_of(built: Built, triton: str, strict_norms: bool = False) -> dict[str, Any]:
    """The index as JSON values, in an order that depends on the contents only."""
    return {
        "format": FORMAT, "attncompile": __version__, "triton": triton,
        "entries": [
            {**made.entry.to_json(), "id": made.id, "files": {k: digest(d) for k, d in _code(made).items()}}
            for _, made in sorted(built.compiled.items())
        ],
        "calls": [_call(c) for c in sorted(built.calls, key=lambda c: c.key)],
        "nodes": [_node(node, key) for node, key in built.nodes],
        **({"strict_norms": True} if strict_norms else {}),
    }  # fmt: skip


def _call(call: CallKernels) -> dict[str, Any]:
    ranked = [
        {"architecture": architecture, "rank": rank, "entry": entry}
        for architecture, ids in sorted(call.kernels.items())
        for rank, entry in enumerate(ids)
    ]
    return {**signature(call.call), "key": call.key, "kernels": ranked, "refused": [_refusal(r) for r in call.refused]}


def _refusal(refusal: Refusal) -> dict[str, Any]:
    return {
        "architecture": refusal.architecture, "tactic": refusal.tactic, "code": refusal.code, "reason": refusal.reason
    }  # fmt: skip


def _node(node: NodeCall, key: str) -> dict[str, Any]:
    verdict = node.verdict
    return {
        "name": node.name, "scope": node.scope, "op": node.op, "call": key, "symbols": dict(node.symbols or {}),
        "code": verdict.code, "reason": verdict.reason, "hint": verdict.hint,
    }  # fmt: skip


def _code(made: Compiled) -> dict[str, bytes]:
    return {"cubin": made.cubin, "ptx": made.ptx.encode()}


def _path(folder: Path, sha: str, kind: str) -> Path:
    return folder / FOLDER / f"{sha}.{kind}"


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise BadBundle(f"{folder} is no bundle: it has no {INDEX}", "make one: attncompile kernels build MODEL")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad(path, f"it cannot be read: {error}") from None
    if isinstance(index, dict) and index.get("format") != FORMAT:
        raise _bad(path, f"its format is {index.get('format')!r}, this version reads {FORMAT}")
    wrong = problem(index)
    if wrong:
        raise _bad(path, wrong)
    found: dict[str, Any] = index
    return found


def _read(path: Path, sha: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _bad(path, str(error.strerror)) from None
    if hashlib.sha256(data).hexdigest() != sha:
        raise _bad(path, f"its contents are not those of the index ({len(data)} bytes)")
    return data


def _bad(path: Path, reason: str) -> BadBundle:
    return BadBundle(f"{path}: {reason}", "build the bundle again: attncompile kernels build")
