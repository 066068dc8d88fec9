"""Benchmarks on a GPU: ``python tools/bench prepare DIR`` compiles (no GPU needed), ``kernels DIR`` measures.

``table FILE`` prints a result as Markdown, ``plot FILE OUT.svg`` draws it, one of whole models too. Peers that are not
installed are left out by name. PYTHONPATH must hold the checkout where the package is not installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cases import CASES
from sweep import sweep

if TYPE_CHECKING:
    from linear import Linear


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("prepare", help="compile the kernels of all cases into a bundle")
    make.add_argument("out", type=Path)
    make.add_argument("--arch", type=int, action="append", default=[])
    make.add_argument("--sweep", type=int, default=0, help="this many configurations from --seed in place of the cases")
    make.add_argument("--seed", type=int, default=0)
    measure = verbs.add_parser("kernels", help="measure on this GPU; JSON to --out, the table to stdout")
    measure.add_argument("bundle", type=Path)
    measure.add_argument("--out", type=Path, default=Path("kernels.json"))
    measure.add_argument("--only", nargs="*", default=[])
    measure.add_argument("--rounds", type=int, default=25)
    measure.add_argument("--no-peers", action="store_true")
    measure.add_argument("--without", nargs="*", default=[], metavar="PEER", help="natten compiles for minutes")
    measure.add_argument("--sweep", type=int, default=0, help="as it was prepared")
    measure.add_argument("--seed", type=int, default=0, help="likewise")
    whole = verbs.add_parser(
        "e2e",
        help="whole models: prepare compiles (no GPU), export makes all files (no GPU), run measures, table prints",
    )
    whole.add_argument("step", choices=("prepare", "export", "run", "table", "step", "case"))
    whole.add_argument("folder", type=Path, help="what prepare writes; of table the result")
    whole.add_argument("name", nargs="?", default="", help="of a single step, which export runs")
    whole.add_argument("--work", type=Path, default=Path("e2e-work"), help="exports and models, gigabytes of them")
    whole.add_argument("--out", type=Path, default=Path("e2e.json"))
    whole.add_argument("--only", nargs="*", default=[])
    whole.add_argument("--arch", type=int, action="append", default=[])
    whole.add_argument("--processes", type=int, default=8, help="steps of export at a time")
    whole.add_argument("--rounds", type=int, default=25)
    whole.add_argument("--limit", type=float, default=280.0, help="seconds that run may take")
    whole.add_argument("--serial", action="store_true", help="cases get ready one after another too")
    whole.add_argument("--without", nargs="*", default=[], metavar="PEER", help="leave these peers out")
    whole.add_argument("--lock", type=int, help="of a case that run starts")
    whole.add_argument("--order", nargs="*", default=[], help="all cases, in the order in which they are timed")
    whole.add_argument("--tiny", action="store_true", help="the same structure, small")
    whole.add_argument("--cpu", action="store_true", help="a dry run without a GPU, ours through function bodies")
    made = verbs.add_parser("prepare-linear", help="compile the kernels of linear attention into a bundle")
    made.add_argument("out", type=Path)
    made.add_argument("--arch", type=int, action="append", default=[])
    made.add_argument("--only", nargs="*", default=[])
    made.add_argument("--tactics", action="store_true", help="all that are worth a try, of every op")
    made.add_argument("--sweep", type=int, default=0, help="this many configurations from --seed in place of the cases")
    made.add_argument("--seed", type=int, default=0)
    timed = verbs.add_parser("linear", help="measure linear attention on this GPU; JSON to --out, lines to stdout")
    timed.add_argument("bundle", type=Path)
    timed.add_argument("--out", type=Path, default=Path("linear.json"))
    timed.add_argument("--only", nargs="*", default=[])
    timed.add_argument("--rounds", type=int, default=25)
    timed.add_argument("--no-peers", action="store_true")
    timed.add_argument("--tactics", action="store_true", help="every tactic of every op, as it was prepared")
    timed.add_argument("--sweep", type=int, default=0, help="as it was prepared; without peers")
    timed.add_argument("--seed", type=int, default=0, help="likewise")
    chosen = verbs.add_parser("prepare-selection", help="compile the kernels that choose blocks, and attention to them")
    chosen.add_argument("out", type=Path)
    chosen.add_argument("--arch", type=int, action="append", default=[])
    chosen.add_argument("--only", nargs="*", default=[])
    picked = verbs.add_parser("selection", help="measure chosen blocks on this GPU; JSON to --out, the table to stdout")
    picked.add_argument("bundle", type=Path)
    picked.add_argument("--out", type=Path, default=Path("selection.json"))
    picked.add_argument("--only", nargs="*", default=[])
    picked.add_argument("--rounds", type=int, default=11)
    lists = verbs.add_parser("prepare-plans", help="compile the kernels that run what a search chose")
    lists.add_argument("out", type=Path)
    lists.add_argument("--arch", type=int, action="append", default=[])
    planned = verbs.add_parser("plans", help="measure a search's lists on this GPU; JSON to --out, the table to stdout")
    planned.add_argument("bundle", type=Path)
    planned.add_argument("patterns", type=Path, help="patterns.json of search_compare, or what has them under patterns")
    planned.add_argument("--out", type=Path, default=Path("plans.json"))
    planned.add_argument("--rounds", type=int, default=11)
    moved = verbs.add_parser("orders", help="measure gathers into other orders of tokens, in ONNX Runtime; JSON lines")
    moved.add_argument("--out", type=Path, default=Path("orders.json"))
    moved.add_argument("--rounds", type=int, default=11)
    moved.add_argument("--cpu", action="store_true", help="a dry run without a GPU")
    fitted = verbs.add_parser("fit", help="fit the cost model to a sweep's result, print its TOML")
    fitted.add_argument("result", type=Path)
    fitted.add_argument("--withheld", type=Path, help="a sweep with another seed, to judge by")
    fitted.add_argument("--multiprocessors", type=int, default=132)
    for verb, text in (("table", "print a result"), ("plot", "draw a result")):
        show = verbs.add_parser(verb, help=text)
        show.add_argument("result", type=Path)
        if verb == "plot":
            show.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.verb == "prepare":
        from kernels import prepare

        prepare(given.out, given.arch, sweep(given.sweep, given.seed) if given.sweep else CASES)
    elif given.verb == "kernels":
        from kernels import run
        from report import table

        cases = sweep(given.sweep, given.seed) if given.sweep else CASES
        result = run(
            given.bundle, given.only, given.rounds, None if given.no_peers else given.without, cases, given.out
        )
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(table(result))
    elif given.verb == "e2e":
        _e2e(given)
    elif given.verb == "prepare-linear":
        if given.tactics:
            import linear_tactics

            linear_tactics.prepare(given.out, given.arch, given.only)
        else:
            import linear

            linear.prepare(given.out, given.arch, given.only, _linear_cases(given))
    elif given.verb == "linear":
        if given.tactics:
            import linear_tactics

            result = linear_tactics.run(given.bundle, given.only, given.rounds, not given.no_peers, given.out)
        else:
            import linear

            with_peers = not (given.no_peers or given.sweep)
            result = linear.run(given.bundle, given.only, given.rounds, with_peers, given.out, _linear_cases(given))
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    elif given.verb == "prepare-selection":
        from selection import prepare as prepare_selection

        prepare_selection(given.out, given.arch, given.only)
    elif given.verb == "selection":
        import selection

        result = selection.run(given.bundle, given.only, given.rounds, given.out)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(selection.table(result))
    elif given.verb == "prepare-plans":
        import plans

        plans.prepare(given.out, given.arch)
    elif given.verb == "plans":
        import plans

        result = plans.run(given.bundle, given.patterns, given.rounds, given.out)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(plans.table(result))
    elif given.verb == "orders":
        import orders

        result = orders.run(given.rounds, "cpu" if given.cpu else "cuda")
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    elif given.verb == "fit":
        from fit import fit

        results = [json.loads(p.read_text(encoding="utf-8")) for p in (given.result, given.withheld) if p is not None]
        print(fit(results[0], given.multiprocessors, *results[1:]))
    else:
        _show(given)


def _linear_cases(given: argparse.Namespace) -> Sequence[Linear]:
    from linear import CASES as KNOWN
    from linear_sweep import linear_sweep

    return linear_sweep(given.sweep, given.seed) if given.sweep else KNOWN


def _table(result: dict[str, Any]) -> str:
    """By what was measured: chosen blocks, linear attention, or the other kernels."""
    import report

    if "total" in result:
        import plans

        return plans.table(result)
    if "density" in result:
        import selection

        return selection.table(result)
    linear = any("share_of_copy" in case for case in result["cases"])
    return report.linear_table(result) if linear else report.table(result)


def _show(given: argparse.Namespace) -> None:
    import e2e_plot
    import report

    result = json.loads(given.result.read_text(encoding="utf-8"))
    if given.verb == "table":
        print(_table(result))
    elif any("limit_ms" in case for case in result["cases"]):
        report.plot(result, given.out)
    else:
        e2e_plot.plot(result, given.out)


def _e2e(given: argparse.Namespace) -> None:
    import e2e_export

    if given.step == "prepare":
        e2e_export.prepare(given.folder, given.only, given.arch, given.tiny)
    elif given.step == "export":
        raise SystemExit(min(1, e2e_export.export(given.folder, given.work, given.only, given.tiny, given.processes)))
    elif given.step == "step":
        e2e_export.step(given.folder, given.work, given.only[0], given.name, given.tiny)
    else:
        import e2e

        if given.step == "case":
            e2e.case(given.work, given.only[0], given.rounds, given.lock, given.cpu, given.without, given.order)
            return
        if given.step == "run":
            result = e2e.run(given.work, given.only, given.rounds, given.limit, given.cpu, given.serial, given.without)
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        else:
            result = json.loads(given.folder.read_text(encoding="utf-8"))
        print(e2e.table(result))


if __name__ == "__main__":
    main()
