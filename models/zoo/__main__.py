"""``python -m attncompile.models.zoo``: the zoo's graphs and truth made, checked and shown."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.table import Table

from attncompile.models.zoo.check import Outcome, Skipped, attempt, attempt_graph, attempt_writing
from attncompile.models.zoo.docs import PAGE, page
from attncompile.models.zoo.table import ENTRIES

_Result = Outcome | Skipped | str


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every true site was found or declared as refused, nothing else was, and every mask agrees; else 1."""
    parser = argparse.ArgumentParser(prog="python -m attncompile.models.zoo", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="export with weights, count, detect and compare")
    what.add_argument("--check-graphs", action="store_true", help="detect in the committed graphs; needs no torch")
    what.add_argument("--write-graphs", action="store_true", help="export, count, and write graphs and truth")
    what.add_argument("--docs", action="store_true", help="write docs/zoo.md from the committed graphs")
    what.add_argument("--list", action="store_true", help="print the titles of the entries")
    parser.add_argument("--only", type=int, metavar="N", help="every entry whose number modulo 10 is N")
    parser.add_argument("--match", metavar="TEXT", help="only entries whose title contains TEXT")
    parser.add_argument("--jobs", type=int, default=1, metavar="J")
    parsed = parser.parse_args(arguments)
    chosen = [
        i for i, e in enumerate(ENTRIES)
        if (parsed.only is None or i % 10 == parsed.only % 10) and (parsed.match or "") in e.title
    ]  # fmt: skip
    if parsed.list:
        for i in chosen:
            sys.stdout.write(f"{i} {ENTRIES[i].title}\n")
        return 0
    if not chosen:
        parser.error("no entry matches")
    if parsed.docs and len(chosen) < len(ENTRIES):
        parser.error("--docs shows all entries")
    work = attempt if parsed.check else attempt_writing if parsed.write_graphs else attempt_graph
    results = _each(work, chosen, parsed.jobs)
    if parsed.docs:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(dict(zip(chosen, results, strict=True))))
    return report(chosen, results)


def _each(work: Callable[[int], _Result], chosen: Sequence[int], jobs: int) -> list[_Result]:
    if jobs <= 1:
        return [work(i) for i in chosen]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(work, chosen))


def report(chosen: Sequence[int], results: Sequence[_Result]) -> int:
    """Prints the table and the differences; the exit code."""
    table = Table("entry", "family", "nodes", "true", "found", "refused", "missed", "false", "near misses", "s")
    problems: list[str] = []
    totals = [0, 0, 0, 0]
    for position, result in zip(chosen, results, strict=True):
        entry = ENTRIES[position]
        if not isinstance(result, Outcome):
            table.add_row(entry.title, entry.family, *["-"] * 7, "failed" if isinstance(result, str) else "skipped")
            problems.append(f"{entry.title}: {result if isinstance(result, str) else 'skipped: ' + result.reason}")
            continue
        missed = len(result.true) - result.found - result.refused
        numbers = [len(result.true), result.found, result.refused, missed]
        totals = [a + b for a, b in zip(totals, numbers, strict=True)]
        codes = sorted({m.split(":")[0] for m in result.near_misses})
        false = str(len(result.false)) if result.false else "0"
        table.add_row(entry.title, entry.family, str(result.nodes), *map(str, numbers), false, ", ".join(codes),
                      f"{result.seconds:.1f}")  # fmt: skip
        problems += [f"{entry.title}: missed {m}" for m in result.missed]
        problems += [f"{entry.title}: near miss {m}" for m in result.near_misses if result.missed]
        problems += [f"{entry.title}: false {m}" for m in result.false]
        problems += [f"{entry.title}: {m}" for m in result.wrong]
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    words = f"{totals[0]} true sites, {totals[1]} found, {totals[2]} refused with a reason, {totals[3]} missed"
    console.print(f"{len(chosen)} entries, {words}", highlight=False)
    for problem in problems:
        console.print(problem, highlight=False, markup=False, soft_wrap=True)
    return 1 if any(isinstance(r, str) or (isinstance(r, Outcome) and not r.passed) for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
