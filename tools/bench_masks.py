"""What recovered masks are worth: `python tools/bench_masks.py` prints one table and exits 1 if a claim fails.

Each model is the attention op alone (no projections), written as exporters write it: scaled products, a stored mask
that is added, softmax, product. Each goes through the compiler's pipeline, or with `--direct` straight through the
mechanism.
Ratios are from paired rounds against the input file with ONNX Runtime's full optimisation and the same threads; peak
memory is that of a process that loads the file and runs it three times. Run it on an idle machine.
`--linear` prints time and memory of windowed attention at growing lengths instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from attncompile import measure, pipeline
from attncompile.core.errors import AttncompileError
from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Candidate, Mechanism
from attncompile.core.pattern import BlockSparse, GridWindow
from attncompile.core.site import AttentionSite, Operand
from attncompile.pipeline import Options
from attncompile.plugins import mechanisms

HEAD_DIM = 64
ERROR = 1e-5
MEMORY = 0.5


@dataclass(frozen=True)
class Spec:
    """``heads`` of 64 over ``tokens``; ``visible`` makes the mask [tokens, tokens]; ``part`` what it is."""

    heads: int
    tokens: int
    visible: Callable[[], np.ndarray]
    part: Callable[[np.ndarray], MaskPart]
    wanted: float
    grid: str | None = None


@dataclass(frozen=True)
class Row:
    name: str
    wanted: float
    timing: measure.Timing
    error: float
    peak: tuple[float, float]
    how: str

    @property
    def ok(self) -> bool:
        small = self.wanted <= 1 or 0 < self.peak[1] <= MEMORY * self.peak[0]
        fast = self.timing.gain >= self.wanted if self.wanted > 1 else not self.timing.slower
        return small and fast and self.error <= ERROR


def distance(tokens: int) -> np.ndarray:
    """Query minus key."""
    return np.arange(tokens, dtype=np.int32)[:, None] - np.arange(tokens, dtype=np.int32)[None, :]


def neighborhood(shape: tuple[int, ...], kernel: tuple[int, ...]) -> np.ndarray:
    """The kernel's box around each token, moved inward at the borders, axis by axis."""
    seen = np.ones((1, 1), bool)
    for size, width in zip(shape, kernel, strict=True):
        start = np.clip(np.arange(size) - width // 2, 0, size - width)[:, None]
        place = np.arange(size)[None, :]
        seen = np.kron(seen, (place >= start) & (place < start + width))
    return np.asarray(seen, bool)


def global_and_local(tokens: int, window: int, count: int) -> np.ndarray:
    seen = abs(distance(tokens)) <= window
    seen[:count] = seen[:, :count] = True
    return np.asarray(seen)


def random_blocks(tokens: int, block: int) -> np.ndarray:
    """BigBird's: neighbours, first and last, and three at random."""
    count = tokens // block
    rng = np.random.default_rng(0)
    seen = abs(distance(count)) <= 1
    seen[[0, -1]] = seen[:, [0, -1]] = True
    for row in seen:
        row[rng.choice(count, 3, replace=False)] = True
    return np.kron(seen, np.ones((block, block), bool))


def documents(lengths: tuple[int, ...]) -> np.ndarray:
    of = np.repeat(np.arange(len(lengths)), lengths)
    return np.tril(of[:, None] == of[None, :])


def swin(side: int, window: int, shift: int) -> np.ndarray:
    y, x = np.divmod(np.arange(side * side), side)
    of = (y + shift) // window * side + (x + shift) // window
    return np.asarray(of[:, None] == of[None, :])


def stored(visible: np.ndarray) -> MaskPart:
    return MaskPart("block_sparse", Certificate("constant", "built here"), pattern=BlockSparse.of(visible, 64))


def windowed(left: int) -> MaskPart:
    return MaskPart("window", Certificate("constant", "built here"), left, 0)


def on_grid(shape: tuple[int, ...], kernel: tuple[int, ...]) -> MaskPart:
    ones = (1,) * len(shape)
    pattern = GridWindow(TokenGrid(shape), kernel, ones, ones, (False,) * len(shape))
    return MaskPart("neighborhood", Certificate("constant", "built here"), pattern=pattern)


SPECS = {
    "2-D 64x64, window 15x15": Spec(6, 4096, lambda: neighborhood((64, 64), (15, 15)),
                                    lambda _: on_grid((64, 64), (15, 15)), 4.0, "64x64"),
    "causal window of 512 in 8,192": Spec(8, 8192, lambda: (distance(8192) >= 0) & (distance(8192) < 512),
                                          lambda _: windowed(511), 6.0),
    "3-D 8x24x24, window 3x9x9": Spec(6, 4608, lambda: neighborhood((8, 24, 24), (3, 9, 9)),
                                      lambda _: on_grid((8, 24, 24), (3, 9, 9)), 4.0, "8x24x24"),
    "256 to both sides and 1 global of 4,096": Spec(12, 4096, lambda: global_and_local(4096, 256, 1), stored, 1.0),
    "blocks of BigBird in 4,096": Spec(12, 4096, lambda: random_blocks(4096, 64), stored, 1.0),
    "7 causal documents in 4,096": Spec(8, 4096, lambda: documents((1000, 700, 64, 333, 1200, 99, 700)), stored, 1.0),
    "shifted windows of 7x7 in 56x56": Spec(3, 3136, lambda: swin(56, 7, 3), stored, 1.0),
    "prefix of 1,024 in 4,096, causal": Spec(8, 4096, lambda: (distance(4096) >= 0) | (np.arange(4096) < 1024), stored,
                                             1.0),
}  # fmt: skip


def masked_dense(spec: Spec, visible: np.ndarray) -> onnx.ModelProto:
    """The square root of the scale on both operands, as torch exports scaled_dot_product_attention."""
    root = np.float32(HEAD_DIM**-0.25)
    stored_values = {"root": root, "mask": np.where(visible, np.float32(0), np.float32(-np.inf))[None, None]}
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("Mul", ["q", "root"], ["qs"]), helper.make_node("Mul", ["kt", "root"], ["ks"]),
        helper.make_node("MatMul", ["qs", "ks"], ["scores"]), helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["o"]),
    ]  # fmt: skip
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in stored_values.items()]
    return _model(spec, nodes, constants, 18)


