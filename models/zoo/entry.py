"""What an entry of the zoo is, and what is known to be true about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from attncompile.models.recipe import AttentionForm, Dtype, Exporter


@dataclass(frozen=True, slots=True)
class Entry:
    """One export. ``maker`` is ``module:function``; the function takes (``Entry``) and returns a ``Built``.

    ``modules`` names torch module classes whose own forward writes attention in products and a softmax, ``linear``
    those with linear attention, ``sparse`` those that reach a part of the keys by gathers and chunks; ``varied`` names
    inputs on which masks depend (see ``truth.calls_of`` for all four). ``after`` names what is done to the exported
    file (see ``after.py``). ``refused`` says which true sites are known to stay near misses, as code -> count.
    ``needs`` names packages that the extra ``models`` does not bring.
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
    linear: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    refused: Mapping[str, int] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """A name that no other entry has."""
        words = [self.name, self.exporter, str(self.opset), self.attention]
        words += [self.dtype] if self.dtype != "fp32" else []
        words += ["dynamic-" + "-".join(self.dynamic)] if self.dynamic else []
        return "/".join([*words, *self.after])

    @property
    def slug(self) -> str:
        """The title as a file name."""
        return self.title.replace("/", "-")


@dataclass(frozen=True, slots=True, order=True)
class Call:
    """One attention call of a torch model.

    ``kv_heads`` counts heads of keys and values that differ. ``mask`` is what its elements were in this call (see
    ``seen.mask_words``). ``how`` is what was called.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    query_length: int
    key_length: int
    mask: str
    how: str
    kind: Literal["softmax", "linear"] = "softmax"
    sinks: bool = False
