"""Timing of two models against each other: paired rounds, robust statistics, an early stop.

The baseline is always the input file with ONNX Runtime's full optimisation and the same number of threads.
What is reported is a ratio ``ours / original``; "slower" means that the 95 % interval of that ratio lies above 1.02.

Statistics: every round gives one ratio, so a slow machine phase hits both sides, and the order within a round
alternates (AB, BA, AB, ...), so in each round both sides follow the same predecessor. The estimate is the median of
the ratios; its interval is the distribution-free one between two order statistics (the sign test inverted; David and
Nagaraja, Order Statistics, section 7.1), which one slow round cannot move. It needs at least 6 rounds for 95 %: with
fewer the interval is (0, inf) and nothing is claimed.

Looking at the data repeatedly would inflate the error rate, so early stopping looks only at a few growing round
numbers and demands 99 % there, while the reported interval is the 95 % one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime as ort

from attncompile.core.errors import AttncompileError, BadArguments, BadModel, MissingDependency

SLOWER_THAN = 1.02
FASTER_THAN = 1.0
MIN_ROUNDS = 6
"""The fewest rounds for which a 95 % order-statistic interval of the median exists (2 * 0.5**6 = 3.1 %)."""

_LOOKS = (8, 11, 15, 21, 29, 41, 57, 81, 113, 161)
_MAX_ROUNDS = 161
_LONG_CALL = 1.0
"""Seconds of a first call after which no more of them are needed to see that one is enough for a sample."""
_MIN_SAMPLE_SECONDS = 2e-3
_NARROW = 0.01
CUDA = "CUDAExecutionProvider"
LEAN_CUDA = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
"""What a lean session asks of the CUDA provider."""

Feed = Mapping[str, np.ndarray]
Optimisation = Literal["all", "extended", "basic", "none"]
Provider = Literal["cpu", "cuda"]


class Session(Protocol):
    """What is timed: ``onnxruntime.InferenceSession`` or anything with its ``run``."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], /) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class Timing:
    """The median over rounds of the ratio ours / original, with its 95 % interval, and the seconds per call of both
    sides in the round that has it (the mean of the two in the middle): medians of each side alone can contradict it.
    """

    original: float
    ours: float
    ratio: float
    low: float
    high: float
    rounds: int
    ratios: tuple[float, ...]
    threads: int
    calls: tuple[int, int] = (1, 1)
    stopped: str = ""

    @property
    def slower(self) -> bool:
        """Shown to be slower: the whole interval lies above 1.02."""
        return self.low > SLOWER_THAN

    @property
    def faster(self) -> bool:
        """Shown to be faster: the whole interval lies below 1."""
        return self.high < FASTER_THAN

    @property
    def conclusive(self) -> bool:
        """Whether an interval exists at all; without one neither ``slower`` nor ``faster`` can be claimed."""
        return self.rounds >= MIN_ROUNDS

    @property
    def gain(self) -> float:
        """original / ours: 2.0 means twice as fast."""
        return 1.0 / self.ratio

    def to_json(self) -> dict[str, Any]:
        return {
            "original_seconds": self.original, "seconds": self.ours, "ratio": self.ratio, "gain": self.gain,
            "interval": [self.low, self.high if math.isfinite(self.high) else None], "confidence": 0.95,
            "rounds": self.rounds, "threads": self.threads, "slower": self.slower, "faster": self.faster,
            "calls_per_sample": list(self.calls), "stopped": self.stopped,
        }  # fmt: skip


