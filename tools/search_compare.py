"""The search for each head against every single mechanism used alike in all heads, at the same budget.

    python tools/search_compare.py MODEL --inputs FILE [--max-error 0.01] [--metric relative_l2] [--time] [--json OUT]

Both choose on the calibration inputs, by the same bound and the same candidates' scores; both are then measured on the
held-out inputs. A uniform mechanism has one strength for all heads of all sites: one window, or one share of the
attention weight that every head's columns and diagonals, or blocks, have to keep. With --tokens NAME, an integer input
of token numbers, the perplexity of the first output (logits) is measured too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from attncompile import measure, metrics, pipeline, policy
from attncompile.console import LineProgress
from attncompile.core.block_pattern import BlockPattern
from attncompile.core.block_selection import BlockSelection, is_selection
from attncompile.passes.replace import apply
from attncompile.plugins import mechanisms
from attncompile.search import Search, Settings, choose, split, tasks
from attncompile.search.choose import Choice, SiteSpace, Unit
from attncompile.search.confidence import upper_bound
from attncompile.shaped import binding_of
from attncompile.targets import onnx as onnx_target

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)


@dataclass
class Row:
    """What one way of choosing came to. Times are relative to all attention as it is."""

    name: str
    strength: str
    predicted: float
    density: float
    bound: float
    held_mean: float
    held_worst: float
    choice: Choice
    measured: float | None = None
    perplexity: float | None = None


def pick(unit: Unit, kept: np.ndarray, kind: str, strength: float | str) -> int:
    """The candidate of one head: that with this text, or of this kind the one with the fewest blocks that keeps so
    much; dense where there is none.
    """
    if isinstance(strength, str):
        return unit.labels.index(strength) if strength in unit.labels else 0
    fitting = [k for k in unit.of(0)[1:] if BlockPattern(unit.labels[k]).kind == kind and kept[k] >= strength - 1e-4]
    return int(min(fitting, key=lambda k: unit.time[k], default=0))


def families(spaces: Sequence[SiteSpace]) -> dict[str, list[float | str]]:
    """Kinds and their strengths, the sparsest first."""
    texts = {u.labels[k] for s in spaces for u in s.units for k in u.of(0)[1:]}
    patterns = [BlockPattern(t) for t in texts]
    found: dict[str, list[float | str]] = {}
    for sinks in sorted({p.text.split()[1] for p in patterns if p.kind == "streaming"}):
        same = [p.text for p in patterns if p.kind == "streaming" and p.text.split()[1] == sinks]
        found[f"sinks {sinks} + window"] = sorted(same, key=lambda t: int(t.split()[3]))
    grids = [p.text for p in patterns if p.kind == "grid"]
    if grids:
        found["neighborhood"] = sorted(grids, key=lambda t: int(np.prod([int(x) for x in t[5:].split("x")])))
    radial = sorted({p.text for p in patterns if p.kind == "radial"})
    if radial:
        found["radial"] = list(radial)
    for kind in ("slash", "blocks"):
        if any(p.kind == kind for p in patterns):
            found[kind] = list(LEVELS)
    chosen = {text for s in spaces for u in s.units for text in u.labels if is_selection(text)}
    for way in sorted({text.split()[0] for text in chosen}):  # by blocks that are chosen when the model runs
        found[way] = sorted((t for t in chosen if t.startswith(f"{way} ")), key=lambda t: BlockSelection(t).amount)
    return found


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


def perplexity_of(path: Path, feeds: Sequence[Any], tokens: str, provider: Any) -> float:
    """Over all feeds: exp of the mean negative log-likelihood."""
    session = measure.open_session(path, provider=provider)
    name = session.get_outputs()[0].name
    logs = [np.log(metrics.perplexity(measure.run_session(session, f, [name])[0], f[tokens])) for f in feeds]
    return float(np.exp(np.mean(logs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--max-error", type=float, default=0.01)
    parser.add_argument("--metric", default="relative_l2", choices=tuple(tasks.POWER))
    parser.add_argument("--policy", default="sparse")
    parser.add_argument("--target", default="onnx", help="whose predicted times count")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--grid")
    parser.add_argument("--jobs", type=int, default=measure.default_threads())
    parser.add_argument("--provider", default="cpu", choices=("cpu", "cuda"), help="where the search runs the model")
    parser.add_argument("--time", action="store_true", help="time the chosen models in ONNX Runtime, in paired rounds")
    parser.add_argument("--tokens", help="input of token numbers, for perplexity")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    options = pipeline.Options(
        policy=given.policy, inputs=given.inputs, max_error=given.max_error, metric=given.metric, grid=given.grid,
        target=given.target, precision="fp16" if given.fp16 else None,
    )  # fmt: skip
    found = pipeline.inspect(given.model, options)
    target = pipeline.base.get(given.target)
    worlds = pipeline.Worlds(found.index)
    registry = mechanisms()
    exact = pipeline.edits(found, options)
    by_name = {m.name: m for m in registry}
    taken = {e.site.id for e in exact if by_name[e.decision.mechanism].skips_keys}
    sites = [s for s in found.detection.sites if s.id not in taken]
    with tempfile.TemporaryDirectory(prefix="attncompile-compare-") as name:
        folder = Path(name)

        def write(edits: Sequence[Any], place: str = "model") -> Path:
            (folder / place).mkdir(exist_ok=True)
            proto = apply(found.index.model, [(e.site, e.lowering) for e in edits])
            return onnx_target.write(proto, found.model, folder / place)

        settings = Settings(given.metric, given.max_error, None, 0.99, given.jobs, provider=given.provider)
        search = Search(
            found, policy.load_policy(given.policy, registry), registry, found.feeds,
            [worlds(binding_of(found, f)) for f in found.feeds], exact, folder, settings,
            LineProgress(Console(stderr=True)), pipeline.gpu_of(options, target, worlds), folder / "state",
        )  # fmt: skip
        try:
            spaces = [s for s in search.spaces(sites) if search.kept(s.site)]  # others have no heads to choose for
            rows = compared(search, spaces, given)
            report(rows, found, search, write, given)
        finally:
            search.close()


def compared(search: Search, spaces: list[SiteSpace], given: argparse.Namespace) -> list[Row]:
    """The search's row, then one for every uniform mechanism that keeps the budget at some strength."""
    known, held = split(len(search.feeds))
    budget = tasks.badness(given.metric, given.max_error)
    base = sum(s.base for s in spaces)

    def judged(choice: Choice, name: str, strength: str) -> Row:
        errors = search.errors(choice, spaces, known, given.metric)
        bound = upper_bound(errors, len(held), 0.99)
        later = search.errors(choice, spaces, held, given.metric) if bound <= budget else [np.nan]
        return Row(name, strength, choose.time_of(spaces, choice) / base, search.density(choice), bound,
                   float(np.mean(later)), float(np.max(later)), choice)  # fmt: skip

    limits = choose.Limits(budget, len(held), 0.99, tasks.POWER[given.metric])
    best, _ = choose.tune(spaces, limits, lambda c: search.errors(c, spaces, known, given.metric))
    rows = [judged(best.choice, "each head its own", "")] if best is not None else []
    for name, strengths in families(spaces).items():
        kind = "" if isinstance(strengths[0], str) else name
        rows += first_fitting(
            strengths, lambda s, k=kind, n=name: judged(uniform(search, spaces, k, s), n, str(s)), budget
        )
    return rows


