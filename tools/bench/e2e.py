"""Whole models: the same weights and inputs through torch, ONNX Runtime and ours, correctness first, in one run."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from e2e_models import BEST_ORT, MODELS, Model
from e2e_ours import BundleKit, export, replaced, write

from attncompile.core.errors import AttncompileError
from attncompile.kernel_kit import Kit

Run = Callable[[], torch.Tensor]
BUDGET = 3.0
"""Our distance from float32 over that of torch's eager fp16, at most."""


def prepare(out: Path, names: Sequence[str], architectures: Sequence[int], tiny: bool) -> None:
    """Compile what the models need, without a GPU: two layers of each are exported in fp16 and rewritten."""
    from attncompile.console import SilentProgress

    for model in chosen(names):
        module, inputs = model.build(tiny)
        path = export(shallow(module).half(), half(inputs), out / "exports" / f"{model.name}.onnx", 18)
        proto, source, said, profile = replaced(path, model, tiny)
        print(f"{model.name}: {'; '.join(said)}", flush=True)
        write(proto, source, Kit(tuple(architectures) or (90,), SilentProgress()), out / model.name, profile)


def chosen(names: Sequence[str]) -> list[Model]:
    return [m for m in MODELS if not names or m.name in names]


def half(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: v.half() if v.is_floating_point() else v for n, v in inputs.items()}


def shallow(module: torch.nn.Module, layers: int = 2) -> torch.nn.Module:
    """``module`` with its first layers only: all layers ask for the same kernels."""
    for inner in module.modules():
        for name, child in inner.named_children():
            alike = isinstance(child, torch.nn.ModuleList) and len({type(c) for c in child}) == 1
            if alike and len(child) > layers:
                setattr(inner, name, child[:layers])
    return module


