"""The models' scores, as functions of a callable that may be torch, ONNX Runtime or a rewritten model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attncompile import metrics
from attncompile.models.trained import draw, tasks
from attncompile.models.trained.recipe import DitRecipe, LmRecipe, VitRecipe

_SEED = 20_251  # of evaluation, apart from the seeds of training
_SEGMENT = 256
_CPU = torch.device("cpu")

# [batch, tokens + 1] to the losses [batch, tokens] in nats and the likeliest next tokens [batch, tokens]
Losses = Callable[[Tensor], tuple[Tensor, Tensor]]


def language(
    held: Tensor, recipe: LmRecipe, losses: Losses, batch: int = 1, probes: int | None = None
) -> dict[str, Any]:
    """Perplexity on the windows ``held`` [window, tokens + 1] and, with as many of them (or ``probes``) as ground,
    the accuracy of looked up records and of repeated segments.
    """
    loss = torch.cat([losses(part)[0] for part in held.split(batch)])
    quarter = loss.shape[1] // 4
    generator = torch.Generator().manual_seed(_SEED)
    ground = held[:probes]
    needle = tasks.needle(ground, recipe.vocab, generator)
    copy = tasks.copy(ground, recipe.vocab, min(_SEGMENT, ground.shape[1] // 8), generator)
    whole, parts = tasks.found(torch.cat([losses(part)[1] for part in needle.windows.split(batch)]), needle)
    copied = tasks.copied(torch.cat([losses(part)[1] for part in copy.windows.split(batch)]), copy)
    return {
        "windows": len(held),
        "tokens": loss.shape[1],
        "loss": round(loss.mean().item(), 5),
        "perplexity": round(math.exp(loss.mean().item()), 4),
        "perplexity_of_quarters": [round(math.exp(part.mean().item()), 4) for part in loss.split(quarter, 1)],
        "records": needle.answers.shape[0] * needle.answers.shape[1],
        "needle": round(whole, 4),
        "needle_near_to_far": [round(part, 4) for part in parts],
        "copy": round(copied, 4),
    }


def classes(
    recipe: VitRecipe, logits: Callable[[Tensor], Tensor], count: int, batch: int, device: torch.device = _CPU
) -> dict[str, Any]:
    """Top-1 on ``count`` images that show as many glyphs as they may, painted on ``device``."""
    generator = torch.Generator().manual_seed(_SEED)
    hits = 0
    loss = 0.0
    for _ in range(count // batch):
        images, labels = draw.scene(batch, recipe.side, generator, device, full=True)
        labels = labels.cpu()
        out = logits(images)
        hits += int((out.argmax(1) == labels).sum())
        loss += torch.nn.functional.cross_entropy(out, labels).item() * batch
    total = count // batch * batch
    return {"images": total, "top1": round(hits / total, 4), "loss": round(loss / total, 5)}


Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def denoising(recipe: DitRecipe, velocity: Velocity, count: int) -> dict[str, Any]:
    """Mean squared error of the velocity at five times, on ``count`` images a time."""
    generator = torch.Generator().manual_seed(_SEED)
    images, labels = draw.family(count, recipe.side, generator, _CPU)
    noise = torch.randn(images.shape, generator=generator)
    result: dict[str, Any] = {"images": count}
    for at in (0.1, 0.3, 0.5, 0.7, 0.9):
        guess = velocity(images * (1 - at) + noise * at, torch.full((count,), at), labels)
        result[f"error_at_{at}"] = round((guess - (noise - images)).square().mean().item(), 5)
    return result


def sample(recipe: DitRecipe, velocity: Velocity, labels: Tensor, seed: int) -> Tensor:
    """Images float32 [image, 3, side, side] in -1 to 1, one for each label, by Euler steps from seeded noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 3, recipe.side, recipe.side, generator=generator)
    for step in range(recipe.steps):
        time = 1.0 - step / recipe.steps
        x = x - velocity(x, torch.full((len(labels),), time), labels) / recipe.steps
    return x.clamp(-1, 1)


def psnr(images: Tensor, reference: Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of each image, values being -1 to 1; infinite where they are equal."""
    return [metrics.psnr(r.numpy(), i.numpy(), peak=2.0) for r, i in zip(reference, images, strict=True)]
