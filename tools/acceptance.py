"""The claims of the README, measured: `python tools/acceptance.py` prints one table and exits 1 if a claim fails.

Every model is exported here with seeded weights; every ratio is from paired rounds in this run, against the input file
with ONNX Runtime's full optimisation and the same threads. What detection finds, ONNX's operator tests, left padding
and mutants are commands and tests of this checkout, each with a budget. Run it on an idle machine; ``--only`` takes
parts.
"""

from __future__ import annotations

import argparse
import json
import re
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
from attncompile.measure import default_threads
from attncompile.models import export
from attncompile.pipeline import Options
from attncompile.report import Report, SiteReport

ROOT = Path(__file__).resolve().parent.parent


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
    return speed(report, path, claim)


def speed(report: Report, path: Path, claim: str) -> Row:
    if report.outcome != "replaced":
        same = (Path(report.out) / "model.onnx").read_bytes() == path.read_bytes()
        return Row(claim, "not slower, or the input file", f"{report.outcome}, byte-identical: {same}", same)
    slower = any(t.timing.slower for t in report.timings)
    return Row(claim, "not slower, or the input file", gain_text(report), not slower)


def linear(folder: Path) -> list[Row]:
    """Models with linear attention by policy ``linear``: as exact as the bound says, and not slower than the export."""
    from dataclasses import replace as changed

    from attncompile.models.zoo import check
    from attncompile.models.zoo.table import ENTRIES

    entries = {e.slug: e for e in ENTRIES}
    sana = {
        "settings": {"in_channels": 4, "out_channels": 4, "num_attention_heads": 16, "attention_head_dim": 32,
                     "num_layers": 1, "num_cross_attention_heads": 4, "cross_attention_head_dim": 128,
                     "cross_attention_dim": 512, "caption_channels": 64, "sample_size": 32, "patch_size": 1},
        "inputs": {"hidden_states": (1, 4, 32, 32), "encoder_hidden_states": (1, 77, 64), "timestep": (1,)},
    }  # fmt: skip
    rows: list[Row] = []
    for claim, slug, options, pays in (
        ("EfficientViT-B0 (timm) at 224 px", "timm-efficientvit_b0-dynamo-18-sdpa", {"side": 224}, True),
        ("SANA, one block, 1,024 tokens", "sana-dynamo-18-sdpa", sana, True),
        ("LiT-S/2, 2 blocks, 256 tokens", "", {}, False),
    ):
        path = folder / f"linear-{len(rows)}.onnx"
        if slug:
            entry = entries[slug]
            check.exported(changed(entry, options={**entry.options, **options}), path)
        else:
            export("lit", path, size="small", layers=2)
        report = pipeline.compile(path, Options(policy="linear", target="onnx", out=folder / f"{path.stem}.out"))
        found = [s for s in report.sites if s.site.kind == "linear"]
        kept = [s for s in found if not s.decision.kept and not s.rolled_back]
        alone = ", ".join(f"{site_gain(s):.2f}x" for s in found)
        sites = f"{len(kept)} of {len(found)} sites replaced (alone {alone})"
        error = report.parity.value if report.parity is not None and report.parity.value is not None else 1.0
        wanted = f"sites {'replaced' if pays else 'found'}, <= 1e-5"
        passed = bool(kept if pays else found) and report.exit_code == 0 and error <= 1e-5
        rows.append(Row(f"{claim}: relative L2", wanted, f"{error:.1e}, {sites}", passed))
        rows.append(speed(report, path, f"{claim}: speed"))
    return rows


def vit_b(folder: Path) -> Row:
    report, _, seconds = compiled(folder, "vit", {"target": "onnx"}, size="base")
    passed = report.parity is not None and report.parity.passed and len(report.sites) == 12
    return Row("ViT-B/16, 12 sites: file to verified output", "< 40 s", f"{seconds:.1f} s ({report.outcome})",
               passed and seconds < 40)  # fmt: skip


def search(folder: Path, minutes: float = 10) -> list[Row]:
    """A whole search: GPT-2's shape with seeded weights, which look everywhere, so it is given a budget of 10%."""
    from attncompile.models.inputs import write

    inputs = folder / "search.json"
    write("gpt2", inputs, 16, size="small", tokens=1024)
    options = {"target": "onnx", "inputs": inputs, "max_error": 0.1}
    report, _, seconds = compiled(folder, "gpt2", options, size="small", tokens=1024)
    found = report.search
    claim = "Search, 12 layers of 12 heads of 64, 1,024 tokens, 16 inputs"
    if found is None:
        return [Row(claim, "searched", f"{report.outcome}: {'; '.join(report.warnings)}", False)]
    models, held = len(found.points), max(found.held, default=float("inf"))
    left = 1.0 if found.density is None else found.density
    cores = default_threads()
    return [
        Row(f"{claim}: file to verified output", f"< {minutes:g} min on 2 cores",
            f"{seconds / 60:.1f} min on {cores}, {models} models measured", seconds < 60 * minutes),
        Row(f"{claim}: held-out inputs", "<= 10%", f"{held:.1%}, {left:.0%} of the blocks left",
            held <= 0.1),
    ]  # fmt: skip


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