def run(bundles: Path, work: Path, names: Sequence[str], rounds: int, tiny: bool) -> dict[str, Any]:
    """Measure on this GPU. A case whose ours is wrong is not timed."""
    from measure import ceilings

    device = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "gpu": device.name, "torch": torch.__version__, "when": time.strftime("%Y-%m-%d"), "rounds": rounds,
        **ceilings(), "cases": [],
    }  # fmt: skip
    for model in chosen(names):
        try:
            found = one(model, bundles / model.name, work / model.name, rounds, tiny)
        except (AttncompileError, RuntimeError, ValueError) as error:
            found = {"name": model.name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
        result["cases"].append(found)
        print(json.dumps({k: v for k, v in found.items() if k != "breakdown"}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return result


def one(model: Model, bundle: Path, work: Path, rounds: int, tiny: bool) -> dict[str, Any]:
    clock = time.perf_counter()
    module, given = model.build(tiny)
    module, inputs = module.half().cuda(), {n: v.cuda() for n, v in half(given).items()}
    files = {opset: export(module, inputs, work / f"opset{opset}" / "model.onnx", opset) for opset in (18, 23)}
    proto, source, said, profile = replaced(files[18], model, tiny)
    capability = torch.cuda.get_device_capability()
    kit = BundleKit(bundle / "bundle", capability[0] * 10 + capability[1])
    folder = write(proto, source, kit, work / "out", profile)
    left_out: dict[str, str] = {}
    makers: dict[str, Callable[[], Run]] = {
        "ours": lambda: ours(folder, inputs),
        "ours graph": lambda: ours(folder, inputs, graph=True),
    }
    makers |= torch_peers(model, module, inputs, tiny)
    makers |= {
        "onnxruntime raw": lambda: session(files[18], inputs),
        "onnxruntime opset 23": lambda: session(files[23], inputs),
        "onnxruntime optimizer": lambda: session(optimized(files[18], work, model), inputs),
        "onnxruntime onnxscript": lambda: session(fused(files[18], work), inputs),
    }
    runs: dict[str, Run] = {}
    for name, make in makers.items():
        try:
            made = make()
            with torch.no_grad():
                made()
            runs[name] = made
        except Exception as problem:  # whatever a peer raises, it is left out by name
            if name == "ours":
                raise
            left_out[name] = " ".join(str(problem).split())[:300] or type(problem).__name__
    prepared = time.perf_counter() - clock
    errors = distances(model, module, inputs, runs)
    low = errors.get("eager", 0.0)
    if model.exact and not errors["ours"] <= BUDGET * max(low, 2.0**-11):
        raise AttncompileError(f"ours is wrong: {errors['ours']:.1e}, torch's eager fp16 {low:.1e}")
    took = alternate(runs, rounds)
    ort = {n: ms for n, ms in took.items() if n.startswith("onnxruntime")}
    if ort:
        took[BEST_ORT] = min(ort.values())
    best = min(ms for n, ms in took.items() if n.startswith("ours"))
    ratios = {n: best / ms for n, ms in took.items() if not n.startswith("ours")}
    return {
        "name": model.name, "exact": model.exact, "sites": said, "ms": took, "errors": errors, "left_out": left_out,
        "ratios": ratios, "wanted": dict(model.wanted), "prepared_s": prepared,
        "met": {n: ratios[n] <= most for n, most in model.wanted.items() if n in ratios},
        "breakdown": breakdown(runs["ours"]),
    }  # fmt: skip


def torch_peers(
    model: Model, module: Any, inputs: Mapping[str, torch.Tensor], tiny: bool
) -> dict[str, Callable[[], Run]]:
    def eager(m: Any) -> Run:
        return lambda: m(**inputs)

    def compiled(m: Any) -> Run:
        torch._dynamo.reset()
        return eager(torch.compile(m, dynamic=False))

    if not model.flex:
        return {"eager": lambda: eager(module), "compile": lambda: compiled(module)}

    def other(**changes: Any) -> Any:
        """The same weights under another attention."""
        made, _ = model.build(tiny)
        for name, value in changes.items():
            setattr(made.inner.config, name, value)
        made.load_state_dict(module.state_dict())
        return made.half().cuda()

    return {
        "eager": lambda: eager(module),
        "compile dense": lambda: compiled(other(sliding_window=None)),
        "compile flex": lambda: compiled(other(_attn_implementation="flex_attention")),
    }


def session(path: Path, inputs: Mapping[str, torch.Tensor], made: Any = None) -> Run:
    """ONNX Runtime on torch's memory, nothing copied; with ``made`` that session."""
    import onnxruntime as ort

    opened = made or ort.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    if opened.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("ONNX Runtime did not start its CUDA provider")
    binding = opened.io_binding()
    for name, value in inputs.items():
        kind = {torch.float16: 10, torch.int64: 7, torch.float32: 1}[value.dtype]
        binding.bind_input(name, "cuda", 0, kind, tuple(value.shape), value.data_ptr())
    output = opened.get_outputs()[0]
    shape = [int(d) for d in output.shape]
    kind = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32}[output.type]
    into = torch.empty(shape, dtype=kind, device="cuda")
    number = 10 if kind == torch.float16 else 1
    binding.bind_output(output.name, "cuda", 0, number, tuple(shape), into.data_ptr())

    def go() -> torch.Tensor:
        opened.run_with_iobinding(binding)
        return into

    return go


def ours(folder: Path, inputs: Mapping[str, torch.Tensor], graph: bool = False) -> Run:
    from attncompile.runtime import InferenceSession

    made = InferenceSession(folder, provider_options={"enable_cuda_graph": "1"} if graph else None)
    return session(folder, inputs, made)


def optimized(path: Path, work: Path, model: Model) -> Path:
    """ONNX Runtime's transformers optimizer, as its users call it for such models."""
    from onnxruntime.transformers.optimizer import optimize_model

    made = optimize_model(str(path), model_type="gpt2" if model.causal else "vit", opt_level=0, use_gpu=True)
    place = work / "optimized" / "model.onnx"
    place.parent.mkdir(parents=True, exist_ok=True)
    made.save_model_to_file(str(place), use_external_data_format=True)
    return place


def fused(path: Path, work: Path) -> Path:
    import onnxscript.ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    made = optimize_for_ort(ir.load(str(path)))
    place = work / "fused" / "model.onnx"
    place.parent.mkdir(parents=True, exist_ok=True)
    ir.save(made[0] if isinstance(made, tuple) else made, str(place), external_data="model.data")
    return place


def distances(
    model: Model, module: Any, inputs: Mapping[str, torch.Tensor], runs: Mapping[str, Run]
) -> dict[str, float]:
    """Relative L2 of each output to the model in float32; to the original's, also where ours is an approximation."""
    found = {}
    with torch.no_grad():
        outputs = {name: run().float().cpu() for name, run in runs.items()}
        module.float()
        want = module(**{n: v.float() if v.is_floating_point() else v for n, v in inputs.items()}).float().cpu()
        module.half()
    for name, got in outputs.items():
        if not (name.endswith("dense") and model.flex):
            found[name] = float((got - want).norm() / want.norm())
    return found


def alternate(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Medians in milliseconds, by the clock of the host around a synchronised run: what a caller waits."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for turn in range(rounds + 3):
            for name, go in runs.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                go()
                torch.cuda.synchronize()
                if turn >= 3:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(t) for name, t in times.items()}


def breakdown(go: Run) -> dict[str, Any]:
    """Device time of three runs by kernel, and what the host asked the driver for meanwhile."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            go()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    host: dict[str, int] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name[:80]] = kernels.get(event.name[:80], 0.0) + event.device_time / 3e3
        elif event.name.startswith("cu") and any(x in event.name for x in ("Malloc", "Free", "Synchronize")):
            host[event.name] = host.get(event.name, 0) + 1
    top = dict(sorted(kernels.items(), key=lambda x: -x[1])[:25])
    return {"ms": {n: round(t, 4) for n, t in top.items()}, "total_ms": round(sum(kernels.values()), 4), "host": host}


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{result['gpu']}, torch {result['torch']}, {result['when']}, fp16: medians of {result['rounds']} alternating "
        "rounds, ms a call as its caller waits; relative L2 to the original in float32", "",
        "| model | ours | with a CUDA graph | peers | error: ours, torch fp16 | ours / peer: wanted | reached |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case in result["cases"]:
        if "failed" in case:
            lines.append(f"| {case['name']} | failed: {case['failed'][:120]} | | | | | |")
            continue
        ms = case["ms"]
        peers = ", ".join(f"{n} {t:.1f}" for n, t in ms.items() if not n.startswith(("ours", "best")))
        graph = f"{ms['ours graph']:.2f}" if "ours graph" in ms else ""
        wanted = "; ".join(f"{n} <= {w:g}" for n, w in case["wanted"].items())
        reached = "; ".join(f"{case['ratios'][n]:.2f}" for n in case["wanted"] if n in case["ratios"])
        errors = f"{case['errors']['ours']:.1e}, {case['errors'].get('eager', float('nan')):.1e}"
        mark = "" if all(case["met"].values()) else " (missed)"
        lines.append(
            f"| {case['name']} | {ms['ours']:.2f} | {graph} | {peers} | {errors} | {wanted} | {reached}{mark} |"
        )
    return "\n".join(lines)
