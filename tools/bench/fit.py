"""Fit the cost model's constants to a sweep and say how far off they are where they were not fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from attncompile.core.kernel import Work
from attncompile.kernels.cost import CostModel, features
from attncompile.kernels.stream_cost import StreamCost, streamed

NAMES = ("launch", "block", "flop", "score", "mask", "parts", "beside")
OF_STREAMS = ("launch", "block", "step", "flop", "score", "byte", "moved", "slots")
LINEAR = "-linear-"
SLOTS = (1, 2, 3, 4, 6, 8, 12, 16)
PARTS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)
BESIDE = {"triton-90-lists": 2}
"""Kinds whose blocks share a multiprocessor, by their registers and shared memory, and how many do. (The Gluon kernels
with ``-pair`` do too, but take all blocks in equal turns.)
"""
LARGEST = 0.5
"""Where it is further off than this on any configuration that was withheld there are no constants."""
NEAR = 0.25
FEWEST = 4
"""Configurations that say how far off a fit is, at least."""


def fit(result: dict[str, Any], multiprocessors: int, other: dict[str, Any] | None = None) -> str:
    """TOML of the constants, by model, and a table of errors as comments. All of ``other`` is withheld, without it
    every second launch of ``result``.
    """
    lines = [f"# Fitted by `python tools/bench fit` to a sweep on one {result['gpu']}, {result['when']}; nanoseconds."]
    every = list(launches(result))
    beside = None if other is None else list(launches(other))
    near = judged = 0
    for name in sorted({c["model"] for c in every}):
        cases = [c for c in every if c["model"] == name]
        used, withheld = cases[::2], cases[1::2]
        if beside is not None:
            used, withheld = cases, [c for c in beside if c["model"] == name]
        if len(withheld) < FEWEST:
            lines += [f"# {name}: {len(cases)} configurations are too few", ""]
            continue
        said = {"multiprocessors": multiprocessors, "bandwidth": result["copy_tbs"] * 1e3, "withheld": 0.0,
                "measured_on": f"{result['gpu']}, {result['when']}"}  # fmt: skip
        constants = stream(used, multiprocessors) if LINEAR in name else blocks(used, multiprocessors, name)
        model = (StreamCost if LINEAR in name else CostModel)(**constants, **said)  # type: ignore[arg-type]
        errors = [model.milliseconds(Work(**c["work"])) / c["ms"] - 1 for c in withheld]
        for c, e in zip(withheld, errors, strict=True):
            lines.append(f"# withheld {c['name']}: {c['ms']:.3f} ms, {e:+.0%}")
        near, judged = near + sum(abs(e) <= NEAR for e in errors), judged + len(errors)
        if max(abs(e) for e in errors) > LARGEST:
            lines += [f"# {name}: too far off", ""]
            continue
        lines += [f"[{name}]", *(f"{n} = {v:.6g}" for n, v in constants.items())]
        lines += [
            f"multiprocessors = {multiprocessors}", f"bandwidth = {model.bandwidth:.6g}",
            f"withheld = {max(abs(e) for e in errors):.3f}", f'measured_on = "{model.measured_on}"', "",
        ]  # fmt: skip
    lines.append(f"# {near} of {judged} withheld launches within {NEAR:.0%}")
    return "\n".join(lines)


def blocks(cases: Sequence[dict[str, Any]], multiprocessors: int, name: str) -> dict[str, float]:
    """Constants of ``CostModel`` with the least mean square of relative errors."""
    beside = BESIDE.get(name, 1)
    tried = (fitted(cases, lambda w, p=parts: features(w, multiprocessors, p, beside)) for parts in PARTS)  # type: ignore[misc]
    (_, constants), parts = min(zip(tried, PARTS, strict=True), key=lambda found: found[0][0])
    return dict(zip(NAMES, (*constants, parts, beside), strict=True))


def stream(cases: Sequence[dict[str, Any]], multiprocessors: int) -> dict[str, float]:
    """The same of ``StreamCost``."""
    tried = (fitted(cases, lambda w, s=slots: streamed(w, multiprocessors, s)) for slots in SLOTS)  # type: ignore[misc]
    (_, constants), slots = min(zip(tried, SLOTS, strict=True), key=lambda found: found[0][0])
    return dict(zip(OF_STREAMS, (*constants, slots), strict=True))


def fitted(
    cases: Sequence[dict[str, Any]], terms: Callable[[Work], tuple[float, ...]]
) -> tuple[float, list[float]]:  # fmt: skip
    """The mean square of the relative errors, and the constants that ``terms`` are multiplied by."""
    matrix = np.array([terms(Work(**c["work"])) for c in cases])
    scaled = matrix / np.array([c["ms"] * 1e6 for c in cases])[:, None]
    constants = least_squares(scaled, np.ones(len(cases)))
    return float(np.square(scaled @ constants - 1).mean()), constants


def launches(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every launch that was timed, by the name of its case; of tactics in one language the best."""
    for case in (c for c in result["cases"] if "wrong" not in c):
        met: set[str] = set()
        for launch in case["launches"]:
            if launch["model"] not in met:
                yield {"name": case["name"], **launch}
            met.add(launch["model"])


def least_squares(matrix: np.ndarray, target: np.ndarray) -> list[float]:
    """Constants that are not negative: those that would be are left out, the most negative first."""
    active = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, active], target, rcond=None)
        if min(found) >= 0:
            constants = [0.0] * matrix.shape[1]
            for i, value in zip(active, found, strict=True):
                constants[i] = float(value)
            return constants
        active.pop(int(np.argmin(found)))
