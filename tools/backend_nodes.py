"""The attention nodes of ONNX's own backend tests: what is found, what is rewritten, what is not taken and why.

``python tools/backend_nodes.py`` prints one table and exits 1 if a rewritten model differs from a test's expected
output. Every exact candidate of every mechanism is applied, also where it would not be chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from attncompile.core.errors import Unsupported
from attncompile.core.mechanism import Candidate, Mechanism, exact_candidates, understood
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite, Detection
from attncompile.passes.detect import detect
from attncompile.passes.evaluate import GraphIndex
from attncompile.passes.normalise import normalise
from attncompile.passes.replace import apply
from attncompile.passes.separate import HELPED, separate
from attncompile.plugins import mechanisms

OPERATORS = ("Attention", "FlexAttention", "LinearAttention")

TOLERANCE = {"float32": 2e-5, "float64": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""What outputs may differ by, absolute and relative: rounding of the element type."""


@dataclass(frozen=True)
class Case:
    """One test: ``operator`` is what it tests, ``expanded`` says that the model is the operator's body."""

    name: str
    operator: str
    expanded: bool
    model: ModelProto
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


@dataclass
class Outcome:
    """``rewritten``: mechanism -> the largest difference from the expected output, or why it could not be run."""

    case: Case
    model: Model
    detection: Detection
    rewritten: dict[str, float | str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def site(self) -> AttentionSite | None:
        return self.detection.sites[0] if self.detection.sites else None

    @property
    def reason(self) -> str:
        """Why there is no site: the near misses' codes."""
        codes = sorted({m.code for m in self.detection.near_misses})
        return "" if self.site is not None else ", ".join(codes) or "nothing was near"


def cases() -> list[Case]:
    """All attention tests of the installed onnx, in its order."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    result = []
    for test in found:
        operator = _operator(test.name)
        if operator is None or test.model is None:
            continue
        ((given, expected),) = test.data_sets[:1]
        graph = test.model.graph
        inputs = {i.name: np.asarray(x) for i, x in zip(graph.input, given, strict=True)}
        outputs = {o.name: np.asarray(x) for o, x in zip(graph.output, expected, strict=True)}
        result.append(Case(test.name, operator, "_expanded" in test.name, test.model, inputs, outputs))
    return result


def _operator(name: str) -> str | None:
    for prefix, operator in (("test_attention_", "Attention"), ("test_linear_attention", "LinearAttention")):
        if name.startswith(prefix):
            return operator
    return "FlexAttention" if name.startswith("test_flexattention") else None


def find(case: Case) -> Outcome:
    """What detection says, as the pipeline asks it."""
    opset = next(o.version for o in case.model.opset_import if o.domain in ("", "ai.onnx"))
    profile = ShapeProfile({})
    model = normalise(Model(Path(f"{case.name}.onnx"), case.model, "", opset))
    detection = detect(model, profile, index=GraphIndex(model))
    if any(m.code in HELPED for m in detection.near_misses):
        model = separate(model, profile)
        detection = detect(model, profile, index=GraphIndex(model))
    return Outcome(case, model, detection)


def rewrite(outcome: Outcome, registry: Sequence[Mechanism]) -> None:
    """Applies every exact way to replace the site, and compares with the expected outputs."""
    site = outcome.site
    if site is None:
        return
    for mechanism, parameters in ways(site, registry):
        try:
            lowering = mechanism.lower(site, parameters, outcome.model.opset)
        except Unsupported:
            continue
        label = mechanism.name if mechanism.name not in outcome.rewritten else f"{mechanism.name} {dict(parameters)}"
        proto = apply(outcome.model, [(site, lowering)])
        onnx.checker.check_model(proto)
        try:
            found = run(proto, outcome.case.inputs)
        except Exception as error:  # runtimes raise their own types
            outcome.rewritten[label] = f"not run: {' '.join(str(error).split())[:120]}"
            continue
        worst = max(difference(found[n], x) for n, x in outcome.case.outputs.items())
        outcome.rewritten[label] = worst
        if not worst <= TOLERANCE[site.dtype]:
            outcome.wrong.append(f"{label}: {worst:.3g}")


def ways(site: AttentionSite, registry: Sequence[Mechanism]) -> Iterator[tuple[Mechanism, Mapping[str, Any]]]:
    """Every mechanism that says that it can replace the site exactly, with parameters that it need not offer."""
    causal = site.mask.part("causal") is not None
    rows = site.mask.masked_rows
    forced: dict[str, list[dict[str, Any]]] = {
        "Attention": [{"causal": causal}],
        "DenseAttention": [
            {"right": 0 if causal else -1, "masked_rows": rows, "chunks": n, "softcap": site.softcap}
            for n in ((1, 2) if causal else (1,))
        ],
    }
    for mechanism in registry:
        if not understood(mechanism, site).ok:
            continue
        offered = [a.parameters for a in exact_candidates(mechanism, site) if isinstance(a, Candidate)]
        seen: list[Mapping[str, Any]] = []
        for parameters in (*offered, *forced.get(mechanism.name, [])):
            exact = mechanism.supports(site, parameters).ok and mechanism.is_exact_for(site, parameters).ok
            if exact and parameters not in seen:
                seen.append(parameters)
                yield mechanism, parameters


def run(proto: ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model's outputs in ONNX Runtime; where it has no kernel for the type, in onnx.reference."""
    names = [o.name for o in proto.graph.output]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {i.name: inputs[i.name] for i in session.get_inputs()}
        return dict(zip(names, session.run(names, feed), strict=True))
    except Exception as error:  # ONNX Runtime raises its own untyped errors
        if "NOT_IMPLEMENTED" not in str(error) and "bfloat16" not in str(error):
            raise
    return dict(zip(names, ReferenceEvaluator(proto).run(names, dict(inputs)), strict=True))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, absolute where the expected value is below 1, relative above; inf where NaN differs."""
    a, b = (np.asarray(x).astype(np.float64) for x in (found, expected))
    if a.shape != b.shape or not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("inf")
    return float(np.nanmax(np.abs(a - b) / np.maximum(np.abs(b), 1.0), initial=0.0))


def outcomes() -> list[Outcome]:
    """All tests, found and rewritten."""
    registry = mechanisms()
    result = []
    for case in cases():
        outcome = find(case)
        rewrite(outcome, registry)
        result.append(outcome)
    return result


def not_taken(found: Sequence[Outcome]) -> dict[str, list[str]]:
    """Reason -> the tests without a site, twins folded into their operator's."""
    table: dict[str, list[str]] = defaultdict(list)
    for outcome in found:
        if outcome.site is None:
            table[outcome.reason].append(outcome.case.name)
    return dict(sorted(table.items()))


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    found = outcomes()
    wrong = [f"{o.case.name}: {w}" for o in found for w in o.wrong]
    rows = []
    for operator in OPERATORS:
        for expanded in (False, True):
            group = [o for o in found if o.case.operator == operator and o.case.expanded == expanded]
            done = [o for o in group if any(isinstance(x, float) for x in o.rewritten.values())]
            rows.append({
                "tests": operator + (" expanded" if expanded else ""), "number": len(group),
                "recognised": sum(o.site is not None for o in group), "rewritten": len(done),
                "differ": sum(bool(o.wrong) for o in group),
            })  # fmt: skip
    if arguments.json:
        print(json.dumps({"rows": rows, "not taken": not_taken(found), "wrong": wrong}, indent=1))
        return 1 if wrong else 0
    print(f"onnx {onnx.__version__}, ONNX Runtime {ort.__version__}")
    print(f"{'tests':28}{'number':>8}{'recognised':>12}{'rewritten':>11}{'differ':>8}")
    for row in rows:
        print("".join(f"{row[k]:{w}}" for k, w in zip(row, ("28", ">8", ">12", ">11", ">8"), strict=True)))
    said = {o.case.name: next((m.reason for m in o.detection.near_misses), "") for o in found}
    for reason, names in not_taken(found).items():
        print(f"\nnot taken, {reason}: {len(names)}")
        for name in names:
            print(f"  {name.removeprefix('test_')}: {said[name][:100]}")
    for line in wrong:
        print(f"\nDIFFERS {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
