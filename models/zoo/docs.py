"""The page about the zoo: what was found, per exporter and family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from attncompile.models.zoo.check import Outcome, Skipped
from attncompile.models.zoo.entry import Entry
from attncompile.models.zoo.graphs import HERE
from attncompile.models.zoo.table import ENTRIES
from attncompile.models.zoo.table_open import OPEN

PAGE = HERE.parent.parent / "docs" / "zoo.md"

_HEAD = """\
# The zoo: what is found in real exports
Written by `python -m attncompile.models.zoo --docs` from the committed graphs; do not edit.

The zoo holds {entries} exports of small models: transformers, diffusers, timm and plain torch, through both of torch's
exporters, and files that other tools made of them (a merged decoder, local functions, ONNX Runtime's optimizer, int8
QDQ). The truth about each is counted by watching the torch model run
(calls of attention functions, their shapes, and the elements of their masks), never by our own detector. A site counts
as found where kind, heads, key heads, head dim, value dim and lengths agree; its mask and sinks are compared element
by element. A site over a grid, whose windows torch attends to one by one (Swin), is compared by its first window, as
its own facts say it.

- `--check` exports again with weights, counts again, and compares everything.
- `--check-graphs` detects in the committed graphs, without torch, in seconds.
- `--write-graphs` writes graphs (without weights) and truth.

*true*: attention calls of the torch models. *refused*: near misses with the reason that is declared for them.
*missed*: true sites that are not found as they are, *false*: claims that are not true as they are, *differs*: sites of
which something else is not as it was seen (mask class, sinks). A section "Open" at the end names each such export, if
there is any.
"""


def page(results: Mapping[int, Outcome | Skipped | str]) -> str:
    """The page for the outcomes of ``ENTRIES`` by position."""
    parts = [_HEAD.format(entries=len(ENTRIES))]
    parts.append(_table("exporter", results, _exporter))
    parts.append(_table("family", results, lambda e: e.family))
    parts.append(_table("model", results, lambda e: e.name))
    refused: Counter[tuple[str, str]] = Counter()
    said: dict[tuple[str, str], str] = {}
    for result in results.values():
        if isinstance(result, Outcome):
            for code, count in result.entry.refused.items():
                refused[result.entry.name, code] += count
                reasons = [m.split(": ", 2) for m in result.near_misses]
                said.setdefault((result.entry.name, code), next((why for c, _, why in reasons if c == code), ""))
    if refused:
        lines = [f"| {key[0]} | {key[1]} | {count} | {said[key]} |" for key, count in sorted(refused.items())]
        parts.append(
            "\n".join(["## Refused", "| model | code | sites | for example |", "|---|---|---|---|", *lines]) + "\n"
        )
    if OPEN:
        lines = [f"| {title} | {words} |" for title, words in sorted(OPEN.items())]
        parts.append("\n".join(["## Open", "| export | what is said instead |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def _exporter(entry: Entry) -> str:
    words = f"{entry.exporter}, opset {entry.opset}"
    return ", ".join([words, *entry.after])


def _table(name: str, results: Mapping[int, Outcome | Skipped | str], group: Callable[[Entry], str]) -> str:
    rows: dict[str, Counter[str]] = {}
    for position, result in results.items():
        row = rows.setdefault(group(ENTRIES[position]), Counter())
        row["exports"] += 1
        if isinstance(result, Outcome):
            row["true"] += len(result.true)
            row["found"] += result.found
            row["refused"] += result.refused
            row["missed"] += len(result.true) - result.found - result.refused
            row["false"] += len(result.false)
            row["differs"] += len(result.wrong)
    columns = ("exports", "true", "found", "refused", "missed", "false", "differs")
    total: Counter[str] = sum(rows.values(), Counter())
    lines = [f"## By {name}", f"| {name} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {key} | {' | '.join(str(rows[key][c]) for c in columns)} |" for key in sorted(rows)]
    lines.append(f"| all | {' | '.join(str(total[c]) for c in columns)} |")
    return "\n".join(lines) + "\n"