def default_threads() -> int:
    """CPUs that this process may use: the affinity mask where the system has one, else ``os.cpu_count()``."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def open_session(
    model: str | os.PathLike[str] | bytes, threads: int | None = None, optimisation: Optimisation = "all",
    provider: Provider = "cpu", *, lean: bool = False, library: str | os.PathLike[str] | None = None,
) -> ort.InferenceSession:  # fmt: skip
    """An ONNX Runtime session with ``threads`` intra-op threads (default: ``default_threads()``) and one inter-op.
    ``provider``: where it runs; ``cuda`` leaves to the CPU what the GPU cannot do. ``lean``: memory goes back after
    every run, and a second one takes no more than the first; by default both are kept, up to twice a run's need. On
    ``cuda`` a lean session keeps what a run needed and no more, so that several fit on one GPU, and its float32
    products are float32's (ONNX Runtime's are TF32's else): what is judged there is the model, as on a CPU.
    ``library``: custom operators.

    Raises BadModel if ONNX Runtime cannot load the model or the library, BadArguments for a bad ``threads`` or
    ``optimisation``, MissingDependency where this ONNX Runtime has no such provider.
    """
    levels = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }
    if optimisation not in levels:
        raise BadArguments(f"unknown optimisation level {optimisation!r}", f"use one of {', '.join(levels)}")
    if threads is not None and threads < 1:
        raise BadArguments(f"cannot run with {threads} threads", "use 1 or more")
    options = ort.SessionOptions()
    options.graph_optimization_level = levels[optimisation]
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not lean
    options.log_severity_level = 4  # errors arrive as exceptions; stderr is for our own messages
    # Idle workers of one session would otherwise spin on the cores while the other session is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source: str | bytes = model if isinstance(model, bytes) else os.fspath(model)
    if isinstance(source, str) and not Path(source).is_file():
        raise BadModel(f"{source} does not exist", "give the path of an ONNX file")
    names = providers(provider)
    given = [(name, LEAN_CUDA if lean and name == CUDA else {}) for name in names]
    try:
        if library is not None:
            options.register_custom_ops_library(os.fspath(library))
        session = ort.InferenceSession(source, options, providers=given)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        name = "the model" if isinstance(source, bytes) else source
        raise BadModel(
            f"ONNX Runtime cannot load {name}: {_first_line(error)}",
            "check the file with `python -m onnx.checker`, and that ONNX Runtime supports its opset and types",
        ) from error
    if names[0] not in session.get_providers():  # it is compiled in, its libraries do not load, and the CPU took over
        raise MissingDependency(
            f"ONNX Runtime did not start {names[0]}, and said why above", "see which of its libraries are missing"
        )
    return session


def providers(name: Provider) -> list[str]:
    """ONNX Runtime's names. Raises MissingDependency where it has none of them, never falls back by itself."""
    if name == "cpu":
        return ["CPUExecutionProvider"]
    if CUDA not in ort.get_available_providers():
        raise MissingDependency(
            "this ONNX Runtime has no CUDA provider", "install onnxruntime-gpu in place of onnxruntime, or use cpu"
        )
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return [CUDA, "CPUExecutionProvider"]


def run_session(session: Session, feed: Feed, names: Sequence[str] | None = None) -> list[np.ndarray]:
    """One inference; AttncompileError with the first line of the runtime's message if it fails. ``names`` None: of all
    outputs.
    """
    if names is not None and not names:  # ONNX Runtime gives all for an empty list too
        return []
    try:
        return [np.asarray(x) for x in session.run(names, dict(feed))]
    except Exception as error:
        raise AttncompileError(
            f"ONNX Runtime failed to run the model: {_first_line(error)}",
            "check that the inputs have the names, shapes and types that the model declares",
        ) from error


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of ``values`` and its distribution-free confidence interval from two order statistics.

    The interval is [x_(k+1), x_(n-k)] for the largest k with 2 * P(Binomial(n, 1/2) <= k) <= 1 - confidence, and
    (0, inf) where no such k exists. Values are positive (ratios).
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    n = len(ordered)
    tail, k = 0.0, -1
    while k + 1 < n:
        tail += math.comb(n, k + 1) * 0.5**n
        if 2 * tail > 1 - confidence:
            break
        k += 1
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    if k < 0:
        return middle, 0.0, math.inf
    return middle, ordered[k], ordered[n - 1 - k]


