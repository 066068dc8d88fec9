"""Where the time goes: per layer and per attention site, before and after, by ONNX Runtime's own profiler.

ONNX Runtime names what it runs after the nodes of the file. A node that came from the body of a model-local function is
called ``_inlfunc_<op>_<node>``, with a running token from the second call on, which does not say which call it was. So
the model is profiled with one copy of the body for each call, in which every node and value carries a tag of its site.
Nodes that ONNX Runtime fuses keep the name of their last output: a site's nodes are told by value as well as by name.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from attncompile.core.errors import BadModel
from attncompile.core.site import AttentionSite

_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
"""Their events span those of the nodes inside, which are listed themselves."""

_DUMP_LIMIT = 1 << 30
_TAG = re.compile(r"@site(\d+)@")
_SUFFIX = "_kernel_time"
_FUSED = re.compile(r"(?:/\w+/)+$")
"""What ONNX Runtime appends to a node's name when it fuses it: ``/MatMulScaleFusion/``."""


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One node as ONNX Runtime ran it. ``microseconds`` is the mean a run; ``calls`` how often it ran in one run.

    ``site`` is the id of the attention site that it belongs to, or empty.
    """

    name: str
    op_type: str
    microseconds: float
    calls: float
    site: str = ""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Times of one model at one set of inputs. ``total`` is the median wall time a run, in microseconds, with the
    profiler on; it is more than the sum of ``layers`` where the runtime itself takes time.
    """

    layers: tuple[LayerTime, ...]
    total: float
    runs: int
    threads: int

    def site(self, name: str) -> float:
        """Microseconds a run in the nodes of one site."""
        return math.fsum(layer.microseconds for layer in self.layers if layer.site == name)

    def by_op(self) -> Mapping[str, float]:
        """Op type -> microseconds a run, largest first."""
        sums: dict[str, float] = {}
        for layer in self.layers:
            sums[layer.op_type] = sums.get(layer.op_type, 0.0) + layer.microseconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True)
class SiteTime:
    """Microseconds a run in one site's nodes. NaN where none of its nodes was found in a profile."""

    site: str
    before: float
    after: float

    @property
    def gain(self) -> float:
        """before / after."""
        return self.before / self.after if self.after > 0 else math.nan


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both models at the same inputs, and every site in both."""

    before: LayerTimes
    after: LayerTimes
    sites: tuple[SiteTime, ...]


def profile_model(
    path: Path,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int | None = None,
    runs: int = 5,
    regions: Mapping[str, Iterable[str]] | None = None,
) -> LayerTimes:
    """Run the model at ``path`` under ONNX Runtime's profiler, after one run that is not counted.

    ``regions``: site id -> names of its nodes (``op_type:output`` for unnamed ones) in this file, see ``region``.

    Raises:
        BadModel: ONNX Runtime cannot load or run it.
    """
    regions = {site: set(nodes) for site, nodes in (regions or {}).items()}
    ids = list(regions)
    proto = onnx.load(str(path), load_external_data=False)
    owner = {node: index for index, site in enumerate(ids) for node in regions[site]}
    values = _tag(proto, owner)
    with tempfile.TemporaryDirectory(prefix="attncompile-profile-") as scratch:
        options = _options(path, Path(scratch), threads, dump=path.stat().st_size < _DUMP_LIMIT)
        try:
            session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
            for _ in range(runs + 1):
                session.run(None, dict(feeds))
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            message = " ".join(str(error).split())[:300]
            raise BadModel(f"ONNX Runtime cannot run {path.name}: {message}", "check the inputs' shapes") from None
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        outputs = _outputs(Path(scratch) / "optimised.onnx")
    return _times(events, outputs, owner, values, ids, runs, threads or 0)


def profile_pair(
    before: Path,
    after: Path,
    feeds: Mapping[str, np.ndarray],
    sites: Sequence[AttentionSite],
    *,
    threads: int | None = None,
    runs: int = 5,
) -> Comparison:
    """Profile the input and the output model with the same inputs, in turns, and compare them site by site."""
    protos = [onnx.load(str(p), load_external_data=False) for p in (before, after)]
    known = {o for n in protos[0].graph.node for o in n.output}
    regions = [{s.id: region(proto, s, known) for s in sites} for proto in protos]
    # Half of the runs each way round, so that a change of the machine's pace meets both.
    first = max(1, runs // 2)
    parts: list[list[LayerTimes]] = [[], []]
    for count in (first, max(1, runs - first)):
        for side, path in enumerate((before, after)):
            parts[side].append(profile_model(path, feeds, threads=threads, runs=count, regions=regions[side]))
    return compare(_mean(parts[0]), _mean(parts[1]), sites)


def compare(before: LayerTimes, after: LayerTimes, sites: Sequence[AttentionSite]) -> Comparison:
    """Every site's time in two profiles that were made with ``regions``."""

    def time(times: LayerTimes, site: str) -> float:
        return times.site(site) if any(layer.site == site for layer in times.layers) else math.nan

    return Comparison(before, after, tuple(SiteTime(s.id, time(before, s.id), time(after, s.id)) for s in sites))


