"""Drawn images whose label, or whose look, ties parts together that are far apart.

``scene`` (classifier): glyphs of different colours, one of each, and one striped disc, the cue. The label is the shape
of the glyph that has the cue's colour, which is never a neighbour of the cue. ``family`` (diffusion): all glyphs of an
image have the label's shape and one colour, drawn anew for each image.

The same seed gives the same images on the same kind of device; evaluation draws its images' parameters on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("disc", "ring", "square", "frame", "star", "bar", "plus", "triangle")
# Of each shape: half-height relative to half-width, exponent of the superellipse, hole, also turned by 90 degrees.
_TABLE = (
    (1.0, 2.0, 0.0, 0.0),
    (1.0, 2.0, 0.55, 0.0),
    (0.85, 10.0, 0.0, 0.0),
    (0.85, 10.0, 0.55, 0.0),
    (1.0, 0.6, 0.0, 0.0),
    (0.3, 8.0, 0.0, 0.0),
    (0.3, 8.0, 0.0, 1.0),
    (1.0, 2.0, 0.0, 0.0),
)
_COLOURS = (
    (0.9, 0.1, 0.1), (0.1, 0.8, 0.1), (0.15, 0.2, 0.95), (0.95, 0.85, 0.1),
    (0.85, 0.1, 0.85), (0.1, 0.85, 0.85), (1.0, 0.5, 0.05), (0.95, 0.95, 0.95),
)  # fmt: skip
_CELLS = 42.0  # pixels of the classifier's images to a cell, of which each holds one glyph at most
_FAMILY_CELLS = 21.0


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Glyphs of a batch, [batch, glyph] each (colour [batch, glyph, 3]); centres and radii in pixels."""

    shape: Tensor
    colour: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor
    shown: Tensor
    striped: Tensor


def scene(
    batch: int, side: int, generator: torch.Generator, device: torch.device, full: bool = False
) -> tuple[Tensor, Tensor]:
    """Images float32 [batch, 3, side, side] in -1 to 1 and labels int64 [batch]; ``full``: as many glyphs as fit."""
    cells = max(2, round(side / _CELLS))
    most = min(8, cells * cells - 1)
    at = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=at)

    place = uniform(batch, cells * cells).argsort(1)[:, : most + 1]  # the cue is glyph 0
    row, column = place // cells, place % cells
    far = ((row - row[:, :1]).abs().maximum((column - column[:, :1]).abs()) >= 2)[:, 1:]
    # In a grid of 2 x 2 cells nothing is far; there any glyph will do.
    wish = uniform(batch, most) + far.float()
    target = wish.argmax(1)
    least = most if full else min(2, most)
    count = torch.randint(least, most + 1, (batch, 1), generator=generator, device=at)
    hidden = wish.argsort(1, descending=True).argsort(1) >= count  # the target has rank 0 and is always shown
    kind = torch.randint(0, len(SHAPES), (batch, most), generator=generator, device=at)
    hue = uniform(batch, len(_COLOURS)).argsort(1)[:, :most]
    rows = torch.arange(batch, device=at)
    label = kind[rows, target]
    kind = torch.cat([torch.zeros_like(kind[:, :1]), kind], 1)
    hue = torch.cat([hue[rows, target][:, None], hue], 1)
    colour = torch.tensor(_COLOURS, device=at)[hue] + 0.06 * (uniform(batch, most + 1, 3) - 0.5)
    glyphs = _placed(kind, colour, row, column, side / cells, uniform)
    shown = torch.cat([torch.ones_like(hidden[:, :1]), ~hidden], 1)
    striped = torch.zeros_like(shown)
    striped[:, 0] = True
    drawn = Glyphs(*(value.to(device) for value in (*glyphs, shown, striped)))
    ground = (0.35 * uniform(batch, 4, 3)).to(device)
    return _render(drawn, ground, side, noise=0.04, generator=generator), label.to(device)


