"""Whole-model comparison through Polygraphy's runners and comparators, and the files that let a person repeat it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from attncompile.core.errors import BadArguments, BadModel
from attncompile.core.policy import METRICS
from attncompile.core.verdict import Verdict
from attncompile.metrics import Metrics, compute
from attncompile.verification.answers import answers
from attncompile.verification.artifacts import save_results
from attncompile.verification.inputs import check_feed
from attncompile.verification.next_token import NextToken, next_token
from attncompile.verification.retype import uses
from attncompile.verification.runners import ORIGINAL, REWRITTEN, Baseline, polygraphy_verdict, run, run_twins

EXACT_BUDGETS: Mapping[int, float] = {
    TensorProto.DOUBLE: 1e-10,
    TensorProto.FLOAT: 1e-5,
    TensorProto.FLOAT16: 5e-3,
    TensorProto.BFLOAT16: 4e-2,
}
"""Relative L2 that rounding alone may cost over a whole model: 1e-5 in float32 is about 84 rounding units, because
rounding differences grow from layer to layer; float16 and bfloat16 have 5 units, since ONNX Runtime's CPU provider
rounds to them only between operators."""

SAVE_LIMIT = 512 << 20

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """One output of one set of inputs. ``metrics`` is None where nothing could be computed."""

    name: str
    iteration: int
    metrics: Metrics | None
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.name, "iteration": self.iteration, "passed": self.verdict.ok, "code": self.verdict.code,
            "reason": self.verdict.reason, "metrics": self.metrics.to_json() if self.metrics else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """The verdict over all outputs and inputs. ``polygraphy`` is Polygraphy's own: SNR above the budget's (relative L2
    of x is an SNR of -20 log10 x dB), never taken when it compared nothing. ``files`` were written for the user.
    """

    verdict: Verdict
    outputs: tuple[OutputComparison, ...]
    metric: str
    budget: float
    polygraphy: Verdict
    iterations: int
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())
    together: bool = False

    @property
    def passed(self) -> bool:
        return self.verdict.ok

    @property
    def error(self) -> float:
        """The worst relative L2; NaN if nothing was compared."""
        values = [o.metrics.relative_l2 for o in self.outputs if o.metrics is not None]
        return math.nan if not values or any(math.isnan(v) for v in values) else max(values)

    @property
    def worst(self) -> float:
        """The worst value of ``metric``, of perplexity and of a classifier's ``top1_agreement`` that of all inputs
        together; NaN if nothing was compared.
        """
        return _worst(self.outputs, self.metric, self.together)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.verdict.ok, "code": self.verdict.code, "reason": self.verdict.reason,
            "metric": self.metric, "budget": self.budget, "error": self.error if math.isfinite(self.error) else None,
            "polygraphy": {"passed": self.polygraphy.ok, "reason": self.polygraphy.reason},
            "iterations": self.iterations, "outputs": [o.to_json() for o in self.outputs],
            "files": [f.name for f in self.files], "notes": list(self.notes),
        }  # fmt: skip


HIGHER_IS_BETTER = {"cosine", "psnr", "top1_agreement"}


def exact_budget(proto: ModelProto) -> float:
    """The default budget for a rewrite that changes only rounding: that of the coarsest float type in the model."""
    graph = proto.graph
    types = {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types |= {t.data_type for t in graph.initializer}
    types |= {a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"}
    found = [EXACT_BUDGETS[t] for t in types if t in EXACT_BUDGETS and t != TensorProto.DOUBLE]
    if found:
        return max(found)
    return EXACT_BUDGETS[TensorProto.DOUBLE if TensorProto.DOUBLE in types else TensorProto.FLOAT]


def compare_models(
    original: Path | Baseline,
    rewritten: Path,
    inputs: Iterable[Feed],
    *,
    budget: float | None = None,
    metric: str = "relative_l2",
    folder: Path | None = None,
    save_limit: int = SAVE_LIMIT,
) -> ModelComparison:
    """Run both models on ``inputs`` with ONNX Runtime through Polygraphy and compare every output.

    ``budget`` bounds ``metric`` (a lower bound for cosine, psnr and top1_agreement); default: ``exact_budget`` of the
    original for relative_l2. Of perplexity it bounds the relative rise over all inputs together, each counted alike,
    and says nothing of outputs other than the logits; of a classifier's top1_agreement it bounds the share of all
    answers. Integer and bool outputs must be equal. With ``folder`` the inputs, both results and a data loader that
    `polygraphy run` accepts are written there, unless they exceed ``save_limit`` bytes.

    ``original`` may be a ``Baseline``, which remembers its results from call to call.

    Raises BadArguments for inputs that do not fit or a metric that the model has no tokens for, BadModel for a model
    that does not load. What is wrong with the rewritten model's *results* is a verdict.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}")
    baseline = original if isinstance(original, Baseline) else Baseline(original)
    proto = _read(baseline.path)
    language = next_token(proto) if metric == "perplexity" else None
    for value in proto.graph.output:
        if value.type.tensor_type.elem_type == TensorProto.STRING:
            raise BadArguments(f"output {value.name} holds strings, which are not compared",
                               "leave that output out of the model")  # fmt: skip
    if budget is None:
        if metric != "relative_l2":
            raise ValueError(f"metric {metric!r} has no default budget")
        budget = exact_budget(proto)
    feeds = [check_feed(proto, f, f"inputs, set {i}") for i, f in enumerate(inputs)]
    if not feeds:
        none = Verdict.no("nothing_compared", "there were no inputs to run")
        return ModelComparison(none, (), metric, budget, none, 0)
    notes: list[str] = []
    if uses(proto, TensorProto.BFLOAT16):
        notes.append("compared as float32 twins: ONNX Runtime's CPU provider has no bfloat16 kernels")
        results, feeds = run_twins(baseline, rewritten, feeds)
    else:
        results = run(baseline, baseline.path, rewritten, feeds)
    left, right = results[ORIGINAL], results[REWRITTEN]
    shapes = [x.shape for side in left for _, x in side.items()]
    together = metric == "perplexity" or (metric == "top1_agreement" and answers(feeds, shapes) > 0)
    outputs = []
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        a_values, b_values = dict(a.items()), dict(b.items())
        for name in a_values.keys() | b_values.keys():
            if name not in a_values or name not in b_values:
                verdict = Verdict.no("outputs_differ", f"output {name} exists on one side only")
                outputs.append(OutputComparison(name, i, None, verdict))
            else:
                given = (language, feeds[i]) if language is not None and name == language.logits else None
                least = None if together else budget
                outputs.append(_compare_output(name, i, a_values[name], b_values[name], metric, least, given))
    order = {o.name: k for k, o in enumerate(proto.graph.output)}
    outputs.sort(key=lambda o: (o.iteration, order.get(o.name, len(order)), o.name))
    polygraphy = polygraphy_verdict(results, metric, budget)
    files: tuple[Path, ...] = ()
    if folder is not None:
        size = sum(x.nbytes for f in feeds for x in f.values()) + sum(
            x.nbytes for side in (left, right) for r in side for x in r.values()
        )
        if size > save_limit:
            notes.append(f"Polygraphy files not written: {size >> 20} MiB is above the limit of {save_limit >> 20} MiB")
        else:
            judged = budget if metric == "relative_l2" else None
            files = save_results(folder, feeds, results, (ORIGINAL, REWRITTEN), judged)
    return ModelComparison(
        _overall(outputs, polygraphy, metric, budget, together), tuple(outputs), metric, budget, polygraphy, len(feeds),
        files, tuple(notes), together,
    )  # fmt: skip


