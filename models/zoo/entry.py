"""What an entry of the zoo is, and what is known to be true about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attncompile.models.recipe import AttentionForm, Dtype, Exporter


@dataclass(frozen=True, slots=True)
class Entry:
    """One export. ``maker`` is ``module:function``; the function takes (``Entry``) and returns a ``Built``.

    ``modules`` names torch module classes that hold attention which calls nothing that can be recorded (products and a
    softmax in their own forward); each call counts as one site. ``refused`` says which true sites are known to stay
    near misses, as code -> count: what an attention site cannot express yet.
    """

    name: str
    maker: str
    family: str
    exporter: Exporter = "dynamo"
    opset: int = 18
    attention: AttentionForm = "sdpa"
    dtype: Dtype = "fp32"
    dynamic: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    refused: Mapping[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """A name that no other entry has."""
        words = [self.name, self.exporter, str(self.opset), self.attention]
        words += [self.dtype] if self.dtype != "fp32" else []
        words += ["dynamic-" + "-".join(self.dynamic)] if self.dynamic else []
        return "/".join(words)


@dataclass(frozen=True, slots=True, order=True)
class Call:
    """One attention call of a torch model. ``mask`` is what its elements were in this call: ``none``, ``causal``,
    ``window LEFT RIGHT``, ``data`` (anything else) or ``unknown`` (not seen); ``+data`` where batch entries differ.
    ``how`` is what was called.
    """

    heads: int
    head_dim: int
    query_length: int
    key_length: int
    mask: str
    how: str