def tool(*arguments: str, seconds: float) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command of this checkout, its output, and how long it took. It is stopped at three times ``seconds``."""
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * seconds, check=False)
    return done, time.perf_counter() - start


def zoo(budget: float = 60) -> Row:
    """Every committed graph, compared with the truth counted in torch."""
    done, seconds = tool("-m", "attncompile.models.zoo", "--check-graphs", seconds=budget)
    summary = [line for line in done.stdout.splitlines() if re.match(r"\d+ entries, ", line)]
    text = f"{summary[0] if summary else 'no summary'}; {seconds:.0f} s"
    return Row("Zoo: graphs against truth", f"no site missed, none false, < {budget:.0f} s", text,
               done.returncode == 0 and bool(summary) and seconds < budget)  # fmt: skip


def backend_nodes(budget: float = 30) -> list[Row]:
    """ONNX's own tests of its attention operators: what is rewritten gives the expected output."""
    done, _ = tool("tools/backend_nodes.py", "--json", seconds=budget)
    if done.returncode not in (0, 1) or not done.stdout.startswith("{"):
        return [Row("onnx.backend.test nodes", "no rewrite differs", f"exit code {done.returncode}", False)]
    rows = []
    for r in json.loads(done.stdout)["rows"]:
        text = f"{r['recognised']} of {r['number']} recognised, {r['rewritten']} rewritten, {r['differ']} differ"
        ok = r["differ"] == 0 and r["recognised"] >= RECOGNISED[r["tests"]]
        rows.append(Row(f"onnx.backend.test: {r['tests']}", f">= {RECOGNISED[r['tests']]}, none differs", text, ok))
    return rows if len(rows) == len(RECOGNISED) else [*rows, Row("onnx.backend.test nodes", "all", "rows lack", False)]


def detection_time() -> list[Row]:
    """Llama-shaped graphs: 32 layers in seconds, and no more time for a node of a deep model than of a shallow one."""
    done, _ = tool("tools/detection_time.py", "--layers", "8", "32", "64", "--repeats", "3", "--format", "json",
                   seconds=60)  # fmt: skip
    if done.returncode:
        return [Row("Detection time", "measured", done.stderr.strip()[-80:], False)]
    shallow, usual, deep = json.loads(done.stdout)
    growth = (deep["seconds"] / deep["nodes"]) / (shallow["seconds"] / shallow["nodes"])
    return [
        Row("Detection, 32 layers, weights external", "< 10 s", f"{usual['seconds']:.2f} s, {usual['nodes']} nodes",
            usual["seconds"] < 10),
        Row("Detection, a node of 64 layers against one of 8", "<= 1.5 times the time", f"{growth:.2f} times",
            growth <= 1.5),
    ]  # fmt: skip


def tests(claim: str, *paths: str, budget: float) -> Row:
    """Tests that are a claim of their own: all pass, and none is skipped."""
    done, seconds = tool("-m", "pytest", "-q", "-rs", *paths, seconds=budget)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    passed = re.search(r"(\d+) passed", summary)
    skipped = re.search(r"(\d+) skipped", summary)
    ok = done.returncode == 0 and passed is not None and skipped is None and seconds < budget
    return Row(claim, f"all pass, < {budget:.0f} s", summary, ok)


RECOGNISED = {
    "Attention": 75, "Attention expanded": 75, "FlexAttention": 10, "FlexAttention expanded": 10,
    "LinearAttention": 14, "LinearAttention expanded": 0,
}  # fmt: skip
"""How many of ONNX's tests are recognised at least. The others give scores out or change the weights, which a
replacement could not; LinearAttention is written out as a Scan."""

CLAIMS = {
    "large": lambda f: [large_weights(f)],  # first: it reads the largest child's memory
    "mistral-512": lambda f: mistral(f, 512, 1.8, 3.0),
    "mistral-256": lambda f: mistral(f, 256, 2.1, 5.0),
    "vit-s": lambda f: [not_slower(f, "vit", "ViT-S/16 at 224 px", size="small")],
    "minilm": lambda f: [not_slower(f, "minilm", "MiniLM (trained) at 128 tokens", size="base", tokens=128)],
    "vit-b": lambda f: [vit_b(f)],
    "linear": linear,
    "search": search,
    "engines": lambda f: [
        engine(f, "vit", "TensorRT-RTX fp16: ViT-S/16", size="small"),
        engine(f, "dit", "TensorRT-RTX fp16: DiT-XL/2 blocks", size="xl"),
        engine(f, "mistral", "TensorRT-RTX fp16: Mistral, window 512", size="bench", tokens=4096, window=512),
    ],
    "zoo": lambda f: [zoo()],
    "backend-nodes": lambda f: backend_nodes(),
    "detection-time": lambda f: detection_time(),
    "left-padding": lambda f: [
        tests("GPT-2 and left-padded BERT, end to end", "tests/models/test_zoo_end_to_end.py", budget=60)
    ],
    "mutants": lambda f: [
        tests(
            "Mutants: refused, or right as shown by running",
            "tests/passes/test_mutants.py",
            "tests/passes/test_mutants_of_forms.py",
            budget=180,
        )
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
