"""Made-up values for tests of the report and the CLI; no test judges numbers by these."""

from __future__ import annotations

import dataclasses
import math

from attncompile.core.assumption import Assumption
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.plan import Decision, Refusal
from attncompile.core.profile import Range
from attncompile.core.site import AttentionSite, NearMiss, Operand
from attncompile.core.verdict import Verdict
from attncompile.env import Environment, Gpu
from attncompile.measure import Timing
from attncompile.metrics import Metrics
from attncompile.report import (
    Exactness,
    ModelInfo,
    OutputComparison,
    Parity,
    Report,
    ShapeTiming,
    SiteCase,
    SiteFidelity,
    SiteReport,
    TargetFile,
    TargetReport,
)

HOW = Certificate("evaluated", "the mask's subgraph was run", ((64, 64), (129, 129)), True)
WINDOW = MaskFacts((MaskPart("window", HOW, left=255, right=0), MaskPart("padding", HOW, source="mask")), "uniform")


def site(name: str = "layers.0", mask: MaskFacts = WINDOW, heads: int = 12, kv_heads: int = 4) -> AttentionSite:
    def operand(part: str) -> Operand:
        return Operand(f"{name}/{part}", "BHND")

    return AttentionSite(
        id=name, form="matmul-softmax-matmul", query=operand("q"), key=operand("k"), value=operand("v"),
        output=operand("o"), batch="batch", heads=heads, kv_heads=kv_heads, head_dim=64, value_dim=64,
        query_length="seq", key_length="seq", scale=0.125, mask=mask, dtype="float32", softmax_dtype="float32",
        nodes=(f"{name}/MatMul", f"{name}/Softmax", f"{name}/MatMul_1"), interior=(f"{name}/scores",),
    )  # fmt: skip


ENVIRONMENT = Environment(
    attncompile="0.1.0", python="3.11.7", platform="Linux", cpu="A CPU", cores=2, threads=2, memory=8 << 30,
    packages={"onnx": "1.23.2"}, gpus=(Gpu("A GPU", (9, 0), 80 << 30),), cuda_driver="13.0",
    targets={"onnx": Verdict.yes("always written"), "tensorrt": Verdict.no("no_gpu", "no CUDA device", "find one")},
)  # fmt: skip
NEAR_MISS = NearMiss("/head/Softmax", "the product with V is missing", "matmul-softmax-matmul", "no_value")


def timing(ratio: float = 0.4, low: float = 0.38, high: float = 0.43, rounds: int = 11) -> Timing:
    return Timing(0.1, 0.1 * ratio, ratio, low, high, rounds, (ratio,) * rounds, 2)


def shape_timing(label: str = "usual", **changes: float) -> ShapeTiming:
    return ShapeTiming(label, {"seq": 512}, timing(**changes))


METRICS = Metrics(3e-7, 1e-6, 1.0, math.inf, None, 1.0, 4096)


ASSUMED = (
    Assumption("sizes", "seq is 1 to 4096", "checked at 1, 512, 4096 and at prime lengths", ("ids", "mask"), True),
    Assumption("dtype", "the site runs in float32", "checked against float64 on the CPU"),
)
CHECKS = (
    SiteCase("random", "usual shapes", True, True, 1e-7, 1.1e-7),
    SiteCase("large logits", "usual shapes", True, True, 2e-7, 2e-7),
    SiteCase("random", "prime lengths", True, True, 1.5e-7, 1e-7),
    SiteCase("logits beyond float16", "usual shapes", False, False, math.nan, math.nan, "nothing finite to compare"),
    SiteCase("logits beyond float16", "prime lengths", True, True, 3e-7, 2e-7, "the original is finite in 40% of it"),
)


def site_report(name: str = "layers.0", **changes: object) -> SiteReport:
    replaced = SiteReport(
        site=site(name),
        decision=Decision(
            name, "NeighborhoodAttention", "a window of 256 in 4096 tokens", True, {"kernel_size": [256]}, 3.5,
            (Refusal("Attention", "slower", "it reads all keys"),), ASSUMED,
        ),
        exactness=Exactness(True, 14, 1.1, 2e-7, worst_case="large logits", checks=CHECKS),
        timings=(shape_timing(),),
    )  # fmt: skip
    return dataclasses.replace(replaced, **changes)


def report(**changes: object) -> Report:
    full = Report(
        environment=ENVIRONMENT,
        model=ModelInfo("model.onnx", "sha256:" + "0" * 64, 18, 321, 12_345_678, ("converted from opset 17",)),
        policy="exact",
        options={"seed": 0, "max_error": None},
        profile={"seq": Range(1, 512, 4096, assumed=True)},
        sites=(site_report("layers.0"), site_report("layers.1")),
        near_misses=(NEAR_MISS,),
        outcome="replaced",
        parity=Parity(True, "relative_l2", 1e-5, 3e-7, "seeded", (OutputComparison("logits", "usual", METRICS),)),
        timings=(shape_timing("usual"), shape_timing("max", ratio=0.3, low=0.28, high=math.inf)),
        targets=(
            TargetReport("onnx", (TargetFile("model.onnx", 12_000_000),), 0.2),
            TargetReport("tensorrt-rtx", (TargetFile("model.engine", 6_000_000),), 21.5, 6_000_000, 2, 2, ("fp16",)),
        ),
        warnings=("the profile was assumed",),
        seconds={"load": 0.1, "detect": 0.4},
        out="model.attncompile",
        created="2026-01-02T03:04:05Z",
    )
    return dataclasses.replace(full, **changes)


def kept(name: str = "layers.0", reason: str = "no gain predicted") -> SiteReport:
    return SiteReport(site(name, MaskFacts()), Decision(name, "keep", reason))


def approximate(name: str = "layers.0") -> SiteReport:
    return site_report(
        name,
        decision=Decision(name, "NeighborhoodAttention", "within budget", False, {"kernel_size": [64]}, 5.0),
        exactness=None,
        fidelity=SiteFidelity(0.004, 0.99999, 0.97),
    )
