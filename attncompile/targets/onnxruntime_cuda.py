"""ONNX Runtime's CUDA provider with our kernels: a model whose nodes name them, their bundle, and the library that
launches them (``attncompile/runtime``). Nodes without a kernel are written out as standard ops.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, defs, helper, shape_inference

from attncompile.core.errors import TargetError
from attncompile.core.folder import copy_file
from attncompile.core.model import Model
from attncompile.core.profile import ShapeProfile
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict
from attncompile.runtime import layout
from attncompile.runtime.locate import library
from attncompile.targets import graph as g
from attncompile.targets import precision as conversion
from attncompile.targets.base import BuildResult, Precision
from attncompile.targets.engine import save
from attncompile.targets.kernels import KernelKit, NodeKernel, by_name
from attncompile.targets.ort_fusions import fuse
from attncompile.targets.ort_fusions.skip import SKIP_NORMS
from attncompile.targets.ort_fusions.view import CONTRIB, OURS

ASIDE = "kept:"
"""Before the overload of a node that inlining is to leave alone."""

_INSTALL = "pip install 'attncompile[gpu]'"
_DTYPES: dict[Precision | None, str] = {"fp16": "float16", "bf16": "bfloat16", None: "float16"}


class OnnxRuntimeCuda:
    """The target ``onnxruntime-cuda``. Building needs Triton and no GPU."""

    name = "onnxruntime-cuda"
    fuses_dense = False
    takes_branches = True
    runs_kernels = True
    least_gain = 0.0
    barrier = 0.0

    def __init__(
        self, kit: KernelKit | None = None, fusions: bool = True, half_norms: bool = True, without: tuple[str, ...] = ()
    ) -> None:
        self._kit = kit
        self._fusions, self.half_norms, self._without = fusions, half_norms, without
        self.fused: Mapping[str, int] = {}
        """Fusion -> how often, of what was lowered last."""
        self.unlaunched: ModelProto | None = None
        """What was lowered last, before nodes of ours became launches."""
        self._notes: list[str] = []
        self._seconds = 0.0

    def equipped(self, kit: KernelKit) -> OnnxRuntimeCuda:
        return OnnxRuntimeCuda(kit, self._fusions, self.half_norms, self._without)

    def fusing(self, fusions: bool, half_norms: bool = True, without: tuple[str, ...] = ()) -> OnnxRuntimeCuda:
        """The target with or without the fusions of ``ort_fusions``; ``half_norms`` and ``without`` as there."""
        return OnnxRuntimeCuda(self._kit, fusions, half_norms, without)

    def available(self) -> Verdict:
        """Judged without importing anything."""
        if not sys.platform.startswith("linux"):
            return Verdict.no("platform", f"there are no kernels on {sys.platform}", "use Linux")
        if importlib.util.find_spec("triton") is None:
            return Verdict.no("not_installed", "triton, which compiles the kernels, is not installed", _INSTALL)
        return Verdict.yes("kernels are compiled without a GPU")

    def supports(self, proto: ModelProto) -> Verdict:
        return Verdict.yes("what has no kernel is written out in standard ops")

    def lower(self, proto: ModelProto, model: Model, precision: Precision | None = None) -> ModelProto:
        """Kernels compiled, nodes that have one turned into launches, all else inlined; in ``precision`` if given.

        The external tensors of the result are still those of ``model`` unless it was converted.

        Raises:
            TargetError: no node has a kernel, or the model is in float32.
        """
        start = time.perf_counter()
        kit = self._equipment()
        aside = set_aside(proto)
        left_out: dict[str, NodeKernel] = {}
        while True:
            lowered = self._converted(aside, proto, left_out, kit, model, precision)
            made = by_name(kit.compile(lowered))
            failed = {name: kernel for name, kernel in made.items() if kernel.reason}
            if not failed:
                break
            if failed.keys() <= left_out.keys():
                raise TargetError(f"node '{min(failed)}' cannot be written out in standard ops", "report this model")
            left_out |= failed
        self.unlaunched = lowered
        strict = half_sums(lowered)
        self._notes = [*_notes(made, left_out, kit), *_of_branches(lowered), *self._said(strict)]
        self._seconds = time.perf_counter() - start
        return _launching(lowered, made, strict)

    def _equipment(self) -> KernelKit:
        if self._kit is None:
            raise TargetError(f"target {self.name} was given no kernels", "build it through attncompile.pipeline")
        return self._kit

    def _converted(
        self, aside: ModelProto, proto: ModelProto, left_out: dict[str, NodeKernel], kit: KernelKit, model: Model,
        precision: Precision | None,
    ) -> ModelProto:  # fmt: skip
        """Everything inlined but the nodes that may have kernels."""
        found = kit.candidates(aside, _DTYPES[precision])
        if not found:
            raise TargetError(
                "nothing was replaced by an op of ours, so there is no kernel to launch",
                "model.onnx runs in ONNX Runtime as it is; --policy sparse or --keep-slower replace more",
            )
        left_out |= {kernel.name: kernel for kernel in found if kernel.reason}
        if len(left_out) == len(found):
            first = next(iter(left_out.values()))
            raise TargetError(f"no node has a kernel: {first.name}: {first.reason}", first.hint)
        lowered = _inlined_but(aside, proto, set(left_out))
        if precision is not None:
            lowered = conversion.convert(lowered, model.path.resolve().parent, precision)
        _refuse_float32(lowered)
        if self._fusions:
            result = fuse(lowered, model.path.resolve().parent, half_norms=self.half_norms, without=self._without)
            lowered, self.fused = result.proto, result.counts
        return lowered

    def _said(self, strict: bool) -> list[str]:
        fused = ", ".join(f"{n} ({c})" for n, c in self.fused.items())
        said = [f"fused for ONNX Runtime: {fused}"] if fused else []
        if strict:
            said.append(
                "norms of sums in fp16: plain onnxruntime-gpu before 1.27 is refused unless it is in strict mode, in "
                "which attncompile.runtime starts it (docs/onnxruntime.md)"
            )
        return said

    def build(
        self, lowered: ModelProto, model: Model, profile: ShapeProfile, folder: Path,
        sites: Sequence[AttentionSite] = (),
    ) -> BuildResult:  # fmt: skip
        """Write the model, ``bundle/`` and the library into ``folder``; external data of ``model`` must lie there.

        Raises:
            MissingDependency: the library is not there and cannot be compiled.
        """
        start = time.perf_counter()
        place = folder / layout.LIBRARY
        copy_file(library(), place)  # not a link: the process loads one library a file
        files = save(lowered, folder / layout.MODEL)
        bundle = folder / layout.BUNDLE
        self._equipment().write(bundle, any(_is_strict(n) for graph in g.graphs(lowered.graph) for n in graph.node))
        cubins = [path.stat().st_size for path in bundle.rglob("*.cubin")]
        return BuildResult(
            self.name, (*files, place, bundle / layout.INDEX), self._seconds + time.perf_counter() - start,
            reason="not executed: building needs no GPU", launches=True,
            notes=(*self._notes, f"the bundle holds {_plural(len(cubins), 'kernel')}, {sum(cubins):,} bytes"),
        )  # fmt: skip

    def open(self, folder: Path) -> Any:
        """A session on the first CUDA device. Raises ``TargetError`` or ``MissingDependency`` where it cannot run."""
        from attncompile.runtime.session import InferenceSession

        return InferenceSession(folder)


def half_sums(proto: ModelProto) -> bool:
    """Whether ``proto`` has norms of sums in fp16, whoever made them; one whose type is not known counts."""
    nodes = [n for graph in g.graphs(proto.graph) for n in graph.node]
    scales = {n.input[2] for n in nodes if n.domain == CONTRIB and n.op_type in SKIP_NORMS}
    kinds = {t.name: t.data_type for graph in g.graphs(proto.graph) for t in graph.initializer}
    if not scales <= kinds.keys():
        kinds |= {name: kind for name, (kind, _) in _value_types(proto).items()}
    return any(kinds.get(s, TensorProto.UNDEFINED) in (TensorProto.FLOAT16, TensorProto.UNDEFINED) for s in scales)


def _is_strict(node: NodeProto) -> bool:
    return node.domain == layout.DOMAIN and any(a.name == layout.STRICT for a in node.attribute)


def _ours(proto: ModelProto) -> list[NodeProto]:
    inside = [n for graph in g.graphs(proto.graph) for n in graph.node]
    return [n for n in inside if n.domain == OURS]


def set_aside(proto: ModelProto) -> ModelProto:
    """``proto`` with all functions inlined but ours: their nodes carry an overload that no function has, which is their
    own behind ``ASIDE``, and names that stay.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    bodies = [n for f in copy.functions if f.domain != OURS for n in f.node if n.domain == OURS]
    for node in [*_ours(copy), *bodies]:
        node.overload = ASIDE + node.overload
    result = g.inlined(copy)
    g.name_nodes(result)
    return result