def region(proto: ModelProto, site: AttentionSite, known: set[str]) -> set[str]:
    """Names of the nodes that compute ``site`` in ``proto``, the input model or one made from it.

    A kept site has the nodes that it had. A replaced one has what lies between its output and its operands and was not
    in the input model, of which ``known`` holds all values.
    """
    names = {_label(n) for n in proto.graph.node}
    maker = {o: n for n in proto.graph.node for o in n.output if o}
    end = maker.get(site.output.value)
    if end is not None and _label(end) in site.nodes:
        return names & set(site.nodes)
    found: set[str] = set()
    pending = [site.output.value]
    while pending:
        value = pending.pop()
        node = maker.get(value)
        if node is None or _label(node) in found or (value in known and value != site.output.value):
            continue
        found.add(_label(node))
        pending.extend(v for v in node.input if v)
    return found


def _mean(parts: Sequence[LayerTimes]) -> LayerTimes:
    runs = sum(p.runs for p in parts)
    layers: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for part in parts:
        for layer in part.layers:
            weighted = (layer.microseconds * part.runs, layer.calls * part.runs)
            layers.setdefault((layer.name, layer.op_type, layer.site), []).append(weighted)
    merged = tuple(
        LayerTime(name, op, sum(t for t, _ in items) / runs, sum(c for _, c in items) / runs, site)
        for (name, op, site), items in layers.items()
    )
    return LayerTimes(merged, statistics.median(p.total for p in parts), runs, parts[0].threads)


def _options(path: Path, scratch: Path, threads: int | None, *, dump: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "profile")
    options.log_severity_level = 3  # a dumped graph that holds CPU-specific layouts is worth a warning to others
    if threads:
        options.intra_op_num_threads = threads
    # The bytes given to ONNX Runtime have no folder of their own.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.resolve().parent))
    if dump:
        options.optimized_model_filepath = str(scratch / "optimised.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
    return options


def _outputs(optimised: Path) -> dict[str, tuple[str, ...]]:
    """Node name -> its outputs in the graph that ONNX Runtime ran; empty if that was not written."""
    if not optimised.exists():
        return {}
    proto = onnx.load(str(optimised), load_external_data=False)
    return {n.name: tuple(n.output) for n in _all_nodes(proto.graph)}


def _tag(proto: ModelProto, owner: Mapping[str, int]) -> dict[str, int]:
    """Name every node, and give each call of a function that belongs to a site a tagged body of its own, in place.

    Returns value -> index of the site whose nodes make it.
    """
    bodies = {(f.domain, f.name, f.overload): f for f in proto.functions}
    values: dict[str, int] = {}
    for call, node in enumerate(proto.graph.node):
        name = _label(node)
        node.name = name
        if name not in owner:
            continue
        for output in node.output:
            values[output] = owner[name]
        body = bodies.get((node.domain, node.op_type, node.overload))
        if body is not None:
            proto.functions.append(_tagged(body, f"@site{owner[name]}@", f"{body.overload}_{call}"))
            node.overload = f"{body.overload}_{call}"
        for graph in _subgraphs(node):
            _tag_graph(graph, f"@site{owner[name]}@")
    return values


def _tagged(body: FunctionProto, tag: str, overload: str) -> FunctionProto:
    copy = FunctionProto()
    copy.CopyFrom(body)
    copy.overload = overload
    for node in copy.node:
        _tag_node(node, tag)
    return copy


def _tag_node(node: NodeProto, tag: str) -> None:
    node.name = tag + _label(node)
    for graph in _subgraphs(node):
        _tag_graph(graph, tag)


def _tag_graph(graph: GraphProto, tag: str) -> None:
    for node in graph.node:
        _tag_node(node, tag)


def _times(
    events: Sequence[Mapping[str, Any]],
    outputs: Mapping[str, tuple[str, ...]],
    owner: Mapping[str, int],
    values: Mapping[str, int],
    ids: Sequence[str],
    runs: int,
    threads: int,
) -> LayerTimes:
    walls = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    # The first run allocates memory and is not counted.
    start = walls[1][0] if len(walls) > 1 else 0
    spent: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX) or event["ts"] < start:
            continue
        op = event["args"].get("op_name", "")
        if op not in _CONTROL_FLOW:
            spent.setdefault((event["name"][: -len(_SUFFIX)], op), []).append(float(event["dur"]))
    layers = []
    for (name, op), times in spent.items():
        index = _site_of(name, outputs.get(name, ()), owner, values)
        site = "" if index is None else ids[index]
        layers.append(LayerTime(name, op, math.fsum(times) / runs, len(times) / runs, site))
    total = statistics.median([end - begin for begin, end in walls[1:]] or [0.0])
    return LayerTimes(tuple(layers), float(total), runs, threads or (os.cpu_count() or 1))


def _site_of(name: str, outputs: Sequence[str], owner: Mapping[str, int], values: Mapping[str, int]) -> int | None:
    for text in (name, *outputs):
        match = _TAG.search(text)
        if match:
            return int(match[1])
    plain = _FUSED.sub("", name)
    if name in owner or plain in owner:
        return owner.get(name, owner.get(plain))
    return next((values[o] for o in outputs if o in values), None)


def _label(node: NodeProto) -> str:
    return node.name or f"{node.op_type}:{next((o for o in node.output if o), '')}"


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in _subgraphs(node):
            yield from _all_nodes(inner)
