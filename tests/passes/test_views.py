"""Axes seen under other shapes."""

from __future__ import annotations

import pytest

from attncompile.core.errors import Unsupported
from attncompile.passes.detect.views import Atoms


def test_regroup_splits_and_joins() -> None:
    atoms = Atoms()
    six, four = atoms.new(6), atoms.new(4)
    split = atoms.regroup((six, four), [2, 3, 4])
    assert [atoms.size(a) for a in split] == [2, 3, 4]
    assert [atoms.size(a) for a in atoms.regroup(split, [24])] == [24]


@pytest.mark.parametrize(("sizes", "shape"), [((6,), [4, 2]), ((6,), [5]), ((0, 4), [2, 2]), ((4,), [4, 2])])
def test_what_is_no_view_is_refused(sizes: tuple[int, ...], shape: list[int]) -> None:
    """An axis without elements, as fewer query than key heads make one, divides nothing."""
    atoms = Atoms()
    with pytest.raises(Unsupported) as caught:
        atoms.regroup(tuple(atoms.new(s) for s in sizes), shape)
    assert caught.value.code == "reshape"
