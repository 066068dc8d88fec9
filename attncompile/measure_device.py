"""Sessions on a GPU for ``measure.paired``: inputs and outputs stay in the device's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from attncompile import measure
from attncompile.runtime.session import InferenceSession, missing

Feed = Mapping[str, np.ndarray]


class OnDevice:
    """``session`` with ``run``: inputs are copied to ``device`` once for each feed, outputs are left there.

    ONNX Runtime waits for the device at the end of each run, so that a run lasts as long as its caller waits.
    """

    def __init__(self, session: Any, device: str = "cuda") -> None:
        self._session, self._device = session, device
        self._bound: dict[int, tuple[Feed, Any]] = {}

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], /) -> Sequence[Any]:
        """The outputs as ``OrtValue``s, on the device."""
        _, binding = self._bound.get(id(input_feed)) or self._bind(output_names, input_feed)
        self._session.run_with_iobinding(binding)
        found: Sequence[Any] = binding.get_outputs()
        return found

    def _bind(self, names: Sequence[str] | None, feed: Feed) -> tuple[Feed, Any]:
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, self._device, 0))
        for name in names or [o.name for o in self._session.get_outputs()]:
            binding.bind_output(name, self._device, 0)
        self._bound[id(feed)] = feed, binding
        return feed, binding


def open_on_device(path: Path) -> OnDevice:
    """A session of ONNX Runtime's CUDA provider: of an ONNX file, or of a folder that --target onnxruntime-cuda wrote.

    Raises:
        MissingDependency: no CUDA provider, driver or GPU.
        TargetError: a folder without such a model.
        BadModel: a file that ONNX Runtime does not load.
    """
    reason = missing()
    if reason is not None:
        raise reason
    if path.is_dir():
        return OnDevice(InferenceSession(path))
    return OnDevice(measure.open_session(path, provider="cuda"))
