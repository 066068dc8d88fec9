"""The truth that a site is judged by: the original subgraph in float64, whole or cut to sampled query rows; where it
can be neither, what the site's facts mean at sampled query rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from attncompile.core.errors import AttncompileError, Unsupported
from attncompile.core.site import Operand
from attncompile.core.verdict import Verdict
from attncompile.measure import Session, open_session, run_session
from attncompile.verification.facts_reference import FactsReference, far
from attncompile.verification.judge import compare_output
from attncompile.verification.retype import TO_DOUBLE, convert_feed, retype
from attncompile.verification.rows import Rows, choose_rows, sample_rows
from attncompile.verification.standard_operators import in_standard_operators

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Truth:
    """A reference output in float64; ``rows`` if only those query rows of it were computed. ``facts``: it is what the
    site's facts mean, not what the graph gives.
    """

    value: np.ndarray
    kind: str
    rows: Rows | None = None
    facts: bool = False

    def contradicted(self, original: np.ndarray) -> Verdict:
        """Whether the original's sampled rows, in its own precision, are as near to facts as rounding allows."""
        said = far(original, self.value) if self.facts else ""
        if said:
            return Verdict.no("facts_differ", f"the facts do not describe the subgraph: {said}")
        return Verdict.yes()


@dataclass(frozen=True, slots=True)
class _Cut:
    """The original cut to ``rows``: a session in its own precision, one in float64, and the latter's model."""

    rows: Rows
    own: Session
    double: Session
    kind: str
    model: ModelProto


class FactsDiffer(AttncompileError):
    """The site's facts do not describe its subgraph: it must not be replaced."""


class Reference:
    """Runs the original in float64: whole, or cut to sampled query rows where that would need too much memory. Where
    it cannot be cut, ``facts`` are the reference, once ``original``, run by ``own``, is seen to agree with them.
    """

    def __init__(
        self, original: ModelProto, query: Operand | None, cap: int, threads: int | None,
        own: Session | None = None, facts: FactsReference | None = None,
    ) -> None:  # fmt: skip
        self.original = in_standard_operators(original)
        self._unseen = self.original is not original  # whether it gives what the operators gave is still to be seen
        self.threads = threads
        self.labels: list[str] = []
        self.query = query
        self._own_session = own
        self._facts = facts
        self._session: tuple[Session, str, ModelProto] | None = None
        self._cuts: dict[bytes, _Cut] = {}
        size = largest_intermediate(self.original) * 8
        self.over = size > cap
        if self.over:
            self.why = f"float64 would need {size / 2**30:.2f} GiB for one intermediate, the cap is {cap / 2**30:.2f}"

    def run(self, feed: Feed, outputs: Sequence[np.ndarray], names: Sequence[str]) -> list[Truth | None]:
        """The reference for every output, or None where only the original's own precision is available."""
        if not self.over:
            if self._session is None:
                self._session = _double(self.original, self.threads)
            session, kind, model = self._session
            values = run_session(session, convert_feed(feed, model), names)
            for output, value in zip(outputs, values, strict=True) if self._unseen else ():
                if said := far(output, value):
                    raise FactsDiffer(f"the operator is not what its documentation says: {said}", "report this")
            self._unseen = False
            return [Truth(v, kind) for v in values]
        if self.query is None or len(names) != 1:
            return self._own(len(names), "which input carries the query rows is not known")
        try:
            rows = choose_rows(self.original, self.query, outputs[0])
            cut = self._cut(self.query, rows)
        except Unsupported as error:
            return self._without_cut(
                feed, outputs, names, f"the subgraph cannot be cut to query rows ({error.message})"
            )
        # The cut is trusted only if the cut original gives the same rows as the whole one, in its own precision.
        same = run_session(cut.own, feed, names)[0]
        check = compare_output(cut.rows.take(outputs[0]), same, None)
        if not check.verdict.ok:
            why = f"the subgraph cut to query rows differs ({check.verdict.reason})"
            return self._without_cut(feed, outputs, names, why)
        self._label(f"{self.why}: {len(rows.index)} sampled query rows were compared")
        value = run_session(cut.double, convert_feed(feed, cut.model), names)[0]
        return [Truth(value, f"{cut.kind}, {len(rows.index)} query rows", cut.rows)]

    def _cut(self, query: Operand, rows: Rows) -> _Cut:
        """Cases without fully masked rows sample the same ones, so their sessions are shared."""
        key = rows.index.tobytes()
        if key not in self._cuts:
            self._cuts.clear()
            model, placed = sample_rows(self.original, query, rows)
            double, kind, double_model = _double(model, self.threads)
            own = open_session(model.SerializeToString(), self.threads, lean=True)
            self._cuts[key] = _Cut(placed, own, double, kind, double_model)
        return self._cuts[key]

    def _without_cut(
        self, feed: Feed, outputs: Sequence[np.ndarray], names: Sequence[str], why: str
    ) -> list[Truth | None]:  # fmt: skip
        """The facts at sampled query rows. FactsDiffer if they do not describe the original."""
        facts = self._facts
        if facts is None or self._own_session is None or self.query is None:
            return self._own(len(names), why)
        try:
            if facts.shown is None:
                witness = convert_feed(facts.witness, self.original)
                known = witness.keys() == feed.keys() and all(np.array_equal(witness[n], feed[n]) for n in witness)
                output = outputs[0] if known else run_session(self._own_session, witness, names)[0]
                facts.show(output, choose_rows(self.original, self.query, output))
            if facts.shown is not None and not facts.shown.ok:
                raise FactsDiffer(facts.shown.reason, "explain shows the facts")
            value, rows = facts.output(feed, choose_rows(self.original, self.query, outputs[0]))
        except Unsupported as error:
            return self._own(len(names), f"{why}, nor its facts written out ({error.message})")
        self._label(
            f"{self.why}, and {why}: sampled query rows were compared with the site's facts written out in float64, "
            "which the original agrees with in its own precision; ordinary cases also with all rows of the original"
        )
        return [Truth(value, f"float64 (the site's facts), {len(rows.index)} query rows", rows, facts=True)]

    def _own(self, count: int, why: str) -> list[Truth | None]:
        self._label(f"{self.why}, and {why}: compared with the original in its own precision")
        return [None] * count

    def _label(self, text: str) -> None:
        if text not in self.labels:
            self.labels.append(text)


