"""What the end-to-end benchmark needs and a GPU does not: kernels compiled, models built, exported, rewritten.

``prepare`` needs Triton, and its result travels. ``export`` runs beside the GPU's other work, as many steps at a time
as it is told, each in a process of its own; one that fails is recorded and stops only what needs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e_models import Model, chosen, half

HERE = Path(__file__).parent


VARIANTS: Mapping[str, Mapping[str, bool]] = {
    "ours": {"fusions": True, "half_norms": False}, "ours plain": {"fusions": False, "half_norms": False},
    "ours norms": {"fusions": True, "half_norms": True},
}  # fmt: skip
"""What is fused around the sites; "ours norms" is what ``attncompile`` writes by default. Kernels of packed operands
are others: each has a bundle of its own.
"""


def folder_of(variant: str) -> str:
    """Where ``OUT/`` of a variant lies in the folder of its model."""
    return variant.replace("ours", "out").replace(" ", "-")


def prepare(out: Path, names: Sequence[str], architectures: Sequence[int], tiny: bool) -> None:
    """Bundles of the kernels: two layers of each model are exported in fp16 and rewritten; all ask for the same."""
    import shutil

    from e2e_ours import export_onnx, replaced, write

    from attncompile.console import SilentProgress
    from attncompile.kernel_kit import Kit

    for model in chosen(names):
        module, inputs = model.build(tiny, 2)
        with tempfile.TemporaryDirectory() as scratch:
            path = export_onnx(module.half(), half(inputs), Path(scratch) / "model.onnx", 18, model.tokens)
            proto, source, said, profile = replaced(path, model, tiny)
            print(f"{model.name}: {'; '.join(said)}", flush=True)
            shutil.rmtree(out / model.name, ignore_errors=True)
            for variant, fused in VARIANTS.items():
                kit = Kit(tuple(architectures) or (90,), SilentProgress())
                made = write(proto, source, kit, Path(scratch) / folder_of(variant), profile, **fused)
                shutil.copytree(made / "bundle", out / model.name / folder_of(variant))


@dataclass
class Step:
    """``name`` names the file of its result too; ``of`` is the folder's name."""

    of: str
    name: str
    after: tuple[str, ...] = ()
    process: Any = None
    started: float = 0.0
    done: bool = False
    failed: str = field(default="")

    @property
    def key(self) -> str:
        return f"{self.of}/{self.name}"


def steps(models: Sequence[Model]) -> list[Step]:
    """Longest chains first."""
    found: dict[str, Step] = {}
    for model in sorted(models, key=lambda m: ("mistral", "so400m", "dinov2", "wan").index(m.of)):
        for step in (
            Step(model.of, "module"),
            Step(model.of, "opset18", (f"{model.of}/module",)),
            Step(model.name, "ours", (f"{model.of}/opset18",)),
        ):
            found.setdefault(step.key, step)
    for model in models:
        for name, needs in (("opset 23", "module"), ("optimizer", "opset18"), ("onnxscript", "opset18")):
            if f"onnxruntime {name}" not in model.left_out:
                step = Step(model.of, name.replace(" ", ""), (f"{model.of}/{needs}",))
                found.setdefault(step.key, step)
    return list(found.values())


def export(bundles: Path, work: Path, names: Sequence[str], tiny: bool, processes: int) -> int:
    """Run all steps; lines of what became of each go to stdout. Returns how many failed."""
    work.mkdir(parents=True, exist_ok=True)
    todo = steps(chosen(names))
    by_key = {step.key: step for step in todo}
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    while any(not step.done for step in todo):
        for step in todo:
            needs = [by_key[k] for k in step.after]
            broken = [n for n in needs if n.failed]
            if not step.done and step.process is None and broken:
                step.done, step.failed = True, f"{broken[0].key} failed"
                _record(work, step, 0.0)
            running = sum(s.process is not None and not s.done for s in todo)
            if step.done or step.process is not None or running >= processes or not all(n.done for n in needs):
                continue
            log = _file(work, step, "log")
            log.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(HERE), "e2e", "step", str(bundles), step.name, "--only", step.of,
                       "--work", str(work), *(["--tiny"] if tiny else [])]  # fmt: skip
            with log.open("w") as to:
                step.process = subprocess.Popen(command, stdout=to, stderr=subprocess.STDOUT, env=environment)
            step.started = time.perf_counter()
        for step in todo:
            if step.process is not None and not step.done and step.process.poll() is not None:
                step.done = True
                if step.process.returncode != 0:
                    text = _file(work, step, "log").read_text(errors="replace").split("\n")
                    step.failed = next((line for line in reversed(text) if line.strip()), "it said nothing")[:400]
                _record(work, step, time.perf_counter() - step.started)
        time.sleep(0.05)
    return sum(bool(step.failed) for step in todo)


