"""Which of the user's inputs a search may look at where some calls stay dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from attncompile.core.errors import BadArguments
from attncompile.core.keep_dense import KeepDense

Feed = Mapping[str, np.ndarray]

LEAST_INPUTS = 2
"""Inputs that must be left: one to choose on, one to hold out."""


def approximated(feeds: Sequence[Feed], rule: KeepDense | None) -> list[Feed]:
    """``feeds`` but for those that ``rule`` holds of: these are exact by construction, so they say nothing of an
    approximation's error, and would only make its bound look smaller.

    Raises:
        BadArguments: fewer than ``LEAST_INPUTS`` are left.
    """
    if rule is None:
        return list(feeds)
    left = [feed for feed in feeds if not rule.holds(feed)]
    if len(left) < LEAST_INPUTS:
        raise BadArguments(
            f"'{rule.text}' holds of {len(feeds) - len(left)} of {len(feeds)} inputs: too few are left to choose "
            "approximations on and to hold out",
            f"give inputs of calls that it does not hold of, {LEAST_INPUTS} or more, better sixteen",
        )
    return left