class _Evaluator:
    """``onnx.reference`` behind a session's ``run``: slow, and has a double version of every standard operator."""

    def __init__(self, model: ModelProto) -> None:
        self._evaluator = ReferenceEvaluator(model)

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], /) -> Sequence[Any]:
        return list(self._evaluator.run(list(output_names) if output_names else None, dict(input_feed)))


def _double(model: ModelProto, threads: int | None) -> tuple[Session, str, ModelProto]:
    """A runner for ``model`` in float64 and what it is called. AttncompileError if there is none."""
    double = retype(model, TO_DOUBLE)
    try:
        return open_session(double.SerializeToString(), threads, "basic", lean=True), "float64 (ONNX Runtime)", double
    except AttncompileError as ort_error:
        try:
            return _Evaluator(double), "float64 (onnx.reference)", double
        except Exception as error:  # it raises many kinds for operators that it does not know
            text = f"neither ONNX Runtime nor onnx.reference runs the original in float64: {ort_error.message}"
            raise AttncompileError(f"{text}; {error}") from error


def largest_intermediate(model: ModelProto) -> int:
    """Elements of the largest value that running ``model`` holds, the score matrix inside ``Attention`` included."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, list[int]] = {}
    for v in (*inferred.input, *inferred.output, *inferred.value_info):
        dims = v.type.tensor_type.shape.dim
        if v.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[v.name] = [d.dim_value for d in dims]
    sizes = [math.prod(s) for s in shapes.values()]
    for node in inferred.node:
        if node.op_type == "Attention" and len(node.input) > 1 and {node.input[0], node.input[1]} <= shapes.keys():
            q, k = shapes[node.input[0]], shapes[node.input[1]]
            heads = next((a.i for a in node.attribute if a.name == "q_num_heads"), q[1] if len(q) == 4 else 1)
            sizes.append(q[0] * heads * q[-2] * k[-2])
    return max(sizes, default=0)