def _inlined_but(aside: ModelProto, proto: ModelProto, names: set[str]) -> ModelProto:
    """``aside`` with the bodies of the nodes called ``names``; the others keep no overload and no body."""
    copy = ModelProto()
    copy.CopyFrom(aside)
    for node in _ours(copy):
        if node.name in names:
            node.overload = node.overload.removeprefix(ASIDE)
    copy.functions.extend(f for f in proto.functions if f.domain == OURS)
    result = g.inlined(copy)
    del result.functions[:]
    for node in _ours(result):
        node.overload = ""
    g.name_nodes(result)
    return result


def _refuse_float32(lowered: ModelProto) -> None:
    kinds = _value_types(lowered)
    for node in _ours(lowered):
        if defs.has(node.op_type, 1, OURS) and defs.get_schema(node.op_type, 1, OURS).inputs[0].type_str != "T":
            continue  # it combines states, which are float32 whatever the operands are
        if kinds.get(node.input[0], (TensorProto.UNDEFINED, None))[0] == TensorProto.FLOAT:
            raise TargetError(
                f"node '{node.name}' is in float32: kernels take float16 and bfloat16", "add --fp16 or --bf16"
            )


def _value_types(proto: ModelProto) -> dict[str, tuple[int, ValueInfoProto]]:
    """Element type and description of every value, inferred."""
    inferred = shape_inference.infer_shapes(proto)
    return {
        value.name: (value.type.tensor_type.elem_type, value)
        for graph in g.graphs(inferred.graph)
        for value in (*graph.input, *graph.output, *graph.value_info)
    }