def first_fitting(strengths: Sequence[float | str], judge: Callable[[Any], Row], budget: float) -> list[Row]:
    """The sparsest strength whose bound keeps the budget, by bisection: errors fall as strengths grow."""
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
    return [best] if best is not None else []


def report(
    rows: list[Row], found: pipeline.Inspection, search: Search, write: Callable[..., Path], given: argparse.Namespace
) -> None:
    """Prints the table; with --time and --tokens measures the models first."""
    held = [search.feeds[i] for i in split(len(search.feeds))[1]]
    before = perplexity_of(found.model.path, held, given.tokens, given.provider) if given.tokens else None
    for i, row in enumerate(rows):
        path = write(search.edits(row.choice), f"chosen{i}")
        if given.tokens:
            row.perplexity = perplexity_of(path, held, given.tokens, given.provider)
        if given.time:
            pair = [measure.open_session(p) for p in (found.model.path, path)]
            row.measured = measure.paired_conclusive(*pair, held[0], budget_seconds=20.0).gain
    print("| chosen | strength | predicted attention time | gain | blocks left | bound | held-out mean | worst |"
          + (" model, measured |" if given.time else "") + (" perplexity |" if given.tokens else ""))  # fmt: skip
    print("|---" * (8 + given.time + bool(given.tokens)) + "|")
    for row in rows:
        cells = [row.name, row.strength, f"{row.predicted:.3f}", f"{1 / row.predicted:.2f}", f"{row.density:.1%}",
                 f"{row.bound:.2e}", f"{row.held_mean:.2e}", f"{row.held_worst:.2e}"]  # fmt: skip
        cells += [f"{row.measured:.2f}x"] if row.measured is not None else []
        cells += [f"{row.perplexity:.4f} ({row.perplexity / before - 1:+.2%})"] if row.perplexity and before else []
        print("| " + " | ".join(cells) + " |")
    others = [r.predicted for r in rows[1:]] or [1.0]
    if rows and rows[0].name == "each head its own":
        verdict = (
            f"{min(1.0, *others) / rows[0].predicted:.2f} times as fast as the best single mechanism, by prediction"
        )
        print(f"\nbudget {given.metric} {given.max_error:g}; chosen for each head: {verdict}")
    else:
        print(f"\nbudget {given.metric} {given.max_error:g}: the search found nothing that keeps it")
    if given.json:
        plain = [{k: v for k, v in vars(r).items() if k != "choice"} for r in rows]
        given.json.write_text(json.dumps({"budget": given.max_error, "metric": given.metric, "perplexity": before,
                                          "rows": plain}, indent=1) + "\n", encoding="utf-8")  # fmt: skip


if __name__ == "__main__":
    main()