def _worst(outputs: Sequence[OutputComparison], metric: str, together: bool) -> float:
    values = [getattr(o.metrics, metric) for o in outputs if o.metrics is not None]
    found = [float(v) for v in values if v is not None]
    if not found or any(math.isnan(v) for v in found):
        return math.nan
    if metric == "perplexity":
        return float(np.expm1(sum(map(math.log1p, found)) / len(found)))
    if together:  # of several outputs the worst
        names = {o.name for o in outputs if o.metrics is not None}
        of_each = [[getattr(o.metrics, metric) for o in outputs if o.name == name] for name in names]
        return min(float(np.mean([v for v in values if v is not None])) for values in of_each)
    return min(found) if metric in HIGHER_IS_BETTER else max(found)


def _overall(
    outputs: list[OutputComparison], polygraphy: Verdict, metric: str, budget: float, together: bool
) -> Verdict:
    if not outputs:
        return Verdict.no("nothing_compared", "the models have no outputs to compare")
    failed = [o for o in outputs if not o.verdict.ok]
    if failed:
        first = failed[0]
        return Verdict.no(first.verdict.code, f"output {first.name}, inputs {first.iteration}: {first.verdict.reason}")
    if not polygraphy.ok:
        return Verdict.no(polygraphy.code, f"Polygraphy's comparison: {polygraphy.reason}")
    worst = _worst(outputs, metric, together)
    if metric == "perplexity" and not worst <= budget:
        return Verdict.no("over_budget", f"perplexity rises by {worst:.3%}, the budget is {budget:.3%}")
    if together and metric == "top1_agreement" and worst < budget:  # NaN: no output has it, and each was judged
        return Verdict.no("over_budget", f"{worst:.3%} of all answers stay, the budget is {budget:.3%}")
    return Verdict.yes(f"{len(outputs)} outputs compared, worst {metric} {worst:.3g}")


