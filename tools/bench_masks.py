"""What recovered masks are worth: `python tools/bench_masks.py` prints one table; with `--check` it exits 1 if a target
is missed.

Most models are the attention op alone (no projections), written as exporters write it: scaled products, a stored mask
that is added, softmax, product; or keys and values unfolded into windows. Two are made by torch: Swin-T as a whole, and
a Longformer layer, which takes minutes and is left out unless `--only` names it. Each goes through the compiler's
pipeline, or with `--direct` straight through the mechanism.
Ratios are from paired rounds against the input file with ONNX Runtime's full optimisation and the same threads; peak
memory is that of a process that loads the file and runs it three times, over one that only imports. A target is met
where the gain is reached (or the ratio's 95% interval is not above 1.02), peak memory is at most half of the input
file's where there is a gain to reach, and the relative L2 is at most 1e-5. Run it on an idle machine.
`--linear` prints time and memory of windowed attention at growing lengths instead; `--rtx` builds the replaced models
as TensorRT-RTX engines in fp16 and says how much of their attention is fused.
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
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from attncompile import measure, pipeline
from attncompile.core.errors import AttncompileError
from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import Candidate, Mechanism
from attncompile.core.pattern import BlockSparse, GridWindow
from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.load import load
from attncompile.passes.replace import apply
from attncompile.passes.symbols import profile_for
from attncompile.pipeline import Options
from attncompile.plugins import mechanisms
from attncompile.targets import base

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
    model: Callable[[Spec], onnx.ModelProto] | None = None
    torch: Callable[[Path], dict[str, np.ndarray]] | None = None
    """Writes the file and gives its inputs, where it is no op alone; needs torch and transformers."""
    optional: bool = False


@dataclass(frozen=True)
class Row:
    name: str
    wanted: float
    timing: measure.Timing
    error: float
    peak: tuple[float, float]
    how: str
    same: bool = False
    """The file that came out is byte for byte the one that went in: as fast by definition, whatever was measured."""

    @property
    def ok(self) -> bool:
        if self.same:
            return self.wanted <= 1
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


def unfolded(spec: Spec, side: int = 64, kernel: int = 15) -> onnx.ModelProto:
    """Keys and values as torch's unfold is exported: two Gathers on the grid, borders repeated (clamped windows)."""
    inner, half, width = side - kernel + 1, kernel // 2, spec.heads * HEAD_DIM
    stored_values = {
        "grid": [0, width, side, side], "index": np.arange(kernel)[:, None] + np.arange(inner)[None],
        "flat": [0, width * kernel**2, inner, inner], "pads": [0, 0, half, half, 0, 0, half, half],
        "split": [0, spec.heads, HEAD_DIM, kernel**2, spec.tokens], "one": [3], "scale": np.float32(HEAD_DIM**-0.5),
    }  # fmt: skip
    nodes = []
    for x in "kv":
        nodes += [
            helper.make_node("Transpose", [x], [f"{x}1"], perm=[0, 1, 3, 2]),
            helper.make_node("Reshape", [f"{x}1", "grid"], [f"{x}2"]),
            helper.make_node("Gather", [f"{x}2", "index"], [f"{x}3"], axis=2),
            helper.make_node("Gather", [f"{x}3", "index"], [f"{x}4"], axis=4),
            helper.make_node("Transpose", [f"{x}4"], [f"{x}5"], perm=[0, 1, 2, 4, 3, 5]),
            helper.make_node("Reshape", [f"{x}5", "flat"], [f"{x}6"]),
            helper.make_node("Pad", [f"{x}6", "pads"], [f"{x}7"], mode="edge"),
            helper.make_node("Reshape", [f"{x}7", "split"], [f"{x}8"]),
            helper.make_node("Transpose", [f"{x}8"], [f"{x}9"], perm=[0, 1, 4, 3, 2]),
        ]
    nodes += [
        helper.make_node("Mul", ["q", "scale"], ["qs"]), helper.make_node("Unsqueeze", ["qs", "one"], ["q1"]),
        helper.make_node("Transpose", ["k9"], ["kt"], perm=[0, 1, 2, 4, 3]),
        helper.make_node("MatMul", ["q1", "kt"], ["scores"]), helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v9"], ["o1"]), helper.make_node("Squeeze", ["o1", "one"], ["o"]),
    ]  # fmt: skip
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in stored_values.items()]
    return _model(spec, nodes, constants, 18)


