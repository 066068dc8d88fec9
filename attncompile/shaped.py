"""The inputs on which a whole model is compared: seeded ones at each shape of the profile, and the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from attncompile import branches, measure, verify
from attncompile.core.errors import AttncompileError
from attncompile.core.keep_dense import KeepDense
from attncompile.core.model import Model
from attncompile.core.site import AttentionSite
from attncompile.passes.evaluate import World
from attncompile.passes.index import symbol_of
from attncompile.passes.symbols import symbols

if TYPE_CHECKING:
    from attncompile.pipeline import Inspection

Feed = Mapping[str, np.ndarray]


GIVEN = "inputs"
"""Begins the label of the user's inputs."""


@dataclass(frozen=True, slots=True)
class Shaped:
    """Inputs at one shape; ``label`` is that of the profile, or ``inputs`` for the user's. Not all are timed."""

    label: str
    bindings: Mapping[str, int]
    feed: Feed
    timed: bool = True

    @property
    def given(self) -> bool:
        """Whether these are the user's inputs; others are seeded."""
        return self.label.startswith(GIVEN)


def sizes_of(model: Model, feed: Feed) -> dict[str, int]:
    """The dynamic dimensions' sizes in a feed that was checked against the model."""
    known = symbols(model)
    return {
        symbol: feed[info.name].shape[axis]
        for info in model.proto.graph.input if info.name in feed
        for axis, dim in enumerate(info.type.tensor_type.shape.dim)
        if (symbol := symbol_of(info.name, axis, dim)) in known
    }  # fmt: skip


def binding_of(found: Inspection, feed: Feed) -> dict[str, int]:
    """The sizes in ``feed``, the profile's usual ones for what it does not say."""
    return {**found.profile.usual(), **sizes_of(found.model, feed)}


def shaped_inputs(
    found: Inspection, sites: Sequence[AttentionSite], session: measure.Session | None,
    worlds: Callable[[Mapping[str, int]], World], seed: int, warn: Callable[[str], None],
) -> list[Shaped]:  # fmt: skip
    """Seeded inputs at every shape at which the original runs, through every body that holds one of ``sites``, with and
    without padding; then the user's.

    ``session`` runs the original; None where the CPU cannot. ``warn`` is told of shapes at which it does not run.
    """
    made: list[Shaped] = []
    inside = [s for s in sites if s.scope]
    for label, binding in found.profile.bindings():
        plain = verify.make_inputs(found.model, binding, seed)
        for name, feed in branches.through(worlds(binding), inside, label, plain) if inside else [(label, plain)]:
            try:
                if session is not None:
                    measure.run_session(session, feed)
            except AttncompileError as error:
                sizes = ", ".join([f"{n}={v}" for n, v in binding.items()] + name.split(", ")[1:])
                warn(f"the original itself does not run at {sizes}, so nothing was checked there: set --profile "
                     f"({error.message[:160]})")  # fmt: skip
                continue
            made.append(Shaped(name, binding, feed))
            if session is not None and label in ("usual", "static"):
                made += [Shaped(f"{name}, {what}", binding, padded, timed=False)
                         for what, padded in _padded(found, sites, session, feed)]  # fmt: skip
    return made + [Shaped(GIVEN, binding_of(found, f), f) for f in found.feeds]


KEPT = "kept dense"
"""Ends the label of inputs that a rule keeps dense."""


def both_sides(
    shaped: Sequence[Shaped], rule: KeepDense, given: Sequence[Feed], session: measure.Session,
    warn: Callable[[str], None],
) -> list[Shaped]:  # fmt: skip
    """``shaped`` with every seeded feed once as a call that ``rule`` holds of and once as one that it does not: by the
    value of one of the user's inputs ``given``, or at the rule's edge where none is on that side. Labels of the first
    end in ``KEPT``. Those that the original does not run on are left out, and ``warn`` is told.
    """
    found = []
    for item in shaped:
        if item.given:
            found.append(replace(item, label=f"{GIVEN}, {KEPT}") if rule.holds(item.feed) else item)
            continue
        for keep in (False, True):
            values = next((f[rule.input] for f in given if rule.holds(f) == keep), None)
            feed = rule.feed(item.feed, keep)
            if values is not None and values.size:
                entry = next(v for v in values.reshape(-1) if rule.holds({rule.input: v}) == keep)
                feed = {**item.feed, rule.input: np.full_like(item.feed[rule.input], entry)}
            label = f"{item.label}, {KEPT}" if keep else item.label
            try:
                measure.run_session(session, feed)
            except AttncompileError as error:
                warn(f"the original itself does not run with {rule.input} = {feed[rule.input].reshape(-1)[:1]}, so "
                     f"nothing was checked there ({error.message[:160]})")  # fmt: skip
                continue
            found.append(replace(item, label=label, feed=feed))
    return found


def _padded(
    found: Inspection, sites: Sequence[AttentionSite], session: measure.Session, feed: Feed
) -> list[tuple[str, dict[str, np.ndarray]]]:
    """``feed`` with keys hidden on the left, on the right and in between, as far as the original gives numbers then:
    padding that is never used is not proved.
    """
    sources = [p.source or "" for s in sites for p in s.mask.parts if p.kind in ("padding", "opaque")]
    result = []
    for what, padded in verify.padded_feeds(feed, found.ledger.data_inputs(*sources)):
        try:
            values = measure.run_session(session, padded)
        except AttncompileError:
            continue  # what the original refuses no user feeds
        if all(v.dtype.kind != "f" or np.isfinite(v).all() for v in values):
            result.append((what, padded))
    return result
