"""Timing statistics on synthetic samples: a fake clock and sessions that advance it, so no wall-clock flakiness."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from attncompile import measure
from attncompile.core.errors import AttncompileError, BadArguments, BadModel
from attncompile.measure import (
    MIN_ROUNDS,
    Timing,
    default_threads,
    median_interval,
    open_session,
    paired,
    run_session,
)

FEED = {"x": np.zeros(1, np.float32)}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now


class Fake:
    """A session whose calls take what ``seconds(call number)`` says."""

    def __init__(self, clock: Clock, name: str, seconds: Callable[[int], float]) -> None:
        self.clock, self.name, self.seconds, self.count = clock, name, seconds, 0

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], /) -> list[Any]:
        self.clock.now += self.seconds(self.count)
        self.clock.order.append(self.name)
        self.count += 1
        return []


def time_fakes(a: Callable[[int], float], b: Callable[[int], float], **options: Any) -> tuple[Timing, Clock]:
    clock = Clock()
    return paired(Fake(clock, "a", a), Fake(clock, "b", b), FEED, clock=clock, **options), clock


def noisy(mean: float, spread: float, seed: int) -> Callable[[int], float]:
    rng = np.random.default_rng(seed)
    return lambda _: float(mean * np.exp(spread * rng.standard_normal()))


def test_ratio_is_ours_over_original() -> None:
    t, _ = time_fakes(lambda _: 0.1, lambda _: 0.05, rounds=6)
    assert t.ratio == pytest.approx(0.5) and t.gain == pytest.approx(2.0)
    assert t.original == pytest.approx(0.1) and t.ours == pytest.approx(0.05)
    assert t.faster and not t.slower and t.conclusive


def test_times_are_of_the_round_that_has_the_ratio() -> None:
    """Medians of each side alone, 200 and 300 s, would say the contrary of the pairs; of even rounds two are in the
    middle.
    """
    of, by = ([100, 100, 200, 900], [100, 300, 100, 800])  # the first is the warm-up
    t, _ = time_fakes(lambda i: of[i], lambda i: by[i], rounds=3)
    assert (t.original, t.ours, t.ratio) == (900, 800, pytest.approx(8 / 9))
    t, _ = time_fakes(lambda i: [*of, 400][i], lambda i: [*by, 100][i], rounds=4)
    assert (t.original, t.ours, t.ratio) == (550, 450, pytest.approx((1 / 2 + 8 / 9) / 2))


def test_one_percent_slower_is_not_slower() -> None:
    t, _ = time_fakes(lambda _: 0.1, lambda _: 0.101, rounds=10)
    assert t.ratio == pytest.approx(1.01) and not t.slower and not t.faster


def test_three_percent_slower_is_slower() -> None:
    t, _ = time_fakes(noisy(0.1, 0.002, 0), noisy(0.103, 0.002, 1), rounds=20)
    assert t.slower and not t.faster and t.low > 1.02


def test_one_slow_round_changes_nothing() -> None:
    t, _ = time_fakes(lambda _: 0.1, lambda i: 5.0 if i == 6 else 0.08, rounds=9)
    assert max(t.ratios) > 10
    assert t.ratio == pytest.approx(0.8) and t.high == pytest.approx(0.8) and t.faster


def test_rounds_swap_their_order() -> None:
    _, clock = time_fakes(lambda _: 0.1, lambda _: 0.1, rounds=4)
    assert "".join(clock.order[6:]) == "abbaabba"


def test_short_calls_are_repeated_until_a_sample_lasts() -> None:
    t, _ = time_fakes(lambda _: 1e-5, lambda _: 4e-5, rounds=6)
    assert t.calls[0] * 1e-5 >= 0.0019 and t.calls[1] * 4e-5 >= 0.0019
    assert t.calls[0] > 3 * t.calls[1]
    assert t.ratio == pytest.approx(4.0)


def test_long_calls_are_not_repeated() -> None:
    t, clock = time_fakes(lambda _: 0.5, lambda _: 0.5, rounds=6)
    assert t.calls == (1, 1) and len(clock.order) == 6 + 12


def test_stops_early_when_decided() -> None:
    t, _ = time_fakes(noisy(0.1, 0.01, 2), noisy(0.05, 0.01, 3), budget_seconds=1000)
    assert t.stopped == "decided" and t.rounds == 8 and t.faster


def test_stops_early_when_narrow() -> None:
    t, _ = time_fakes(noisy(0.1, 0.001, 2), noisy(0.101, 0.001, 3), budget_seconds=1000)
    assert t.stopped == "interval is narrow" and t.high - t.low <= 0.01


def test_stops_at_the_time_budget_but_not_before_an_interval_exists() -> None:
    t, clock = time_fakes(noisy(0.1, 0.3, 4), noisy(0.1, 0.3, 5), budget_seconds=1.0)
    assert t.stopped == "time budget" and t.rounds >= MIN_ROUNDS
    assert clock.now < 2.5


def test_of_very_long_calls_one_is_warm_up_enough() -> None:
    """One warm-up each, and the fewest rounds that give an interval."""
    t, clock = time_fakes(lambda _: 100.0, lambda _: 50.0, budget_seconds=1.0, conclusive=True)
    assert t.conclusive and t.rounds == MIN_ROUNDS and t.faster
    assert clock.now == pytest.approx((MIN_ROUNDS + 1) * 150.0)


def test_far_above_the_budget_nothing_is_claimed() -> None:
    t, _ = time_fakes(lambda _: 100.0, lambda _: 1.0, budget_seconds=1.0)
    assert t.rounds < MIN_ROUNDS and not t.conclusive and not t.faster and not t.slower
    assert t.to_json()["interval"] == [0.0, None]


def test_equal_sessions_are_rarely_called_slower_or_faster() -> None:
    wrong = 0
    for seed in range(200):
        t, _ = time_fakes(noisy(0.1, 0.1, 2 * seed), noisy(0.1, 0.1, 2 * seed + 1), budget_seconds=10)
        wrong += t.faster or t.slower
    assert wrong <= 20  # 5 % of intervals may exclude 1, and a few looks add to it


def test_median_interval_by_hand() -> None:
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (3.5, 1.0, 6.0)  # 2 / 64 <= 5 %
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 0.0, math.inf)  # 2 / 32 > 5 %
    # n = 9: P(X <= 1) = 10 / 512, doubled 3.9 % <= 5 %; P(X <= 2) = 46 / 512 is too much.
    assert median_interval([float(i) for i in range(1, 10)]) == (5.0, 2.0, 8.0)
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_median_interval_covers() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        _, low, high = median_interval(list(np.exp(rng.standard_normal(15))))
        covered += low <= 1.0 <= high
    assert covered >= 0.93 * 400


def test_bad_arguments() -> None:
    clock = Clock()
    fake = Fake(clock, "a", lambda _: 0.1)
    with pytest.raises(BadArguments, match="no inputs"):
        paired(fake, fake, [], clock=clock)
    with pytest.raises(BadArguments, match="rounds"):
        paired(fake, fake, FEED, rounds=0, clock=clock)


def relu_model() -> bytes:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def test_open_session_and_pair_for_real(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(relu_model())
    a, b = open_session(path, 1), open_session(relu_model(), 1, "none")
    feed = {"x": np.array([-1.0, 2.0], np.float32)}
    assert run_session(a, feed)[0].tolist() == [0.0, 2.0]
    t = paired(a, b, [feed, feed], rounds=6, threads=1)
    assert t.rounds == 6 and t.threads == 1 and t.original > 0 and t.ours > 0 and min(t.calls) >= 1


def test_open_session_errors(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="does not exist"):
        open_session(tmp_path / "missing.onnx")
    with pytest.raises(BadModel, match="cannot load") as error:
        open_session(b"not onnx")
    assert error.value.hint and "\n" not in error.value.message
    with pytest.raises(BadArguments):
        open_session(relu_model(), threads=0)
    with pytest.raises(BadArguments):
        open_session(relu_model(), optimisation="most")  # type: ignore[arg-type]


def test_a_lean_session_on_a_gpu_asks_for_float32_and_no_spare_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[tuple[str, dict[str, str]]]] = []

    class Session:
        def __init__(self, source: object, options: object, providers: list[tuple[str, dict[str, str]]]) -> None:
            asked.append(providers)

        def get_providers(self) -> list[str]:
            return [measure.CUDA]

    monkeypatch.setattr(measure.ort, "get_available_providers", lambda: [measure.CUDA])
    monkeypatch.setattr(measure.ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(measure.ort, "InferenceSession", Session)
    for lean in (False, True):
        open_session(b"", 1, provider="cuda", lean=lean)
    plain, kept = (dict(providers)[measure.CUDA] for providers in asked)
    assert plain == {} and kept == {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}


def test_run_session_maps_errors() -> None:
    with pytest.raises(AttncompileError, match="failed to run"):
        run_session(open_session(relu_model(), 1), {"x": np.zeros((1, 1), np.float32)})


def test_default_threads_is_positive() -> None:
    assert default_threads() >= 1
