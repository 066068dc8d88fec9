"""``python -m attncompile.models.trained.evaluate lm|vit|dit MODEL.onnx``: scores of an ONNX file by ONNX Runtime.

With ``--reference`` another file, a rewritten model's dense one, runs too, and ``dit`` gives the PSNR of images
from the same noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attncompile.models.trained import corpus, scores
from attncompile.models.trained.recipe import Recipes, load

_HELD = Path(__file__).with_name("data")


class Session:
    """An ONNX file as a function of tensors in the order of its inputs, to its first output in float32."""

    def __init__(self, path: Path, providers: list[str], library: Path | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if library is not None:
            options.register_custom_ops_library(str(library))
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self._inputs = self._session.get_inputs()

    def __call__(self, *values: Tensor) -> Tensor:
        types = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
        feed = {
            wanted.name: value.numpy().astype(types[wanted.type])
            for wanted, value in zip(self._inputs, values, strict=True)
        }
        return torch.from_numpy(self._session.run(None, feed)[0]).float()

    def one_by_one(self, *values: Tensor) -> Tensor:
        """As a call, for files of batch 1."""
        return torch.cat([self(*(value[index : index + 1] for value in values)) for index in range(len(values[0]))])


def evaluate(
    name: str, run: Session, recipes: Recipes, count: int | None, data: Path, split: str, tokens: int | None
) -> dict[str, Any]:
    """The scores of ``run``: on ``count`` windows of the held-out ``split``, or that many images."""
    if name == "lm":
        length = tokens or recipes.lm.context
        if split == "held":
            held = torch.from_numpy(corpus.held(data))[: count or 4, : length + 1]
        else:
            held = torch.from_numpy(corpus.windows(corpus.read(data, split), length + 1, count or 4))

        def losses(windows: Tensor) -> tuple[Tensor, Tensor]:
            logits = run.one_by_one(windows[:, :-1])
            flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
            return flat.view(windows.shape[0], -1), logits.argmax(-1)

        return scores.language(held, recipes.lm, losses)
    if name == "vit":
        return scores.classes(recipes.vit, run.one_by_one, count or 200, batch=20)
    return scores.denoising(recipes.dit, run.one_by_one, count or 8)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("lm", "vit", "dit"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--library", type=Path, help="custom operators of the model, for ONNX Runtime")
    parser.add_argument("--count", type=int, help="windows of text, or images")
    parser.add_argument("--data", type=Path, default=_HELD)
    parser.add_argument("--split", choices=("held", *corpus.SPLITS), default="held")
    parser.add_argument("--tokens", type=int, help="of a window of text; the model's context where not given")
    parser.add_argument("--provider", default="CPUExecutionProvider")
    parser.add_argument("--seed", type=int, default=7, help="of the noise that images are made from")
    parser.add_argument("--images", type=Path, help="dit: write the sampled images here (PNG)")
    parser.add_argument("--recipe", type=Path)
    arguments = parser.parse_args()
    recipes = load(arguments.recipe)
    run = Session(arguments.model, [arguments.provider], arguments.library)
    result = evaluate(arguments.kind, run, recipes, arguments.count, arguments.data, arguments.split, arguments.tokens)
    if arguments.kind == "dit" and (arguments.reference or arguments.images):
        labels = torch.arange(arguments.count or 4) % recipes.dit.classes
        images = scores.sample(recipes.dit, run.one_by_one, labels, arguments.seed)
        if arguments.images:
            _write(images, arguments.images)
        if arguments.reference:
            dense = Session(arguments.reference, [arguments.provider])
            reference = scores.sample(recipes.dit, dense.one_by_one, labels, arguments.seed)
            result["psnr"] = [round(value, 2) for value in scores.psnr(images, reference).tolist()]
    elif arguments.reference:
        dense = Session(arguments.reference, [arguments.provider])
        result["reference"] = evaluate(
            arguments.kind, dense, recipes, arguments.count, arguments.data, arguments.split, arguments.tokens
        )
    print(json.dumps(result, indent=1))  # noqa: T201


def _write(images: Tensor, path: Path) -> None:
    from PIL import Image

    row = ((images + 1) * 127.5).round().byte().permute(2, 0, 3, 1).flatten(1, 2)  # side, image * side, 3
    Image.fromarray(row.numpy()).save(path)


if __name__ == "__main__":
    main()
