"""The claims of the README, measured: `python tools/acceptance.py` prints one table and exits 1 if a claim fails.

Every model is exported here with seeded weights; every ratio is from paired rounds in this run, against the input file
with ONNX Runtime's full optimisation and the same threads. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from attncompile import pipeline
from attncompile.models import export
from attncompile.pipeline import Options
from attncompile.report import Report, SiteReport


@dataclass(frozen=True)
class Row:
    claim: str
    wanted: str
    measured: str
    ok: bool


def compiled(folder: Path, name: str, options: dict[str, Any], **export_options: Any) -> tuple[Report, Path, float]:
    """Export, compile with policy sparse, and the seconds from file to verified output."""
    path = folder / f"{name}-{'-'.join(str(v) for v in export_options.values())}.onnx"
    export(name, path, **export_options)
    start = time.perf_counter()
    out = folder / f"{path.stem}.out"
    report = pipeline.compile(path, Options(policy="sparse", out=out, **options))
    return report, path, time.perf_counter() - start


def gain_text(report: Report) -> str:
    timing = report.timings[0].timing
    return f"{timing.gain:.2f}x [{1 / timing.high:.2f}, {1 / timing.low:.2f}]"


def site_gain(site: SiteReport) -> float:
    return site.measured_gain or 0.0


def mistral(folder: Path, window: int, model_gain: float, attention_gain: float) -> list[Row]:
    report, _, _ = compiled(folder, "mistral", {"target": "onnx"}, size="bench", tokens=4096, window=window)
    claim = f"Mistral-shaped, 2 layers, 4,096 tokens, window {window}"
    if not report.timings or report.parity is None or report.parity.value is None:
        return [Row(claim, "replaced", report.outcome, False)]
    sites = [site_gain(s) for s in report.sites]
    error = report.parity.value
    return [
        Row(f"{claim}: model", f">= {model_gain}x", gain_text(report), report.timings[0].timing.gain >= model_gain),
        Row(f"{claim}: attention", f">= {attention_gain}x", ", ".join(f"{s:.2f}x" for s in sites),
            min(sites) >= attention_gain),
        Row(f"{claim}: relative L2", "<= 1e-5", f"{error:.1e}", error <= 1e-5),
    ]  # fmt: skip


def not_slower(folder: Path, name: str, claim: str, **export_options: Any) -> Row:
    report, path, _ = compiled(folder, name, {"target": "onnx"}, **export_options)
    if report.outcome != "replaced":
        same = (Path(report.out) / "model.onnx").read_bytes() == path.read_bytes()
        return Row(claim, "not slower, or the input file", f"{report.outcome}, byte-identical: {same}", same)
    slower = any(t.timing.slower for t in report.timings)
    return Row(claim, "not slower, or the input file", gain_text(report), not slower)


def vit_b(folder: Path) -> Row:
    report, _, seconds = compiled(folder, "vit", {"target": "onnx"}, size="base")
    passed = report.parity is not None and report.parity.passed and len(report.sites) == 12
    return Row("ViT-B/16, 12 sites: file to verified output", "< 40 s", f"{seconds:.1f} s ({report.outcome})",
               passed and seconds < 40)  # fmt: skip


def engine(folder: Path, name: str, claim: str, **export_options: Any) -> Row:
    options = {"target": "tensorrt-rtx", "precision": "fp16"}
    report, _, _ = compiled(folder, name, options, **export_options)
    built = [t for t in report.targets if t.name == "tensorrt-rtx"]
    if not built:
        return Row(claim, "engine, attention fused", "; ".join(report.failures), False)
    (target,) = built
    size = (target.engine_size or 0) / 2**20
    text = f"{target.attention_fused} of {target.attention_layers} fused, {size:.0f} MiB, {target.seconds:.1f} s"
    fused = bool(target.attention_layers) and target.attention_fused == target.attention_layers
    return Row(claim, "engine, attention fused", text, fused)


def large_weights(folder: Path) -> Row:
    """A small ViT with 13 GB of further weights in a sparse file: inspected without reading them."""
    path = folder / "large.onnx"
    export("vit", path, size="tiny")
    model = onnx.load(path)
    rows = 13 * (1 << 30) // 400
    tensor = TensorProto(name="huge", data_type=1, dims=[rows, 100], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "large.bin"), ("offset", "0"), ("length", str(rows * 400))):
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    model.graph.node.append(helper.make_node("Identity", ["huge"], ["unused"]))
    path.write_bytes(model.SerializeToString())
    with (folder / "large.bin").open("wb") as handle:
        handle.truncate(rows * 400)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "attncompile", "inspect", str(path)], check=True, capture_output=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return Row("13 GB of external data: inspect", "< 60 s, < 1.5 GB", f"{seconds:.1f} s, {peak:.2f} GiB",
               seconds < 60 and peak < 1.4)  # fmt: skip


CLAIMS = {
    "large": lambda f: [large_weights(f)],  # first: it reads the largest child's memory
    "mistral-512": lambda f: mistral(f, 512, 1.8, 3.0),
    "mistral-256": lambda f: mistral(f, 256, 2.1, 5.0),
    "vit-s": lambda f: [not_slower(f, "vit", "ViT-S/16 at 224 px", size="small")],
    "minilm": lambda f: [not_slower(f, "minilm", "MiniLM (trained) at 128 tokens", size="base", tokens=128)],
    "vit-b": lambda f: [vit_b(f)],
    "engines": lambda f: [
        engine(f, "vit", "TensorRT-RTX fp16: ViT-S/16", size="small"),
        engine(f, "dit", "TensorRT-RTX fp16: DiT-XL/2 blocks", size="xl"),
        engine(f, "mistral", "TensorRT-RTX fp16: Mistral, window 512", size="bench", tokens=4096, window=512),
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(CLAIMS), default=list(CLAIMS))
    chosen = parser.parse_args().only
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in CLAIMS:
            if name in chosen:
                print(f"{name} ...", file=sys.stderr, flush=True)
                rows += CLAIMS[name](Path(folder))
    table = Table("claim", "wanted", "measured", "")
    for row in rows:
        table.add_row(row.claim, row.wanted, row.measured, "ok" if row.ok else "FAILED")
    Console(width=140).print(table)
    return 0 if all(r.ok for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
