"""``python -m attncompile.models.trained.evaluate lm|vit|dit [MODEL.onnx]``: scores of an ONNX file by ONNX Runtime.

Without a file, of the committed one. ``--reference``, the file that MODEL was rewritten from, is scored too, and
``dit`` gives the PSNR of images from the same noise. ``--torch`` takes as reference the torch model in float32 with the
committed file's weights.
"""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attncompile import measure
from attncompile.models.trained import corpus, scores
from attncompile.models.trained.export import built, committed
from attncompile.models.trained.recipe import Recipes, load

_HELD = Path(__file__).with_name("data")


class Runner(ABC):
    """A model as a function of tensors, in the order of its inputs, to its first output in float32."""

    @abstractmethod
    def __call__(self, *values: Tensor) -> Tensor:
        """One run."""

    def one_by_one(self, *values: Tensor) -> Tensor:
        """As a call, for models of batch 1."""
        return torch.cat([self(*(value[index : index + 1] for value in values)) for index in range(len(values[0]))])


class Session(Runner):
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, provider: measure.Provider, library: Path | None = None) -> None:
        # Lean: two sessions of 8,192 tokens keep 10 GB else.
        self._session = measure.open_session(path, provider=provider, lean=True, library=library)
        self._inputs = self._session.get_inputs()

    def __call__(self, *values: Tensor) -> Tensor:
        types = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
        feed = {
            wanted.name: value.numpy().astype(types[wanted.type])
            for wanted, value in zip(self._inputs, values, strict=True)
        }
        return torch.from_numpy(self._session.run(None, feed)[0]).float()


class Torch(Runner):
    """The torch model in float32 with a file's weights."""

    def __init__(self, name: str, weights: Path, recipes: Recipes) -> None:
        self._module = built(name, recipes, weights, torch.float32).module

    def __call__(self, *values: Tensor) -> Tensor:
        with torch.inference_mode():
            out: Tensor = self._module(*values)
        return out.clone()


@dataclass(frozen=True, slots=True)
class Sample:
    """How much is scored: ``count`` windows of the ``split`` in ``data``, ``tokens`` long, of which ``probes`` are the
    ground of records and repeated segments; or ``count`` images. ``None`` is the kind's own number.
    """

    count: int | None = None
    probes: int | None = None
    tokens: int | None = None
    data: Path = _HELD
    split: str = "held"


def evaluate(name: str, run: Runner, recipes: Recipes, sample: Sample) -> dict[str, Any]:
    """The scores of ``run``."""
    count = sample.count
    if name == "lm":
        length = sample.tokens or recipes.lm.context
        if sample.split == "held":
            held = torch.from_numpy(corpus.held(sample.data))[: count or 4, : length + 1]
        else:
            held = torch.from_numpy(corpus.windows(corpus.read(sample.data, sample.split), length + 1, count or 4))

        def losses(windows: Tensor) -> tuple[Tensor, Tensor]:
            logits = run.one_by_one(windows[:, :-1])
            flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
            return flat.view(windows.shape[0], -1), logits.argmax(-1)

        return scores.language(held, recipes.lm, losses, probes=sample.probes)
    if name == "vit":
        return scores.classes(recipes.vit, run.one_by_one, count or 200, batch=20)
    return scores.denoising(recipes.dit, run.one_by_one, count or 8)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("lm", "vit", "dit"))
    parser.add_argument("model", type=Path, nargs="?", help="the committed file where not given")
    against = parser.add_mutually_exclusive_group()
    against.add_argument("--reference", type=Path)
    against.add_argument("--torch", action="store_true")
    parser.add_argument("--library", type=Path, help="custom operators of the model, for ONNX Runtime")
    parser.add_argument("--count", type=int, help="windows of text, or images")
    parser.add_argument("--probes", type=int, help="lm: windows for records and repeated segments; all if not given")
    parser.add_argument("--data", type=Path, default=_HELD)
    parser.add_argument("--split", choices=("held", *corpus.SPLITS), default="held")
    parser.add_argument("--tokens", type=int, help="of a window of text; the model's context where not given")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=7, help="of the noise that images are made from")
    parser.add_argument("--images", type=Path, help="dit: write the sampled images here (PNG)")
    parser.add_argument("--recipe", type=Path)
    given = parser.parse_args()
    recipes = load(given.recipe)
    sample = Sample(given.count, given.probes, given.tokens, given.data, given.split)
    run = Session(given.model or committed(given.kind), given.provider, given.library)
    result = evaluate(given.kind, run, recipes, sample)
    reference: Runner | None = None
    if given.reference:
        reference = Session(given.reference, given.provider)
    elif given.torch:
        reference = Torch(given.kind, committed(given.kind), recipes)
    if reference is not None:
        result["reference"] = evaluate(given.kind, reference, recipes, sample)
    if given.kind == "dit" and (reference or given.images):
        labels = torch.arange(min(given.count or 4, recipes.dit.classes))
        images = scores.sample(recipes.dit, run.one_by_one, labels, given.seed)
        if given.images:
            _write(images, given.images)
        if reference is not None:
            expected = scores.sample(recipes.dit, reference.one_by_one, labels, given.seed)
            result["psnr"] = [round(value, 2) for value in scores.psnr(images, expected)]
    print(json.dumps(result, indent=1))  # noqa: T201


def _write(images: Tensor, path: Path) -> None:
    from PIL import Image

    row = ((images + 1) * 127.5).round().byte().permute(2, 0, 3, 1).flatten(1, 2)  # side, image * side, 3
    Image.fromarray(row.numpy()).save(path)


if __name__ == "__main__":
    main()
