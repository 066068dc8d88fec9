"""Models of diffusers at a small size."""

from __future__ import annotations

from typing import Any

import torch

from attncompile.models.dit import set_attention
from attncompile.models.recipe import Built, Options
from attncompile.models.weights import seed_weights
from attncompile.models.zoo.entry import Entry


class _Called(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], more: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._names, self._more = names, more

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.model(**dict(zip(self._names, tensors, strict=True)), **self._more, return_dict=False)[0]


def model(entry: Entry) -> Built:
    """``options``: ``kind`` (a class of diffusers), ``settings`` (its arguments), ``inputs`` (name -> shape), ``call``
    (arguments that are no tensors). A mask hides the last two tokens of the last batch entry.
    """
    import diffusers

    made = getattr(diffusers, entry.options["kind"])(**entry.options["settings"])
    if entry.attention == "eager":
        set_attention(made, Options(attention="eager"))
    seed_weights(made, 0)
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    for name, shape in entry.options["inputs"].items():
        if name == "timestep":
            inputs[name] = torch.full(shape, 500)
        elif name.endswith("mask"):
            inputs[name] = torch.ones(shape)
            inputs[name][-1, -2:] = 0
        else:
            inputs[name] = torch.randn(shape, generator=generator)
    axes = {name: {0: "batch"} for name in inputs}
    return Built(_Called(made, tuple(inputs), dict(entry.options.get("call", {}))).eval(), inputs, ("output",), axes)
