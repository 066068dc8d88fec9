"""What the processes of one run share: a folder for exports and compiled kernels, and the processors."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile

import pytest

WORKER = "PYTEST_XDIST_WORKER"
SHARED = "ATTNCOMPILE_TEST_SHARED"
if WORKER in os.environ:
    # There is a process for each processor: threads of one would wait for those of another. Read when torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Workers inherit the name of the folder. A cache of kernels that is named already is kept, so that a developer
    need not compile again; the user's own is never used.
    """
    if WORKER not in os.environ:
        os.environ[SHARED] = tempfile.mkdtemp(prefix="attncompile-tests-")
        os.environ.setdefault("ATTNCOMPILE_CACHE", os.path.join(os.environ[SHARED], "cache"))  # noqa: PTH118


def pytest_unconfigure(config: pytest.Config) -> None:
    if WORKER not in os.environ:
        shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


REGISTRY = "torch.onnx._internal.exporter._registration"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """torch's exporter reads the signatures of all its functions anew for every model: here once a process. None of
    our exports adds to them.
    """
    registry = getattr(sys.modules.get(REGISTRY), "ONNXRegistry", None)
    read = getattr(getattr(registry, "from_torchlib", None), "__func__", None)
    if registry is not None and read is not None and not hasattr(read, "cache_info"):
        registry.from_torchlib = classmethod(functools.cache(read))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that keep what is slower: rounds that nothing depends on are the fewest there may be."""
    from attncompile import measure

    right = measure.paired_conclusive
    monkeypatch.setattr(
        measure, "paired_conclusive", lambda *given, budget_seconds, **more: right(*given, budget_seconds=0.05, **more)
    )
