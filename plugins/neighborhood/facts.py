"""What a site's mask says, in the terms of the ops: a window, a padding input, a bias, the keys that a query sees."""

from __future__ import annotations

import numpy as np

from attncompile.core.errors import Unsupported
from attncompile.core.mask import MaskFacts, MaskPart, in_windows, plain_biases, seam
from attncompile.core.site import AttentionSite
from attncompile.core.verdict import Verdict
from attncompile.plugins.body import float_type

UNIFORM_FILL = -1e30
"""A score plus a number below this is that number in every float type that has it, so hidden scores are all equal."""

FROM_DATA = ("padding", "bias")
"""Factors that are values of the graph; any other is a structure or opaque."""


def structures(mask: MaskFacts) -> tuple[MaskPart, ...]:
    """The factors that say from the lengths alone which keys a query sees.

    Raises:
        Unsupported: there is a factor that says nothing.
    """
    parts = tuple(p for p in mask.parts if p.kind not in FROM_DATA)
    for part in parts:
        if part.kind not in ("window", "causal") and part.pattern is None:
            raise Unsupported("mask", f"a mask of kind {part.kind} cannot go into the op")
    return parts


def visible(parts: tuple[MaskPart, ...], query_length: int, key_length: int) -> np.ndarray:
    """Bool [query_length, key_length]: what all of ``parts`` (of ``structures``) let through.

    Raises:
        Unsupported: a structure has no meaning at these lengths.
    """
    out = np.ones((query_length, key_length), bool)
    for part in parts:
        if part.pattern is not None:
            try:
                out &= part.pattern.visible(query_length, key_length)
            except ValueError as error:
                raise Unsupported("lengths", str(error)) from None
            continue
        left, right = (-1, 0) if part.kind == "causal" else (part.left, part.right)
        distance = np.arange(key_length, dtype=np.int32)[None, :] - np.arange(query_length, dtype=np.int32)[:, None]
        distance -= key_length - query_length
        if left >= 0:
            out &= distance >= -left
        if right >= 0:
            out &= distance <= right
    return out


def window(mask: MaskFacts) -> tuple[int, int] | Verdict:
    """(left, right) of the intersection of all window and causal factors, or why there is none."""
    left, right = -1, -1
    for part in mask.parts:
        if part.kind in ("window", "causal"):
            left = part.left if left < 0 else min(left, part.left) if part.left >= 0 else left
            right = part.right if right < 0 else min(right, part.right) if part.right >= 0 else right
        elif part.kind not in FROM_DATA:
            return Verdict.no("mask", f"a mask of kind {part.kind} is not a window")
    if not mask.parts:
        return Verdict.no("nothing-to-skip", "every query sees every key")
    if left < 0 and right < 0:
        return Verdict.no("nothing-to-skip", f"a {mask.kind} mask leaves no window to use")
    if left < 0 or right < 0:
        reason = "causal without a window: half of the keys" if right == 0 else "a window with one side unlimited"
        return Verdict.no("nothing-to-skip", f"{reason} cannot be skipped in blocks worth having")
    return left, right


def check_plain(site: AttentionSite) -> None:
    """Raise ``Unsupported`` for what none of the ops does: another kind, a softcap, heads or a type that do not fit."""
    if site.kind != "softmax":
        raise Unsupported("kind", f"a {site.kind} attention site")
    if site.softcap:
        raise Unsupported("softcap", f"softcap {site.softcap}: the op has none")
    if site.heads % site.kv_heads:
        raise Unsupported("heads", f"{site.heads} query heads over {site.kv_heads} key heads")
    float_type(site.dtype)


def check_padding(mask: MaskFacts) -> str:
    """The graph value of the one boolean padding factor, or an empty string without padding.

    Raises:
        Unsupported: several factors, an additive one (a float input may hold anything), or fully masked rows whose
            result the mask alone does not decide: they average all values only where every hidden score is the same
            huge number.
    """
    paddings = [p for p in mask.parts if p.kind == "padding"]
    if not paddings:
        return ""
    if len(paddings) > 1:
        raise Unsupported("mask", f"{len(paddings)} padding masks from different values", "join them into one input")
    (padding,) = paddings
    if padding.additive or padding.source is None:
        raise Unsupported("mask", "padding that is added as floats may hold anything", "export with a boolean mask")
    check_masked_rows(mask)
    return padding.source


def check_masked_rows(mask: MaskFacts) -> None:
    """Raise ``Unsupported`` where ``masked_rows`` = uniform does not follow from the fills: see ``check_padding``."""
    if mask.masked_rows == "uniform" and (len(mask.fills) != 1 or mask.fills[0] > UNIFORM_FILL):
        raise Unsupported(
            "masked-rows", "what fully masked rows give in the source depends on the scores or on several masks",
            "export with one boolean or -inf mask",
        )  # fmt: skip


def check_bias(site: AttentionSite) -> str:
    """The graph value of the one bias, or an empty string without one; how often keys count is no value of the graph.

    Raises:
        Unsupported: several, one that is not known to broadcast to [batch, heads, query, key], or a dynamic length.
    """
    if in_windows(site.mask) is not None or seam(site.mask) is not None:
        raise Unsupported("bias", "the bias goes by places in windows, not by queries and keys")
    biases = plain_biases(site.mask)
    if not biases:
        return ""
    (bias, *others) = biases
    if others:
        raise Unsupported("bias", f"{len(biases)} biases are added", "add them up in the model")
    if bias.source is None or not bias.additive or bias.certificate.method == "structure":
        raise Unsupported("bias", "the bias is not one that is added to scores of [batch, heads, query, key]")
    if not isinstance(site.query_length, int) or not isinstance(site.key_length, int):
        raise Unsupported("bias", "a bias is cut into tiles of a fixed length only", "export with a fixed length")
    return bias.source
