"""The standard op ``Attention`` (opset 23 and later): what this project relies on. The schema is ONNX's own.

Without a cache ``is_causal`` is a lower triangle aligned at the first key, so it is used only where there are as many
queries as keys. A boolean ``attn_mask`` says which keys are seen; ONNX Runtime 1.32 wants its query axis whole up to
opset 24, so a padding mask is expanded over the queries. The scale goes as sqrt(scale) on Q and on K.
"""

from __future__ import annotations

OP_TYPE = "Attention"
FIRST_OPSET = 23
