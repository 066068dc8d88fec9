"""Constant factors of the scores of parallel linear attention: triangles and decays, shown element by element."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate
from attncompile.passes.detect.linear_chain import Context, Step
from attncompile.passes.detect.views import Atoms, Axes, Axis
from attncompile.passes.evaluate import World


@dataclass(frozen=True, slots=True)
class Factor:
    """scores[h, i, j] are multiplied by ``scale`` * rates[h] ** (i - j) for j <= i and by 0 else where ``causal``; by
    ``scale`` alone else. No rate at all: 1.
    """

    scale: float = 1.0
    causal: bool = False
    rates: tuple[float, ...] = ()
    certificate: Certificate | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """A step that multiplies the scores, and which of [heads, queries, keys] each axis of the scores is there (from the
    right; -1: another one).
    """

    step: Step
    roles: tuple[int, ...]


def applied(atoms: Atoms, step: Step, axes: Axes, heads: Axis, queries: Axis, keys: Axis) -> Applied:
    """``step`` with the roles of the axes that it is applied to."""
    wanted = [atoms.leaves(a) for a in (heads, queries, keys)]
    roles = [next((i for i, w in enumerate(wanted) if w and atoms.leaves(a) == w), -1) for a in axes]
    return Applied(step, tuple(roles))


def factor_of(ctx: Context, steps: list[Applied], heads: int) -> Factor:
    """All of ``steps`` as one factor, the same at every size.

    Raises:
        Unsupported: their product is no causal triangle and no decay, or differs between sizes.
    """
    if not steps:
        return Factor()
    first = _factor_at(ctx.world, steps, heads)
    lengths = [first[1]]
    moving = False
    for world in ctx.others():
        other = _factor_at(world, steps, heads)
        same = (other[0].causal, other[0].scale) == (first[0].causal, first[0].scale)
        if not same or not np.allclose(other[0].rates, first[0].rates, rtol=1e-5, atol=0):
            raise Unsupported("mask", "the factor of the scores changes with a dynamic dimension")
        moving |= other[1] != first[1]
        lengths.append(other[1])
    detail = "every element of the factor of the scores compared"
    certificate = Certificate("evaluated" if moving else "constant", detail, tuple(dict.fromkeys(lengths)), moving)
    return Factor(first[0].scale, first[0].causal, first[0].rates, certificate)


def _factor_at(world: World, steps: list[Applied], heads: int) -> tuple[Factor, tuple[int, int]]:
    shape = world.shapes[steps[0].step.node.output[0]]
    sizes = [heads, 1, 1]
    for role, n in zip(steps[0].roles, shape, strict=True):
        if role > 0:
            sizes[role] = n
    total = np.ones(sizes, dtype=np.float64)
    eps = 2.0**-52
    for item in steps:
        if item.step.kind == "lower":
            if item.roles[-2:] != (1, 2):
                raise Unsupported("mask", f"'{item.step.node.output[0]}' does not cut queries from keys")
            total *= np.tri(sizes[1], sizes[2])
            continue
        array = world.value(item.step.value)
        if array.dtype.kind == "f":
            eps = max(eps, float(np.finfo(array.dtype).eps))
        roles = item.roles[len(item.roles) - array.ndim :]
        if array.ndim > len(item.roles) or any(n > 1 and r < 0 for n, r in zip(array.shape, roles, strict=True)):
            raise Unsupported("mask", f"'{item.step.value}' differs between batch entries, or its axes are merged ones")
        kept = [r for r in roles if r >= 0]
        array = array.reshape([n for n, r in zip(array.shape, roles, strict=True) if r >= 0])
        array = array.transpose(np.argsort(kept)) if kept else array.reshape(())
        spread = [array.shape[sorted(kept).index(r)] if r in kept else 1 for r in range(3)]
        part = array.reshape(spread)
        total = total * (part == 0 if item.step.kind == "hidden" else part.astype(np.float64))
    return _named(total, eps), (sizes[1], sizes[2])


def _named(total: np.ndarray, eps: float) -> Factor:
    heads, queries, keys = total.shape
    scale = float(total[0, 0, 0])
    if not scale > 0 or not np.isfinite(total).all():
        raise Unsupported("mask", "the first query does not see the first key, or the factor is not finite")
    if bool((total == scale).all()):
        return Factor(scale)
    distance = np.arange(queries)[:, None] - np.arange(keys)[None]
    if queries != keys or bool(total[:, distance < 0].any()):
        raise Unsupported("mask", "the scores are multiplied by a constant that is no causal triangle")
    rates = []
    for head in range(heads):
        column = total[head, :, 0] / scale
        normal = np.nonzero(column > 1e-30)[0]
        last = int(normal[-1]) if len(normal) else 0
        rate = float(column[last] ** (1.0 / last)) if last else 1.0
        want = scale * rate ** np.maximum(distance, 0).astype(np.float64)
        # A power that was computed step by step, or by exp and log, is off by a rounding a step.
        bound = np.maximum(want * eps * (8 + 8 * distance), 1e-37)
        if bool((np.abs(total[head] - want) > bound)[distance >= 0].any()):
            raise Unsupported("mask", f"the scores of head {head} are multiplied by a constant that is no power of the "
                              "distance")  # fmt: skip
        rates.append(rate)
    return Factor(scale, True, () if all(r == 1.0 for r in rates) else tuple(rates))
