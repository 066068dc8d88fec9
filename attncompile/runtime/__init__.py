"""Our kernels in ONNX Runtime: ``InferenceSession(OUT)`` is ONNX Runtime's own, with them.

``library()`` is the custom-op library for plain onnxruntime (``csrc/``, docs/onnxruntime.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attncompile.runtime.locate import library

if TYPE_CHECKING:
    from attncompile.runtime.session import InferenceSession

__all__ = ["InferenceSession", "library"]


def __getattr__(name: str) -> Any:  # onnxruntime is imported when a session is made, not before
    if name == "InferenceSession":
        from attncompile.runtime.session import InferenceSession

        return InferenceSession
    raise AttributeError(name)
