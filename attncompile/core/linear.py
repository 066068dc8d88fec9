"""What a linear attention site computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

FeatureMap = Literal["identity", "relu", "elu+1", "exp", "softmax"]
"""``identity``: the operands are features already, or the map before them is none of these. ``softmax`` runs over the
head dim of the queries and over the keys of the keys (efficient attention)."""


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """scale * phi(Q) (phi(K)^T V), with ``normaliser`` sum divided by phi(Q) sum(phi(K)) + ``epsilon``, which is
    at least ``floor`` where that is a number.

    ``causal``: query i meets the keys up to i alone. ``decay``: ``none``; ``head``: key j counts decay_h ** (i - j),
    one number a head (retention, Lightning attention), in ``decay_rates`` where they are constants; ``token`` or
    ``channel``: a gate computed from the input (GLA, Mamba-2). ``decay_source`` is the value that holds the gates'
    logarithms, [batch, length, kv_heads] or [batch, length, kv_heads * head_dim], empty where there is none.
    ``form`` says how the graph computes it: ``state`` (keys with values first), ``cumulative`` (a running sum),
    ``chunked``, ``parallel`` (scores times a decay mask), ``recurrent`` (a Loop or Scan), ``operator``.

    ``update`` delta: what a key already reads out of the (decayed) state is taken off its value, and the rest is
    written with the weight that ``update_source`` ([batch, length, kv_heads or 1]) holds. ``past_state`` and
    ``present_state`` are the values that hold the state [batch, kv_heads, head_dim, value_dim] before the first and
    after the last key, empty where the graph has none.
    """

    query_map: FeatureMap
    key_map: FeatureMap
    normaliser: Literal["none", "sum"]
    epsilon: float
    causal: bool
    form: Literal["state", "cumulative", "chunked", "parallel", "recurrent", "operator"]
    decay: Literal["none", "head", "token", "channel"] = "none"
    decay_source: str = ""
    decay_rates: tuple[float, ...] = ()
    floor: float | None = None
    update: Literal["sum", "delta"] = "sum"
    update_source: str = ""
    past_state: str = ""
    present_state: str = ""

    def to_json(self) -> dict[str, Any]:
        """The object of ``inspect --format json``."""
        return asdict(self)
