"""Whole models: the same weights and inputs through torch, ONNX Runtime and ours, correctness first, in one run.

``e2e_export.py`` made the files. Each case is a process of its own, so that a kernel that breaks its CUDA context
breaks no other case: all get ready side by side, then one after another has the GPU to itself and is timed; when all
are, one after another is profiled. What is known is in the result also if the time runs out.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from e2e_export import HERE, VARIANTS, failure, folder_of, load
from e2e_models import BEST_ORT, ORT, Model, chosen

Run = Callable[[], torch.Tensor]
BUDGET = 3.0
"""Our distance from float32 over that of torch's eager fp16, at most."""
SECONDS = 4.0
"""What the timed rounds of one case may take, about."""
STRICT = {"enable_skip_layer_norm_strict_mode": "1"}
TIMED = "timed"
"""Beside a case's result: it has been timed, or never will be."""
LEAST = 7
"""Rounds that everything near the best is timed in, at least."""


def run(
    work: Path, names: Sequence[str], rounds: int, limit: float, cpu: bool, serial: bool = False,
    without: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Measure on this GPU, for at most ``limit`` seconds. A case whose ours is wrong is not timed. ``serial``: one case
    after another, also while they get ready. ``without``: peers that are left out of all cases.
    """
    start = time.monotonic()
    gate = work / "gpu.lock"
    gate.touch()
    running: dict[str, tuple[Any, Any]] = {}
    result: dict[str, Any] = {"torch": torch.__version__, "when": time.strftime("%Y-%m-%d"), "rounds": rounds}
    cases: dict[str, Any] = {}

    def finish(name: str, late: bool = False) -> None:
        process, log = running.pop(name)
        if late:
            process.kill()
        process.wait()
        place = work / name / "result.json"
        found = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"name": name}
        if "ms" not in found and "failed" not in found:
            said = log.read_text(errors="replace").strip().split("\n")[-1][:600]
            found["failed"] = f"stopped after {limit:.0f} s" if late else f"exit {process.returncode}: {said}"
        (work / name / TIMED).touch()  # whoever comes after it waits no longer
        cases[name] = found
        brief = {k: v for k, v in found.items() if k not in ("breakdown", "sites")}
        print(json.dumps({"at_s": round(time.monotonic() - start), **brief}), flush=True)

    order = [m.name for m in chosen(names)]
    for model in chosen(names):
        for left in ("result.json", TIMED):
            (work / model.name / left).unlink(missing_ok=True)
    for model in chosen(names):
        place = work / model.name
        place.mkdir(parents=True, exist_ok=True)
        log = place / "run.log"
        # The lock is shared while a case gets ready, and taken for it here, so that none is timed before all are ready.
        with gate.open() as held, log.open("w") as to:
            if not serial:
                fcntl.flock(held, fcntl.LOCK_SH)
            process = subprocess.Popen(
                [sys.executable, str(HERE), "e2e", "case", "-", "--work", str(work), "--only", model.name,
                 "--rounds", str(rounds), "--lock", str(held.fileno()), *(["--cpu"] if cpu else []),
                 "--without", *without, "--order", *([model.name] if serial else order)],
                stdout=to, stderr=subprocess.STDOUT, pass_fds=[held.fileno()],
            )  # fmt: skip
        running[model.name] = (process, log)
        while serial and process.poll() is None and time.monotonic() - start < limit:
            time.sleep(0.1)
        if serial:
            finish(model.name, process.poll() is None)
    while running and time.monotonic() - start < limit:
        for name in [n for n, (p, _) in running.items() if p.poll() is not None]:
            finish(name)
        time.sleep(0.05)
    for name in list(running):
        finish(name, late=True)
    result["gpu"] = "none: a dry run on the CPU, whose times mean nothing"
    if not cpu:
        from measure import ceilings

        result |= {"gpu": torch.cuda.get_device_name(), **ceilings()}
    result["cases"] = [cases[m.name] for m in chosen(names)]
    return result


class Case:
    """One model on one device, in this process."""

    def __init__(
        self, model: Model, work: Path, rounds: int, lock: int | None, cpu: bool, without: Sequence[str] = (),
        order: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.work, self.rounds, self.cpu = model, work, rounds, cpu
        self.without, self.order = without, order
        self._lock = lock
        self.shape: tuple[int, ...] = ()
        if lock is not None:
            os.set_inheritable(lock, False)  # processes that torch starts to compile outlive this one
        self._clock = time.perf_counter()
        self.found: dict[str, Any] = {"name": model.name, "exact": model.exact, "wanted": dict(model.wanted)}

    def write(self, **more: Any) -> None:
        """What is known so far, whole or not at all: whoever waits may be out of patience at any time."""
        self.found |= more
        place = self.work / self.model.name / "result.json"
        place.with_suffix(".new").write_text(json.dumps(self.found), encoding="utf-8")
        place.with_suffix(".new").replace(place)

    def go(self) -> None:
        try:
            self._go()
        except Exception as problem:  # whatever it is, the table says it; the log has the traceback
            self.write(failed=_said(problem, 600))
            raise
        finally:
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _go(self) -> None:
        model, work = self.model, self.work
        for of, name in ((model.of, "module"), (model.name, "ours")):
            if why := failure(work, of, name):
                raise RuntimeError(f"{of}/{name}: {why}")
        self.module, inputs = load(work, model.of)
        if not self.cpu:
            torch.cuda.init()
            self.module = self.module.cuda()
        self.inputs = {n: v if self.cpu else v.cuda() for n, v in inputs.items()}
        sites = json.loads((work / model.name / "sites.json").read_text(encoding="utf-8"))
        left_out, seconds = {**model.left_out, **dict.fromkeys(self.without, "not asked for in this run")}, {}
        runs: dict[str, Run] = {}
        makers = self.makers()
        left_out = {name: why for name, why in left_out.items() if name in makers}
        for name, make in makers.items():
            if name in left_out:
                continue
            start = time.perf_counter()
            try:
                made = make()
                with torch.no_grad(), best_attention():
                    self.shape = tuple(made().shape)
                self.wait()
                runs[name] = made
            except Exception as problem:  # whatever a peer raises, it is left out by name
                if name == "ours":
                    raise
                left_out[name] = _said(problem, 300)
            seconds[name] = round(time.perf_counter() - start, 1)
            self.write(sites=sites, left_out=left_out, ready_s=seconds)
        errors = self.distances(runs)
        self.write(errors=errors)
        low = errors["eager"]
        wrong = [n for n in runs if n.startswith("ours") and not errors[n] <= BUDGET * max(low, 2.0**-11)]
        if "ours" in wrong:
            raise RuntimeError(f"ours is wrong: {errors['ours']:.1e}, torch's eager fp16 {low:.1e}")
        left_out |= {n: f"it is wrong: {errors[n]:.1e}, torch's eager fp16 {low:.1e}" for n in wrong}
        runs = {n: go for n, go in runs.items() if n not in wrong}
        self.write(left_out=left_out)
        if not self.cpu:
            torch.cuda.empty_cache()
        self.write(ready_total_s=round(time.perf_counter() - self._clock, 1))
        self.turn(self.order[: self.order.index(model.name)])
        took, counts = self.alternate({n: go for n, go in runs.items() if n != "eager"})
        ort = {n: ms for n, ms in took.items() if n.startswith("onnxruntime")}
        if ort:
            took[BEST_ORT] = min(ort.values())
        best = min(ms for n, ms in took.items() if n.startswith("ours"))
        ratios = {n: best / ms for n, ms in took.items() if not n.startswith("ours")}
        asked = {n: most for n, most in model.wanted.items() if n not in self.without}
        met = {n: n in ratios and ratios[n] <= most for n, most in asked.items()}
        self.write(ms=took, counts=counts, ratios=ratios, met=met)
        (work / model.name / TIMED).touch()
        if self._lock is not None:  # all are timed before any is profiled
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self.turn(self.order)
        shown = [n for n in ("ours", "compile", "compile flex") if n in runs]
        self.write(breakdown={n: self.breakdown(runs[n]) for n in shown},
                   total_s=round(time.perf_counter() - self._clock, 1))  # fmt: skip

    def turn(self, others: Sequence[str]) -> None:
        """Waits until all that run are ready, and ``others`` have been timed; then nobody else has the GPU."""
        while True:
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            if all((self.work / name / TIMED).is_file() for name in others):
                return
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            time.sleep(0.02)

    def wait(self) -> None:
        if not self.cpu:
            torch.cuda.synchronize()

    def makers(self) -> dict[str, Callable[[], Run]]:
        """Those that compile come first, while the GPU idles for all."""
        model, folder = self.model, self.work / self.model.name
        names = dict(zip(ORT, ("opset18", "opset23", "optimizer", "onnxscript"), strict=True))
        return {
            **self.torch_peers(),
            **{name: lambda name=name: self.ours(folder / folder_of(name)) for name in VARIANTS},
            "ours graph": lambda: self.ours(folder / folder_of("ours"), enable_cuda_graph="1"),
            "ours norms graph": lambda: self.ours(folder / folder_of("ours norms"), enable_cuda_graph="1"),
            "ours norms strict": lambda: self.ours(folder / folder_of("ours norms"), **STRICT),
            **{n: lambda step=step: self.exported(model.of, step) for n, step in names.items()},
        }

    def torch_peers(self) -> dict[str, Callable[[], Run]]:
        def eager(m: Any) -> Run:
            return lambda: m(**self.inputs)

        def compiled(m: Any) -> Run:
            torch._dynamo.reset()
            # A dry run traces and lowers, and leaves out what only makes code for this CPU.
            return eager(torch.compile(m, dynamic=False, backend="aot_eager" if self.cpu else "inductor"))

        def other(**changes: Any) -> Any:
            """The same weights under another attention."""
            shared = {id(p): p for p in self.module.parameters()}
            made = copy.deepcopy(self.module, shared)
            for name, value in changes.items():
                setattr(made.inner.config, name, value)
            return made

        if not self.model.flex:
            return {"compile": lambda: compiled(self.module), "eager": lambda: eager(self.module)}
        return {
            "compile dense": lambda: compiled(other(sliding_window=None)),
            "compile flex": lambda: compiled(other(_attn_implementation="flex_attention")),
            "eager": lambda: eager(self.module),
        }

    def exported(self, of: str, step: str) -> Run:
        if why := failure(self.work, of, step):
            raise RuntimeError(f"{of}/{step}: {why}")
        return self.session(self.open(self.work / of / step / "model.onnx"))

    def open(self, path: Path) -> Any:
        """A session of ONNX Runtime as it comes."""
        import onnxruntime as ort

        if self.cpu:
            return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        provider = ("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})
        opened = ort.InferenceSession(str(path), providers=[provider])
        if opened.get_providers()[0] != provider[0]:
            raise RuntimeError("ONNX Runtime did not start its CUDA provider")
        return opened

    def ours(self, folder: Path, **more: str) -> Run:
        from attncompile.runtime import InferenceSession

        options = {"arena_extend_strategy": "kSameAsRequested", **more}
        return self.session(InferenceSession(folder, allow_cpu=self.cpu, provider_options=options))

    def session(self, opened: Any) -> Run:
        """ONNX Runtime on torch's memory, nothing copied."""
        device = "cpu" if self.cpu else "cuda"
        binding = opened.io_binding()
        numbers = {torch.float16: 10, torch.int64: 7, torch.float32: 1}
        for name, value in self.inputs.items():
            binding.bind_input(name, device, 0, numbers[value.dtype], tuple(value.shape), value.data_ptr())
        output = opened.get_outputs()[0]
        static = all(isinstance(d, int) for d in output.shape)
        shape = tuple(output.shape) if static else self.shape  # that of torch, which ran before
        kind = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32}[output.type]
        into = torch.empty(shape, dtype=kind, device=device)
        binding.bind_output(output.name, device, 0, numbers[kind], shape, into.data_ptr())

        def go() -> torch.Tensor:
            opened.run_with_iobinding(binding)
            return into

        return go

    def distances(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Relative L2 of each output to the model in float32; where ours is an approximation, ours and torch's eager
        fp16 to the model whose attention has the neighborhood for its mask.
        """
        model, module = self.model, self.module
        approximate = None if model.neighborhood is None else neighborhood(model.neighborhood(_tiny(self)), self.inputs)
        with torch.no_grad(), best_attention():
            outputs = {name: run().float().cpu() for name, run in runs.items()}
            if "eager" not in outputs:
                raise RuntimeError("torch's eager run failed: there is nothing to compare with")
        found = {}
        with torch.no_grad():
            for masked in (None, approximate) if approximate is not None else (None,):
                with attention_mask(masked):
                    if masked is not None:
                        outputs["eager"] = module(**self.inputs).float().cpu()
                    with float32(module):
                        given = {n: v.float() if v.is_floating_point() else v for n, v in self.inputs.items()}
                        want = module(**given).float().cpu()
                for name, got in outputs.items():
                    ours = name.startswith("ours") or name == "eager"
                    dense = name == "compile dense" and model.flex  # another function
                    if dense or (masked is not None and not ours):
                        continue
                    wrong = float((got - want).norm() / want.norm())
                    if masked is None and not model.exact and name.startswith("ours"):
                        found[f"{name} to the original"] = wrong
                    else:
                        found[name] = wrong if torch.isfinite(got).all() else float("inf")
        return found

    def alternate(self, runs: Mapping[str, Run]) -> tuple[dict[str, float], dict[str, int]]:
        """Medians in milliseconds, by the clock of the host around a synchronised run: what a caller waits. Runs far
        from the best are in the first three rounds only.
        """
        first: dict[str, float] = {}
        times: dict[str, list[float]] = {name: [] for name in runs}
        with torch.no_grad(), best_attention():
            for name, go in runs.items():
                self.once(go)
                first[name] = min(self.once(go) for _ in range(2))
            near = [n for n, ms in first.items() if ms <= 3 * min(first.values())]
            rounds = max(LEAST, min(self.rounds, int(SECONDS * 1e3 / sum(first[n] for n in near))))
            for turn in range(rounds):
                for name in runs if turn < 3 else near:
                    times[name].append(self.once(runs[name]))
        return {name: median(t) for name, t in times.items()}, {name: len(t) for name, t in times.items()}

    def once(self, go: Run) -> float:
        self.wait()
        start = time.perf_counter()
        go()
        self.wait()
        return (time.perf_counter() - start) * 1e3

    def breakdown(self, go: Run) -> dict[str, Any]:
        """Device time of three runs by kernel, and what the host asked the driver for meanwhile."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + ([] if self.cpu else [ProfilerActivity.CUDA])
        with torch.no_grad(), best_attention(), profile(activities=activities) as seen:
            for _ in range(3):
                go()
            self.wait()
        kernels: dict[str, list[float]] = {}
        host: dict[str, int] = {}
        for event in seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kernels.setdefault(event.name[:120], []).append(event.time_range.elapsed_us() / 3e3)
            elif event.name.startswith("cu") and any(x in event.name for x in ("Malloc", "Free", "Synchronize")):
                host[event.name] = host.get(event.name, 0) + 1
        top = sorted(kernels.items(), key=lambda x: -sum(x[1]))[:30]
        return {
            "ms": {n: [round(sum(t), 4), len(t) / 3] for n, t in top},
            "total_ms": round(sum(map(sum, kernels.values())), 4), "host": host,
        }  # fmt: skip


def _said(problem: BaseException, most: int) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:most]}"


