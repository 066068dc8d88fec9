"""Export an entry, detect in the file, compare with what the torch model did; the same with committed graphs."""

from __future__ import annotations

import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module, util
from math import prod
from pathlib import Path

import numpy as np
from onnx import ModelProto
from onnx.checker import ValidationError

from attncompile.core.grid_pattern import Blocked
from attncompile.core.mask import MaskPart
from attncompile.core.model import Model
from attncompile.core.pattern import BlockSparse
from attncompile.core.site import AttentionSite, Detection
from attncompile.models.export import export_built, quiet
from attncompile.models.recipe import Built, Options
from attncompile.models.zoo import graphs
from attncompile.models.zoo.entry import Call, Entry
from attncompile.models.zoo.seen import counts_from, from_words, window
from attncompile.models.zoo.table import ENTRIES


@dataclass(frozen=True, slots=True)
class Outcome:
    """One entry compared. ``missed`` are true sites that are neither found nor declared as refused; ``false`` are
    found sites that are not true; ``wrong`` says what else differs: masks, sinks, the committed truth.
    """

    entry: Entry
    true: tuple[Call, ...]
    found: int
    refused: int
    missed: tuple[str, ...]
    false: tuple[str, ...]
    wrong: tuple[str, ...]
    near_misses: tuple[str, ...]
    nodes: int
    seconds: float

    @property
    def passed(self) -> bool:
        return not (self.missed or self.false or self.wrong)


@dataclass(frozen=True, slots=True)
class Skipped:
    """An entry that cannot be exported here, and why."""

    reason: str


def make(entry: Entry) -> Built:
    """The torch module of ``entry``, in its element type."""
    import torch

    from attncompile.models.export import cast

    module, function = entry.maker.split(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built: Built = getattr(import_module(module), function)(entry)
    built.module.eval()
    return cast(built, Options(dtype=entry.dtype))


def exported(entry: Entry, path: Path) -> list[Call]:
    """Writes the model of ``entry`` to ``path`` and returns what its torch module did."""
    from attncompile.models.zoo import after
    from attncompile.models.zoo.truth import calls_of

    with quiet():
        built = make(entry)
        calls = calls_of(built, entry.modules, entry.linear, entry.sparse, entry.varied)
        options = Options(exporter=entry.exporter, opset=entry.opset, dynamic=entry.dynamic)
        export_built(built, options, path)
        for step in entry.after:
            calls = after.STEPS[step](entry, built, path, calls)
    return calls


def run(entry: Entry, write: bool = False) -> Outcome:
    """Makes, counts, exports into a temporary folder, detects, compares: with the truth, and that with the committed
    one. ``write`` writes graph and truth in place of the latter.
    """
    from attncompile.passes.load import load

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="attncompile-zoo-") as folder:
        path = Path(folder) / "model.onnx"
        calls = exported(entry, path)
        model = load(path)
        detection = _written(entry, model, calls) if write else found_in(model)
    outcome = compare(entry, calls, detection, model.proto, time.perf_counter() - start)
    if not graphs.truth_path(entry).is_file():
        return replace(outcome, wrong=(*outcome.wrong, "no truth is committed: --write-graphs"))
    if graphs.read_truth(entry)["calls"] != calls:
        return replace(outcome, wrong=(*outcome.wrong, "the committed truth is another one"))
    return outcome


def _written(entry: Entry, model: Model, calls: list[Call]) -> Detection:
    """Writes the graph and detects in it. What a mask is computed from (SwinV2's bias is a small network of constants)
    has to be read: such tensors keep their data.
    """
    kept: frozenset[str] = frozenset()
    while True:
        graphs.write(entry, model.proto, calls, kept)
        try:
            return found_in(graphs.read_graph(entry))
        except ValidationError as error:
            named = re.search(r"tensor name: (.+?)\) should be stored", str(error))
            if named is None or named[1] in kept:
                raise
            kept |= {named[1]}


def run_graph(entry: Entry) -> Outcome:
    """Detects in the committed graph and compares with the committed truth."""
    start = time.perf_counter()
    model = graphs.read_graph(entry)
    calls = graphs.read_truth(entry)["calls"]
    detection = found_in(model)
    return compare(entry, calls, detection, model.proto, time.perf_counter() - start)


def found_in(model: Model) -> Detection:
    """What the compiler finds: as in the pipeline, detection runs again where giving operands rank 4 helps, or where
    windows can be taken to their attention.
    """
    from attncompile.passes.detect import detect
    from attncompile.passes.equal_lengths import with_sums
    from attncompile.passes.normalise import normalise
    from attncompile.passes.separate import HELPED, separate
    from attncompile.passes.symbols import profile_for
    from attncompile.passes.whole_grid import whole_grid

    model = normalise(with_sums(model))
    profile = profile_for(model, {})
    detection = detect(model, profile)
    if any(m.code in HELPED for m in detection.near_misses):
        model = separate(model, profile)
        detection = detect(model, profile)
    return whole_grid(model, profile, detection)[1]


