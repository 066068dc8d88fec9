"""The assumption ledger of a replacement: from what detection found, what was decided, and what the mechanism says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import TensorProto

from attncompile.core.assumption import Assumption, of_mechanism
from attncompile.core.mask import MaskPart
from attncompile.core.mechanism import Mechanism, Parameters
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite
from attncompile.edges import Edge
from attncompile.passes.evaluate import GraphIndex
from attncompile.passes.index import symbol_of

HIDES = -9000.0
"""An additive mask hides a key with this or less (exporters write -1e4, -1e9 or the type's lowest number)."""

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_KEEPS_VALUES = frozenset({
    "Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Slice", "Flatten", "Transpose",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the assumptions of all sites of one model are read from."""

    index: GraphIndex
    profile: ShapeProfile
    opset_before: int
    edges: Sequence[Edge] = ()

    def of(
        self, site: AttentionSite, mechanism: Mechanism, parameters: Parameters, exact: bool
    ) -> tuple[Assumption, ...]:
        """What replacing ``site`` by ``mechanism`` with ``parameters`` relies on."""
        return (
            *self._sizes(site, exact),
            *self._masks(site, parameters),
            self._finite(site, mechanism),
            *self._always(site),
            *of_mechanism(mechanism, site, parameters),
        )

    def data_inputs(self, *values: str) -> tuple[str, ...]:
        """The model's inputs whose data reaches one of ``values``, in the model's order."""
        reached = {i for v in values if v for i in self.index.data_inputs(v)}
        return tuple(name for name in self.index.inputs if name in reached)

    def float_inputs(self, site: AttentionSite) -> tuple[str, ...]:
        """Those of numbers with a fraction whose data reaches what ``site`` reads: the ones that may not be finite."""
        names = self.data_inputs(site.query.value, site.key.value, site.value.value)
        return tuple(n for n in names if self.index.inputs[n].type.tensor_type.elem_type in _FLOATS)

    def symbols(self, site: AttentionSite) -> tuple[str, ...]:
        """The dynamic dimensions that the site's batch and lengths are made of."""
        text = " ".join(str(x) for x in (site.batch, site.query_length, site.key_length))
        return tuple(s for s in self.profile.ranges if re.search(rf"(?<!\w){re.escape(s)}(?!\w)", text))

    def axes(self) -> Mapping[str, list[tuple[str, int]]]:
        """Every dynamic dimension's places: (input, axis)."""
        found: dict[str, list[tuple[str, int]]] = {}
        for info in self.index.inputs.values():
            for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                symbol = symbol_of(info.name, axis, dim)
                if symbol is not None:
                    found.setdefault(symbol, []).append((info.name, axis))
        return found

    def _sizes(self, site: AttentionSite, exact: bool) -> Iterator[Assumption]:
        symbols = self.symbols(site)
        axes = self.axes()
        edges = [e.label for e in self.edges] if exact else []
        for name in symbols:
            r = self.profile.ranges[name]
            sizes = ", ".join(str(x) for x in dict.fromkeys((r.minimum, r.usual, r.maximum)))
            where = f"checked at {sizes}" + (f" and at {', '.join(edges)}" if edges else "")
            where = where if exact else "the profile; judged at the sizes of --inputs"
            yield Assumption("sizes", f"{name} is {r.minimum} to {r.maximum}", where,
                             tuple(dict.fromkeys(i for i, _ in axes.get(name, []))), True)  # fmt: skip
        fixed = [(what, n) for what, n in (("batch", site.batch), ("queries", site.query_length),
                                           ("keys", site.key_length)) if isinstance(n, int)]  # fmt: skip
        if fixed:
            yield Assumption("sizes", ", ".join(f"{what} {n}" for what, n in fixed), "the file fixes them")
        heads = f"{site.heads} query heads on {site.kv_heads} key heads, head dim {site.head_dim}"
        heads += f", value dim {site.value_dim}" if site.value_dim != site.head_dim else ""
        how = "the same at the usual sizes, at each of them plus 1, and at the largest" if symbols else "the file"
        yield Assumption("heads", heads, how)
        if len(symbols) > 1:
            yield Assumption("symbols", f"{', '.join(symbols)} are independent of one another",
                             "the file gives them different names")  # fmt: skip
        for name in symbols:
            if re.search(r"[-+*/ ]", name):
                yield Assumption("symbols", f"'{name}' is a size of its own, not computed from others",
                                 "bound as a name; inputs that disagree are refused")  # fmt: skip

    def _masks(self, site: AttentionSite, parameters: Parameters) -> Iterator[Assumption]:
        for part in site.mask.parts:
            if part.kind == "padding":
                yield from self._padding(site, part)
                continue
            words = ", ".join(_parameters(part))
            if part.counts is not None:
                statement = f"keys count up to {part.counts.largest} times in one softmax"
                yield Assumption("mask", statement, _shown(site, part))
                continue
            statement = f"the mask is {part.kind}" + (f" ({words})" if words else "")
            yield Assumption("mask", statement, _shown(site, part), self.data_inputs(part.source or ""))
        if not site.mask.parts:
            yield Assumption("mask", "there is no mask", "no value is added to the scores and none selects them")
        paddings = [p for p in site.mask.parts if p.kind == "padding"]
        if not paddings:
            return
        gives, ours = site.mask.masked_rows, str(parameters.get("masked_rows", "zero"))
        names = self.data_inputs(*(p.source or "" for p in paddings))
        if site.mask.zeroed:
            yield Assumption("masked-rows", "queries that are hidden themselves give zero", "as in the source", names)
        if gives == ours:
            yield Assumption("masked-rows", f"queries that see no key give {gives}",
                             "as in the source, whether they are observed or not", names)  # fmt: skip
        else:
            how = f"not shown; else the source gives {gives}, the replacement {ours}"
            yield Assumption("masked-rows", "every query sees a key", how, names, True)

    def _padding(self, site: AttentionSite, part: MaskPart) -> Iterator[Assumption]:
        names = self.data_inputs(part.source or "")
        what = ", ".join(f"'{n}'" for n in names) or "a value"
        if part.additive:
            yield Assumption("padding", f"{what} adds 0 to a score, or {HIDES:g} and less to hide its key",
                             f"not shown: {part.certificate.detail}", names, bool(names))  # fmt: skip
            return
        direct = self.direct_float(part)
        if direct:
            how = "other numbers were not looked at" if part.tokens else "the file reads it as a bool"
            yield Assumption(
                "padding", f"'{direct}' is 0 (hidden) or 1 (visible)", f"not shown: {how}", (direct,), True
            )
        yield Assumption(
            "padding", f"{what} hides keys on any side and in the middle, the same for all queries and heads",
            f"{part.certificate.method}: {part.certificate.detail}", names,
        )  # fmt: skip

    def direct_float(self, part: MaskPart) -> str:
        """The input of numbers whose values, cast to bool, are this padding; empty if there is none."""
        name = part.source or ""
        if part.tokens:
            kind = self.index.inputs[name].type.tensor_type.elem_type
            return "" if kind == TensorProto.BOOL else name
        while (node := self.index.producer.get(name)) is not None and node.op_type in _KEEPS_VALUES:
            name = node.input[0]
        info = self.index.inputs.get(name)
        return name if info is not None and info.type.tensor_type.elem_type in _FLOATS else ""

    def _finite(self, site: AttentionSite, mechanism: Mechanism) -> Assumption:
        floats = self.float_inputs(site)
        what = "".join(f"'{n}', " for n in floats)
        statement = f"{what}{'and ' if what else ''}the site's operands are finite".replace(", and", " and")
        how = "not shown" + ("; inputs are looked at" if floats else "")
        if mechanism.skips_keys:
            how += "; a key that is hidden and not read cannot spread NaN, as it can in the source"
        return Assumption("finite", statement, how, floats, bool(floats))

    def _always(self, site: AttentionSite) -> Iterator[Assumption]:
        yield Assumption("constants", "weights and masks stored in the file stay as they are", "read from the file")
        opset = self.index.model.opset
        how = f"converted from {self.opset_before}" if opset != self.opset_before else "as the file imports it"
        yield Assumption("opset", f"operators mean what opset {opset} says", how)
        wide = f" with the softmax in {site.softmax_dtype}" if site.softmax_dtype != site.dtype else ""
        how = "checked against float64 on the CPU"
        if site.dtype == "bfloat16":
            how = "checked on a float32 twin: ONNX Runtime's CPU provider has no bfloat16 kernels"
        yield Assumption("dtype", f"the site runs in {site.dtype}{wide}", how)


_METHODS = {
    "constant": "read from the stored mask", "evaluated": "computed and compared", "structure": "from the graph's form",
    "attribute": "the operator says so",
}  # fmt: skip


def _parameters(part: MaskPart) -> Iterator[str]:
    """``kernel 7x7``, ``dilation 2``, ``causal``: what is not as it usually is; one number where all axes agree."""
    usual = {"dilation": 1, "stride": 1, "shift": 0, "before": 0, "after": 0, "causal": False, "cyclic": False,
             "shape": "box"}  # fmt: skip
    for key, value in part.parameters().items():
        name = "kernel" if key == "kernel_size" else key.replace("_", " ")
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if key in ("source", "grid") or (key in usual and all(v == usual[key] for v in values)):
            continue
        if all(v is True for v in values):
            yield name
        elif len(values) > 8:
            yield f"{len(values)} {name}"
        elif values and all(isinstance(v, int) and v is not True for v in values):
            yield f"{name} {'unlimited' if values == [-1] else 'x'.join(map(str, values))}"
        else:
            yield f"{name} {value}"


def _shown(site: AttentionSite, part: MaskPart) -> str:
    """How the mask was shown, its first clause alone (``explain`` prints all), and for which lengths it holds."""
    c = part.certificate
    how = f"{_METHODS[c.method]}: {re.split('[;:]', c.detail)[0].strip()}"
    if isinstance(site.query_length, int) and isinstance(site.key_length, int):
        return how  # the file fixes the lengths: there are no others
    if c.general or (c.method == "structure" and not c.lengths):
        return f"{how}; holds for every length"
    return f"{how}; for {'these lengths' if len(c.lengths) > 1 else 'this length'} alone"