def _compare_output(
    name: str, iteration: int, a: np.ndarray, b: np.ndarray, metric: str, budget: float | None,
    language: tuple[NextToken, Feed] | None = None,
) -> OutputComparison:  # fmt: skip
    """``budget`` None: all inputs are judged together later. ``language``: the output holds logits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        reason = f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
        return OutputComparison(name, iteration, None, Verdict.no("shape_differs", reason))
    if a.size == 0:
        return OutputComparison(name, iteration, None, Verdict.no("nothing_compared", "the output is empty"))
    metrics = compute(a, b)
    if a.dtype.kind in "iub":
        same = bool(np.array_equal(a, b))
        verdict = Verdict.yes() if same else Verdict.no("not_equal", f"{int((a != b).sum())} entries differ")
        return OutputComparison(name, iteration, metrics, verdict)
    for side, x in (("the original", a), ("the rewritten model", b)):
        bad = int(x.size - np.isfinite(x).sum())
        if bad:
            what = "NaN" if np.isnan(x).any() else "infinity"
            verdict = Verdict.no("not_finite", f"{side} gives {what} in {bad} of {x.size} entries")
            return OutputComparison(name, iteration, metrics, verdict)
    if metric == "perplexity":
        if language is not None:
            told, feed = language
            rise = float(np.expm1(told.loss({name: b}, feed) - told.loss({name: a}, feed)))
            metrics = replace(metrics, perplexity=rise)
        return OutputComparison(name, iteration, metrics, Verdict.yes())
    value = getattr(metrics, metric)
    if value is None:
        verdict = Verdict.no("not_applicable", f"{metric} needs at least two entries on the last axis")
    elif budget is None or (value >= budget if metric in HIGHER_IS_BETTER else value <= budget):
        verdict = Verdict.yes()
    else:
        verdict = Verdict.no("over_budget", f"{metric} {value:.3g}, the budget is {budget:.3g}")
    return OutputComparison(name, iteration, metrics, verdict)


def _read(path: Path) -> ModelProto:
    """The proto without external data: only its inputs, outputs and types are looked at."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise BadModel(f"{path} is not a readable ONNX model", "check it with `python -m onnx.checker`") from error
