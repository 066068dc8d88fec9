"""The mask lines of the ledger: short, and no length is promised where the file has one alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attncompile.core.grid import TokenGrid
from attncompile.core.mask import Certificate, MaskPart
from attncompile.core.pattern import GridWindow
from attncompile.ledger import _parameters, _shown
from tests.test_verify_facts import SITE

LONG = "every element compared at 1 length; 4.8% of the keys are seen at 324x324: the windows followed back"
OPEN = replace(SITE, query_length="seq", key_length="seq")


@pytest.mark.parametrize(
    ("certificate", "dynamic"),
    [
        (Certificate("structure", LONG, ((324, 324),)), "; for this length alone"),
        (Certificate("evaluated", LONG, ((3, 3), (4, 4))), "; for these lengths alone"),
        (Certificate("evaluated", LONG, ((3, 3), (4, 4)), general=True), "; holds for every length"),
        (Certificate("structure", "a causal attribute"), "; holds for every length"),
    ],
)
def test_lengths_are_spoken_of_where_there_are_others(certificate: Certificate, dynamic: str) -> None:
    part = MaskPart("causal", certificate, -1, 0)
    assert _shown(OPEN, part).endswith(dynamic)
    fixed = _shown(SITE, part)
    assert "length alone" not in fixed and "every length" not in fixed
    assert fixed.split(": ")[1] == certificate.detail.split(";")[0]


def test_parameters_are_those_that_say_something() -> None:
    pattern = GridWindow(TokenGrid((18, 20)), (7, 5), (1, 2), (1, 1), (False, False))
    words = list(_parameters(MaskPart("neighborhood", Certificate("constant", ""), pattern=pattern)))
    assert words == ["kernel 7x5", "dilation 1x2", "border clamp"]
    window = MaskPart("window", Certificate("constant", ""), 15, -1)
    assert list(_parameters(window)) == ["left 15", "right unlimited"]
