"""From the calls of a model to compiled kernels: which programs, compiled once each, and which call has which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import SMALL_SHARED, Kernel, OpCall
from attncompile.kernels.cache import Cache
from attncompile.kernels.compiler import PTX_VERSION, describe
from attncompile.kernels.entry import Compiled, canonical, digest
from attncompile.kernels.jobs import Job
from attncompile.kernels.pool import compile_all
from attncompile.kernels.records import Built, CallKernels, NodeCall, Refusal, key_of


def build(
    nodes: Sequence[NodeCall],
    further: Sequence[OpCall],
    kernels: Mapping[str, Kernel],
    architectures: Sequence[int],
    cache: Cache | None,
    start: Callable[[int], None] = lambda total: None,
    done: Callable[[], None] = lambda: None,
    workers: int | None = None,
    ptx_version: int = PTX_VERSION,
) -> Built:
    """Compile the kernels of ``nodes`` and of the calls ``further``, for each of ``architectures``.

    ``start`` is told how many programs there are, ``done`` of each that is compiled. What is refused is in the result.
    """
    nodes = [_with_kernel(node, kernels, architectures) for node in nodes]
    asked = {key_of(c): c for c in (general(kernels, n.call) for n in nodes if n.call is not None)}
    asked |= {key_of(c): c for c in (general(kernels, c) for c in further)}
    jobs: dict[str, Job] = {}
    wanted: dict[str, list[tuple[int, str]]] = {}
    refused: dict[str, list[Refusal]] = {key: [] for key in asked}
    for key, call in asked.items():
        wanted[key] = []
        for architecture in architectures:
            try:
                programs = kernels[call.op].programs(call, architecture)
            except Unsupported as error:
                refused[key].append(Refusal(architecture, "", error.code, error.message))
                continue
            for program in programs:
                name = digest(canonical([describe(program), architecture]))
                jobs.setdefault(name, Job(program, architecture, ptx_version))
                wanted[key].append((architecture, name))
    start(len(jobs))
    results = dict(zip(jobs, compile_all(list(jobs.values()), cache, done, workers), strict=True))
    calls = [_kernels(call, wanted[key], refused[key], jobs, results) for key, call in asked.items()]
    compiled = {made.id: made for made in results.values() if isinstance(made, Compiled)}
    keyed = tuple((n, key_of(general(kernels, n.call)) if n.call is not None else "") for n in nodes)
    return Built(dict(sorted(compiled.items())), tuple(sorted(calls, key=lambda c: c.key)), keyed)


def _with_kernel(node: NodeCall, kernels: Mapping[str, Kernel], architectures: Sequence[int]) -> NodeCall:
    """``node``, without its call where that has a kernel on no architecture."""
    call = node.call
    if call is None:
        return node
    verdicts = [kernels[call.op].supports(call, architecture) for architecture in architectures]
    if any(v.ok for v in verdicts):
        return node
    return replace(node, verdict=verdicts[0], call=None, symbols=None, tensors=None)


def general(kernels: Mapping[str, Kernel], call: OpCall) -> OpCall:
    """The general call of ``call``, by its kernel."""
    return kernels[call.op].general(call)


def _kernels(
    call: OpCall, wanted: Sequence[tuple[int, str]], refused: list[Refusal], jobs: Mapping[str, Job],
    results: Mapping[str, Compiled | Unsupported],
) -> CallKernels:  # fmt: skip
    found: dict[int, list[Compiled]] = {}
    for architecture, name in wanted:
        made = results[name]
        if isinstance(made, Compiled):
            found.setdefault(architecture, []).append(made)
        else:
            refused.append(Refusal(architecture, jobs[name].program.tactic, made.code, made.message))
    for architecture, made_all in found.items():
        if all(made.entry.shared > SMALL_SHARED or made.entry.abi != "plain" for made in made_all):
            reason = f"no tactic needs at most {SMALL_SHARED} bytes of shared memory"
            refused.append(Refusal(architecture, "", "small", reason))
    return CallKernels(call, {a: tuple(m.id for m in found[a]) for a in sorted(found)}, tuple(refused))
