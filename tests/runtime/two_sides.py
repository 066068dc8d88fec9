"""A model with a rule for calls that stay dense, and a plan for it: no search, no times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attncompile.core import plan_toml
from attncompile.core.plan import Decision, Dense, Plan
from attncompile.passes.load import load
from attncompile.pipeline import Options
from tests.search import constructed

RULE = "t >= 0.7"
EDGE = np.float32(0.7)
BELOW = np.nextafter(EDGE, np.float32(0))
"""The next float32, which is 0.7 too in fp16 and bf16."""
TOKENS = 600
PATTERNS = ("sinks 1 window 1", "sinks 1 window 2", "sinks 0 window 1", "skip")


@dataclass(frozen=True)
class Planned:
    """Files of a model with three sites. Site 0 is approximated, and replaced exactly in calls that stay dense; site 1
    is approximated, and as it was in such calls; site 2 is replaced exactly in all.
    """

    model: Path
    inputs: Path
    plan: Path
    batched: bool

    def options(self, out: Path, precision: str = "fp16", architectures: tuple[int, ...] = ()) -> Options:
        return Options(
            target="onnxruntime-cuda", out=out, plan=self.plan, inputs=self.inputs, precision=precision,
            architectures=architectures, keep_slower=True, max_error=10.0,
        )  # fmt: skip

    def feed(self, *times: np.float32, seed: int = 1) -> dict[str, np.ndarray]:
        """One input, of these times where it has a batch of them, else of the one."""
        t = np.array(times if self.batched else times[0], np.float32)
        return {**constructed.feeds(1, TOKENS, seed=seed)[0], "t": t}


def planned(folder: Path, batched: bool = False, times: tuple[float, ...] = (0.0, 0.4, 0.8, 1.0)) -> Planned:
    """``times`` are those of the inputs."""
    proto = constructed.build(TOKENS, 3, causal=False, timed="batch" if batched else "")
    given = [
        {**feed, "t": np.array([t] if batched else t, np.float32)}
        for feed, t in zip(constructed.feeds(len(times), TOKENS), times, strict=True)
    ]
    model, inputs = constructed.write(folder, proto, given)
    lists = {"edge": 64, "masked_rows": "zero", "heads": list(PATTERNS)}
    decisions = (
        Decision("site0", "BlockSparseAttention", "", False, lists, dense=Dense("DenseAttention", {})),
        Decision("site1", "BlockSparseAttention", "", False, lists),
        Decision("site2", "DenseAttention", "", True, {}),
    )
    plan = folder / "plan.toml"
    plan.write_text(plan_toml.dumps(Plan(load(model).hash, "sparse", decisions, {"keep_dense": RULE})))
    return Planned(model, inputs, plan, batched)