def _file(work: Path, step: Step, suffix: str) -> Path:
    return work / step.of / f"{step.name}.{suffix}"


def _record(work: Path, step: Step, seconds: float) -> None:
    place = _file(work, step, "json")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"failed": step.failed, "seconds": round(seconds, 1)}), encoding="utf-8")
    print(f"{step.key}: {step.failed or 'done'}, {seconds:.1f} s", flush=True)


def failure(work: Path, of: str, name: str) -> str:
    """Why a step has no result, or an empty text."""
    try:
        found: Mapping[str, Any] = json.loads((work / of / f"{name}.json").read_text(encoding="utf-8"))
    except OSError:
        return f"'e2e export' has not made {of}/{name}"
    return str(found["failed"])


def step(bundles: Path, work: Path, of: str, name: str, tiny: bool) -> None:
    """One step, in this process; an exception is its failure."""
    import torch

    if name == "ours":
        (model,) = chosen([of])
        return _ours(bundles, work, model, tiny)
    model = next(m for m in chosen([]) if m.of == of)
    folder = work / of
    folder.mkdir(parents=True, exist_ok=True)
    if name == "module":
        module, inputs = model.build(tiny, None)
        torch.save((module.half(), half(inputs)), folder / "module.pt")
    elif name in ("opset18", "opset23"):
        from e2e_ours import export_onnx

        module, inputs = load(work, of)
        export_onnx(module, inputs, folder / name / "model.onnx", int(name[-2:]), model.tokens)
    elif name == "optimizer":
        optimized(folder / "opset18" / "model.onnx", folder / name / "model.onnx", model)
    else:
        fused(folder / "opset18" / "model.onnx", folder / name / "model.onnx")
    return None


def load(work: Path, of: str) -> tuple[Any, dict[str, Any]]:
    """The module in fp16 and its inputs, on the CPU."""
    import torch

    found: tuple[Any, dict[str, Any]] = torch.load(work / of / "module.pt", weights_only=False, mmap=True)
    return found


def _ours(bundles: Path, work: Path, model: Model, tiny: bool) -> None:
    from e2e_ours import BundleKit, replaced, write

    from attncompile.kernels.bundle import Bundle

    proto, source, said, profile = replaced(work / model.of / "opset18" / "model.onnx", model, tiny)
    for variant, fused in VARIANTS.items():
        place = bundles / model.name / folder_of(variant)
        (architecture,) = {e.architecture for e in Bundle.open(place).entries.values()}
        write(proto, source, BundleKit(place, architecture), work / model.name / folder_of(variant), profile, **fused)
    (work / model.name / "sites.json").write_text(json.dumps(said), encoding="utf-8")


def optimized(path: Path, place: Path, model: Model) -> None:
    """ONNX Runtime's transformers optimizer, as its users call it for such models."""
    from onnxruntime.transformers.optimizer import optimize_model

    made = optimize_model(str(path), model_type="gpt2" if model.causal else "vit", opt_level=0, use_gpu=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    made.save_model_to_file(str(place), use_external_data_format=True)


def fused(path: Path, place: Path) -> None:
    """onnxscript's fusions for ONNX Runtime."""
    import onnxscript.ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    made = optimize_for_ort(ir.load(str(path)))
    place.parent.mkdir(parents=True, exist_ok=True)
    ir.save(made[0] if isinstance(made, tuple) else made, str(place), external_data="model.data")
