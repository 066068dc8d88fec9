"""The real ``tensorrt.plugin`` over doubles, one version after the other, and the samples' plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto

from attncompile.core.kernel import SMALL_SHARED
from attncompile.kernels import build, calls, compiler
from attncompile.kernels.bundle import Bundle, write
from attncompile.kernels.cache import Cache
from attncompile.kernels.records import NodeCall, key_of
from attncompile.kernels.tensorrt import generate, plugin
from attncompile.plugins import kernels
from tests.exports import alone
from tests.kernels.tensorrt import native
from tests.kernels.tensorrt.samples import SAMPLES, Sample

TOOL = Path(__file__).parents[3] / "tools" / "tensorrt_bindings.py"
VERSIONS = ("10.9", "10.10", "10.15", "10.16", "11.2", "11.4")
SMS = 108
"""Multiprocessors of the GPU that these engines are built for."""


@pytest.fixture(scope="session")
def packages() -> dict[str, str]:
    """Folder of each version's package, or why it is not there."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json"], capture_output=True, text=True, check=False, timeout=600
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="session")
def opened(packages: dict[str, str]) -> Callable[[str], Any]:
    """``installed`` for a version; skips where its package cannot be had, and fails there on CI."""

    def open_(version: str, **more: Any) -> Any:
        place = packages[version]
        if not Path(place).is_dir():
            if os.environ.get("CI"):
                pytest.fail(f"CI needs the bindings of TensorRT {version}: {place}")
            pytest.skip(f"no bindings of TensorRT {version}: {place}")
        return native.installed(Path(place), **more)

    return open_


@pytest.fixture(params=VERSIONS)
def tensorrt(request: pytest.FixtureRequest, opened: Callable[[str], Any]) -> Iterator[tuple[Any, Any]]:
    """(tensorrt, tensorrt.plugin) of every version."""
    with opened(request.param) as both:
        yield both


@pytest.fixture
def newest(opened: Callable[[str], Any]) -> Iterator[tuple[Any, Any]]:
    with opened(VERSIONS[-1]) as both:
        yield both


@dataclass(frozen=True)
class Prepared:
    """A sample's model, what was made of it, and the kernels of its call, best first."""

    sample: Sample
    model: ModelProto
    made: generate.Generated
    rewritten: ModelProto
    bundle: Bundle
    node: NodeCall


class AllPrepared(dict[str, Prepared]):
    """By a sample's name; the kernels of its group are compiled when the first of it is asked for. The processes of a
    run take turns at that, and the second finds them in the cache.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Prepared:
        slow = next(s.slow for s in SAMPLES if s.name == name)
        group = [s for s in SAMPLES if s.slow == slow]
        with alone(f"prepared-{slow}"):
            self.update(prepare(group, 80, self.folder / ("slow" if slow else "quick")))
        return self[name]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> AllPrepared:
    """All samples with kernels of sm_80."""
    pytest.importorskip("triton")
    return AllPrepared(tmp_path_factory.mktemp("plugins"))


def prepare(samples: Sequence[Sample], architecture: int, folder: Path) -> dict[str, Prepared]:
    """Compile, write a bundle into ``folder``, generate."""
    found = {}
    models = {s.name: s.model() for s in samples}
    nodes = {n: calls.find(m, kernels(), "float32")[0] for n, m in models.items()}
    made = build.build(list(nodes.values()), [], kernels(), (architecture,), Cache.default())
    write(folder, made, compiler.require_triton())
    bundle = Bundle.open(folder)
    generated = []
    for sample in samples:
        node, model = nodes[sample.name], models[sample.name]
        assert node.call is not None, f"{sample}: {node.verdict.reason}"
        chosen = bundle.kernels(key_of(build.general(kernels(), node.call)), architecture)
        assert any(k.entry.shared <= SMALL_SHARED for k in chosen)
        result = generate.generate(model, [node], lambda _, chosen=chosen: chosen)  # type: ignore[misc]
        assert not result.others, result.others
        generated += list(result.plugins.values())
        found[sample.name] = Prepared(sample, model, result, generate.rewritten(model, result), bundle, node)
    plugin.write(folder, generated)
    return found
