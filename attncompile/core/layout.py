"""Axis orders of operands, and operands that are one part of a packed tensor.

A layout names the axes of an operand in order, such as ``BNHD``. A digit in it is an axis of the tensor that the
operand has not: of its parts the operand is the one with that number. So q, k and v of a product [B, N, 3 H D], as a
view [B, N, 3, H, D], have the layouts ``BN0HD``, ``BN1HD`` and ``BN2HD``, and all three inputs are that one tensor.
"""

from __future__ import annotations

DIGITS = "0123456789"


def part(layout: str) -> tuple[int, int] | None:
    """``(axis, number)`` of the part that a packed operand is, None for one that is a whole tensor."""
    return next(((axis, int(letter)) for axis, letter in enumerate(layout) if letter in DIGITS), None)


def unpacked(layout: str) -> str:
    """The layout of the part alone."""
    return "".join(x for x in layout if x not in DIGITS)
