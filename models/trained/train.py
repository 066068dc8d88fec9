"""``python -m attncompile.models.trained.train lm|vit|dit --seconds S --out FOLDER``: trains one of the models.

Ends inside the budget on a GPU. Seeds fix the first weights and the batches of the first phase; phases end by the
clock.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attncompile.models.trained import corpus, draw, scores, tasks
from attncompile.models.trained.dit import Dit
from attncompile.models.trained.lm import Lm, token_losses
from attncompile.models.trained.loop import Run, compiled, finish, train
from attncompile.models.trained.recipe import Phase, Recipes, load
from attncompile.models.trained.vit import Vit


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("lm", "vit", "dit"))
    parser.add_argument(
        "--seconds", type=float, required=True, help="wall-clock budget, compilation and evaluation included"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and curve")
    parser.add_argument("--data", type=Path, help="folder that attncompile.models.trained.corpus wrote (lm only)")
    parser.add_argument("--state", type=Path, help="checkpoint to write, and to go on from where it exists")
    parser.add_argument("--steps", type=int, help="stop after this many steps even if time is left")
    parser.add_argument("--recipe", type=Path, help="another recipe.toml")
    arguments = parser.parse_args()
    if arguments.model == "lm" and arguments.data is None:
        parser.error("lm needs --data")
    recipes = load(arguments.recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(getattr(recipes, arguments.model).seed)

    def run(model: torch.nn.Module) -> Run:
        made = Run(arguments.model, getattr(recipes, arguments.model), model.to(device), arguments.seconds,
                   arguments.out, arguments.state, arguments.steps, device)  # fmt: skip
        compiled(made, iter(made.model.layers))  # type: ignore[arg-type]
        return made

    arguments.out.mkdir(parents=True, exist_ok=True)
    {"lm": _lm, "vit": _vit, "dit": _dit}[arguments.model](recipes, run, arguments.data)


def _lm(recipes: Recipes, start: Callable[[torch.nn.Module], Run], data: Path) -> None:
    recipe = recipes.lm
    model = Lm(recipe)
    run = start(model)
    tokens = torch.from_numpy(corpus.read(data, "train").astype(np.int32)).to(run.device)
    if int(tokens.max()) >= recipe.vocab:
        raise ValueError(f"{data} has tokens beyond the recipe's vocabulary of {recipe.vocab}")
    coin = random.Random(recipe.seed)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32

    def loss_of(phase: Phase, generator: torch.Generator) -> Tensor:
        start = torch.randint(0, len(tokens) - phase.size, (phase.batch, 1), generator=generator, device=run.device)
        windows = tokens[start + torch.arange(phase.size + 1, device=run.device)].long()
        inputs, targets = tasks.mixed(windows, recipe.vocab, recipe.needles, recipe.copies, generator, coin)
        with _autocast(run.device):
            losses = token_losses(model.features(inputs, dtype), model.embedding.weight, targets)
        return losses.sum() / (targets >= 0).sum()

    train(run, loss_of)
    held = torch.from_numpy(corpus.windows(corpus.read(data, "validation"), recipe.context + 1, 24))

    def losses(windows: Tensor) -> tuple[Tensor, Tensor]:
        windows = windows.to(run.device)
        with torch.no_grad(), _eager(), _autocast(run.device):
            features = model.features(windows[:, :-1], dtype)
            loss = token_losses(features, model.embedding.weight, windows[:, 1:])
            best = torch.nn.functional.linear(features, model.embedding.weight.to(dtype)).argmax(-1)
        return loss.cpu(), best.cpu()

    finish(run, scores.language(held, recipe, losses, batch=4))


def _vit(recipes: Recipes, start: Callable[[torch.nn.Module], Run], data: Path | None) -> None:
    recipe = recipes.vit
    model = Vit(recipe)
    run = start(model)

    def loss_of(phase: Phase, generator: torch.Generator) -> Tensor:
        images, labels = draw.scene(phase.batch, phase.size, generator, run.device)
        with _autocast(run.device):
            logits = model(images)
        return torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.02)

    train(run, loss_of)

    def logits(images: Tensor) -> Tensor:
        with torch.no_grad(), _eager(), _autocast(run.device):
            return model(images.to(run.device)).float().cpu()

    count = 2000 if run.device.type == "cuda" else 20
    finish(run, scores.classes(recipe, logits, count=count, batch=100 if count > 100 else 20, device=run.device))


def _dit(recipes: Recipes, start: Callable[[torch.nn.Module], Run], data: Path | None) -> None:
    recipe = recipes.dit
    model = Dit(recipe)
    run = start(model)

    def loss_of(phase: Phase, generator: torch.Generator) -> Tensor:
        images, labels = draw.family(phase.batch, phase.size, generator, run.device)
        noise = torch.randn(images.shape, generator=generator, device=run.device)
        time = torch.sigmoid(torch.randn(phase.batch, generator=generator, device=run.device))
        at = time[:, None, None, None]
        with _autocast(run.device):
            velocity = model(images * (1 - at) + noise * at, time, labels)
        return torch.nn.functional.mse_loss(velocity.float(), noise - images)

    train(run, loss_of)

    def velocity(sample: Tensor, time: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad(), _eager(), _autocast(run.device):
            return model(sample.to(run.device), time.to(run.device), label.to(run.device)).float().cpu()

    count = 256 if run.device.type == "cuda" else 8
    finish(run, scores.denoising(recipe, velocity, count=count))


def _autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _eager() -> Any:
    """Evaluation has shapes of its own: not worth a compilation."""
    return torch.compiler.set_stance("force_eager")


if __name__ == "__main__":
    main()
