"""What lies where in ``OUT/`` for ONNX Runtime's CUDA provider, and what the library in ``csrc/`` expects."""

from __future__ import annotations

from attncompile.runtime.build import NAME as LIBRARY

MODEL = "model.onnxruntime-cuda.onnx"
PORTABLE = "model.onnx"
BUNDLE = "bundle"
INDEX = "bundle.json"

DOMAIN = "attncompile.kernels"
"""Of nodes that are launched as kernels; their op is ``<op>_<key of its call>``."""

RECORD = "launch"
"""The attribute that says how a node's numbers follow from the sizes of its inputs, as JSON."""

BUNDLE_KEY = "attncompile.bundle"
"""Session option: the folder of the bundle; default: ``bundle`` beside the library."""

__all__ = ["BUNDLE", "BUNDLE_KEY", "DOMAIN", "INDEX", "LIBRARY", "MODEL", "PORTABLE", "RECORD"]