def compare(entry: Entry, calls: Sequence[Call], found: Detection, proto: ModelProto, seconds: float) -> Outcome:
    """True calls against sites: kind, heads, dims and lengths have to agree, then masks and sinks are looked at."""
    pairs = _paired(calls, found.sites)
    missing = [c for i, c in enumerate(calls) if i not in {i for i, _ in pairs}]
    false = [s for j, s in enumerate(found.sites) if j not in {j for _, j in pairs}]
    codes = Counter(m.code for m in found.near_misses)
    refused = sum(min(count, codes[code]) for code, count in entry.refused.items())
    declared = sum(entry.refused.values())
    missed = [_words(c) for c in missing] if len(missing) != refused else []
    if refused != declared:
        missed.append(f"{declared} sites are declared as refused, {refused} were")
    return Outcome(
        entry, tuple(calls), len(pairs), refused, tuple(missed), tuple(_words(s) for s in false),
        tuple(said for i, j in pairs for said in _differences(found.sites[j], calls[i])),
        tuple(f"{m.code}: {m.node}: {m.reason}" for m in found.near_misses), len(proto.graph.node), seconds,
    )  # fmt: skip


def _paired(calls: Sequence[Call], sites: Sequence[AttentionSite]) -> list[tuple[int, int]]:
    """Positions of calls and sites of the same kind, heads, dims and lengths. Both come in the order of execution;
    where some are missing, a site goes to a call with the same mask if there is one.
    """
    left, rest, pairs = list(range(len(calls))), list(range(len(sites))), []
    for strict in (False,) if len(calls) == len(sites) else (True, False):
        for j in list(rest):
            fitting = (i for i in left if _fits(sites[j], calls[i]))
            i = next((i for i in fitting if not (strict and _differences(sites[j], calls[i]))), None)
            if i is not None:
                left.remove(i)
                rest.remove(j)
                pairs.append((i, j))
    return pairs


def _fits(site: AttentionSite, call: Call) -> bool:
    """A symbolic length has no number here and stands for any.

    transformers hands the one query of a decoding step over as a row for each query head of a group: heads that meet
    the same keys become queries of one head. That is the same function, and a graph may say it either way.
    """
    own = (site.kind, site.head_dim, site.value_dim)
    if own != (call.kind, call.head_dim, call.value_dim):
        return False
    site = _one_window(site)
    if not isinstance(site.key_length, str) and site.key_length != call.key_length:
        return False
    lengths = isinstance(site.query_length, str) or site.query_length == call.query_length
    if lengths and (site.heads, site.kv_heads) == (call.heads, call.kv_heads):
        return True
    return _unfolded(site) == _unfolded(call)


def _one_window(site: AttentionSite) -> AttentionSite:
    """A site over a grid whose windows are batch entries in torch, as torch calls it: its first window.

    What is looked at is said by the site alone: which tokens are that window, and which of them see one another.
    """
    windows = _windows_of(site)
    if windows is None:
        return site
    part, seen = windows
    size = seen.shape[-1]
    inside = replace(part, kind="block_sparse", pattern=BlockSparse.of(seen[0], size))
    others = tuple(inside if p is part else p for p in site.mask.parts)
    return replace(site, query_length=size, key_length=size, mask=replace(site.mask, parts=others))


def _windows_of(site: AttentionSite) -> tuple[MaskPart, np.ndarray] | None:
    """The part of the mask that cuts a grid into windows, and bool [windows, tokens, tokens] of what is seen in each;
    None where the site says no such thing.
    """
    part = next((p for p in site.mask.parts if p.kind == "blocked"), None)
    if not site.form.startswith("windowed ") or part is None or not isinstance(part.pattern, Blocked):
        return None
    grid, window = part.pattern.grid, part.pattern.window
    if grid is None or site.query_length != grid.tokens:
        return None
    if any(n % w for n, w in zip(grid.shape, window, strict=True)):
        return None
    tokens = np.arange(grid.tokens).reshape(grid.shape)
    for axis, (shift, w) in enumerate(zip(part.pattern.shift, window, strict=True)):
        tokens = np.roll(tokens, -shift, 2 * axis)
        tokens = tokens.reshape(*tokens.shape[: 2 * axis], -1, w, *tokens.shape[2 * axis + 1 :])
    rank = len(window)
    tokens = tokens.transpose(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)).reshape(-1, prod(window))
    seen = part.pattern.visible(grid.tokens, grid.tokens)
    return part, seen[tokens[:, :, None], tokens[:, None, :]]


def _unfolded(of: Call | AttentionSite) -> tuple[int, int, int | str]:
    """Heads, key heads and queries, with the query heads of a group as queries where there is one query."""
    if of.query_length == 1 and of.heads > of.kv_heads:
        return of.kv_heads, of.kv_heads, of.heads // of.kv_heads
    return of.heads, of.kv_heads, of.query_length


