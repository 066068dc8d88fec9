"""The search for each head against every single mechanism used alike in all heads, at the same budget.

    python tools/search_compare.py MODEL --inputs FILE [--max-error 0.01] [--metric relative_l2] [--time] [--json OUT]

Both choose on the calibration inputs, by the same bound and the same candidates' scores; what then breaks the budget on
the held-out inputs is refused and made denser, as in ``attncompile``. A uniform mechanism has one strength for all
heads of all sites: one window, or one share of the attention weight that every head's columns and diagonals, or blocks,
have to keep. The fastest of them is then met by the search at no more than the mean error that it was measured to have
on the calibration inputs ("at equal error").

With --limit SECONDS no further single mechanism is begun after so much time; "at equal error" is then against the best
of those that were tried. They come in the order of FIRST. --only NAME, once or more, tries these alone.

With --density there is no budget: all are made to keep so many blocks, and their errors are measured.

With --keep-dense RULE the inputs that it holds of are set aside: all numbers are of the calls that are approximated.

With --also TARGET the same choices are priced for that target's GPU too, by the cost model of launches: ``gpu`` is what
they gain over the attention as the file has it, ``gpu_over_exact`` over the exact kernels; of choices of fixed lists.

Errors are 0 for equal outputs and grow with distance: see ``attncompile.search.tasks.badness``. --write keeps models,
and of each the patterns of its heads in patterns.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from attncompile import measure, pipeline, policy
from attncompile.console import LineProgress
from attncompile.core.block_pattern import BlockPattern
from attncompile.core.block_selection import BlockSelection, is_selection, rest_of
from attncompile.core.site import AttentionSite
from attncompile.cost import shape_of
from attncompile.gate import Edit
from attncompile.gpu_cost import GpuCost
from attncompile.passes.replace import apply
from attncompile.plugins import mechanisms
from attncompile.search import Search, Settings, approximated, choose, open_sites, split, tasks
from attncompile.search.candidates import KEPT
from attncompile.search.choose import Choice, Limits, SiteSpace, Unit
from attncompile.shaped import binding_of
from attncompile.targets import base as targets
from attncompile.targets import onnx as onnx_target

MEANS = " + means"
"""Of a mechanism that meets what it leaves out by its means."""

FIRST = (
    "blocks",
    "slash",
    "sinks 1 + window",
    "neighborhood",
    "pooled",
    "xattention",
    "blocks + means",
    "xattention + means",
    "sinks 0 + window + means",
    "anchor",
)
"""Single mechanisms that are tried before others: what time is short for should be the weaker ones."""

EACH, EQUAL, EXACT = "each head its own", "each head its own, at equal error", "exact replacements only"


@dataclass
class Row:
    """What one way of choosing came to. Times are relative to all attention with its exact replacements, and
    ``gain_over_file`` to it as it is in the file; ``density``: blocks over those of dense heads. ``errors``: of the
    calibration inputs, ``held`` of the others.
    """

    name: str
    strength: str
    predicted: float
    gain_over_file: float
    density: float
    bound: float
    errors: list[float]
    held: list[float]
    choice: Choice
    measured: float | None = None
    gpu: float | None = None
    gpu_over_exact: float | None = None

    @property
    def whole_error(self) -> float:
        """The mean over all inputs, those that it was chosen on and those that were held out."""
        return float(np.mean([*self.errors, *self.held]))

    def to_json(self) -> dict[str, Any]:
        """Without the choice: thousands of numbers."""
        plain = {k: v for k, v in vars(self).items() if k != "choice"}
        return {**plain, "mean": float(np.mean(self.errors)), "held_mean": float(np.mean(self.held))}


def pick(unit: Unit, kept: np.ndarray, kind: str, strength: float | str) -> int:
    """The candidate of one head: that with this text, or of this kind the one with the fewest blocks that keeps so
    much, of its blocks beside means where the kind says so; dense where there is none.
    """
    if isinstance(strength, str):
        return unit.labels.index(strength) if strength in unit.labels else 0
    of, mode = kind.removesuffix(MEANS), _beside_means(unit) if kind.endswith(MEANS) else 0
    offered = unit.of(mode)
    fitting = [
        k for k in offered[1:] if (p := BlockPattern(unit.labels[k])).kind == of and kept[k] >= strength - 1e-4
        and not p.order and bool(p.rest) == kind.endswith(MEANS)
    ]  # fmt: skip
    return int(min(fitting, key=lambda k: unit.time[k], default=offered[0]))


def _beside_means(unit: Unit) -> int:
    """The first mode of fixed patterns with means of what they leave out; 0 where there is none."""
    texts = enumerate(unit.labels)
    return next((int(unit.of_modes[k]) for k, t in texts if not is_selection(t) and BlockPattern(t).rest), 0)


def families(spaces: Sequence[SiteSpace]) -> dict[str, list[float | str]]:
    """Kinds, those of FIRST first, and their strengths, the sparsest first."""
    texts = {u.labels[k] for s in spaces for u in s.units for k in u.of(0)[1:]}
    every = {BlockPattern(t) for s in spaces for u in s.units for t in u.labels if not is_selection(t)}
    beside = [p for p in every if p.rest and not p.order]
    patterns = [BlockPattern(t) for t in texts]
    found: dict[str, list[float | str]] = {}
    for sinks in sorted({p.text.split()[1] for p in patterns if p.kind == "streaming"}):
        same = [p.text for p in patterns if p.kind == "streaming" and p.text.split()[1] == sinks]
        found[f"sinks {sinks} + window"] = [*sorted(same, key=lambda t: int(t.split()[3]))]
        same = [p.text for p in beside if p.kind == "streaming" and p.text.split()[1] == sinks]
        if same:
            found[f"sinks {sinks} + window{MEANS}"] = [*sorted(same, key=lambda t: int(t.split()[3]))]
    for kind, name in (("grid", "neighborhood"), ("ball", "ball")):
        sizes = [p.text for p in patterns if p.kind == kind]
        if sizes:
            found[name] = [*sorted(sizes, key=lambda t: math.prod(int(x) for x in t[5:].split("x")))]
    radial = sorted({p.text for p in patterns if p.kind == "radial"}, key=lambda t: float([*t.split(), "1"][1]))
    if radial:
        found["radial"] = [*radial]
    for kind in ("slash", "blocks"):
        if any(p.kind == kind for p in patterns):
            found[kind] = list(KEPT)
    if any(p.kind == "blocks" for p in beside):
        found[f"blocks{MEANS}"] = list(KEPT)
    chosen = {text for s in spaces for u in s.units for text in u.labels if is_selection(text)}
    for way in sorted({text.split()[0] for text in chosen}):  # by blocks that are chosen when the model runs
        same = [t for t in chosen if t.startswith(f"{way} ")]
        for name, of in (
            (way, [t for t in same if not rest_of(t)]),
            (f"{way}{MEANS}", [t for t in same if rest_of(t)]),
        ):
            if of:
                found[name] = [*sorted(of, key=lambda t: BlockSelection(t).amount)]
    return dict(sorted(found.items(), key=lambda f: FIRST.index(f[0]) if f[0] in FIRST else len(FIRST)))


def uniform(
    search: Search, spaces: Sequence[SiteSpace], kind: str, strength: float | str
) -> dict[str, tuple[int, ...]]:
    """All heads alike; sites that do not gain stay as they are."""
    found = {}
    for space in spaces:
        kept = search.kept(space.site)
        picks = tuple(pick(u, k, kind, strength) for u, k in zip(space.units, kept, strict=True))
        if any(picks) and space.time(picks) * space.least_gain <= space.base:
            found[space.site] = picks
    return found


class Comparison:
    """Judges choices of one search. ``single``: the mechanisms to try in all heads alike, with their strengths.
    ``noted`` is called with every row that is found: long runs leave something.
    ``late``: whether no further single mechanism is to be begun; ``skipped`` are those that were not, ``refused``
    those that no strength of keeps the budget with a gain.
    """

    def __init__(
        self, search: Search, spaces: list[SiteSpace], single: Mapping[str, list[float | str]], metric: str,
        limits: Limits, noted: Callable[[Row], None], late: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.search = search
        self.spaces = spaces
        self.metric = metric
        self.limits = limits
        self._noted = noted
        self._late = late
        self.single = single
        self.skipped: list[str] = []
        self.refused: list[str] = []
        self.known, self.held = split(len(search.feeds))
        self._base = sum(s.base for s in spaces)
        self._exported = sum(search.exported(s.site) or s.base for s in spaces)

    def rows(self) -> list[Row]:
        """The search's, one for every uniform mechanism that keeps the budget at some strength, that of the search at
        equal error, and that of exact replacements.
        """
        found = [self._noting(self._judged({}, EXACT, ""))]
        best, _ = choose.tune(self.spaces, self.limits, self._measured)
        if best is not None:
            best, _, refused = choose.corrected(self.spaces, best, self.limits, self._measured, self._later)
            if best is not None:
                found.append(self._noting(self._judged(best.choice, EACH, f"{refused} refused" if refused else "")))
        alike: list[Row] = []
        for name, strengths in self.single.items():
            if self._late():
                self.skipped.append(name)
                continue
            kind = "" if isinstance(strengths[0], str) else name

            def judge(strength: float | str, kind: str = kind, name: str = name) -> Row:
                return self._judged(uniform(self.search, self.spaces, kind, strength), name, str(strength))

            fitting = first_fitting(strengths, judge, self.limits.budget, self._confirmed)
            alike += [self._noting(r) for r in fitting]
            if not fitting:
                self.refused.append(name)
        if alike:
            found += [*alike, *self._equal(min(alike, key=lambda r: r.predicted))]
        return found

    def rows_at(self, density: float) -> list[Row]:
        """What keeps at most this share of the blocks, with the error that it is measured to have: the search's choice
        with the least predicted damage, and of every uniform mechanism the densest that is sparse enough.
        """
        search, spaces = self.search, self.spaces
        found = [self._noting(self._judged({}, EXACT, ""))]
        choice = choose.within_density(spaces, density, search.density)
        found.append(self._noting(self._judged(choice, EACH, "")))
        for name, strengths in self.single.items():
            if self._late():
                self.skipped.append(name)
                continue
            kind = "" if isinstance(strengths[0], str) else name
            fitting = [(search.density(c), str(s), c) for s in strengths for c in [uniform(search, spaces, kind, s)]]
            fitting = [f for f in fitting if f[2] and f[0] <= density]
            if fitting:
                _, strength, alike = max(fitting, key=lambda f: f[0])
                found.append(self._noting(self._judged(alike, name, strength)))
        return found

    def _equal(self, other: Row) -> list[Row]:
        """What the search finds with no larger a mean error than ``other`` was measured to have."""
        budget = float(np.mean(other.errors))
        limits = Limits(budget, len(self.held), 0.5, self.limits.power, together=True)  # at 50% the bound is the mean
        best, _ = choose.tune(self.spaces, limits, lambda c: self.search.measured(c, self.spaces, limits))
        return [self._noting(self._judged(best.choice, EQUAL, f"mean {budget:.3g}"))] if best is not None else []

    def _measured(self, choice: Choice) -> list[float]:
        if self.limits.budget == math.inf:
            return self.search.errors(choice, self.spaces, self.known, self.metric)
        return self.search.measured(choice, self.spaces, self.limits)

    def _later(self, choice: Choice) -> list[float]:
        return self.search.errors(choice, self.spaces, self.held, self.metric)

    def _confirmed(self, row: Row) -> bool:
        """Whether a choice keeps the budget on held-out inputs."""
        return self.limits.judged(self._later(row.choice)) <= self.limits.budget

    def _judged(self, choice: Choice, name: str, strength: str) -> Row:
        errors = self._measured(choice) if choice else [0.0] * len(self.known)
        time_ = choose.time_of(self.spaces, choice)
        return Row(name, strength, time_ / self._base, self._exported / time_, self.search.density(choice),
                   self.limits.bound(errors) if choice else 0.0, errors, [], choice)  # fmt: skip

    def _noting(self, row: Row) -> Row:
        """A row that stays: it meets the held-out inputs."""
        row.held = [0.0] * len(self.held)
        if row.choice:
            row.held = self._later(row.choice)
        self._noted(row)
        return row


def priced(
    row: Row, search: Search, sites: Sequence[AttentionSite], exact: Sequence[Edit], gpu: GpuCost,
    binding: Mapping[str, int],
) -> None:  # fmt: skip
    """The row's gains on a GPU, at these sizes of the model's axes; none where heads choose blocks when the model runs,
    whose kernels are priced by the search for that target alone, or average values, which is not priced.
    """
    kernels = {e.site.id: e.lowering for e in exact}
    lists, turned = search.blocks(row.choice), search.turned(row.choice)
    texts = [text for of_site in search.patterns(row.choice).values() for text in of_site]
    if set(row.choice) - set(lists) or any(text == "mean" or rest_of(text) for text in texts):
        return
    before = dense = ours = 0.0
    for site in sites:
        shape = shape_of(site, binding)
        file = gpu.before(site, shape)
        best = min(file, gpu.milliseconds(site, kernels[site.id], binding)) if site.id in kernels else file
        before, dense = before + file, dense + best
        ours += gpu.lists(site, shape, *lists[site.id]) if site.id in lists else best
        ours += gpu.moving(site, shape) if site.id in turned else 0.0
    row.gpu, row.gpu_over_exact = before / ours, dense / ours


def first_fitting(
    strengths: Sequence[float | str], judge: Callable[[Any], Row], budget: float, confirmed: Callable[[Row], bool]
) -> list[Row]:
    """The sparsest strength whose bound keeps the budget, by bisection: errors fall as strengths grow; or the next
    denser one that is ``confirmed`` too.
    """
    low, high, best = 0, len(strengths) - 1, None
    while low <= high:
        middle = (low + high) // 2
        row = judge(strengths[middle])
        if row.choice and row.bound <= budget:
            best, high = row, middle - 1
        elif not row.choice:
            high = middle - 1  # so dense that nothing is gained
        else:
            low = middle + 1
    if best is None or confirmed(best):
        return [best] if best is not None else []
    for strength in strengths[high + 2 :]:
        row = judge(strength)
        if row.choice and row.bound <= budget and confirmed(row):
            return [row]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--max-error", type=float, default=0.01)
    parser.add_argument("--density", type=float, help="in place of a budget: errors of what keeps so many blocks")
    parser.add_argument("--keep-dense", metavar="RULE", help="calls that are not approximated, as in attncompile")
    parser.add_argument("--metric", default="relative_l2", choices=tuple(tasks.POWER))
    parser.add_argument("--policy", default="sparse")
    parser.add_argument("--target", default="onnx", help="whose predicted times count")
    parser.add_argument("--also", help="a target for whose GPU the choices are priced too")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--grid")
    parser.add_argument("--jobs", type=int, default=measure.default_threads())
    parser.add_argument("--threads", type=int, help="of all jobs together")
    parser.add_argument("--provider", default="cpu", choices=("cpu", "cuda"), help="where the search runs the model")
    parser.add_argument("--limit", type=float, help="seconds after which no further single mechanism is begun")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a single mechanism to try, of all")
    parser.add_argument("--time", action="store_true", help="time the chosen models in ONNX Runtime, in paired rounds")
    parser.add_argument("--state", type=Path, help="folder of what is found; a run that was interrupted goes on there")
    parser.add_argument("--write", type=Path, help="folder for the chosen models, one subfolder a row")
    parser.add_argument("--json", type=Path, help="rewritten after every row")
    given = parser.parse_args()
    options = pipeline.Options(
        policy=given.policy, inputs=given.inputs, max_error=given.max_error, metric=given.metric, grid=given.grid,
        target=given.target, precision="fp16" if given.fp16 else None, keep_dense=given.keep_dense,
    )  # fmt: skip
    found = pipeline.inspect(given.model, options)
    worlds = pipeline.Worlds(found.index)
    registry = mechanisms()
    rules = policy.load_policy(given.policy, registry)
    exact = pipeline.edits(found, options)
    gpu = pipeline.gpu_of(options, targets.get(given.target), worlds)
    also = None
    if given.also:
        also = pipeline.gpu_of(replace(options, precision="fp16"), targets.get(given.also), worlds)
    sites = open_sites(found.detection.sites, rules, registry, exact)
    said = gpu.said if gpu is not None else "for the CPU"
    rule = pipeline.keep_dense(found, options, pipeline.plan(found, options))
    feeds = approximated(found.feeds, rule)
    binding = binding_of(found, feeds[0])
    rows: list[Row] = []
    start = time.perf_counter()

    def late() -> bool:
        return given.limit is not None and time.perf_counter() - start > given.limit

    def noted(row: Row) -> None:
        rows.append(row)
        if also is not None:
            priced(row, search, sites, exact, also, binding)
        if given.write:
            written(row, len(rows) - 1, given.write)
        saved()

    def saved() -> None:
        if given.json:
            known, held = split(len(feeds))
            given.json.write_text(json.dumps({
                "command": " ".join(["python tools/search_compare.py", *sys.argv[1:]]),
                "metric": given.metric, "density": given.density,
                "max_error": given.max_error if given.density is None else None,
                "budget": tasks.badness(given.metric, given.max_error) if given.density is None else None,
                "confidence": rules.confidence,
                "times": f"predicted {said}", "calibration": len(known), "held_out": len(held),
                "keep_dense": rule.text if rule else None, "set_aside": len(found.feeds) - len(feeds),
                "also": also.said if also is not None else None,
                "warnings": list(search.warnings), "seconds": round(time.perf_counter() - start),
                "only": given.only, "not_tried": compared.skipped, "did_not_keep_it": compared.refused,
                "rows": [r.to_json() for r in rows],
            }, indent=1) + "\n", encoding="utf-8")  # fmt: skip

    def written(row: Row, number: int, models: Path) -> Path:
        place = models / f"{number}-{row.name.replace(' + ', '-').replace(', ', '-').replace(' ', '-')}"
        place.mkdir(parents=True, exist_ok=True)
        proto = apply(found.index.model, [(e.site, e.lowering) for e in search.edits(row.choice)])
        patterns = json.dumps(search.patterns(row.choice), indent=1) + "\n"
        (place / "patterns.json").write_text(patterns, encoding="utf-8")
        return onnx_target.write(proto, found.model, place)

    with tempfile.TemporaryDirectory(prefix="attncompile-compare-") as name:
        folder = Path(name)
        settings = Settings(given.metric, given.max_error, given.density, rules.confidence, given.jobs,
                            threads=given.threads, provider=given.provider)  # fmt: skip
        search = Search(
            found, rules, registry, feeds, [worlds(binding_of(found, f)) for f in feeds], exact, folder,
            settings, LineProgress(Console(stderr=True)), gpu, given.state or folder / "state",
        )  # fmt: skip
        try:
            spaces = [s for s in search.spaces(sites) if search.kept(s.site)]  # others have no heads to choose for
            single = families(spaces)
            if unknown := [name for name in given.only if name not in single]:
                parser.error(f"--only {unknown[0]}: not offered here; there are {', '.join(single)}")
            if given.only:
                single = {name: strengths for name, strengths in single.items() if name in given.only}
            limits = search.limits()
            if given.density is not None:
                limits = replace(limits, budget=math.inf)
            compared = Comparison(search, spaces, single, given.metric, limits, noted, late)
            if given.density is None:
                compared.rows()
            else:
                compared.rows_at(given.density)
            for i, row in enumerate(rows if given.time else ()):
                path = written(row, i, folder / "timed")
                before, after = (measure.open_session(p, lean=True) for p in (found.model.path, path))
                row.measured = measure.paired_conclusive(before, after, feeds[-1], budget_seconds=20.0).gain
            saved()
        finally:
            search.close()
    print(table(rows))
    for text in search.warnings:
        print(f"\nwarning: {text}")
    if compared.skipped:
        print(f"\nnot tried for lack of time: {', '.join(compared.skipped)}")
    if given.density is None:
        print(f"\nbudget {given.metric} {given.max_error:g}, times predicted {said}: {verdict(rows)}")


def table(rows: Sequence[Row]) -> str:
    """As in docs/sparse.md."""
    timed = any(r.measured is not None for r in rows)
    head = ["chosen", "strength", "attention, predicted", "over the file's", "blocks left", "mean", "bound",
            "held-out mean", "worst", *(["model, measured"] if timed else [])]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row.name, row.strength, f"{1 / row.predicted:.2f}x", f"{row.gain_over_file:.2f}x",
                 f"{row.density:.1%}", f"{np.mean(row.errors):.2e}", f"{row.bound:.2e}", f"{np.mean(row.held):.2e}",
                 f"{np.max(row.held):.2e}"]  # fmt: skip
        lines.append([*cells, *([f"{row.measured:.2f}x" if row.measured else ""] if timed else [])])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def verdict(rows: Sequence[Row]) -> str:
    """In one line."""
    named = {r.name: r for r in rows}
    alike = [r for r in rows if r.name not in (EACH, EQUAL, EXACT)]
    if EACH not in named:
        return "the search found nothing that keeps it"
    if not alike:
        return "no single mechanism keeps it"
    fastest, own = min(alike, key=lambda r: r.predicted), named[EACH]
    text = f"chosen for each head {fastest.predicted / own.predicted:.2f} times as fast as the best single mechanism"
    if EQUAL in named:
        text += f", {fastest.predicted / named[EQUAL].predicted:.2f} times at no larger an error"
    elif own.whole_error <= fastest.whole_error:
        text += " and no further from the original over all inputs"
    return f"{text} ({fastest.name} {fastest.strength})"


if __name__ == "__main__":
    main()
