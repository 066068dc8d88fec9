"""The table of an engine's layers, told by the real ``IProfiler`` of TensorRT-RTX; running an engine needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncompile import engine_profile
from attncompile.core.errors import BadArguments
from attncompile.engine_profile import EngineLayerTime, LayerTable


def test_medians_without_the_first_run() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    table = LayerTable(frozenset({"attention"}))
    made = engine_profile.profiler(trt, table)
    assert isinstance(made, trt.IProfiler)
    for attention, gemm in ((9.0, 9.0), (1.0, 0.2), (2.0, 0.1), (3.0, 0.3)):
        made.report_layer_time("attention", attention)
        made.report_layer_time("gemm", gemm)
        made.report_layer_time("gemm", gemm)
        table.next_run()
    assert table.layers() == (EngineLayerTime("attention", 2000.0, True), EngineLayerTime("gemm", 400.0, False))


def test_one_run_is_better_than_none() -> None:
    table = LayerTable()
    assert table.layers() == ()
    table.report("gemm", 0.5)
    assert table.layers() == (EngineLayerTime("gemm", 500.0),)


def test_nothing_to_run_with() -> None:
    with pytest.raises(BadArguments):
        engine_profile.profile(Path("m.engine"), [], "tensorrt")
