"""Softmax attention, whole or in pieces: where the products around a softmax are not attention over all tokens, the
windows they work on are followed back to the tokens, or the region is run to see what it computes.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from attncompile.core.errors import Unsupported
from attncompile.core.mask import Certificate, MaskFacts
from attncompile.core.site import AttentionSite
from attncompile.passes.detect import softmax
from attncompile.passes.detect.gathers.lift import lift_gathered
from attncompile.passes.detect.homes import ShapeRead
from attncompile.passes.detect.normaliser import softmax_operator
from attncompile.passes.detect.probed.lift import Readings, lift_probed
from attncompile.passes.detect.softmax import MaskAnalysis
from attncompile.passes.evaluate import GraphIndex, World

_FOLLOWED = "every pair of query and key compared, the windows followed back to their tokens"
_READ = "every pair of query and key read by running the region, which equals attention on random inputs"

_TELLING = frozenset({"padding-seen", "gather-bias", "gather-tokens", "gather-twice", "scores-used", "value-axis"})
"""Reasons of the second look that say more than those of the first: the windows themselves were understood."""

_IN_PIECES = frozenset({"unknown-op", "joined-scores", "weights-used", "no-value-product"})
"""Reasons of the first look after which the region is run: something stands where it was not expected. Where the parts
were understood and are not attention over tokens, running them cannot know better.
"""


def lift(index: GraphIndex, world: World, node: NodeProto, analyse: MaskAnalysis) -> AttentionSite:
    """The site around the ``Softmax`` node.

    Raises:
        Unsupported: this softmax is not attention, or a form of it that is not understood.
    """
    try:
        return softmax.lift(index, world, node, analyse)
    except Unsupported as error:
        first = error

    def of_tokens(picture: np.ndarray, guarded: bool, fills: tuple[float, ...]) -> MaskFacts:
        return analyse.of_tokens(picture, Certificate("structure", _FOLLOWED, (picture.shape,)), fills, guarded)

    def of_heads(pictures: np.ndarray) -> MaskFacts:
        if not bool(np.all(pictures == pictures[:1])):
            raise Unsupported("per-head-mask", "the keys that are seen differ between heads")
        return analyse.of_tokens(pictures[0], Certificate("evaluated", _READ, (pictures.shape[1:],)), (), False)

    try:
        return lift_gathered(index, world, softmax_operator(index, world, node), of_tokens)
    except Unsupported as error:
        if error.code in _TELLING and not isinstance(first, ShapeRead):  # that one is mended, and looked at again
            first = error
    if first.code not in _IN_PIECES:
        raise first
    known = world.kept.setdefault("probed", Readings())
    assert isinstance(known, Readings)
    try:
        return lift_probed(index, world, node, known, of_heads)
    except Unsupported as error:
        raise first from error
