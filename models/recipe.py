"""What a recipe is: a name, its sizes, and a function that builds a torch module with example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from attncompile.core.errors import BadArguments

if TYPE_CHECKING:
    import torch

Exporter = Literal["dynamo", "torchscript"]
AttentionForm = Literal["sdpa", "eager"]
Dtype = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose. ``None`` means the size's own value.

    ``tokens`` is the sequence length of text, the number of patches of an image (a square number).
    ``padding_mask`` adds the input ``attention_mask`` to a decoder; ``None``: only where the exporter needs it.
    ``dynamic`` names the axes that stay symbolic (``batch``, ``sequence``); ``batch`` is the size of the example.
    """

    size: str = "tiny"
    exporter: Exporter = "dynamo"
    opset: int | None = None
    attention: AttentionForm = "sdpa"
    dtype: Dtype = "fp32"
    tokens: int | None = None
    window: int | None = None
    layers: int | None = None
    kv_heads: int | None = None
    padding_mask: bool | None = None
    dynamic: tuple[str, ...] = ()
    batch: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Built:
    """A module in eval mode with example inputs.

    ``inputs`` maps names to tensors in the order of ``forward``; ``axes`` maps an input's name to its axes that may
    be dynamic, as ``{axis: name}``, names being ``batch``, ``sequence`` or a recipe's own.
    """

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One architecture. ``uses`` lists the options beside size, exporter, opset, dtype and seed that it understands;
    any other that is set is refused rather than ignored.
    """

    name: str
    description: str
    sizes: tuple[str, ...]
    build: Callable[[Options], Built]
    kind: Literal["image", "latent", "tokens", "text"]
    dynamic_axes: tuple[str, ...] = ("batch",)
    uses: frozenset[str] = field(default_factory=frozenset)

    def check(self, options: Options) -> None:
        """Raises ``BadArguments`` for a size, an axis or an option that this recipe does not have."""
        if options.size not in self.sizes:
            raise BadArguments(f"{self.name} has no size {options.size!r}", f"choose one of {', '.join(self.sizes)}")
        for option in ("tokens", "window", "layers", "kv_heads", "padding_mask"):
            if getattr(options, option) is not None and option not in self.uses:
                flag = "--" + option.replace("_", "-")
                raise BadArguments(f"{self.name} takes no {flag}", f"it takes {_flags(self.uses)}")
            value = getattr(options, option)
            if option != "padding_mask" and value is not None and value < 1:
                raise BadArguments(f"--{option.replace('_', '-')} is {value}", "give a number of at least 1")
        for axis in options.dynamic:
            if axis not in self.dynamic_axes:
                raise BadArguments(
                    f"{self.name} has no dynamic axis {axis!r}", f"choose from {', '.join(self.dynamic_axes)}"
                )
        if options.attention == "eager" and "eager" not in self.uses:
            raise BadArguments(f"{self.name} has no eager attention", "leave --attention at sdpa")


def _flags(uses: frozenset[str]) -> str:
    names = ["--attention eager" if use == "eager" else "--" + use.replace("_", "-") for use in sorted(uses)]
    return ", ".join(names) if names else "no such option"
