"""``python -m attncompile.models.trained.export lm|vit|dit --out FILE``: trained weights to ONNX.

They come from the committed file, so that this is how one gets it in float32, at another length or with dynamic axes;
or with ``--weights`` from what ``train`` wrote.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx
import torch

from attncompile.core.errors import MissingDependency
from attncompile.models.export import export_built, quiet
from attncompile.models.recipe import Built, Options
from attncompile.models.trained.dit import Dit
from attncompile.models.trained.lm import Lm
from attncompile.models.trained.recipe import Recipes, load
from attncompile.models.trained.vit import Vit
from attncompile.models.trained.weights import SCOPES
from attncompile.models.trained.weights import load as load_weights

_OPSET = {"dynamo": 18, "torchscript": 17}
_KEPT = ("namespace", SCOPES)


def committed(name: str) -> Path:
    """The trained model that lies beside this file in a checkout; a wheel has none."""
    path = Path(__file__).with_name(f"{name}.onnx")
    if not path.is_file():
        raise MissingDependency(f"{path} is not there", "the trained models are in the repository, not in the package")
    return path


def built(name: str, recipes: Recipes, weights: Path, dtype: torch.dtype, tokens: int | None = None) -> Built:
    """A trained model in eval mode with an example of its inputs; ``tokens`` of the decoder, else its context.

    The diffusion model's ``time`` stays float32: float16 is too coarse for its waves.
    """
    module: torch.nn.Module
    if name == "lm":
        module = Lm(recipes.lm)
        inputs = {"input_ids": torch.zeros(1, tokens or recipes.lm.context, dtype=torch.int64)}
        axes, outputs = {"input_ids": {0: "batch", 1: "sequence"}}, ("logits",)
    elif name == "vit":
        module = Vit(recipes.vit)
        inputs = {"images": torch.zeros(1, 3, recipes.vit.side, recipes.vit.side, dtype=dtype)}
        axes, outputs = {"images": {0: "batch"}}, ("logits",)
    else:
        module = Dit(recipes.dit)
        inputs = {
            "sample": torch.zeros(1, 3, recipes.dit.side, recipes.dit.side, dtype=dtype),
            "time": torch.zeros(1),
            "label": torch.zeros(1, dtype=torch.int64),
        }
        axes, outputs = {key: {0: "batch"} for key in inputs}, ("velocity",)
    load_weights(module, weights, name)
    return Built(module.to(dtype).eval(), inputs, outputs, axes)


def export(name: str, weights: Path, out: Path, options: Options, recipes: Recipes | None = None) -> Path:
    """Writes the ONNX file; of ``options`` exporter, opset, dtype, tokens and dynamic count."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.dtype]
    made = built(name, recipes or load(), weights, dtype, options.tokens)
    if "batch" in options.dynamic:  # torch.export takes an extent of 1 as a constant
        made.inputs.update({key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in made.inputs.items()})  # type: ignore[attr-defined]
    with quiet():
        export_built(made, options, out)
    _without_traces(out)
    return out


def _without_traces(path: Path) -> None:
    """Drops the source lines and paths that the exporter notes at every node; names of modules and scopes stay."""
    model = onnx.load(path)
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key in _KEPT]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(model, path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("lm", "vit", "dit"))
    parser.add_argument("--weights", type=Path, help="folder with MODEL-0.safetensors and so on, or an exported file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--exporter", choices=tuple(_OPSET), default="dynamo")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--tokens", type=int, help="of the decoder; its context where not given")
    parser.add_argument("--dynamic", nargs="*", default=(), choices=("batch", "sequence"))
    parser.add_argument("--recipe", type=Path)
    arguments = parser.parse_args()
    options = Options(exporter=arguments.exporter, opset=_OPSET[arguments.exporter], dtype=arguments.dtype,
                      tokens=arguments.tokens, dynamic=tuple(arguments.dynamic))  # fmt: skip
    weights = arguments.weights or committed(arguments.model)
    path = export(arguments.model, weights, arguments.out, options, load(arguments.recipe))
    print(f"{path}: {path.stat().st_size} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
