"""Sequences that only long attention can predict: records to look up by their key, and repeated segments.

Both overwrite windows of code. Targets are -100, which the loss leaves out, where a token is random at its first sight.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

KEY, VALUE, END = 1, 2, 3  # of corpus.SPECIAL; 0 ends a file
_FIRST = 4
KEYS, VALUES = 2, 4  # tokens of a key, of a value
RECORD = KEYS + VALUES + 3
_UNCLEAR = 4  # tokens of a repeated segment before it is clear that it is one


@dataclass(frozen=True, slots=True)
class Probes:
    """Windows [window, tokens + 1] and where the answers stand in them, int64 [window, probe, token of the answer];
    ``distance`` [window, probe]: tokens between the answer and where it was first seen.
    """

    windows: Tensor
    answers: Tensor
    distance: Tensor


def mixed(
    windows: Tensor, vocab: int, needles: float, copies: float, generator: torch.Generator, coin: random.Random
) -> tuple[Tensor, Tensor]:
    """``windows`` int64 [batch, tokens + 1] of code as inputs and targets [batch, tokens], of which the parts
    ``needles`` and ``copies`` (on average, where they are not whole sequences) hold records and repeated segments.
    """
    batch = windows.shape[0]
    many = [int(batch * part + coin.random()) for part in (needles, copies)]
    known = torch.ones_like(windows, dtype=torch.bool)
    windows = windows.clone()
    first, last = slice(0, many[0]), slice(many[0], many[0] + many[1])
    if many[0]:
        probes = needle(windows[first], vocab, generator)
        windows[first] = probes.windows
        known[first] = _known_of_needles(probes)
    if many[1]:
        length = coin.randint(16, max(17, windows.shape[1] // 8))
        probes = copy(windows[last], vocab, length, generator)
        windows[last] = probes.windows
        known[last] = _known_of_copies(probes)
    targets = torch.where(known, windows, -100)
    return windows[:, :-1], targets[:, 1:]


def needle(windows: Tensor, vocab: int, generator: torch.Generator) -> Probes:
    """Records spread over the windows, and at the end each of their keys again, in another order, with the value."""
    rows, length = windows.shape
    device = windows.device
    count = max(4, min(32, length // 64))
    body = length - count * RECORD
    slot = body // count
    if slot < RECORD:
        raise ValueError(f"{length} tokens have no room for {count} records")
    record = _random(rows, count, RECORD, vocab=vocab, generator=generator)
    record[..., 0], record[..., KEYS + 1], record[..., -1] = KEY, VALUE, END
    start = torch.randint(0, slot - RECORD + 1, (rows, count), generator=generator, device=device)
    start = start + slot * torch.arange(count, device=device)
    order = torch.rand(rows, count, generator=generator, device=device).argsort(1)
    inside = torch.arange(RECORD, device=device)
    asked = (body + RECORD * torch.arange(count, device=device)).expand(rows, count)
    windows = windows.clone()
    windows.scatter_(1, (start[..., None] + inside).flatten(1), record.flatten(1))
    again = record.gather(1, order[..., None].expand_as(record))
    windows.scatter_(1, (asked[..., None] + inside).flatten(1), again.flatten(1))
    answers = asked[..., None] + KEYS + 2 + torch.arange(VALUES, device=device)
    return Probes(windows, answers, asked - start.gather(1, order))


def copy(windows: Tensor, vocab: int, segment: int, generator: torch.Generator) -> Probes:
    """``segment`` random tokens at one place of each window, and again at a later one."""
    rows, length = windows.shape
    if 2 * segment > length:
        raise ValueError(f"{length} tokens have no room for two times {segment}")
    device = windows.device
    text = _random(rows, segment, vocab=vocab, generator=generator)
    room = length - 2 * segment + 1
    places = torch.randint(0, room, (rows, 2), generator=generator, device=device).sort(1).values
    first, second = places[:, :1], places[:, 1:] + segment
    inside = torch.arange(segment, device=device)
    windows = windows.clone()
    windows.scatter_(1, first + inside, text)
    windows.scatter_(1, second + inside, text)
    return Probes(windows, (second + inside)[:, None], second - first)


def _random(*shape: int, vocab: int, generator: torch.Generator) -> Tensor:
    return torch.randint(_FIRST, vocab, shape, generator=generator, device=generator.device)


def _known_of_needles(probes: Probes) -> Tensor:
    """False at the random tokens of records and at the keys of questions."""
    known = torch.ones_like(probes.windows, dtype=torch.bool)
    asked = probes.answers[..., :1] - KEYS - 2
    seen = asked - probes.distance[..., None]
    inside = torch.arange(RECORD, device=known.device)
    known.scatter_(1, (seen + inside).flatten(1), False)
    known.scatter_(1, (asked + inside[: KEYS + 1]).flatten(1), False)
    return known


def _known_of_copies(probes: Probes) -> Tensor:
    """False at the first sight of the segment and at the first tokens of the second."""
    known = torch.ones_like(probes.windows, dtype=torch.bool)
    again = probes.answers[:, 0]
    known.scatter_(1, again - probes.distance, False)
    known.scatter_(1, again[:, :1], False)
    return known


def right(predicted: Tensor, probes: Probes) -> Tensor:
    """Which answers are right: bool [window, probe, token] from ``predicted`` [window, tokens], each's next token."""
    rows, probe, width = probes.answers.shape
    at = probes.answers.flatten(1)
    return (predicted.gather(1, at - 1) == probes.windows.gather(1, at)).view(rows, probe, width)


def copied(predicted: Tensor, probes: Probes) -> float:
    """Accuracy over the tokens of repeated segments, after the first few."""
    return right(predicted, probes)[..., _UNCLEAR:].float().mean().item()


def found(predicted: Tensor, probes: Probes, parts: int = 4) -> tuple[float, list[float]]:
    """Part of the records whose value is right in every token: of all, and by distance from near to far."""
    whole = right(predicted, probes).all(-1).flatten().float()
    order = probes.distance.flatten().argsort()
    return whole.mean().item(), [part.mean().item() for part in whole[order].tensor_split(parts)]