def _launching(lowered: ModelProto, kernels: Mapping[str, NodeKernel], strict: bool = False) -> ModelProto:
    """Our nodes as launches; their outputs' types are written down, since nobody else knows these ops. ``strict``: each
    says that there are norms of sums in fp16.
    """
    result = ModelProto()
    result.CopyFrom(lowered)
    described = _value_types(lowered)
    for graph in g.graphs(result.graph):
        known = {value.name for value in (*graph.output, *graph.value_info)}
        for node in graph.node:
            if node.domain != OURS:
                continue
            kernel = kernels[node.name]
            inputs, outputs = [node.input[i] for i in kernel.inputs], [node.output[i] for i in kernel.outputs]
            graph.value_info.extend(described[o][1] for o in outputs if o not in known)
            launch = helper.make_node(
                kernel.op_type, inputs, outputs, node.name, node.doc_string, layout.DOMAIN,
                **{layout.RECORD: kernel.record}, **({layout.STRICT: "1"} if strict else {}),
            )  # fmt: skip
            node.CopyFrom(launch)
    kept = [o for o in result.opset_import if o.domain not in (OURS, layout.DOMAIN)]
    del result.opset_import[:]
    result.opset_import.extend([*kept, helper.make_opsetid(layout.DOMAIN, 1)])
    return result


def _notes(made: Mapping[str, NodeKernel], left_out: dict[str, NodeKernel], kit: KernelKit) -> list[str]:
    names = ", ".join(f"sm_{a}" for a in kit.architectures)
    launched = _plural(len(made), "node")
    notes = [f"launched as kernels: {launched}, compiled for {names}"]
    reasons: dict[str, list[str]] = {}
    for kernel in left_out.values():
        reasons.setdefault(kernel.reason, []).append(kernel.name)
    for reason, nodes in reasons.items():
        shown = nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more"
        notes.append(f"{shown} run in standard ops: {reason}")
    return notes


def _of_branches(lowered: ModelProto) -> list[str]:
    """What is said of control flow, and of the nodes of ours within."""
    found = g.control_flow(lowered.graph)
    if not found:
        return []
    inside = sum(n.domain == OURS for node in found for body in g.subgraphs(node)
                 for graph in g.graphs(body) for n in graph.node)  # fmt: skip
    kinds = ", ".join(sorted({n.op_type for n in found}))
    named = f"{_plural(len(found), 'node')} with branches or loops ({kinds})"
    launched = f", which hold {inside} of these" if inside else ""
    return [f"{named}{launched}: ONNX Runtime captures no CUDA graph of them, and refuses enable_cuda_graph"]


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


TARGET = OnnxRuntimeCuda()
