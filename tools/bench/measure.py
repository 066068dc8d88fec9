"""Times on the GPU: medians of alternating rounds, with the L2 cache flushed before every launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import torch

FLUSH = 256 << 20
"""Bytes written before each launch: several times the L2 cache."""


def times(runs: Mapping[str, Callable[[], object]], rounds: int, warm: int = 3) -> dict[str, list[float]]:
    """Milliseconds of every run in every round, by device events."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    for run in runs.values():
        for _ in range(warm):
            run()
    torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}


def ceilings() -> dict[str, float]:
    """Of this GPU in this run: TFLOP/s of an fp16 product of random numbers, TB/s of a copy (read + written)."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.half)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.half)
    c = torch.empty_like(a)
    big = torch.randn(1 << 30, device="cuda", dtype=torch.half)
    other = torch.empty_like(big)
    found = times({"gemm": lambda: torch.mm(a, b, out=c), "copy": lambda: other.copy_(big)}, 15)
    return {
        "gemm_tflops": 2 * 8192**3 / median(found["gemm"]) * 1e-9,
        "copy_tbs": 2 * 2 * big.numel() / median(found["copy"]) * 1e-9,
    }
