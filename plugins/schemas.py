"""Makes schemas of ours known to onnx."""

from __future__ import annotations

# It lists all schemas when it is imported first, and refuses one name in two domains, as ours is `Attention` too: here,
# so that no order of imports fails, in a user's process that only opens a model either.
import onnx.reference  # noqa: F401
from onnx import defs
from onnx.defs import OpSchema


def register(schema: OpSchema) -> None:
    """Known to the checker and to shape inference. Raises ``onnx.defs.SchemaError`` where it is already."""
    defs.register_schema(schema)
