"""The error budget that a plan's approximations are judged by: the command line's, else the plan's own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from attncompile.core.errors import BadArguments
from attncompile.core.plan import Plan
from attncompile.core.policy import METRICS, Policy, check_budget

if TYPE_CHECKING:
    from attncompile.pipeline import Options


_KEYS = ("max_error", "density", "metric", "keep_dense")


def of_plan(options: Options, chosen: Plan, policy: Policy) -> tuple[Options, Plan]:
    """Both with the metric and the budget in force: what ``options`` give, else what the plan file has among its own,
    else ``policy``'s. A plan that was made for a density has no budget.

    Raises:
        BadArguments: the plan's settings are none, a density is asked for, or a metric without a budget.
    """
    if options.density is not None:
        raise BadArguments("--density is for a search, and --plan says what each site becomes", "leave one of them out")
    said = chosen.options
    unknown = [key for key in said if key not in _KEYS]
    if unknown:
        raise BadArguments(f"the plan's options have no '{unknown[0]}'", f"there are {', '.join(_KEYS)}")
    for key in ("max_error", "density"):
        if key in said and (isinstance(said[key], bool) or not isinstance(said[key], int | float)):
            raise BadArguments(f"the plan's {key} is not a number: {said[key]!r}", "correct its table [options]")
    metric = options.metric or said.get("metric", policy.metric)
    if metric not in METRICS:
        raise BadArguments(f"the plan's metric is {metric!r}", f"there are {', '.join(METRICS)}")
    own = metric == said.get("metric", policy.metric)  # else the plan's numbers are of another unit
    budget, density = options.max_error, None
    if budget is None and own:
        budget, density = said.get("max_error"), said.get("density")
    if budget is None and density is None:
        if metric != policy.metric:
            raise BadArguments(f"metric {metric} has no default budget", "give one with --max-error")
        budget = policy.max_error
    if budget is not None:
        check_budget(budget, metric, "--max-error" if options.max_error is not None else "the plan's max_error")
        density = None
    given = {**({"max_error": budget} if budget is not None else {"density": density}), "metric": metric}
    kept = {key: value for key, value in said.items() if key not in ("metric", "max_error", "density")}
    return replace(options, metric=metric, max_error=budget, density=density), replace(
        chosen, options={**given, **kept}
    )
