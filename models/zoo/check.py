"""Export an entry, detect in the file, compare with what the torch model did."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from attncompile.core.site import AttentionSite, Detection
from attncompile.models.export import export_built, quiet
from attncompile.models.recipe import Built, Options
from attncompile.models.zoo.entry import Call, Entry
from attncompile.models.zoo.table import ENTRIES


@dataclass(frozen=True, slots=True)
class Outcome:
    """One entry compared. ``missed`` are true sites that are neither found nor declared as refused; ``false`` are
    found sites that are not true; ``wrong`` says which masks differ.
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


def run(entry: Entry) -> Outcome:
    """Makes, counts, exports into a temporary folder, detects, compares."""
    from attncompile.models.zoo.truth import calls_of
    from attncompile.passes.detect import detect
    from attncompile.passes.load import load
    from attncompile.passes.normalise import normalise
    from attncompile.passes.separate import HELPED, separate
    from attncompile.passes.symbols import profile_for

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="attncompile-zoo-") as folder:
        path = Path(folder) / "model.onnx"
        with quiet():
            built = make(entry)
            calls = calls_of(built, entry.modules)
            options = Options(exporter=entry.exporter, opset=entry.opset, dynamic=entry.dynamic)
            export_built(built, options, path)
        model = normalise(load(path))
        profile = profile_for(model, {})
        detection = detect(model, profile)
        if any(m.code in HELPED for m in detection.near_misses):
            detection = detect(separate(model, profile), profile)
    return compare(entry, calls, detection, len(model.proto.graph.node), time.perf_counter() - start)


def compare(entry: Entry, calls: list[Call], detection: Detection, nodes: int, seconds: float) -> Outcome:
    """True calls against sites: as multisets of heads, head dim and lengths, then their masks in order."""
    true = Counter(_key(c) for c in calls)
    found = Counter(_site_key(s, calls) for s in detection.sites)
    missing, false = true - found, found - true
    codes = Counter(m.code for m in detection.near_misses)
    refused = sum(min(count, codes[code]) for code, count in entry.refused.items())
    declared = sum(entry.refused.values())
    missed = [f"{n} x {_words(k)}" for k, n in missing.items()] if missing.total() != refused else []
    if refused != declared:
        missed.append(f"{declared} sites are declared as refused, {refused} were")
    wrong = _wrong_masks(calls, detection.sites) if not missing and not false else []
    return Outcome(
        entry, tuple(calls), found.total() - false.total(), refused, tuple(missed),
        tuple(f"{n} x {_words(k)}" for k, n in false.items()), tuple(wrong),
        tuple(f"{m.code}: {m.reason}" for m in detection.near_misses), nodes, seconds,
    )  # fmt: skip


_Key = tuple[int, int, int | str, int | str]


def _key(call: Call) -> _Key:
    return call.heads, call.head_dim, call.query_length, call.key_length


def _site_key(site: AttentionSite, calls: list[Call]) -> _Key:
    """A symbolic length has no number here: it stands for that of a true call with the same heads, if there is one."""
    lengths: list[int | str] = [site.query_length, site.key_length]
    for call in calls:
        if (call.heads, call.head_dim) == (site.heads, site.head_dim):
            pairs = zip(lengths, (call.query_length, call.key_length), strict=True)
            if all(isinstance(have, str) or have == want for have, want in pairs):
                return _key(call)
    return site.heads, site.head_dim, lengths[0], lengths[1]


def _words(key: _Key) -> str:
    return f"{key[0]} heads of {key[1]}, {key[2]} queries, {key[3]} keys"


def _wrong_masks(calls: list[Call], sites: tuple[AttentionSite, ...]) -> list[str]:
    """Sites and calls come in the order of execution; those of one key are compared one by one."""
    wrong = []
    by_key: dict[_Key, list[Call]] = {}
    for call in calls:
        by_key.setdefault(_key(call), []).append(call)
    for site in sites:
        queue = by_key.get(_site_key(site, calls), [])
        if not queue:
            continue
        call = queue.pop(0)
        part = site.mask.part("window", "causal")
        said = "none" if part is None else "causal" if part.kind == "causal" else f"window {part.left} {part.right}"
        others = [p.kind for p in site.mask.parts if p is not part]
        want, *data = call.mask.split("+")
        # A mask that is nothing but data says no structure; one with padding beside it needs a part for it.
        agrees = want == "unknown" or (bool(others) if want == "data" else said == want and (bool(others) or not data))
        if not agrees:
            wrong.append(f"{site.id}: mask {call.mask} taken for {said}" + (f" and {others}" if others else ""))
    return wrong


def attempt(position: int) -> Outcome | str:
    """The outcome of the entry at this position, or the error that it stopped with."""
    try:
        return run(ENTRIES[position])
    except Exception as error:  # whatever torch's exporters or a library raise is this entry's result
        last = traceback.extract_tb(error.__traceback__)[-1]
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        where = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
        return f"{type(error).__name__}: {lines[0] if lines else ''} ({where})"[:300]