def _model(
    spec: Spec, nodes: list[onnx.NodeProto], constants: list[TensorProto], opset: int,
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:  # fmt: skip
    shape = [1, spec.heads, spec.tokens, HEAD_DIM]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkvo"]
    graph = helper.make_graph(nodes, "attention", values[:3], values[3:], constants)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("attncompile", 1)] if functions else [])]
    return helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=10)


def site_of(spec: Spec, part: MaskPart) -> AttentionSite:
    return AttentionSite(
        id="attention", form="matmul", query=Operand("q", "BHND"), key=Operand("k", "BHND"), value=Operand("v", "BHND"),
        output=Operand("o", "BHND"), batch=1, heads=spec.heads, kv_heads=spec.heads, head_dim=HEAD_DIM,
        value_dim=HEAD_DIM, query_length=spec.tokens, key_length=spec.tokens, scale=HEAD_DIM**-0.5,
        mask=MaskFacts((part,)), dtype="float32", softmax_dtype="float32", nodes=(), interior=(),
    )  # fmt: skip


def direct(spec: Spec, part: MaskPart) -> tuple[onnx.ModelProto, str]:
    """The first exact candidate of any mechanism in place of the site."""
    site = site_of(spec, part)
    for mechanism in mechanisms():
        for found in mechanism.exact_candidates(site):
            if isinstance(found, Candidate):
                return lowered(spec, site, mechanism, found), f"{mechanism.name}: {found.reason}"
    raise AttncompileError(f"no mechanism takes {part.kind}", "run attncompile explain on the model")


def lowered(spec: Spec, site: AttentionSite, mechanism: Mechanism, candidate: Candidate) -> onnx.ModelProto:
    made = mechanism.lower(site, candidate.parameters, 18)
    return _model(spec, list(made.nodes), list(made.initializers), 18, made.functions)


def compiled(spec: Spec, path: Path, out: Path) -> tuple[Path, str]:
    """Through detection, policy, gates and verification. Raises ``AttncompileError`` where nothing is replaced."""
    report = pipeline.compile(path, Options(policy="exact", target="onnx", out=out, grid=spec.grid))
    if report.outcome != "replaced":
        why = "; ".join([s.rolled_back or s.decision.reason for s in report.sites]
                        + [m.reason for m in report.near_misses])  # fmt: skip
        raise AttncompileError(f"{report.outcome}: {why}", "run attncompile explain on the model")
    (site,) = report.sites
    return out / "model.onnx", f"{site.decision.mechanism}: {site.decision.reason}"


