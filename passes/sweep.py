"""A graph inferred from front to back, and the bodies of its control flow with it.

A body reads what is made outside of it. What its inputs are is known as far as it holds in every iteration: a value
that a Loop or Scan carries has the dimensions of its first value that the body gives back unchanged (shown by
induction: assume them, infer the body, drop what does not come back, until all of them do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onnx import TensorProto, ValueInfoProto

from attncompile.passes.infer import Facts, GraphPlan, Inference, Step, common, dimensions

_ROUNDS = 16
"""Rounds of dropping dimensions one by one; whatever still moves after that is taken for unknown altogether."""


class Sweep:
    """``facts`` of all values of one graph; ``bodies`` by (first output of the node, attribute)."""

    def __init__(
        self, inference: Inference, plan: GraphPlan, given: Mapping[str, Facts], outer: Sweep | None = None
    ) -> None:
        self.inference = inference
        self.plan = plan
        self.outer = outer
        self.facts: dict[str, Facts] = {**plan.stored, **given}
        self.bodies: dict[tuple[str, str], Sweep] = {}
        for step in plan.steps:
            self._take(step)

    def get(self, name: str) -> Facts | None:
        """What is known of ``name``, which may be a value of an outer graph."""
        found = self.facts.get(name)
        if found is None and self.outer is not None and name:
            return self.outer.get(name)
        return found

    def outputs(self) -> list[Facts | None]:
        return [self.get(o) for o in self.plan.outputs]

    def _take(self, step: Step) -> None:
        operands = tuple(self.get(i) for i in step.inputs)
        if step.bodies:
            results: Sequence[Facts | None] = self._control(step, operands)
        else:
            results = self.inference.results(step, operands)
        for output, facts in zip(step.outputs, results, strict=False):
            if not output:
                continue
            if facts is None or (step.bodies and facts.shape is None):
                kind = self.plan.declared.get(output)
                said = self.inference.facts(kind) if kind is not None and kind.HasField("tensor_type") else None
                if said is not None and (facts is None or said.shape is not None):
                    facts = said
            if facts is not None:
                self.facts[output] = facts

    # Control flow.

    def _control(self, step: Step, operands: tuple[Facts | None, ...]) -> Sequence[Facts | None]:
        form = {"If": self._if, "Loop": self._loop, "Scan": self._scan}[step.node.op_type]
        found = form(step, operands)
        return [*found, *([None] * (len(step.outputs) - len(found)))]

    def _body(self, step: Step, at: int, given: Mapping[str, Facts]) -> Sweep:
        name, plan = step.bodies[at]
        inner = self.bodies[step.key, name] = Sweep(self.inference, plan, given, self)
        return inner

    def _if(self, step: Step, operands: tuple[Facts | None, ...]) -> list[Facts | None]:
        branches = {name: self._body(step, i, {}) for i, (name, _) in enumerate(step.bodies)}
        if set(branches) != {"then_branch", "else_branch"}:
            return []
        then, other = branches["then_branch"], branches["else_branch"]
        known = operands[0].known if operands and operands[0] is not None else None
        if known is not None and known.size == 1:  # decided by the sizes of this binding
            return (then if known.reshape(-1)[0] else other).outputs()
        return [self.inference.either(a, b) for a, b in zip(then.outputs(), other.outputs(), strict=False)]

    def _loop(self, step: Step, operands: tuple[Facts | None, ...]) -> list[Facts | None]:
        inputs = step.bodies[0][1].inputs
        counter = [self.inference.of_type(TensorProto.INT64, []), self.inference.of_type(TensorProto.BOOL, [])]
        carried = [self._unknown_value(f, i) for f, i in zip(operands[2:], inputs[2:], strict=False)]

        def run(assumed: list[Facts | None]) -> tuple[Sweep, list[Facts | None]]:
            inner = self._body(step, 0, _named(inputs, [*counter, *assumed]))
            return inner, inner.outputs()[1:]

        inner, kept = self._invariant(run, carried)
        return [*kept, *(self._stacked(f, 0, None) for f in inner.outputs()[1 + len(carried) :])]

    def _scan(self, step: Step, operands: tuple[Facts | None, ...]) -> list[Facts | None]:
        attributes = {a.name: a for a in step.node.attribute}
        inputs = step.bodies[0][1].inputs
        count = attributes["num_scan_inputs"].i if "num_scan_inputs" in attributes else 0
        states = len(operands) - count
        axes = list(attributes["scan_input_axes"].ints) if "scan_input_axes" in attributes else [0] * count
        if count < 1 or states < 0 or len(inputs) != len(operands) or len(axes) != count:
            self._body(step, 0, {})  # damaged, or of opset 8, which had a batch axis and sequence lengths
            return []
        carried = [self._unknown_value(f, i) for f, i in zip(operands[:states], inputs, strict=False)]
        slices, lengths = [], set()
        for facts, axis in zip(operands[states:], axes, strict=True):
            dims = dimensions(facts) if facts is not None else None
            if facts is None or dims is None or not -len(dims) <= axis < len(dims):
                slices.append(self.inference.of_type(facts.elem_type, None) if facts is not None else None)
                continue
            lengths.add(dims.pop(axis))
            slices.append(self.inference.of_type(facts.elem_type, dims))

        def run(assumed: list[Facts | None]) -> tuple[Sweep, list[Facts | None]]:
            inner = self._body(step, 0, _named(inputs, [*assumed, *slices]))
            return inner, inner.outputs()

        inner, kept = self._invariant(run, carried)
        made = inner.outputs()[states:]
        places = list(attributes["scan_output_axes"].ints) if "scan_output_axes" in attributes else [0] * len(made)
        length = lengths.pop() if len(lengths) == 1 else None
        return [*kept, *(self._stacked(f, axis, length) for f, axis in zip(made, places, strict=False))]

    def _invariant(
        self, run: Callable[[list[Facts | None]], tuple[Sweep, list[Facts | None]]], assumed: list[Facts | None]
    ) -> tuple[Sweep, list[Facts | None]]:
        """The body at the facts of its carried values that hold before and after every iteration, and these facts."""
        for _ in range(_ROUNDS):
            inner, made = run(assumed)
            made += [None] * (len(assumed) - len(made))
            wider = [self._widened(a, m) for a, m in zip(assumed, made, strict=False)]
            if all(a is b for a, b in zip(assumed, wider, strict=True)):
                return inner, assumed
            assumed = wider
        assumed = [self.inference.of_type(f.elem_type, None) if f is not None else None for f in assumed]
        return run(assumed)[0], assumed

    def _widened(self, assumed: Facts | None, made: Facts | None) -> Facts | None:
        if assumed is None or assumed is made:
            return assumed
        dims = common(dimensions(assumed), dimensions(made)) if made is not None else None
        return self.inference.of_type(assumed.elem_type, dims)

    def _unknown_value(self, first: Facts | None, declared: ValueInfoProto) -> Facts | None:
        """The type and dimensions of a carried value's first value: the value itself changes."""
        if first is not None:
            return self.inference.of_type(first.elem_type, dimensions(first))
        kind = declared.type.tensor_type.elem_type
        return self.inference.of_type(kind, None) if kind else None

    def _stacked(self, facts: Facts | None, axis: int, length: int | None) -> Facts | None:
        """What a body gives in each iteration, all of them along a new axis."""
        if facts is None:
            return None
        dims = dimensions(facts)
        if dims is not None:
            dims.insert(axis if axis >= 0 else len(dims) + 1 + axis, length)
        return self.inference.of_type(facts.elem_type, dims)


def _named(inputs: Sequence[ValueInfoProto], facts: Sequence[Facts | None]) -> dict[str, Facts]:
    return {i.name: f for i, f in zip(inputs, facts, strict=False) if f is not None}