def _tiny(case: Case) -> bool:
    """Whether the files are of the small models."""
    return next(iter(case.inputs.values())).numel() < 200_000


@contextlib.contextmanager
def best_attention() -> Iterator[None]:
    """torch's attention by cuDNN where that takes it: its fastest on Hopper at these sizes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


@contextlib.contextmanager
def float32(module: Any) -> Iterator[None]:
    """``module`` in float32, and in fp16 again after: its weights are what they were."""
    module.float()
    try:
        yield
    finally:
        module.half()


def neighborhood(parameters: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[N, N]: whether the token of a row sees that of a column, for clamped boxes on a grid; axis by axis, by their
    definition (arXiv:2204.07143, stride arXiv:2504.16922).
    """
    device = next(iter(inputs.values())).device
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    for size, kernel, stride in zip(*(parameters[k] for k in ("grid", "kernel_size", "stride")), strict=True):
        place = torch.arange(size, device=device)
        leader = (place // stride * stride + stride // 2).clamp(max=size - 1)
        first = (leader - kernel // 2).clamp(0, size - kernel)[:, None]
        axis = (place >= first) & (place < first + kernel)
        rows, columns = seen.shape[0] * size, seen.shape[1] * size
        seen = (seen[:, None, :, None] & axis[None, :, None, :]).reshape(rows, columns)
    return seen


@contextlib.contextmanager
def attention_mask(mask: torch.Tensor | None) -> Iterator[None]:
    """torch's attention over as many tokens as ``mask`` has, with it."""
    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention
    met = 0

    def masked(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **named: Any) -> Any:
        nonlocal met
        if query.shape[-2] == key.shape[-2] == len(mask) and attn_mask is None:  # type: ignore[arg-type]
            met += 1
            attn_mask = mask
        return plain(query, key, value, attn_mask, *args, **named)

    if mask is None:
        yield
        return
    functional.scaled_dot_product_attention = masked
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain
    if met == 0:
        raise RuntimeError("no attention over so many tokens went through torch's function: nothing was compared")


def case(
    work: Path, name: str, rounds: int, lock: int | None, cpu: bool, without: Sequence[str], order: Sequence[str],
) -> None:  # fmt: skip
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work.resolve() / "inductor"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each of the cases that get ready at a time
    (model,) = chosen([name])
    Case(model, work, rounds, lock, cpu, without, order or [name]).go()


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{result['gpu']}, torch {result['torch']}, {result['when']}, fp16: medians of alternating rounds, ms a call "
        "as its caller waits; relative L2 to float32 (of a neighborhood: to the model with that mask)", "",
        "| model | ours | with a CUDA graph | otherwise | peers | error: ours, torch fp16 | ours / peer: wanted | is |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    notes = []
    for case in result["cases"]:
        if "ms" not in case or "failed" in case:
            lines.append(f"| {case['name']} | failed: {case.get('failed', '')[:300]} | | | | | | |")
            continue
        ms = case["ms"]
        peers = ", ".join(f"{n} {t:.1f}" for n, t in ms.items() if not n.startswith(("ours", "best")))
        graph = f"{ms['ours graph']:.2f}" if "ours graph" in ms else ""
        others = {n.removeprefix("ours "): t for n, t in ms.items() if n.startswith("ours ") and n != "ours graph"}
        otherwise = ", ".join(f"{n} {t:.2f}" for n, t in others.items())
        wanted = "; ".join(f"{n} <= {w:g}" for n, w in case["wanted"].items())
        reached = "; ".join(f"{case['ratios'][n]:.2f}" if n in case["ratios"] else "-" for n in case["wanted"])
        errors = f"{case['errors']['ours']:.1e}, {case['errors']['eager']:.1e}"
        mark = "" if all(case["met"].values()) else " (missed)"
        cells = (case["name"], f"{ms['ours']:.2f}", graph, otherwise, peers, errors, wanted, f"{reached}{mark}")
        lines.append(f"| {' | '.join(cells)} |")
        notes += [f"{case['name']}, {n}: left out: {why}" for n, why in case["left_out"].items()]
    return "\n".join([*lines, "", *notes])
