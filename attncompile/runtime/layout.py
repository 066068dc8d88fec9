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

STRICT = "strict_norms"
"""The attribute of launches, and the entry of the bundle's index, that say that the model has norms of sums in fp16."""

STRICT_KEY = "attncompile.strict_norms"
"""Session option: "1" says that the provider has ``STRICT_OPTION``; else ONNX Runtime before 1.27 is refused such
models.
"""

STRICT_OPTION = "enable_skip_layer_norm_strict_mode"
"""The option of ONNX Runtime's CUDA provider without which it adds up squares of fp16 in fp16 there before 1.27."""

__all__ = [
    "BUNDLE", "BUNDLE_KEY", "DOMAIN", "INDEX", "LIBRARY", "MODEL", "PORTABLE", "RECORD", "STRICT", "STRICT_KEY",
    "STRICT_OPTION",
]  # fmt: skip
