"""A linear attention site in the terms of the ops: its form and sizes, or why it cannot be said so."""

from __future__ import annotations

from math import inf, log

from attncompile.core.errors import Unsupported
from attncompile.core.linear import LinearFacts
from attncompile.core.site import AttentionSite
from attncompile.plugins.body import float_type
from attncompile.plugins.linear_attention.form import Form, Sizes

_MAPS = {"identity": "none", "relu": "relu", "elu+1": "elu+1", "exp": "exp", "softmax": "softmax"}


def facts_of(site: AttentionSite) -> LinearFacts:
    """Raises ``Unsupported`` for a site of another kind."""
    if site.kind != "linear" or site.linear is None:
        raise Unsupported("kind", f"a {site.kind} attention site")
    return site.linear


def form_of(site: AttentionSite, chunk: int) -> Form:
    """The ops' mathematics for ``site``.

    Raises:
        Unsupported: they cannot say it.
    """
    facts = facts_of(site)
    float_type(site.dtype)
    delta = facts.update == "delta"
    if delta and facts.decay == "channel":
        raise Unsupported("update-rule", "the delta rule with gates for every channel is not there")
    if facts.present_state:
        raise Unsupported(
            "state-used", "the state after the last key is an output: two values cannot be replaced at once"
        )
    if any(p.kind != "causal" for p in site.mask.parts):
        raise Unsupported("mask", f"the mask is {site.mask.kind}")
    if site.softcap or site.heads % site.kv_heads:
        raise Unsupported("heads", f"{site.heads} query heads over {site.kv_heads} key heads")
    if facts.causal and site.query_length != site.key_length:
        raise Unsupported("lengths", f"{site.query_length} queries and {site.key_length} keys under a triangle")
    return Form(
        query_map=_MAPS[facts.query_map], key_map=_MAPS[facts.key_map], normaliser=facts.normaliser,
        epsilon=facts.epsilon, floor=-inf if facts.floor is None else facts.floor, scale=site.scale,
        causal=facts.causal, decay=facts.decay, initial=bool(facts.past_state), chunk=chunk,
        delta=delta,
    )  # fmt: skip


def sizes_of(site: AttentionSite, opset: int) -> Sizes:
    queries, keys = (n if isinstance(n, int) else None for n in (site.query_length, site.key_length))
    layouts = (site.query.layout, site.key.layout, site.value.layout, site.output.layout)
    return Sizes(site.heads, site.kv_heads, site.head_dim, site.value_dim, site.dtype, layouts, queries, keys, opset)


def head_decays(site: AttentionSite) -> tuple[float, ...]:
    """Logarithms of a head's decays, one for each key head.

    Raises:
        Unsupported: query heads of one key head decay differently, or a rate is not in (0, 1].
    """
    facts = facts_of(site)
    group = site.heads // site.kv_heads
    if len(facts.decay_rates) != site.heads:
        raise Unsupported("decay", "the decays are not known as one number a head")
    rates = [facts.decay_rates[g * group : (g + 1) * group] for g in range(site.kv_heads)]
    if any(len(set(r)) > 1 for r in rates):
        raise Unsupported("decay", "query heads of one key head decay differently")
    if any(not 0 < r[0] <= 1 for r in rates):
        raise Unsupported("decay", f"decays {sorted({r[0] for r in rates})}: the ops need numbers in (0, 1]")
    return tuple(log(r[0]) for r in rates)
