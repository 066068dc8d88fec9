"""Predicted gain of a replacement on a GPU that is not at hand: what its kernels take, by the cost model of launches,
against the attention as the target would run it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from onnx import ModelProto

from attncompile import standard_cost
from attncompile.core.block_selection import RULES, SINKS, WINDOW, Cut, Family
from attncompile.core.errors import Unsupported
from attncompile.core.kernel import Kernel, OpCall
from attncompile.core.mechanism import Lowering, Shape
from attncompile.core.site import AttentionSite
from attncompile.cost import shape_of
from attncompile.kernels import calls, cost
from attncompile.passes.evaluate import World
from attncompile.passes.extract import extract_site
from attncompile.targets.base import Target

PRODUCTS = 755e9
"""Half-precision flops a millisecond of large products on the GPU of the cost model (docs/bench/sweep-h200.json)."""
MEASURED = 90
"""The compute capability whose launches the cost model knows; others are judged by it too."""
SCORE_BYTES = 8
"""Bytes that unfused attention moves a score element: written by the first product, read and written by the softmax,
read by the second product, two bytes each. ONNX Runtime moves no less."""
POOLING = 5.0
"""How often queries and keys go through memory for the means of their blocks: padded, weighed, summed, each an op."""
MOVING = 4.7
"""How much longer a gather of rows takes in ONNX Runtime than its bytes alone: 3.4 to 5.1 times on an H200 where it
takes more than 10 microseconds (docs/bench/orders-h200.json)."""
LAUNCH = 3e-3
"""Milliseconds that a standard op is taken to need at least, however little it does: not measured. The fit has up to 10
microseconds for a launch of ours."""
BESIDE = ("MatMul", "Exp")
"""Standard ops that take time beside kernels of ours; others that a lowering holds move little or nothing."""
MASK_BYTES = 4
"""What a mask or bias adds: scores are read and written once more."""


@dataclass(frozen=True, slots=True)
class GpuCost:
    """``world_at`` evaluates the model at given sizes; ``dtype`` is what float32 sites are converted to;
    ``fuses_dense``: the target's own attention keeps no scores; ``barrier``: milliseconds that a node of ours costs
    by what it breaks around it.
    """

    world_at: Callable[[Mapping[str, int]], World]
    kernels: Mapping[str, Kernel]
    architecture: int
    dtype: str
    fuses_dense: bool
    least_gain: float = 0.0
    barrier: float = 0.0
    keep_slower: bool = False
    """Whether everything that is right is wanted, though it be slower or its cost not known."""

    @property
    def said(self) -> str:
        """What the predictions are for, in words."""
        return f"for kernels on sm_{self.architecture} ({cost.constants(f'gluon-{self.architecture}').measured_on})"

    def gain(self, site: AttentionSite, lowering: Lowering, binding: Mapping[str, int]) -> float:
        """Time of ``site`` at these sizes over that of the kernels of ``lowering``.

        Raises:
            Unsupported: a node has no kernel, or no cost was measured for such kernels.
        """
        ours = self.milliseconds(site, lowering, binding)
        if site.kind == "linear":
            return self._as_it_stands(site, lowering, binding) / ours
        return self.before(site, shape_of(site, binding)) / ours

    def _as_it_stands(self, site: AttentionSite, lowering: Lowering, binding: Mapping[str, int]) -> float:
        """Milliseconds of the nodes of a site that is no attention with a softmax, at least."""
        original = extract_site(self.world_at(binding), site, lowering).original
        bandwidth = cost.constants(f"gluon-{self.architecture}").bandwidth
        return standard_cost.milliseconds(original, bandwidth, PRODUCTS, not self.fuses_dense, LAUNCH)

    def milliseconds(self, site: AttentionSite, lowering: Lowering, binding: Mapping[str, int]) -> float:
        """Predicted time of the launches of ``lowering``. Raises ``Unsupported`` as ``gain``, and for arithmetic
        in front of the ops, which is no launch of ours.
        """
        beside = [n.op_type for n in lowering.nodes if n.op_type in BESIDE and not n.domain]
        if beside:
            raise Unsupported("no-kernel", f"{beside[0]} in front of the ops is not in the cost model")
        joined = {n.output[0] for n in lowering.nodes if n.op_type == "Concat" and not n.domain}
        if any(joined.intersection(n.input[1:3]) for n in lowering.nodes if n.domain):  # keys and values
            raise Unsupported("cost", "means beside blocks were not measured on a GPU")
        model = extract_site(self.world_at(binding), site, lowering).replaced
        nodes = calls.find(model, self.kernels, self._dtype(site))
        if not nodes:
            raise Unsupported("no-kernel", "it is done by standard ops, which have no kernel of ours")
        total = sum(self._moved(size) for size in self._gathered(model, lowering))
        for node in nodes:
            if node.call is None:
                raise Unsupported(node.verdict.code, node.verdict.reason, node.verdict.hint)
            total += self._launch(node.call) + self.barrier
        return total

    def lists(self, site: AttentionSite, shape: Shape, edge: int, blocks: int) -> float:
        """Predicted time of one launch whose heads have lists of their own, ``blocks`` of them in all, of ``edge``
        queries and keys; as many as there are rows are partial. Raises ``Unsupported`` as ``gain``.
        """
        kernel = self.kernels["BlockSparseAttention"]
        count = -(-shape.query_length // edge)
        sizes = {
            "rows": (1, site.heads, count, 3), "columns": (blocks,), "kinds": (blocks,),
            "masks": (2, edge, edge // 32), "order": (site.heads * count,),
        }  # fmt: skip
        call = OpCall(
            kernel.op, self._dtype(site), site.heads, site.kv_heads, site.head_dim, site.value_dim,
            {"block": edge, "masked_rows": "zero", "scale": site.scale}, dict.fromkeys(sizes, "int32"), sizes,
            batch=shape.batch, query_length=shape.query_length, key_length=shape.key_length,
        )  # fmt: skip
        return self._launch(call) + self.barrier

    def selection(self, site: AttentionSite, shape: Shape, edge: int, family: Family, causal: bool) -> float:
        """Predicted time of the two launches that choose blocks of ``edge``, and of the means of blocks in front, which
        the target makes with ops of its own: what those move is counted. Raises ``Unsupported`` as ``gain``.
        """
        heads, tokens, cut = site.heads, shape.query_length, Cut.of(family, edge)
        rows = -(-tokens // edge)
        queries, keys = (rows if n in cut.pooled else tokens for n in ("query", "key"))
        scores = OpCall(
            "BlockScores", self._dtype(site), heads, site.kv_heads, site.head_dim, site.head_dim,
            {"reduce": "sum", "span": 1, **cut.attributes, "causal": int(causal), "scale": site.scale},
            outputs=("scores",), batch=shape.batch, query_length=queries, key_length=keys,
        )  # fmt: skip
        sizes = {"scores": (shape.batch, heads, -(-queries // cut.stride), rows), "amount": (heads,)}
        select = OpCall(
            "BlockSelect", "float32", heads, heads, 1, 1,
            {"tiles": cut.tiles, "causal": int(causal), "rule": RULES[family[0]], "sinks": SINKS, "window": WINDOW},
            dict.fromkeys(sizes, "float32"), sizes, outputs=("rows", "columns", "kinds", "mass"), batch=shape.batch,
        )  # fmt: skip
        pooled = 0.0
        if cut.pooled:
            bandwidth = cost.constants(f"gluon-{self.architecture}").bandwidth
            meant = sum({"query": heads, "key": site.kv_heads}[n] for n in cut.pooled)
            pooled = 2.0 * shape.batch * tokens * site.head_dim * meant * POOLING / bandwidth * 1e-6
        return pooled + self._launch(scores) + self._launch(select) + 2 * self.barrier

    def moving(self, site: AttentionSite, shape: Shape) -> float:
        """Predicted time of bringing all heads to an order of their own and back, where each has a copy of its key
        head. Raises ``Unsupported`` as ``gain``.
        """
        rows = shape.batch * site.heads * shape.query_length
        dims = (site.head_dim, site.head_dim, site.value_dim, site.value_dim)
        return sum(self._moved(rows * dim) for dim in dims)

    def _moved(self, elements: int) -> float:
        """Of a gather that gives so many elements: read and written, two bytes each."""
        known = cost.constants(f"gluon-{self.architecture}")
        return (known.launch + 4.0 * elements * MOVING / known.bandwidth) * 1e-6

    def _gathered(self, model: ModelProto, lowering: Lowering) -> Iterator[int]:
        """Elements that the gathers of ``lowering`` give, which stand in ``model``."""
        moved = {n.output[0] for n in lowering.nodes if n.op_type == "Gather" and not n.domain}
        if moved:
            graph = calls.inferred(model).graph
            for value in (*graph.value_info, *graph.output):
                if value.name in moved:
                    yield math.prod(d.dim_value for d in value.type.tensor_type.shape.dim)

    def before(self, site: AttentionSite, shape: Shape) -> float:
        """Milliseconds of the site as it is: as one dense kernel of ours where the target fuses it, else as two
        products and a softmax, by what these must move and multiply.
        """
        dense = OpCall(
            "Attention", self._dtype(site), site.heads, site.kv_heads, site.head_dim, site.value_dim,
            attributes={"left": -1, "right": -1}, batch=shape.batch, query_length=shape.query_length,
            key_length=shape.key_length,
        )  # fmt: skip
        if self.fuses_dense or site.form == "attention-op":
            return self._launch(dense)
        scores = float(shape.batch * site.heads * shape.query_length * shape.key_length)
        bandwidth = cost.constants(f"gluon-{self.architecture}").bandwidth  # bytes a nanosecond
        moved = scores * (SCORE_BYTES + MASK_BYTES * bool(site.mask.parts))
        return moved / bandwidth * 1e-6 + 2.0 * scores * (site.head_dim + site.value_dim) / PRODUCTS

    def _launch(self, call: OpCall) -> float:
        kernel = self.kernels[call.op]
        program = kernel.programs(kernel.general(call), self.architecture)[0]
        return cost.milliseconds(kernel.work(call, program), program, self.architecture)

    def _dtype(self, site: AttentionSite) -> str:
        if site.dtype in calls.DTYPES:
            return site.dtype
        return self.dtype


def gpu_cost(
    world_at: Callable[[Mapping[str, int]], World], kernels: Mapping[str, Kernel], precision: str | None,
    target: Target, keep_slower: bool = False,
) -> GpuCost:  # fmt: skip
    """The cost that ``target`` is judged by. ``precision`` (``fp16``, ``bf16``) is what it converts to; without one the
    target itself refuses what stays in float32.
    """
    dtype = "bfloat16" if precision == "bf16" else "float16"
    least = 0.0 if keep_slower else target.least_gain
    return GpuCost(world_at, kernels, MEASURED, dtype, target.fuses_dense, least, target.barrier * 1e3, keep_slower)