def swin_t(path: Path) -> dict[str, np.ndarray]:
    """The whole Swin-T of 224 pixels, seeded weights."""
    from attncompile.models.export import export

    made = export("swin", path, size="small")
    return {name: value.numpy() for name, value in made.built.inputs.items()}


def longformer(path: Path) -> dict[str, np.ndarray]:
    """One layer of Longformer-base (with its projections) at 4,096 tokens, seeded weights."""
    import torch
    from transformers import LongformerConfig, LongformerModel

    torch.manual_seed(0)
    config = LongformerConfig(vocab_size=64, num_hidden_layers=1, attention_window=[512], max_position_embeddings=4104,
                              pad_token_id=0, sep_token_id=2, onnx_export=True)  # fmt: skip
    model = LongformerModel(config, add_pooling_layer=False).eval()

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids).last_hidden_state

    ids = torch.randint(3, 64, (1, 4096))
    torch.onnx.export(Hidden(), (ids,), str(path), dynamo=False, opset_version=17, input_names=["ids"])
    return {"ids": ids.numpy()}


SPECS = {
    "unfold 64x64, 15x15": Spec(6, 4096, lambda: np.ones((1, 1), bool), lambda _: on_grid((64, 64), (15, 15)),
                                       3.0, model=unfolded),
    "Swin-T, 224 pixels": Spec(3, 3136, lambda: np.ones((1, 1), bool), stored, 1.0, torch=swin_t),
    "Longformer layer, 4,096": Spec(12, 4096, lambda: np.ones((1, 1), bool), stored, 1.5, torch=longformer,
                                    optional=True),
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
    if report.outcome != "replaced" and spec.torch is None:
        why = "; ".join([s.rolled_back or s.decision.reason for s in report.sites]
                        + [m.reason for m in report.near_misses])  # fmt: skip
        raise AttncompileError(f"{report.outcome}: {why}", "run attncompile explain on the model")
    done = [s.decision for s in report.sites if s.replaced]
    how = f"{len(done)} of {len(report.sites)} sites replaced"
    return out / "model.onnx", "; ".join(dict.fromkeys([how, *(f"{d.mechanism}: {d.reason}" for d in done)]))


def feed(spec: Spec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal((1, spec.heads, spec.tokens, HEAD_DIM), np.float32) for n in "qkv"}


def peak(path: Path, inputs: dict[str, np.ndarray]) -> float:
    """MiB of a process that runs the file, over one that has only imported everything and read the inputs."""
    given = path.parent / "inputs.npz"
    np.savez(given, **inputs)
    command = [sys.executable, __file__, "--peak-of", str(path), str(given)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_here(path: Path, given: Path) -> float:
    with np.load(given) as stored_inputs:
        inputs = dict(stored_inputs)
    before = _high_water()
    session = measure.open_session(path)
    for _ in range(3):
        session.run(None, inputs)
    return (_high_water() - before) / 1024


def _high_water() -> float:
    """The most KiB that this process held. Not ``getrusage``: a child starts with its parent's maximum there."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def gain_text(t: measure.Timing) -> str:
    """The gain and its 95% interval; too few rounds give none."""
    known = t.low > 0 and np.isfinite(t.high) and t.high > 0
    return f"{t.gain:.2f} ({1 / t.high:.2f}..{1 / t.low:.2f})" if known else f"{t.gain:.2f} (?)"


def row(name: str, folder: Path, straight: bool, rounds: int | None) -> Row:
    spec = SPECS[name]
    before = folder / "before.onnx"
    inputs = spec.torch(before) if spec.torch else feed(spec)
    visible = spec.visible()
    if spec.torch is None:
        onnx.save(spec.model(spec) if spec.model else masked_dense(spec, visible), before)
    if straight and spec.torch is None:
        model, how = direct(spec, spec.part(visible))
        after = folder / "after.onnx"
        onnx.save(model, after)
    else:
        after, how = compiled(spec, before, folder / "out")
    sessions = [measure.open_session(p) for p in (before, after)]
    want, got = (s.run(None, inputs)[0].astype(np.float64) for s in sessions)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    timing = measure.paired(sessions[0], sessions[1], inputs, rounds=rounds, budget_seconds=20.0)
    del sessions
    same = before.read_bytes() == after.read_bytes()
    return Row(name, spec.wanted, timing, error, (peak(before, inputs), peak(after, inputs)), how, same)


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
        used = peak(path, inputs)
        took = min(timing.original, timing.ours) * 1e3
        table.add_row(
            f"{tokens:,}", f"{took:.1f}", f"{took / tokens:.4f}", f"{used:.0f}", f"{used * 1024 / tokens:.1f}"
        )
    return table


def engines(labels: list[str], folder: Path) -> tuple[Table, int]:
    """The replaced models as engines, and how many of them are not built or not fused. Whole models are not replaced
    here: their first exact plan is taken, without checks.
    """
    table = Table("model", "engine MiB", "attention fused", "s", "built", box=SIMPLE, title="TensorRT-RTX, fp16")
    target, failed = base.get("tensorrt-rtx"), 0
    base.require(target)
    for label in labels:
        print(f"{label} ...", file=sys.stderr, flush=True)
        spec, here = SPECS[label], Path(tempfile.mkdtemp(dir=folder))
        path = here / "model.onnx"
        if spec.torch:
            spec.torch(path)
            found = pipeline.inspect(path, Options())
            edits = pipeline.edits(found, Options())
            proto = apply(found.index.model, [(e.site, e.lowering) for e in edits])
        else:
            proto, _ = direct(spec, spec.part(spec.visible()))
            onnx.save(proto, path)
        try:
            model = load(path)
            result = target.build(target.lower(proto, model, "fp16"), model, profile_for(model, {}), here)
        except AttncompileError as error:
            table.add_row(label, "", "", "", f"NO: {error.message}")
            failed += 1
            continue
        fused = f"{result.attention_fused} of {result.attention_layers}"
        failed += result.attention_fused != result.attention_layers
        table.add_row(label, f"{(result.engine_size or 0) / 2**20:.0f}", fused, f"{result.seconds:.1f}", "yes")
    return table, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these (optional ones too)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--direct", action="store_true", help="leave detection, policy and gates out")
    parser.add_argument("--linear", action="store_true", help="time and memory at growing lengths")
    parser.add_argument("--rtx", action="store_true", help="engines of TensorRT-RTX instead of times")
    parser.add_argument("--rounds", type=int, help="paired rounds (default: until the interval is decisive, or 20 s)")
    parser.add_argument("--peak-of", nargs=2, metavar=("FILE", "INPUTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak_of:
        print(_peak_here(Path(given.peak_of[0]), Path(given.peak_of[1])))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        if given.linear:
            Console(width=100).print(linear(Path(name)))
            return 0
        if given.rtx:
            chosen = [s for s in SPECS if not given.only or any(x in s for x in given.only)]
            made, failed = engines(chosen, Path(name))
            Console(width=100).print(made)
            return 1 if not chosen or (failed and given.check) else 0
        table = Table("model", "ms", "gain (95%)", "target", "rel. L2", "peak MiB", "met", box=SIMPLE)
        notes = []
        chosen = [s for s in SPECS if (any(x in s for x in given.only) if given.only else not SPECS[s].optional)]
        for label in chosen:
            print(f"{label} ...", file=sys.stderr, flush=True)
            folder = Path(tempfile.mkdtemp(dir=name))
            wanted = SPECS[label].wanted
            bound = f"{wanted:g}x" if wanted > 1 else "not slower"
            try:
                r = row(label, folder, given.direct, given.rounds)
            except AttncompileError as error:
                table.add_row(label, "", "", bound, "", "", "NO")
                notes.append(f"{label}: {error.message}")
                failed += 1
                continue
            t = r.timing
            table.add_row(
                label, f"{t.original * 1e3:.0f} -> {t.ours * 1e3:.0f}",
                "1 (same file)" if r.same else gain_text(t), bound,
                f"{r.error:.1e}",
                f"{r.peak[0]:.0f} -> {r.peak[1]:.0f}", "yes" if r.ok else "NO",
            )  # fmt: skip
            notes.append(f"{label}: {r.how}")
            failed += not r.ok
    Console(width=100).print(table)
    for note in notes:
        print(note, file=sys.stderr)
    if not chosen:
        print("no row has such a name", file=sys.stderr)
    return 1 if not chosen or (failed and given.check) else 0


if __name__ == "__main__":
    sys.exit(main())
