"""Padding that is said for tokens [batch, keys]: sites whose values are called alike share no constant that differs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper

from attncompile.core.mask import MaskFacts, MaskPart
from attncompile.core.mechanism import Lowering
from attncompile.core.site import AttentionSite, Operand
from attncompile.plugins import mechanism
from tests.plugins.conftest import ONCE

SUBJECT = mechanism("BlockSparseAttention")
GIVEN = {"edge": 64, "heads": ["dense", "sinks 0 window 0", "skip", "sinks 1 window 0"]}


def padded(site: AttentionSite, name: str, layout: str, dtype: str) -> AttentionSite:
    mask = MaskFacts((MaskPart("padding", ONCE, source="shown", tokens=True),), "zero", zeroed=True)
    return replace(site, id=name, mask=mask, output=Operand("o", layout), dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [("BNHD", "float32"), ("BHND", "float16")])
def test_constants_of_two_sites(other, case) -> None:
    """An If may have a site with the output ``o`` in each of its branches; constants of both lie in the main graph."""
    site = case(queries=200, static=True).site()
    made: list[Lowering] = [
        SUBJECT.lower(padded(site, f"site{i}", *how), GIVEN, 18) for i, how in enumerate((("BHND", "float32"), other))
    ]
    first, second = ({t.name: numpy_helper.to_array(t) for t in one.initializers} for one in made)
    assert first and len(first) == len(second)
    for name in first.keys() & second.keys():
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name])
    for one, known in zip(made, (first, second), strict=True):
        outputs = {o for n in one.nodes for o in n.output}
        read = {i for n in one.nodes for i in n.input if i} - outputs
        assert read - known.keys() == {"q", "k", "v", "shown"} and "o" in outputs