def feed(spec: Spec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal((1, spec.heads, spec.tokens, HEAD_DIM), np.float32) for n in "qkv"}


def peak(path: Path, spec: Spec) -> float:
    """MiB of a process that runs the file, over one that has only imported everything and made the inputs."""
    sizes = [str(spec.heads), str(spec.tokens)]
    command = [sys.executable, __file__, "--peak-of", str(path), *sizes]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_here(path: Path, heads: int, tokens: int) -> float:
    inputs = feed(Spec(heads, tokens, lambda: np.ones((1, 1), bool), stored, 1.0))
    before = _high_water()
    session = measure.open_session(path)
    for _ in range(3):
        session.run(None, inputs)
    return (_high_water() - before) / 1024


def _high_water() -> float:
    """The most KiB that this process held. Not ``getrusage``: a child starts with its parent's maximum there."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def row(name: str, folder: Path, straight: bool, rounds: int | None) -> Row:
    spec = SPECS[name]
    visible = spec.visible()
    before = folder / "before.onnx"
    onnx.save(masked_dense(spec, visible), before)
    if straight:
        model, how = direct(spec, spec.part(visible))
        after = folder / "after.onnx"
        onnx.save(model, after)
    else:
        after, how = compiled(spec, before, folder / "out")
    inputs = feed(spec)
    sessions = [measure.open_session(p) for p in (before, after)]
    want, got = (s.run(None, inputs)[0].astype(np.float64) for s in sessions)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    timing = measure.paired(sessions[0], sessions[1], inputs, rounds=rounds, budget_seconds=20.0)
    del sessions
    return Row(name, spec.wanted, timing, error, (peak(before, spec), peak(after, spec)), how)


def linear(folder: Path) -> Table:
    """A causal window of 512, 8 heads: our body alone, since the masked form does not fit at the last length."""
    table = Table("tokens", "ms", "ms a token", "peak MiB", "KiB a token", title="causal window of 512, 8 heads of 64")
    for tokens in (2048, 4096, 8192, 16384):
        spec = Spec(8, tokens, lambda: np.ones((1, 1), bool), lambda _: windowed(511), 1.0)
        model, _ = direct(spec, windowed(511))
        path = folder / f"{tokens}.onnx"
        onnx.save(model, path)
        session, inputs = measure.open_session(path), feed(spec)
        timing = measure.paired(session, session, inputs, rounds=9)
        used = peak(path, spec)
        took = min(timing.original, timing.ours) * 1e3
        table.add_row(
            f"{tokens:,}", f"{took:.1f}", f"{took / tokens:.4f}", f"{used:.0f}", f"{used * 1024 / tokens:.1f}"
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these", default=[""])
    parser.add_argument("--direct", action="store_true", help="leave detection, policy and gates out")
    parser.add_argument("--linear", action="store_true", help="time and memory at growing lengths")
    parser.add_argument("--rounds", type=int, help="paired rounds (default: until the interval is decisive, or 20 s)")
    parser.add_argument("--peak-of", nargs=3, metavar=("FILE", "HEADS", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak_of:
        print(_peak_here(Path(given.peak_of[0]), int(given.peak_of[1]), int(given.peak_of[2])))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        if given.linear:
            Console(width=140).print(linear(Path(name)))
            return 0
        table = Table("mask", "before", "after", "gain", "wanted", "rel. L2", "peak MiB", "", "by")
        for label in [s for s in SPECS if any(part in s for part in given.only)]:
            print(f"{label} ...", file=sys.stderr, flush=True)
            folder = Path(tempfile.mkdtemp(dir=name))
            wanted = SPECS[label].wanted
            bound = f">= {wanted:g}x" if wanted > 1 else "not slower"
            try:
                r = row(label, folder, given.direct, given.rounds)
            except AttncompileError as error:
                table.add_row(label, "", "", "", bound, "", "", "FAILED", error.message)
                failed += 1
                continue
            t = r.timing
            table.add_row(
                label, f"{t.original * 1e3:.0f} ms", f"{t.ours * 1e3:.0f} ms",
                f"{t.gain:.2f}x [{1 / t.high:.2f}, {1 / max(t.low, 1e-9):.2f}]", bound, f"{r.error:.1e}",
                f"{r.peak[0]:.0f} -> {r.peak[1]:.0f}", "ok" if r.ok else "FAILED", r.how,
            )  # fmt: skip
            failed += not r.ok
    Console(width=180).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
