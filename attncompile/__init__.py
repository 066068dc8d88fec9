"""attncompile: find the attention in an ONNX model, replace it, prove the replacement, emit what is deployed."""

__version__ = "0.1.0"
