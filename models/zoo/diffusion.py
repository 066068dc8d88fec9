"""Models of diffusers at a small size."""

from __future__ import annotations

from typing import Any

import torch

from attncompile.models.dit import set_attention
from attncompile.models.recipe import Built, Options
from attncompile.models.weights import seed_weights
from attncompile.models.zoo.entry import Entry


class _Called(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self._names = names

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.model(**dict(zip(self._names, tensors, strict=True)), return_dict=False)[0]


def model(entry: Entry) -> Built:
    """``options``: ``kind`` (a class of diffusers), ``settings`` (its arguments), ``inputs`` (name -> shape)."""
    import diffusers

    made = getattr(diffusers, entry.options["kind"])(**entry.options["settings"])
    if entry.attention == "eager":
        set_attention(made, Options(attention="eager"))
    seed_weights(made, 0)
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.full((shape[0],), 500) if name == "timestep" else torch.randn(shape, generator=generator)
              for name, shape in entry.options["inputs"].items()}  # fmt: skip
    axes = {name: {0: "batch"} for name in inputs}
    return Built(_Called(made, tuple(inputs)).eval(), inputs, ("output",), axes)
