"""Running and comparing two models with Polygraphy's runners and comparators."""

from __future__ import annotations

import hashlib
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from attncompile.core.errors import AttncompileError, BadModel
from attncompile.core.verdict import Verdict
from attncompile.measure import open_session
from attncompile.verification.retype import TO_TWIN, convert_feed, retype

ORIGINAL, REWRITTEN = "original", "attncompile"
ENGINE = ".engine"
"""Suffix of engines."""


class RewrittenFailed(AttncompileError):
    """The rewritten model loads and does not run; the original does."""


class Baseline:
    """An original model with the results that it gave: a search over many rewrites runs the original once per inputs.

    Polygraphy's results by a digest of the inputs; they live as long as this object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[bytes, Any] = {}

    def results(self, model: Path, feeds: list[dict[str, np.ndarray]]) -> Any:
        """Runner results of ``model`` (the original or its twin) on ``feeds``: one entry per set of inputs."""
        digest = hashlib.blake2b()
        for number, feed in enumerate(feeds):
            for name, value in sorted(feed.items()):
                digest.update(repr((number, name, value.dtype.str, value.shape)).encode())
                digest.update(value.tobytes())
        key = digest.digest()
        if key not in self._results:
            self._results[key] = _run_one(model, ORIGINAL, feeds)
        return self._results[key]


def run(baseline: Baseline, original: Path, rewritten: Path, feeds: list[dict[str, np.ndarray]]) -> Any:
    """Polygraphy ``RunResults`` of both models; one session lives at a time. Raises RewrittenFailed."""
    from polygraphy.comparator import RunResults

    results = RunResults()
    results.append((ORIGINAL, baseline.results(original, feeds)))
    try:
        results.append((REWRITTEN, _run_one(rewritten, REWRITTEN, feeds)))
    except BadModel:
        raise
    except AttncompileError as error:
        raise RewrittenFailed(error.message, error.hint) from error
    return results


def _run_one(path: Path, name: str, feeds: list[dict[str, np.ndarray]]) -> Any:
    """Polygraphy's list of ``IterationResult`` of one model, or of an engine of TensorRT."""
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator

    # As SessionFromOnnx does, with our error mapping and a silent log.
    session = None if path.suffix == ENGINE else open_session(path, lean=True)
    try:
        with _quiet():
            runner = _engine_runner(path, name) if session is None else OnnxrtRunner(session, name=name)
            return Comparator.run([runner], data_loader=feeds)[name]
    except Exception as error:
        text = str(error).strip().splitlines()
        raise AttncompileError(
            f"{path.name} fails to run: {text[0][:300] if text else type(error).__name__}",
            f"run it alone with `polygraphy run --{'onnxrt' if session else 'trt'}` to see the whole message",
        ) from error


def _engine_runner(path: Path, name: str) -> Any:
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    return TrtRunner(EngineFromBytes(BytesFromPath(str(path))), name=name)


def run_twins(
    baseline: Baseline, rewritten: Path, feeds: list[dict[str, np.ndarray]]
) -> tuple[Any, list[dict[str, np.ndarray]]]:
    """``_run`` on float32 copies of two bfloat16 models, in a temporary folder; the feeds as they were fed."""
    with tempfile.TemporaryDirectory(prefix="attncompile-twin-") as folder:
        paths = []
        for i, path in enumerate((baseline.path, rewritten)):
            twin = retype(onnx.load(str(path)), TO_TWIN)
            paths.append(Path(folder) / str(i) / path.name)
            paths[-1].parent.mkdir()
            onnx.save(twin, str(paths[-1]), save_as_external_data=True, location="twin.data", size_threshold=1024)
            feeds = [convert_feed(f, twin) for f in feeds]
        return run(baseline, paths[0], paths[1], feeds), feeds


def polygraphy_verdict(results: Any, metric: str, budget: float) -> Verdict:
    """Polygraphy's comparison of floats by SNR and of everything else by equality; counts what it compared, because an
    empty comparison result is truthy.
    """
    from polygraphy.comparator import Comparator, SimpleCompareFunc, SnrCompareFunc
    from polygraphy.exception import PolygraphyException

    kinds: dict[str, bool] = {}  # outputs that both sides have -> whether they are floats
    for a, b in zip(results[ORIGINAL], results[REWRITTEN], strict=True):
        theirs = set(b.keys())
        kinds.update({n: v.dtype.kind not in "iub" for n, v in a.items() if n in theirs})

    def only(wanted: bool) -> Any:
        def find(name: str, _index: int, _other: Any) -> list[str]:
            return [name] if kinds.get(name) is wanted else []

        return find

    # A relative L2 of x is an SNR of -20 log10(x) dB; for other metrics only shapes and NaN are left to Polygraphy.
    snr = -math.inf
    if metric == "relative_l2":
        snr = -20 * math.log10(budget) if budget > 0 else math.inf
    funcs: list[Any] = []
    if True in kinds.values():
        funcs.append(SnrCompareFunc(snr_threshold=snr, find_output_func=only(True)))
    if False in kinds.values():
        funcs.append(SimpleCompareFunc(atol=0.0, rtol=0.0, find_output_func=only(False)))
    if not funcs:
        return Verdict.no("nothing_compared", "the models have no output in common")
    try:
        with _quiet():
            accuracy = Comparator.compare_accuracy(results, compare_func=funcs)
    except PolygraphyException as error:
        return Verdict.no("polygraphy_failed", str(error).strip().splitlines()[0])
    compared = sum(len(outs) for result in accuracy for iterations in result.values() for outs in iterations)
    expected = sum(len(dict(it.items())) for it in results[ORIGINAL])
    if compared == 0 or compared != expected:
        return Verdict.no("nothing_compared", f"{compared} of {expected} outputs were compared")
    if not all(bool(result) for result in accuracy):
        return Verdict.no("polygraphy_failed", f"an output's SNR is below {snr:.1f} dB or an integer output differs")
    return Verdict.yes(f"{compared} outputs compared, SNR at least {snr:.1f} dB")


@contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy logs to stdout, which carries data only; its NumPy warnings (0 / 0) concern statistics of its own."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