def _words(of: Call | AttentionSite) -> str:
    groups = f" ({of.kv_heads} of keys)" if of.kv_heads != of.heads else ""
    dims = f"{of.head_dim}/{of.value_dim}" if of.value_dim != of.head_dim else f"{of.head_dim}"
    name = f"{of.id}: " if isinstance(of, AttentionSite) else ""
    return f"{name}{of.kind}, {of.heads} heads{groups} of {dims}, {of.query_length} queries, {of.key_length} keys"


def _differences(site: AttentionSite, call: Call) -> list[str]:
    said = _mask_difference(_one_window(site), call)
    wrong = [f"{site.id}: {said}"] if said else []
    windows = _windows_of(site)
    if windows is not None and bool(np.any(windows[1] != windows[1][:1])) != ("data" in call.mask.split("+")):
        wrong.append(f"{site.id}: whether its windows see the same of themselves is not as it was seen")
    if bool(site.sinks) != call.sinks:
        wrong.append(f"{site.id}: sinks are {'missed' if call.sinks else 'claimed'}")
    return wrong


_STRUCTURE = frozenset({"padding", "bias", "opaque"})


def _mask_difference(site: AttentionSite, call: Call) -> str:
    """How the site's mask facts differ from the elements that were seen, or nothing."""
    if site.mask.by_head and "heads" not in call.mask.split("+"):
        return f"mask {call.mask} is taken for one that differs between heads"
    structure, *words = call.mask.split("+")
    queries, keys = call.query_length, call.key_length
    want = from_words(structure, queries, keys)
    causal = site.linear is not None and site.linear.causal
    have = window(-1, 0, queries, keys) if causal else np.ones((queries, keys), dtype=bool)
    for part in site.mask.parts:
        if part.kind not in _STRUCTURE:
            have = have & _visible(part, queries, keys)
    if have.ndim == 3:  # the words are those of the first head
        have = have[0]
    kinds = {p.kind for p in site.mask.parts}
    said = " and ".join(f"{p.kind} {p.parameters()}" for p in site.mask.parts) or "none"
    name = call.mask if not structure.startswith("pattern") else "+".join(["a pattern", *(w[:7] for w in words)])
    if "data" in words and queries == 1 and "padding" in kinds:
        words = ["padding"]  # whatever one query does not see are whole keys
    agrees = np.array_equal(want, have) and _same_counts(site, words, queries, keys)
    words = ["bias" if word.startswith("counts ") else word for word in words]
    # A bias that is computed from the queries (SAM, DeBERTa) is opaque to the detector, and rightly so.
    if site.query_length == 1 and "padding" in kinds:
        words = ["padding" if word == "data" else word for word in words]  # with one query data can hide only keys
    agrees &= bool({"bias", "data"} & set(words)) == bool(kinds & {"bias", "opaque"})
    agrees &= "data" not in words or "opaque" in kinds
    agrees &= ("padding" in words) == ("padding" in kinds) and ("zeroed" in words) == site.mask.zeroed
    return "" if agrees else f"mask {name} is taken for {said}"


def _same_counts(site: AttentionSite, words: Sequence[str], queries: int, keys: int) -> bool:
    """Whether keys count as often as was seen: once, where nothing else is said."""
    said = next((word for word in words if word.startswith("counts ")), None)
    if said is None or site.mask.counts is None:
        return said is None and site.mask.counts is None
    return np.array_equal(site.mask.counts.times(queries, keys)[0], counts_from(said, queries, keys))


def _visible(part: MaskPart, queries: int, keys: int) -> np.ndarray:
    if part.kind in ("window", "causal"):
        return window(part.left, 0 if part.kind == "causal" else part.right, queries, keys)
    if part.pattern is None:
        raise ValueError(f"a mask part {part.kind} says nothing about which keys are visible")
    return part.pattern.visible(queries, keys)


def attempt(position: int) -> Outcome | Skipped | str:
    """The outcome of the entry at this position, or the error that it stopped with."""
    return _guarded(position, "run")


def attempt_writing(position: int) -> Outcome | Skipped | str:
    """As ``attempt``, and the graph and its truth are written."""
    return _guarded(position, "write")


def attempt_graph(position: int) -> Outcome | Skipped | str:
    """The outcome of the committed graph of the entry at this position."""
    return _guarded(position, "graph")


def _guarded(position: int, what: str) -> Outcome | Skipped | str:
    entry = ENTRIES[position]
    absent = [name for name in entry.needs if util.find_spec(name) is None]
    if absent and what != "graph":
        return Skipped(f"{', '.join(absent)} is not installed")
    try:
        return run_graph(entry) if what == "graph" else run(entry, write=what == "write")
    except Exception as error:  # whatever torch's exporters or a library raise is this entry's result
        last = traceback.extract_tb(error.__traceback__)[-1]
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        where = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
        return f"{type(error).__name__}: {lines[0] if lines else ''} ({where})"[:300]
