"""Fit the cost model's constants to a sweep and say how far off they are where they were not fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from attncompile.core.kernel import Work
from attncompile.kernels.cost import CostModel, features

NAMES = ("launch", "block", "flop", "score", "mask", "parts", "beside")
PARTS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)
BESIDE = {"triton-90-lists": 2}
"""Kinds whose blocks share a multiprocessor, by their registers and shared memory, and how many do. (The Gluon kernels
with ``-pair`` do too, but take all blocks in equal turns.)
"""
LARGEST = 0.5
"""Where it is further off than this on any configuration that was withheld there are no constants."""
FEWEST = 4
"""Configurations that say how far off a fit is, at least."""


def fit(result: dict[str, Any], multiprocessors: int, other: dict[str, Any] | None = None) -> str:
    """TOML of the constants, by model, and a table of errors as comments. All of ``other`` is withheld, without it
    every second launch of ``result``.
    """
    lines = [f"# Fitted by `python tools/bench fit` to a sweep on one {result['gpu']}, {result['when']}; nanoseconds."]
    every = list(launches(result))
    beside = None if other is None else list(launches(other))
    for name in sorted({c["model"] for c in every}):
        cases = [c for c in every if c["model"] == name]
        used, withheld = cases[::2], cases[1::2]
        if beside is not None:
            used, withheld = cases, [c for c in beside if c["model"] == name]
        if len(withheld) < FEWEST:
            lines += [f"# {name}: {len(cases)} configurations are too few", ""]
            continue
        tried = (fitted(used, multiprocessors, parts, BESIDE.get(name, 1)) for parts in PARTS)
        constants = min(tried, key=lambda found: found[0])[1]
        model = CostModel(
            *constants, multiprocessors, result["copy_tbs"] * 1e3, 0.0, f"{result['gpu']}, {result['when']}"
        )
        errors = [model.milliseconds(Work(**c["work"])) / c["ms"] - 1 for c in withheld]
        for c, e in zip(withheld, errors, strict=True):
            lines.append(f"# withheld {c['name']}: {c['ms']:.3f} ms, {e:+.0%}")
        if max(abs(e) for e in errors) > LARGEST:
            lines += [f"# {name}: too far off", ""]
            continue
        lines += [f"[{name}]", *(f"{n} = {v:.6g}" for n, v in zip(NAMES, constants, strict=True))]
        lines += [
            f"multiprocessors = {multiprocessors}", f"bandwidth = {model.bandwidth:.6g}",
            f"withheld = {max(abs(e) for e in errors):.3f}", f'measured_on = "{model.measured_on}"', "",
        ]  # fmt: skip
    return "\n".join(lines)


def fitted(
    cases: Sequence[dict[str, Any]], multiprocessors: int, parts: float, beside: int
) -> tuple[float, list[float | int]]:
    """The mean square of the relative errors, and the constants, ``parts`` and ``beside`` the last of them."""
    matrix = np.array([features(Work(**c["work"]), multiprocessors, parts, beside) for c in cases])
    scaled = matrix / np.array([c["ms"] * 1e6 for c in cases])[:, None]
    constants = least_squares(scaled, np.ones(len(cases)))
    return float(np.square(scaled @ constants - 1).mean()), [*constants, parts, beside]


def launches(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every launch that was timed, by the name of its case; of tactics in one language the best."""
    for case in (c for c in result["cases"] if "wrong" not in c):
        met: set[str] = set()
        for launch in case["launches"]:
            if launch["model"] not in met or launch["model"].endswith("-linear"):
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