def family(batch: int, side: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images float32 [batch, 3, side, side] in -1 to 1 and labels int64 [batch]."""
    cells = round(side / _FAMILY_CELLS)
    most = min(6, cells * cells)
    at = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=at)

    place = uniform(batch, cells * cells).argsort(1)[:, :most]
    label = torch.randint(0, len(SHAPES), (batch,), generator=generator, device=at)
    hue = 2 * math.pi * (uniform(batch, 1, 1) + torch.arange(3, device=at) / 3)
    colour = (0.55 + 0.45 * hue.cos()).expand(batch, most, 3)
    glyphs = _placed(label[:, None].expand(batch, most), colour, place // cells, place % cells, side / cells, uniform)
    count = torch.randint(min(3, most), most + 1, (batch, 1), generator=generator, device=at)
    shown = torch.arange(most, device=at)[None] < count
    drawn = Glyphs(*(value.to(device) for value in (*glyphs, shown, torch.zeros_like(shown))))
    ground = (0.3 * uniform(batch, 4, 3)).to(device)
    return _render(drawn, ground, side, noise=0.0, generator=generator), label.to(device)


def _placed(
    kind: Tensor, colour: Tensor, row: Tensor, column: Tensor, cell: float, uniform: object
) -> tuple[Tensor, ...]:
    """Shape, colour, x, y, radius and angle of glyphs that stay inside their cells."""
    draw = uniform
    assert callable(draw)
    radius = cell * (0.32 + 0.1 * draw(*kind.shape))
    room = cell / 2 - radius
    x = (column + 0.5) * cell + room * (2 * draw(*kind.shape) - 1)
    y = (row + 0.5) * cell + room * (2 * draw(*kind.shape) - 1)
    return kind, colour, x, y, radius, 0.7 * (draw(*kind.shape) - 0.5)


def _render(glyphs: Glyphs, ground: Tensor, side: int, noise: float, generator: torch.Generator) -> Tensor:
    """Paints glyphs, one after the other, on a ground that runs between the colours of its four corners."""
    device = ground.device
    line = (torch.arange(side, device=device) + 0.5) / side
    right, down = line[None, None, None, :], line[None, None, :, None]
    corner = ground[:, :, :, None, None]
    image = (corner[:, 0] * (1 - right) + corner[:, 1] * right) * (1 - down) + (
        corner[:, 2] * (1 - right) + corner[:, 3] * right
    ) * down
    for index in range(glyphs.shape.shape[1]):
        cover = _cover(glyphs, index, side)[:, None]
        image = image + cover * (glyphs.colour[:, index, :, None, None] - image)
    if noise:
        image = image + noise * torch.randn(image.shape, generator=generator, device=generator.device).to(device)
    return (image * 2 - 1).clamp(-1, 1)


def _cover(glyphs: Glyphs, index: int, side: int) -> Tensor:
    """How much of each pixel glyph ``index`` covers, float32 [batch, side, side] in 0 to 1, with soft edges."""
    table = torch.tensor(_TABLE, device=glyphs.x.device)[glyphs.shape[:, index]]
    flat, power, hole, both = (table[:, at, None, None] for at in range(4))
    pick = {name: getattr(glyphs, name)[:, index, None, None] for name in ("x", "y", "radius", "angle", "shape")}
    pixel = torch.arange(side, device=glyphs.x.device) + 0.5
    dx = (pixel[None, None, :] - pick["x"]) / pick["radius"]
    dy = (pixel[None, :, None] - pick["y"]) / pick["radius"]
    cos, sin = pick["angle"].cos(), pick["angle"].sin()
    u, v = (cos * dx + sin * dy).abs() + 1e-4, cos * dy - sin * dx
    w = v.abs() + 1e-4

    def level(a: Tensor, b: Tensor) -> Tensor:  # 1 on the outline, grows linearly outwards
        wide = torch.where(flat < 0.8, torch.ones_like(flat), flat)
        return ((a / wide) ** power + (b / flat) ** power) ** (1 / power)

    outline = level(u, w)
    outline = torch.where(both > 0, torch.minimum(outline, level(w, u)), outline)
    triangle = torch.maximum(2 * v, math.sqrt(3) * u - v)  # its sides are 1/2 from the centre
    outline = torch.where(pick["shape"] == len(SHAPES) - 1, triangle, outline)
    soft = pick["radius"] / 1.5
    cover = ((1 - outline) * soft + 0.5).clamp(0, 1)
    cover = cover * torch.where(hole > 0, ((outline - hole) * soft + 0.5).clamp(0, 1), torch.ones_like(outline))
    stripes = ((dx + dy) * 5).sin() > -0.2
    cover = torch.where(glyphs.striped[:, index, None, None], cover * stripes, cover)
    return cover * glyphs.shown[:, index, None, None]