def paired(
    session_a: Session,
    session_b: Session,
    feeds: Feed | Sequence[Feed],
    *,
    rounds: int | None = None,
    budget_seconds: float = 10.0,
    threads: int | None = None,
    conclusive: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time ``session_a`` (the original) against ``session_b`` (ours) on ``feeds``, in order-swapped paired rounds.

    ``rounds`` fixes the number of rounds; otherwise rounds are added until the 99 % interval is decisive (above 1.02,
    or below 1) or the 95 % interval is within 1 %, or ``budget_seconds`` are spent. At least 6 rounds are
    taken, unless even four times the budget does not suffice for them and it need not be ``conclusive``. ``threads`` is
    only recorded: the sessions already have theirs. Raises BadArguments without feeds.
    """
    batch: list[Feed] = [feeds] if isinstance(feeds, Mapping) else list(feeds)
    if not batch:
        raise BadArguments("nothing to time: no inputs", "give at least one set of inputs")
    if rounds is not None and rounds < 1:
        raise BadArguments(f"cannot time {rounds} rounds", "use 6 or more, else there is no 95 % interval")
    start = clock()
    calls = tuple(_calibrate(s, batch, clock) for s in (session_a, session_b))
    a: list[float] = []
    b: list[float] = []
    limit = rounds or _MAX_ROUNDS
    stopped = "rounds" if rounds is not None else "round limit"
    while len(a) < limit:
        first_is_a = len(a) % 2 == 0
        for is_a in (first_is_a, not first_is_a):
            session, n, sink = (session_a, calls[0], a) if is_a else (session_b, calls[1], b)
            sink.append(_sample(session, batch, n, clock))
        if rounds is None:
            spent = clock() - start
            late = math.inf if conclusive else 4 * budget_seconds
            reason = _stop([y / x for x, y in zip(a, b, strict=True)], spent, budget_seconds, late)
            if reason:
                stopped = reason
                break
    ratios = tuple(y / x for x, y in zip(a, b, strict=True))
    ratio, low, high = median_interval(ratios)
    order = sorted(range(len(ratios)), key=ratios.__getitem__)
    middle = [order[(len(order) - 1) // 2], order[len(order) // 2]]
    original, ours = (float(np.mean([side[k] for k in middle])) for side in (a, b))
    return Timing(
        original=original, ours=ours, ratio=ratio, low=low, high=high, rounds=len(ratios),
        ratios=ratios, threads=threads or default_threads(), calls=(calls[0], calls[1]), stopped=stopped,
    )  # fmt: skip


def paired_conclusive(
    session_a: Session, session_b: Session, feed: Feed, *, budget_seconds: float, threads: int | None = None
) -> Timing:
    """``paired`` with as many rounds as give an interval, whatever they take."""
    return paired(session_a, session_b, feed, budget_seconds=budget_seconds, threads=threads, conclusive=True)


def _stop(ratios: Sequence[float], spent: float, budget: float, late: float) -> str:
    """Why to stop now, or an empty string; ``late``: seconds after which an interval is no longer waited for."""
    n = len(ratios)
    if n in _LOOKS:
        _, low, high = median_interval(ratios, 0.99)
        if low > SLOWER_THAN or high < FASTER_THAN:
            return "decided"
        _, low, high = median_interval(ratios)
        if high - low <= _NARROW:
            return "interval is narrow"
    if spent >= budget and n >= MIN_ROUNDS:
        return "time budget"
    if spent >= late:
        return "time budget, before an interval existed"
    return ""


def _calibrate(session: Session, batch: Sequence[Feed], clock: Callable[[], float]) -> int:
    """Warm up (the first call plans memory) and return the calls that make one sample last about 2 ms or more."""
    if _sample(session, batch, 1, clock) >= _LONG_CALL:
        return 1
    seconds = min(_sample(session, batch, 1, clock) for _ in range(2))
    return max(1, math.ceil(_MIN_SAMPLE_SECONDS / max(seconds, 1e-7)))


def _sample(session: Session, batch: Sequence[Feed], calls: int, clock: Callable[[], float]) -> float:
    """Seconds per pass over ``batch``, averaged over ``calls`` passes."""
    begin = clock()
    for _ in range(calls):
        for feed in batch:
            session.run(None, feed)
    return (clock() - begin) / calls


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
