"""Sentences that text recipes read. Written for this project; of different lengths, so that padding is real."""

from __future__ import annotations

SENTENCES: tuple[str, ...] = (
    "The ferry leaves the harbour at seven in the morning and comes back after dark.",
    "A compiler reads a program in one language and writes an equal program in another.",
    "Rain is expected on Thursday.",
    "She planted two rows of beans along the fence, then a row of onions, and left the rest of the bed for the "
    "tomatoes that her neighbour had promised to bring over at the end of the week.",
    "How do I change the filter of this vacuum cleaner?",
    "Neural networks spend much of their time on multiplying matrices that are mostly alike.",
    "The court found that the contract had never been signed by both parties.",
    "Glaciers carve wide valleys; rivers carve narrow ones.",
)
