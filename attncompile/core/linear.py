"""What a linear attention site computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

FeatureMap = Literal["identity", "relu", "elu+1", "exp", "softmax"]
"""``identity``: the operands are features already, or the map before them is none of these."""


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """phi(Q) (phi(K)^T V), with ``normaliser`` sum divided by phi(Q) sum(phi(K)) + ``epsilon``.

    ``causal``: query i meets the keys up to i alone. ``decay``: ``none``; ``head``: key j counts decay_h ** (i - j),
    one number a head (retention, Lightning attention); ``token`` or ``channel``: a gate computed from the input
    (GLA, Mamba-2). ``decay_source`` is the value that holds it, empty where it is a constant in the graph's mask.
    ``form`` says how the graph computes it: ``state`` (keys with values first), ``cumulative`` (a running sum),
    ``chunked``, ``parallel`` (scores times a decay mask), ``recurrent`` (a Loop or Scan), ``operator``.
    """

    query_map: FeatureMap
    key_map: FeatureMap
    normaliser: Literal["none", "sum"]
    epsilon: float
    causal: bool
    form: Literal["state", "cumulative", "chunked", "parallel", "recurrent", "operator"]
    decay: Literal["none", "head", "token", "channel"] = "none"
    decay_source: str = ""

    def to_json(self) -> dict[str, Any]:
        """The object of ``inspect --format json``."""
        return asdict(self)
